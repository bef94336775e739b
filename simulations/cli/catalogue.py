"""What `fedattack list` and `fedattack settings` print."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from adversaries import ATTACKS, Attack
from adversaries.refusals import threat_model, words
from adversaries.seats import MaliciousClient
from fedattack.compression import COMPRESSORS
from fedattack.config import SHORT_NAMES, Config
from fedattack.data import DATASETS, PARTITIONERS
from fedattack.defenses import DEFENSES
from fedattack.errors import unknown_name
from fedattack.metrics import METRICS
from fedattack.models import MODELS
from fedattack.presets import PRESETS, SCENARIOS
from fedattack.registry import Registry, plugin_options
from fedattack.storage.plain import flat
from fedattack.unlearning import MECHANISMS
from fedattack.unlearning.gates import GATES
from strategies import STRATEGIES

KINDS: dict[str, Registry[Any]] = {
    "Attacks": ATTACKS,
    "Defences": DEFENSES,
    "Unlearning mechanisms": MECHANISMS,
    "Gates of deletion requests": GATES,
    "Metrics": METRICS,
    "Data sets": DATASETS,
    "Partitioners": PARTITIONERS,
    "Models": MODELS,
    "Compressors": COMPRESSORS,
    "Strategies": STRATEGIES,
}

_PARAMETERS = re.compile(r"^Parameters\n-+\n(.*?)(?=^[^\n]+\n-+$|\Z)", re.M | re.S)
_PARAMETER = re.compile(r"^(\w[\w, ]*?)(?: : ([^\n]*))?(?:\n|\Z)((?: [^\n]*(?:\n|\Z)|\n)*)", re.M)
_SENTENCE = re.compile(r"""(?<=[a-z0-9)"])\. """)
_SOURCE = re.compile(r"((?:[A-Z][\w-]+(?:, | and | et al\.)?)+),? \".*?\b((?:19|20)\d\d)\b(?!\.\d)")
_CITED = re.compile(r" \(((?:[A-Z][\w-]+)(?: et al\.)?)[^()]*?((?:19|20)\d\d)\)")
_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")


