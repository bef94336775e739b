"""What `fedattack list`, `show` and `settings` print, found out from the registries.

``python -m simulations.cli.catalogue`` writes it into ``catalogue.json``, which :mod:`simulations.cli.written` reads.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
import shlex
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from adversaries import ATTACKS, Attack
from adversaries.refusals import applicable, threat_model, words
from adversaries.seats import MaliciousClient
from fedattack.compression import COMPRESSORS
from fedattack.config import SHORT_NAMES, Config
from fedattack.data import DATASETS, PARTITIONERS, World, build_world
from fedattack.defenses import DEFENSES
from fedattack.errors import BadRequest, FedattackError, unknown_name
from fedattack.files import write_bytes
from fedattack.metrics import METRICS
from fedattack.models import MODELS
from fedattack.presets import PRESETS, SCENARIOS
from fedattack.registry import Registry, plugin_options
from fedattack.storage.plain import flat
from fedattack.unlearning import MECHANISMS
from fedattack.unlearning.gates import GATES
from simulations.cli.references import bibtex
from simulations.cli.sources import FILE, sources_hash
from simulations.engine.federation import hushed
from simulations.experiments.base import EXPERIMENTS
from simulations.experiments.choose import (
    arming_attack,
    check_model,
    check_names,
    choose_attacks,
    known_facts,
)
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

    Of an attack also a command that runs, the presets it applies under, and BibTeX of what its docstring cites.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name in PRESETS:
        return [("preset", PRESETS[name].summary), ("command", f"fedattack --preset {name} --data-dir DIR")]
    registries = [registry for registry in KINDS.values() if name in registry]
    if not registries and ":" in name:
        registries = [_kind_of(name)]
    if not registries:
        known = [one for registry in KINDS.values() for one in registry]
        raise unknown_name("name", name, [*known, *PRESETS])
    registry = registries[0]
    cls = registry.get(name)
    text, _, references = (inspect.getdoc(cls) or "").partition("References\n----------\n")
    text = _ROLE.sub(r"\1", _PARAMETERS.sub("", text)).replace("``", "")
    paragraphs = [" ".join(one.split()) for one in text.strip().split("\n\n")]
    parts = [(registry.kind, "\n\n".join(one for one in paragraphs if not one.endswith(":")))]
    references = " ".join(references.split())
    if registry is ATTACKS:
        threat = threat_model(cls)
        letters = f" ({', '.join(threat['letters'])} of Carletti et al. 2025)" if threat["letters"] else ""
        parts.append(("who", threat["seat"] + letters))
        parts.append(("needs", "; ".join(threat["needs"]) or _bare(cls)))
        parts.append(("assumes", "; ".join(threat["assumptions"])))
        if command := command_of(name):
            parts.append(("command", command))
        if fitting := presets_of(name):
            parts.append(("presets", ", ".join(fitting)))
    if references:
        parts.append(("paper" if registry is ATTACKS else "source", references))
        if entries := bibtex(references):
            parts.append(("BibTeX", entries))
    return parts


def _kind_of(name: str) -> Registry[Any]:
    """The registry whose kind an object from outside is of: the first that takes it."""
    refusals = []
    for registry in KINDS.values():
        try:
            registry.get(name)
        except FedattackError as error:
            refusals.append(error)
        else:
            return registry
    raise refusals[0]


DIGITS = {"dataset": "digits", "model": "mlp", "compressor": "none"}
LONG = DIGITS | {"protocol": "fedavg", "batch-size": "20", "local-steps": "10", "rounds": "5", "clients": "4"}
CENTRAL = {
    "scenario": "central",
    "dataset": "digits",
    "model": "mlp",
    "batch-size": "20",
    "local-steps": "50",
}
PEOPLE = {
    "dataset": "qmnist",
    "data-dir": "DIR",
    "limit": "20000",
    "partition": "natural",
    "clients": "20",
    "model": "mlp",
    "compressor": "none",
    "references": "2",
    "set attack.unit": "group",
    "set data.withheld": "0.3",
    "set data.nonmember_unit": "group",
    "set data.nonmembers": "20",
}
GAN = {"task": "wgan-gp", "dataset": "digits", "clients": "4", "rounds": "30"}
TRIED: dict[str, list[dict[str, str]]] = {
    "reconstruction": [
        {},
        {"compressor": "none"},
        DIGITS | {"batch-size": "4"},
        DIGITS,
        *({"compressor": "none", "model": m, "activation": "relu"} for m in ("mlp", "tiny-cnn", "resnet20")),
        *({"compressor": "none", "model": m} for m in ("imprint", "two-layer", "loki")),
        {"compressor": "none", "defense": "secure-aggregation", "model": "loki"},
    ],
    "membership": [
        LONG,
        LONG | {"references": "16"},
        LONG | {"attack-rounds": "1,2,3,4,5"},
        GAN,
        GAN | {"references": "16"},
        DIGITS | {"batch-size": "0", "rounds": "5"},
        LONG | {"set attack.others": "16", "set attack.negatives": "others"},
    ],
    "unlearning": [
        LONG,
        LONG | {"mechanism": "federaser"},
        CENTRAL | {"mechanism": "scrub"},
        CENTRAL | {"mechanism": "certified", "model": "logistic", "set training.weight_decay": "0.01"},
    ],
}
"""Family -> settings, as options, that are tried for a command that runs on embedded data."""


def command_of(name: str) -> str:
    """A command under which that attack applies: the first of those that were tried on embedded data.

    No embedded data say whose a sample is: attacks on people are given one with a folder to fill in.
    """
    cls = ATTACKS.get(name)
    tried = TRIED.get(cls.family, [])
    found = next(
        (one for one in tried if _applies(name, tuple(one.items()))), PEOPLE if cls.needs.people else None
    )
    if found is None:
        return ""
    options = [
        ["--set", f"{key.removeprefix('set ')}={value}"] if key.startswith("set ") else [f"--{key}", value]
        for key, value in found.items()
    ]
    return shlex.join(["fedattack", "--attack", name, *(part for one in options for part in one)])


def presets_of(name: str) -> list[str]:
    """The presets under which that attack applies; images stand in for those that have to be fetched."""
    return [preset for preset in PRESETS if _applies(name, (("preset", preset),))]


def _applies(name: str, variant: tuple[tuple[str, str], ...]) -> bool:
    """Whether an attack applies to a run of these settings, as it would be found before anything starts."""
    try:
        config, world = _world(variant)
    except BadRequest:
        return False
    settings = dict(config.attack.model_dump(exclude={"names"}), names=(name,))
    config = config.model_copy(update={"attack": type(config.attack).model_validate(settings)})
    try:
        with hushed(
            logging.ERROR
        ):  # what Flower says of a strategy that is looked at would be read as a fault
            check_names(config)
        named = choose_attacks(config)
        arming_attack(named)
        family = EXPERIMENTS.get(ATTACKS.get(name).family)
        found, _ = applicable(
            named,
            world.scenario,
            known_facts(config, world),
            lambda *_: family.check(config, world),
            empty=False,
        )
    except BadRequest:
        return False
    return bool(found)


@cache
def _world(variant: tuple[tuple[str, str], ...]) -> tuple[Config, World]:
    settings: dict[str, Any] = {name.removeprefix("set "): value for name, value in variant}
    preset = PRESETS.get(settings.get("preset", ""))
    if preset is not None:
        size = preset.settings["data"].get("image_size")
        side, data = (28, "digits") if preset.settings["data"]["name"] == "mnist" else (size or 32, "faces")
        settings |= {"data.name": data, "data.image_size": side, "data.limit": "", "data.nonmembers": 20}
        settings |= {"data.auxiliary_size": min(20, preset.settings["data"]["auxiliary_size"])}
    config = Config.from_mapping(settings | {"engine": "inline"})
    world = build_world(config)
    if preset is None:
        check_model(config, world)
    return config, world


def document() -> dict[str, Any]:
    """All of it, as ``catalogue.json`` holds it."""
    tables = settings_tables()
    names = [one for registry in KINDS.values() for one in registry]
    own = {name: list(settings_tables(name, strict=False)) for name in [*dict.fromkeys(names), *PRESETS]}
    return {
        "sources": sources_hash(),
        "groups": sorted(filter(None, (registry.group for registry in KINDS.values()))),
        "kinds": catalogue(),
        "markdown": attacks_markdown(),
        "shown": {name: described(name) for name in own},
        "settings": tables,
        "settings of": {name: titles for name, titles in own.items() if titles},
        "presets": {title: rows for preset in PRESETS for title, rows in settings_tables(preset).items()},
    }


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


def main() -> None:
    """Write ``catalogue.json``."""
    text = json.dumps(document(), indent=0, ensure_ascii=True, sort_keys=True)
    write_bytes(FILE, text.encode() + b"\n")


if __name__ == "__main__":
    main()
