"""Plug-ins by name: built-ins, packaging entry points, and ``package.module:Class``.

One :class:`Registry` per kind of thing (attack, data set, model, compressor, ...). Built-ins are listed as
``"package.module:Object"`` strings, so that naming them all costs no import.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedattack.errors import ConfigError, quoted, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of plug-in and how to load them.

    Parameters
    ----------
    kind : str
        What a person calls it, used in messages: "attack", "data set", ...
    builtins : mapping of str to str or object
        Name -> ``"package.module:Object"``, or the object itself.
    group : str, optional
        Packaging entry-point group searched after the built-ins, e.g. ``"fedattack.attacks"``.
    base : str, optional
        ``"package.module:Class"`` that a plug-in from outside must be a subclass or else an instance of.
    families : mapping of str to str, optional
        Names of whole libraries: "torchvision" -> ``"package.module:function"``, which finds the object of
        ``torchvision/NAME`` for NAME, or raises ConfigError.
    """

    def __init__(
        self,
        kind: str,
        builtins: Mapping[str, str | T],
        group: str | None = None,
        base: str | None = None,
        families: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._targets: dict[str, str | T] = dict(builtins)
        self.group = group
        self._base = base
        self._families = dict(families or {})

    def names(self) -> list[str]:
        """All known names, built-ins and entry points, sorted."""
        return sorted({*self._targets, *self._entry_points()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self._targets or name in self._entry_points() or self.family(name) is not None

    def family(self, name: str) -> str | None:
        """The family that a name is of ("torchvision" of ``torchvision/resnet18``); None: it stands for itself."""
        family, slash, _ = name.partition("/")
        return family if slash and family in self._families else None

    def add(self, name: str, target: str | T) -> None:
        """Register ``"package.module:Object"``, or the object itself, under `name` (replaces an earlier one)."""
        self._targets[name] = target

    def discard(self, name: str) -> None:
        """Forget what :meth:`add` registered under `name`."""
        self._targets.pop(name, None)

    def get(self, name: str) -> T:
        """The object registered as `name`, or the one at ``package.module:Object``.

        Raises ConfigError if the name is unknown, or the target cannot be imported or is of another kind.
        """
        if name in self._targets:
            target = self._targets[name]
            if ":" in name:
                trust(name)
            return self._load(target) if isinstance(target, str) else target
        points = self._entry_points()
        if name in points:
            return self._of_kind(name, points[name].load())
        if name.startswith("live:"):
            raise ConfigError(
                f"{self.kind} {name!r} was known to one process alone, and is gone; give it again"
            )
        if (family := self.family(name)) is not None:
            find: Any = self._load(self._families[family])
            return cast(T, find(name.partition("/")[2]))
        if _NAME.fullmatch(name):
            found = self._of_kind(name, self._load(name))
            trust(name)  # named by code or on the command line: what files name was looked at before
            return found
        raise unknown_name(self.kind, name, [*self.names(), *(f"{one}/..." for one in self._families)])

    def summary(self, name: str) -> str:
        """First line of the plug-in's docstring."""
        return (inspect.getdoc(self.get(name)) or "").partition("\n")[0]

    def _of_kind(self, name: str, found: Any) -> T:
        """Refuse what the registry is not of."""
        if self._base is not None:
            module, _, attribute = self._base.partition(":")
            base = getattr(importlib.import_module(module), attribute)
            if not (issubclass(found, base) if isinstance(found, type) else isinstance(found, base)):
                what = f"class {found.__name__!r}" if isinstance(found, type) else type(found).__name__
                raise ConfigError(
                    f"{self.kind} {name!r} is a {what}; a plug-in of this kind is below {attribute} of {module}"
                )
        return cast(T, found)

    def _load(self, target: str) -> T:
        module_name, _, attribute = target.partition(":")
        try:
            return cast(T, getattr(importlib.import_module(module_name), attribute))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"cannot load {self.kind} {target!r}: {error}") from error
        except Exception as error:
            if target in self._targets.values():
                raise
            raise ConfigError(
                f"cannot load {self.kind} {target!r}: {type(error).__name__}: {error}"
            ) from error

    def _entry_points(self) -> dict[str, Any]:
        return {} if self.group is None else _installed(self.group)


_NAME = re.compile(r"[A-Za-z_][\w.-]*:[A-Za-z_]\w*")
_BETWEEN = re.compile(r"[][{}(),;=\"'\s]+")
_TRUSTED: set[str] = set()


def written(text: str) -> Any:
    """The value that a text writes as JSON or TOML, if it is a list or a table; else the text."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    for read in (json.loads, lambda one: tomllib.loads(f"value = {one}")["value"]):
        try:
            return read(text)
        except (ValueError, RecursionError):
            continue
    return text


def outside_names(text: Any) -> list[str]:
    """The names ``package.module:Object`` in a value, of which several may stand with commas or in a list."""
    if isinstance(text, str):
        found = [part for part in _BETWEEN.split(text) if _NAME.fullmatch(part)]
        value = written(text)
        return found if isinstance(value, str) else [*found, *outside_names(value)]
    if isinstance(text, Mapping):
        return [name for pair in text.items() for one in pair for name in outside_names(one)]
    return [name for one in text for name in outside_names(one)] if isinstance(text, list | tuple) else []


def trust(*names: str) -> None:
    """Let the files that this process reads name these ``package.module:Object``, whose code is then imported."""
    _TRUSTED.update(names)


def check_names_of_file(settings: Any, source: str, place: str = "") -> None:
    """Refuse a file's settings that name code which is not registered; nothing is imported to find out.

    Parameters
    ----------
    settings
        What was read: mappings, lists and values; keys are looked at as well.
    source
        What it was read from, as messages call it.

    Raises
    ------
    ConfigError
        If a name ``package.module:Object`` is in it that nobody has named outside of files: neither code, nor the
        command line, nor :func:`trust`.
    """
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            check_names_of_file(str(key), source, place)
            check_names_of_file(value, source, f"{place}.{key}" if place else str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_names_of_file(value, source, place)
    elif unknown := [name for name in outside_names(settings) if name not in _TRUSTED]:
        raise ConfigError(
            f"{source}: setting {place!r} = {settings!r} names code that is not registered, which a file may not do "
            f"by itself; accepted: a registered name, or the same name typed, as --trust {unknown[0]}"
        )


@cache
def _installed(group: str) -> dict[str, Any]:
    """Entry points by name, read once: what is installed does not change under a process, and reading takes 50 ms."""
    return {point.name: point for point in entry_points(group=group)}


def build_plugin(
    cls: type[T], name: str, options: Mapping[str, Any], shared: Mapping[str, Any], prefix: str = ""
) -> T:
    """Build a dataclass plug-in from its own options and from those shared by all selected plug-ins of its kind.

    Values may be strings as typed in a shell. Shared options that it lacks are passed over: the caller sees to it
    that each is known to at least one plug-in. `prefix` stands before the name in the name of a setting. Raises
    ConfigError if one of its own options is unknown, or a value is malformed.
    """
    fields = set(plugin_options(cls))
    for option in options:
        if option not in fields:
            known = [f"{prefix}{name}.{field}" for field in fields]
            raise unknown_name("setting", f"{prefix}{name}.{option}", known)
    chosen = {key: value for key, value in shared.items() if key in fields} | dict(options)
    for key in [key for key, value in chosen.items() if value is None or value == ""]:
        # Nothing was given: no value where the parameter may have none, else the empty text.
        chosen[key] = None if type(None) in get_args(get_type_hints(cls)[key]) else ""
    adapters = _adapters(cast(Any, cls))
    for key, value in chosen.items():
        chosen[key] = as_annotated(adapters[key], value)
        kinds = _parts(get_type_hints(cls)[key])
        if float in kinds and str not in kinds and _not_finite(chosen[key]):
            raise ConfigError(f"setting '{prefix}{name}.{key}' = {value}: a finite number is accepted")
    try:
        return TypeAdapter(cls).validate_python(chosen)
    except ValidationError as error:
        raise _refusal(error, prefix + name) from None


def _not_finite(value: Any) -> bool:
    """Whether a number, or the text of one, is NaN or infinite."""
    try:
        return not math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _parts(annotation: Any) -> set[Any]:
    """The types of which a value may be."""
    return {annotation, *get_args(annotation)}


def as_annotated(adapter: TypeAdapter[Any], value: Any) -> Any:
    """A typed text as the list or table that is wanted: JSON, TOML, or values with commas; else as it is."""
    if not isinstance(value, str):
        return value
    listed = [part.strip() for part in value.split(",") if part.strip()]
    for one in (value, written(value), listed):
        try:
            adapter.validate_python(one)
        except ValidationError:
            continue
        return one
    return value


@cache
def _adapters(cls: type[Any]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return {name: TypeAdapter(hints[name]) for name in plugin_options(cls)}


def check_values(plugin: Any, name: str) -> None:
    """Refuse (ConfigError) a dataclass plug-in, built by whomever, with a value its annotation does not allow."""
    kind: Any = type(plugin)
    for field, adapter in _adapters(kind).items():
        try:
            adapter.validate_python(getattr(plugin, field))
        except ValidationError as error:
            raise _refusal(error, f"{name}.{field}") from None


def _refusal(error: ValidationError, place: str) -> ConfigError:
    first = error.errors()[0]
    place = ".".join([place, *(str(part) for part in first["loc"])])
    return ConfigError(f"setting {quoted(place)} = {quoted(first['input'])}: {first['msg']}")


def build_plugins(
    registry: Registry[type[T]],
    names: Iterable[str],
    options: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    section: str,
) -> dict[str, T]:
    """Build the plug-ins that a run names in a section ("attack", "defense"), each as :func:`build_plugin` does.

    Raises ConfigError too where options are given without their plug-in, or shared ones that none has.
    """
    classes = {name: registry.get(name) for name in names}
    for name in options.keys() - classes:
        if name not in registry:
            raise unknown_name(f"section or {registry.kind}", name, [*registry, *classes])
        raise ConfigError(f"parameters of {name!r} are set, but it is not in setting '{section}.names'")
    known = {option for cls in classes.values() for option in plugin_options(cls)}
    for option in shared:
        if option not in known:
            raise unknown_name("setting", f"{section}.{option}", [f"{section}.{one}" for one in known])
    prefix = "" if section == "attack" else f"{section}."
    return {
        name: build_plugin(cls, name, options.get(name, {}), shared, prefix) for name, cls in classes.items()
    }


def plugin_options(cls: type[Any]) -> dict[str, Any]:
    """Setting -> default of a dataclass plug-in."""
    return {field.name: field.default for field in dataclasses.fields(cls) if field.init}
