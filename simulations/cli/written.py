"""What `fedattack list`, `show` and `settings` print, without the imports that it takes to find it out.

``catalogue.json`` beside this file holds it, with a hash over the sources that it was written from. Where the
sources are others, plug-ins are installed, or one is named ``package.module:Class``, :mod:`simulations.cli.catalogue`
is asked, which imports everything.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fedattack.errors import unknown_name
from simulations.cli.sources import FILE, sources_hash

SettingRow = tuple[str, str, str, str]
"""(dotted setting, option, default, meaning)."""


@cache
def _stored() -> dict[str, Any]:
    try:
        found = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def current() -> dict[str, Any] | None:
    """The document, or None where something else would be found out today."""
    document = _stored()
    if document.get("sources") != sources_hash():
        return None
    installed = entry_points()
    return None if any(group in installed.groups for group in document["groups"]) else document


def kinds_as_written() -> dict[str, list[tuple[str, str]]]:
    """As :func:`kinds`, perhaps of earlier sources: for shell completion, which must not wait."""
    return {kind: [(name, text) for name, text in rows] for kind, rows in _stored().get("kinds", {}).items()}


def names_as_written(kind: str) -> list[str]:
    """The names of a kind, perhaps of earlier sources."""
    return [name for name, _ in kinds_as_written().get(kind, [])]


def kinds() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (name, one line) of everything that can be named."""
    if current() is None:
        from simulations.cli.catalogue import catalogue

        return catalogue()
    return kinds_as_written()


def attacks_markdown() -> str:
    """The table of attacks of the documents."""
    document = current()
    if document is None:
        from simulations.cli import catalogue

        return catalogue.attacks_markdown()
    return str(document["markdown"])


def described(name: str) -> list[tuple[str, str]]:
    """(title, text) of what can be said about the plug-in of that name; ConfigError if there is none."""
    document = current()
    if document is None or ":" in name:
        from simulations.cli import catalogue

        return catalogue.described(name)
    shown = document["shown"]
    if name not in shown:
        raise unknown_name("name", name, shown)
    return [(title, text) for title, text in shown[name]]


def settings_tables(name: str | None = None, *, strict: bool = True) -> dict[str, list[SettingRow]]:
    """As :func:`simulations.cli.catalogue.settings_tables`."""
    document = current()
    if document is None or ":" in (name or ""):
        from simulations.cli import catalogue

        return catalogue.settings_tables(name, strict=strict)
    tables, own = document["settings"], document["settings of"]
    if name is None:
        return {title: list(map(tuple, rows)) for title, rows in tables.items()}
    if strict and name not in own:
        raise unknown_name("attack, defence, mechanism, gate, metric or preset", name, own)
    presets = document["presets"]
    return {title: list(map(tuple, presets.get(title) or tables[title])) for title in own.get(name, [])}
