"""What a SemSim benchmark is made of: models, policies, attacks, images; presets of them, and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adversaries.reconstruction.matching.inverting_gradients import SEMSIM
from fedattack.errors import ConfigError, unknown_name
from fedattack.reading import Unreadable, read_toml
from fedattack.registry import check_names_of_file
from fedattack.storage.plain import flat
from simulations.studies.classifier import SCHEDULES, Schedule
from simulations.studies.sweep import NONE, Sweep

MODEL, POLICY, ATTACK = "model", "defence", "attack"
"""What a reconstruction is of; as the table of ratings calls it."""


@dataclass(frozen=True)
class Entry:
    """A value of one axis: its label and the settings that it stands for."""

    label: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class LabellerSize:
    """Of the classifier that rates where no table of ratings is given: width of its first layer, and steps."""

    width: int = 16
    steps: int = 600

    def __post_init__(self) -> None:
        for name in ("width", "steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"setting 'labeller.{name}' = {value!r}: a whole number from 1 is accepted")


@dataclass(frozen=True)
class Benchmark:
    """Every model is trained under every policy, and every attack run on each; `images` private images each.

    `settings` are those of all runs; `share` is the part of the public images that the classifiers are trained on,
    the rest trains the labeller. A policy is what clients do: in the training of the classifier, and to the update
    that is attacked.
    """

    name: str
    models: tuple[Entry, ...]
    policies: tuple[Entry, ...]
    attacks: tuple[Entry, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = SCHEDULES["published"]
    images: int = 600
    share: float = 0.5
    labeller: LabellerSize = LabellerSize()

    def __post_init__(self) -> None:
        if type(self.images) is not int or self.images < 1:
            raise ConfigError(f"setting 'images' = {self.images!r}: a whole number from 1 is accepted")
        if not isinstance(self.share, float) or not 0 < self.share < 1:
            raise ConfigError(f"setting 'share' = {self.share!r}: a number between 0 and 1 is accepted")

    @classmethod
    def from_mapping(cls, name: str, document: Mapping[str, Any]) -> Benchmark:
        """Read what a file or a preset says; ConfigError names the key, its value and what is accepted."""
        known = [one.name for one in dataclasses.fields(cls) if one.name != "name"]
        for key in document:
            if key not in known:
                raise unknown_name("key of a benchmark", str(key), known)
        schedule, labeller = document.get("schedule", "published"), document.get("labeller", {})
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                raise unknown_name("schedule", schedule, SCHEDULES)
            chosen = SCHEDULES[schedule]
        else:
            chosen = _built(Schedule, schedule, "schedule")
        return cls(
            name=name,
            models=_entries(document, "models"),
            policies=_entries(document, "policies"),
            attacks=_entries(document, "attacks"),
            settings=flat(_table(document.get("settings", {}), "settings")),
            schedule=chosen,
            images=document.get("images", 600),
            share=document.get("share", 0.5),
            labeller=_built(LabellerSize, labeller, "labeller"),
        )

    @classmethod
    def named(cls, name: str) -> Benchmark:
        """A preset, or what a TOML file says."""
        if name in PRESETS:
            return cls.from_mapping(name, PRESETS[name])
        path = Path(name)
        if path.suffix != ".toml":
            raise ConfigError(
                f"setting 'preset' = {name!r}: {', '.join(PRESETS)} or a .toml file is accepted"
            )
        try:
            document = read_toml(path)
        except Unreadable as error:
            what = "does not exist" if error.absent else f"is not readable TOML: {error.reason}"
            raise ConfigError(f"benchmark file {name!r} {what}") from None
        check_names_of_file(document, f"benchmark file {name!r}")
        return cls.from_mapping(path.stem, document)

    def with_settings(self, settings: Mapping[str, Any]) -> Benchmark:
        """The same with other settings of all runs; those of models, policies and attacks go before them."""
        return dataclasses.replace(self, settings=self.settings | dict(settings))

    @property
    def classifiers(self) -> dict[str, tuple[Entry, Entry]]:
        """Label -> model and policy, of every classifier that is trained."""
        return {f"{m.label} · {p.label}": (m, p) for m in self.models for p in self.policies}

    def run_settings(self, model: Entry, policy: Entry) -> dict[str, Any]:
        """Settings of the runs against one classifier, without its weights and the attack.

        One image a client, known BatchNorm statistics, nothing compressed; who wants it otherwise says so.
        """
        usual: dict[str, Any] = {
            "clients": self.images,
            "victims": self.images,
            "batch-size": 1,
            "compressor": "none",
            "training.batch_norm": "eval",
            "federation.evaluate": False,
        }
        return usual | self.settings | model.settings | policy.settings

    def sweep(self, weights: Mapping[str, Path]) -> Sweep:
        """The attacks as a sweep over classifiers, whose weights are given by label, and attacks."""
        usual = self.run_settings(Entry("", {}), Entry("", {}))
        classifiers = [
            {"label": label, **model.settings, **policy.settings, "weights": str(weights[label].resolve())}
            for label, (model, policy) in self.classifiers.items()
        ]
        attacks = [{"label": one.label, **one.settings} for one in self.attacks]
        return Sweep.from_mapping({"settings": usual, "axes": {"classifier": classifiers, "attack": attacks}})


def _table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"key {name!r} of a benchmark = {value!r}: a table is accepted")
    return value


def _built(kind: type[Any], document: Any, name: str) -> Any:
    table = _table(document, name)
    known = [one.name for one in dataclasses.fields(kind)]
    for key in table:
        if key not in known:
            raise unknown_name("setting", f"{name}.{key}", [f"{name}.{one}" for one in known])
    return kind(**table)


def _entries(document: Mapping[str, Any], key: str) -> tuple[Entry, ...]:
    found = document.get(key)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise ConfigError(f"key {key!r} of a benchmark = {found!r}: a list of one or more tables is accepted")
    entries = []
    for one in found:
        table = _table(one, key)
        if not isinstance(table.get("label"), str) or not table["label"].strip():
            raise ConfigError(f"key {key!r} of a benchmark: an entry has no 'label': {dict(table)}")
        entries.append(Entry(table["label"], flat({k: v for k, v in table.items() if k != "label"})))
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"key {key!r} of a benchmark: two entries are called the same: {', '.join(labels)}")
    return tuple(entries)


def _policy(label: str, policy: str) -> dict[str, Any]:
    return {"label": label, "defense": "transform", "defense.policy": policy}


_PUBLISHED_POLICIES: list[dict[str, Any]] = [
    {"label": NONE},
    _policy("crop", ""),
    _policy("3-1-7", "3-1-7"),
    _policy("43-18-18", "43-18-18"),
    _policy("3-1-7+43-18-18", "3-1-7+43-18-18"),
    {"label": "prune_70", "defense": "prune", "defense.share": 0.7},
    {"label": "gaussian_1e-3", "defense": "clip-noise", "defense.clip_norm": "", "defense.noise": 1e-3},
]
"""The benchmark's seven; noise without clipping, as published, has no guarantee."""