def catalogue() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (name, first line of its docstring) of everything that can be named; for attacks, who and what for."""
    rows = {title: [(n, registry.summary(n)) for n in registry] for title, registry in KINDS.items()}
    told = ((one.name, one.summary, one.seat.capitalize(), one.needs) for one in attacks())
    rows["Attacks"] = [(name, f"{text} {seat}; needs: {needs}.") for name, text, seat, needs in told]
    return rows | {"Presets": [(name, preset.summary) for name, preset in PRESETS.items()]}


@dataclass(frozen=True)
class AttackRow:
    """An attack as lists show it: its name, what it does, who runs it, what it needs, and whose it is."""

    name: str
    summary: str
    seat: str
    needs: str
    source: str


def attacks() -> list[AttackRow]:
    """Every registered attack: those on images first, then by seat and name."""
    rows = []
    classes = {name: ATTACKS.get(name) for name in ATTACKS}
    for name in sorted(classes, key=lambda name: (not classes[name].inverts, classes[name].seat, name)):
        cls, summary = classes[name], ATTACKS.summary(name)
        needs = ", ".join(words(cls.needs)) or _bare(cls)
        references = (inspect.getdoc(cls) or "").partition("References\n----------\n")[2]
        found = _SOURCE.match(" ".join(references.split())) or _CITED.search(summary)
        authors = re.split(", | and ", found[1]) if found else []
        source = f"{authors[0]}{' et al.' if len(authors) > 1 else ''} {found[2]}" if found else "ours"
        plain = re.sub(rf"^{name}: ", "", _CITED.sub("", summary), flags=re.I)
        rows.append(AttackRow(name, plain[:1].upper() + plain[1:], cls.seat, needs, source))
    return rows


def _bare(cls: type[Attack]) -> str:
    """What an attack without needs has."""
    if not issubclass(cls, MaliciousClient):
        return "the global model"
    seen = {
        "weights": "its own samples and the global model",
        "queries": "its own samples, and queries of the model",
    }
    return seen.get(cls.access, "its own samples")


def attacks_markdown() -> str:
    """README's table of attacks."""
    lines = ["| attack | who | needs | what it does | source |", "|---|---|---|---|---|"]
    for one in attacks():
        cells = [f"`{one.name}`", one.seat, one.needs, one.summary.rstrip("."), one.source]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def described(name: str) -> list[tuple[str, str]]:
    """(title, text) of the parts of what can be said about the plug-in of that name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name in PRESETS:
        return [("preset", PRESETS[name].summary)]
    registries = [registry for registry in KINDS.values() if name in registry or ":" in name]
    if not registries:
        known = [one for registry in KINDS.values() for one in registry]
        raise unknown_name("name", name, [*known, *PRESETS])
    registry = registries[0]
    cls = registry.get(name)
    text, _, references = (inspect.getdoc(cls) or "").partition("References\n----------\n")
    text = _ROLE.sub(r"\1", _PARAMETERS.sub("", text)).replace("``", "")
    paragraphs = [" ".join(one.split()) for one in text.strip().split("\n\n")]
    parts = [(registry.kind, "\n\n".join(one for one in paragraphs if not one.endswith(":")))]
    if registry is ATTACKS:
        threat = threat_model(cls)
        letters = f" ({', '.join(threat['letters'])} of Carletti et al. 2025)" if threat["letters"] else ""
        parts.append(("who", threat["seat"] + letters))
        parts.append(("needs", "; ".join(threat["needs"]) or _bare(cls)))
        parts.append(("assumes", "; ".join(threat["assumptions"])))
    return [*parts, ("source", " ".join(references.split()))] if references else parts


def settings_tables(
    name: str | None = None, *, strict: bool = True
) -> dict[str, list[tuple[str, str, str, str]]]:
    """Title -> (dotted setting, option, default, meaning) of every setting, then of each plug-in that has some.

    With `name` those of that attack, defence, mechanism, gate or metric alone, or what that preset stands for.

    Raises
    ------
    ConfigError
        If there is none of that name, where `strict`.
    """
    if name in PRESETS:
        return {f"Preset {name}": _preset_settings(name)}
    tables = {} if name else {"Settings of a run": _run_settings()}
    kinds: tuple[tuple[str, Registry[Any], str], ...] = (
        ("Attack", ATTACKS, ""),
        ("Defence", DEFENSES, "defense."),
        ("Mechanism", MECHANISMS, "unlearning."),
        ("Gate", GATES, "gates."),
        ("Metric", METRICS, "metric."),
    )
    if strict and name and ":" not in name and not any(name in registry for _, registry, _ in kinds):
        known = [*(one for _, registry, _ in kinds for one in registry), *PRESETS]
        raise unknown_name("attack, defence, mechanism, gate, metric or preset", name, known)
    for kind, registry, prefix in kinds:
        wanted = registry.names() if name is None else [name] if name in registry else []
        for one in wanted or ([name] if name and ":" in name and kind == "Attack" else []):
            cls = registry.get(one)
            meanings = _meanings(cls)
            rows = [
                (f"{prefix}{one}.{option}", "", _show(default), meanings.get(option, ""))
                for option, default in plugin_options(cls).items()
            ]
            if rows:
                tables[f"{kind} {one}"] = rows
    return tables


def _preset_settings(name: str) -> list[tuple[str, str, str, str]]:
    """What a preset and its scenario set, in the order of the settings of a run."""
    chosen = flat(PRESETS[name].settings)
    chosen = flat(SCENARIOS[chosen["scenario"]]) | chosen
    rows = [(n, option, _show(chosen[n]), text) for n, option, _, text in _run_settings() if n in chosen]
    return [("preset", "--preset", name, ""), *rows]


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
            listed = kind[1 : kind.index("}")] if kind[:1] == "{" else ""
            choices = listed.replace('"', "").replace(", ", " | ")
            found |= dict.fromkeys(names.split(", "), ". ".join(part for part in (choices, meaning) if part))
    return found


def _show(value: Any) -> str:
    if value is None or value is dataclasses.MISSING or value in ({}, ()):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
