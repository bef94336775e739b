"""Plug-ins by name: built-ins, packaging entry points, and ``package.module:Class``.

One :class:`Registry` per kind of thing (attack, data set, model, compressor, ...). Built-ins are listed as
``"package.module:Object"`` strings, so that naming them all costs no import.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from fedattack.errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of plug-in and how to load them.

    Parameters
    ----------
    kind : str
        What a person calls it, used in messages: "attack", "data set", ...
    builtins : mapping of str to str
        Name -> ``"package.module:Object"``.
    group : str, optional
        Packaging entry-point group searched after the built-ins, e.g. ``"fedattack.attacks"``.

    Examples
    --------
    >>> models = Registry("codec", {"json": "json:JSONDecoder"})
    >>> models.get("json").__name__
    'JSONDecoder'
    """

    def __init__(self, kind: str, builtins: Mapping[str, str], group: str | None = None) -> None:
        self.kind = kind
        self._targets: dict[str, str] = dict(builtins)
        self._group = group

    def names(self) -> list[str]:
        """All known names, built-ins and entry points, sorted."""
        return sorted({*self._targets, *self._entry_points()})

    def __contains__(self, name: str) -> bool:
        return name in self._targets or name in self._entry_points()

    def add(self, name: str, target: str) -> None:
        """Register ``"package.module:Object"`` under `name` (replaces an earlier one)."""
        self._targets[name] = target

    def get(self, name: str) -> T:
        """The object registered as `name`, or the one at ``package.module:Object``.

        Raises
        ------
        ConfigError
            If the name is unknown (with the nearest known one) or the target cannot be imported.
        """
        if name in self._targets:
            return self._load(self._targets[name])
        points = self._entry_points()
        if name in points:
            return cast(T, points[name].load())
        if ":" in name:
            return self._load(name)
        raise unknown_name(self.kind, name, self.names())

    def summary(self, name: str) -> str:
        """First line of the plug-in's docstring."""
        return (inspect.getdoc(self.get(name)) or "").partition("\n")[0]

    def _load(self, target: str) -> T:
        module_name, _, attribute = target.partition(":")
        try:
            return cast(T, getattr(importlib.import_module(module_name), attribute))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"cannot load {self.kind} {target!r}: {error}") from error

    def _entry_points(self) -> dict[str, Any]:
        if self._group is None:
            return {}
        return {point.name: point for point in entry_points(group=self._group)}
