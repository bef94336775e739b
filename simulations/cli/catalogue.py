"""What `fedattack list` and `fedattack settings` print."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from pydantic import BaseModel

from adversaries import ATTACKS
from fedattack.compression import COMPRESSORS
from fedattack.config import SHORT_NAMES, Config
from fedattack.data import DATASETS, PARTITIONERS
from fedattack.defenses import DEFENSES
from fedattack.models import MODELS
from fedattack.registry import Registry, plugin_options
from fedattack.unlearning import MECHANISMS
from strategies import STRATEGIES

KINDS: dict[str, Registry[Any]] = {
    "Attacks": ATTACKS,
    "Defences": DEFENSES,
    "Unlearning mechanisms": MECHANISMS,
    "Data sets": DATASETS,
    "Partitioners": PARTITIONERS,
    "Models": MODELS,
    "Compressors": COMPRESSORS,
    "Strategies": STRATEGIES,
}

_PARAMETERS = re.compile(r"^Parameters\n-+\n(.*?)(?=^[^\n]+\n-+$|\Z)", re.M | re.S)
_PARAMETER = re.compile(r"^(\w[\w, ]*?)(?: : ([^\n]*))?(?:\n|\Z)((?: [^\n]*(?:\n|\Z)|\n)*)", re.M)
_SENTENCE = re.compile(r"""(?<=[a-z0-9)"])\. """)
_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")


def catalogue() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (name, first line of its docstring) of everything that can be named; for attacks, what they need."""
    rows = {title: [(n, registry.summary(n)) for n in registry.names()] for title, registry in KINDS.items()}
    rows["Attacks"] = [
        (name, f"{summary} Needs: {ATTACKS.get(name).needs}.") for name, summary in rows["Attacks"]
    ]
    return rows


def settings_tables() -> dict[str, list[tuple[str, str, str, str]]]:
    """Title -> (dotted setting, option, default, meaning) of every setting, then of each attack's and defence's."""
    tables = {"Settings of a run": _run_settings()}
    for kind, registry, prefix in (("Attack", ATTACKS, ""), ("Defence", DEFENSES, "defense.")):
        for name in registry.names():
            cls = registry.get(name)
            meanings = _meanings(cls)
            rows = [
                (f"{prefix}{name}.{option}", "", _show(default), meanings.get(option, ""))
                for option, default in plugin_options(cls).items()
            ]
            if rows:
                tables[f"{kind} {name}"] = rows
    return tables


def _run_settings() -> list[tuple[str, str, str, str]]:
    options = {dotted: f"--{short}" for short, dotted in SHORT_NAMES.items()}
    rows = []
    for section, info in Config.model_fields.items():
        kind, fields = info.annotation, {section: info}
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = {f"{section}.{leaf}": field for leaf, field in kind.model_fields.items()}
        for name, field in fields.items():
            default = _show(field.get_default(call_default_factory=True))
            rows.append((name, options.get(name, ""), default, field.description or ""))
    return rows


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Parameter -> the first sentence that its docstring, or that of a base, says of it under "Parameters"."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = _PARAMETERS.search(inspect.cleandoc(base.__doc__ or ""))
        for names, kind, text in _PARAMETER.findall(section[1] if section else ""):
            meaning = _ROLE.sub(r"\1", " ".join(text.split())).replace("``", "")
            meaning = _SENTENCE.split(meaning)[0].rstrip(".")
            choices = (
                kind[1 : kind.index("}")].replace('"', "").replace(", ", " | ") if kind[:1] == "{" else ""
            )
            found |= dict.fromkeys(names.split(", "), ". ".join(part for part in (choices, meaning) if part))
    return found


def _show(value: Any) -> str:
    if value is None or value is dataclasses.MISSING or value in ({}, ()):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
