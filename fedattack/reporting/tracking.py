"""A finished run's figures as an experiment tracker takes them: parameters, metrics, metrics of rounds, tags."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fedattack.errors import told
from fedattack.reporting.finished import Finished
from fedattack.reporting.report import CHECKSUM
from fedattack.storage.plain import flat, number

_OF_ROUNDS = (
    "accuracy",
    "loss",
    "train_loss",
    "wire_bytes",
    "seconds",
    "answered",
    "failed",
    "rejected",
    "dropped",
)
_ENDS = ("mean", "low", "high", "worst", "best")
_LONGEST = 500
"""Characters of a parameter or a tag; what is longer is in summary.json."""


@dataclass(frozen=True)
class Tracked:
    """Figures by the names that trackers allow: letters, digits, ``_ - . / :`` and spaces.

    `metrics` are ``<attack>/<metric>/mean`` with ``low``, ``high``, ``worst`` and ``best``,
    ``<attack>/floor/<floor>/<metric>``, ``<attack>/seconds`` and ``seconds``; infinities are kept, unknown figures
    are left out. `rounds`: metric ``federation/<name>`` -> (round, value).
    """

    name: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def tracked(run: Finished) -> Tracked:
    """What is exported of a run; nothing of it is an image or a record of a person."""
    s = run.summary
    params = {
        name: _text(value) for name, value in flat(s["config"]).items() if value not in (None, "", [], {})
    }
    metrics: dict[str, float] = {}
    for attack, one in s["attacks"].items():
        place = _allowed(attack)
        for metric, described in one.get("metrics", {}).items():
            _add(metrics, f"{place}/{_allowed(metric)}", described)
        for floor, held in one.get("floors", {}).items():
            for metric, described in held.items():
                _add(metrics, f"{place}/floor/{_allowed(floor)}/{_allowed(metric)}", described, ("mean",))
        if one.get("seconds") is not None:
            metrics[f"{place}/seconds"] = number(one["seconds"])
    about = s.get("run") or {}
    if about.get("seconds") is not None:
        metrics["seconds"] = number(about["seconds"])
    for name, account in s["federation"].get("privacy", {}).items():
        if account.get("epsilon") is not None:
            metrics[f"privacy/{_allowed(name)}/epsilon"] = number(account["epsilon"])
    rounds: dict[str, list[tuple[int, float]]] = {}
    for row in s["federation"].get("rounds", []):
        for name in _OF_ROUNDS:
            if row.get(name) is not None:
                rounds.setdefault(f"federation/{name}", []).append((int(row["round"]), number(row[name])))
    tags = {"fedattack.version": str(s.get("version", "")), "fedattack.folder": str(run.path.resolve())}
    if top := s.get("headline"):
        tags |= {"fedattack.level": top["level"], "fedattack.headline": _text(top["text"])}
    tags |= {
        f"fedattack.verdict.{_allowed(name)}": _text(one["verdict"]) for name, one in s["attacks"].items()
    }
    tags |= {f"fedattack.{name}": str(about[name]) for name in ("begun", "ended") if name in about}
    if CHECKSUM in s["federation"]:
        tags["fedattack.data"] = _text(s["federation"][CHECKSUM])
    return Tracked(run.path.resolve().name, params, metrics, rounds, tags)


def _add(metrics: dict[str, float], name: str, described: Any, ends: tuple[str, ...] = _ENDS) -> None:
    if isinstance(described, dict):
        for end in ends:
            if described.get(end) is not None:
                metrics[name if ends == ("mean",) else f"{name}/{end}"] = number(described[end])


def _allowed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\- ]", "-", name).strip() or "-"


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return told(text, _LONGEST)