_TWICE = {"inversed-adam-L1": 2.0, "inversed-adam-L2": 4.0, "zhu": 4.0}
"""By how much more these objectives weigh here, where the gradient is twice that of half the cross-entropy."""


def _published_attacks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Attacks by the names of ``--optim``; total variation keeps its published weight beside the objective."""
    return [
        {"label": name, "attack": "ig", "ig.preset": name}
        | ({"ig.tv": _TWICE[name] * SEMSIM[name].tv} if name in _TWICE else {})
        for name in names
    ]


_PUBLISHED_MODELS: list[dict[str, Any]] = [
    {"label": "ResNet20-4", "model": "resnet20-4"},
    {"label": "ConvNet", "model": "convnet"},
]
_ALL_MODELS = [
    *_PUBLISHED_MODELS,
    {"label": "ResNet18", "model": "resnet18", "activation": "relu"},
    {"label": "LeNet", "model": "lenet-zhu", "activation": "sigmoid"},
]

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "settings": {"dataset": "cifar10", "limit": 2500, "auxiliary-size": 2200, "data.nonmembers": 250},
        "schedule": "short",
        "images": 32,
        "share": 0.45,
        "labeller": {"steps": 1500},
        "models": [
            {"label": "small CNN, GELU", "model": "tiny-cnn", "activation": "gelu"},
            {"label": "perceptron, GELU", "model": "mlp", "activation": "gelu"},
        ],
        "policies": [{"label": NONE}, _policy("3-1-7", "3-1-7")],
        "attacks": [
            {
                "label": "short Adam",
                "attack": "ig",
                "ig.preset": "inversed",
                "ig.iterations": 400,
                "ig.tv": 0.01,
            },
            {
                "label": "short L-BFGS",
                "attack": "ig",
                "ig.preset": "backtracking",
                "ig.iterations": 300,
                "ig.restarts": 1,
                "ig.tv": 0.01,
            },
        ],
    },
    "cifar10": {
        "settings": {"dataset": "cifar10", "auxiliary-size": 44_000, "data.nonmembers": 5000},
        "share": 0.8,
        "models": _ALL_MODELS,
        "policies": _PUBLISHED_POLICIES,
        "attacks": _published_attacks(list(SEMSIM)),
    },
    "cifar100": {
        "settings": {"dataset": "cifar100", "auxiliary-size": 44_000, "data.nonmembers": 5000},
        "share": 0.8,
        "models": _PUBLISHED_MODELS,
        "policies": _PUBLISHED_POLICIES,
        "attacks": _published_attacks(["inversed"]),
    },
}
"""Benchmarks by name: "cifar100" has the published 14 models, "cifar10" every ``--optim``.

The nets of "small" are shallow and smooth: a few hundred iterations rebuild nothing from deep ones or such with ReLU.
Its attacks are none of the original's. Images enter all networks in [0, 1], where the original standardises them by
channel.
"""
