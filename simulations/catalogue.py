"""What `fedattack list` and `fedattack settings` print."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from adversaries import ATTACKS
from adversaries.base import attack_options
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


def catalogue() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (name, first line of its docstring) of everything that can be named; for attacks, what they need."""
    rows = {title: [(n, registry.summary(n)) for n in registry.names()] for title, registry in KINDS.items()}
    rows["Attacks"] = [
        (name, f"{summary} Needs: {ATTACKS.get(name).needs}.") for name, summary in rows["Attacks"]
    ]
    return rows


def settings_table() -> list[tuple[str, str, str, str]]:
    """(dotted setting, option, default, meaning) of every setting and every attack's parameters."""
    options = {dotted: f"--{short}" for short, dotted in SHORT_NAMES.items()}
    rows: list[tuple[str, str, str, str]] = []
    for section, info in Config.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for leaf, field in kind.model_fields.items():
                name = f"{section}.{leaf}"
                rows.append(
                    (
                        name,
                        options.get(name, ""),
                        _show(field.get_default(call_default_factory=True)),
                        field.description or "",
                    )
                )
        else:
            rows.append(
                (
                    section,
                    options.get(section, ""),
                    _show(info.get_default(call_default_factory=True)),
                    info.description or "",
                )
            )
    for attack in ATTACKS.names():
        for option, default in attack_options(ATTACKS.get(attack)).items():
            rows.append((f"{attack}.{option}", "", _show(default), ""))
    for defense in DEFENSES.names():
        for option, default in plugin_options(DEFENSES.get(defense)).items():
            rows.append((f"defense.{defense}.{option}", "", _show(default), ""))
    return rows


def _show(value: Any) -> str:
    if value is None or value in ({}, ()):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
