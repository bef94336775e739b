"""A sweep's table: a row per cell and attack, from the summaries of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedattack.audit.family import Family
from fedattack.metrics import wilson
from fedattack.storage.plain import number

DONE, FAILED, REFUSED = "done", "failed", "not applicable"

LEAKAGE: dict[Family, tuple[str, str, float]] = {
    "reconstruction": ("gain", "PSNR above the best floor, dB", 0.0),
    "membership": ("auc", "AUC", 0.5),
    "unlearning": ("damage", "accuracy lost beyond random deletion, points", 0.0),
}
"""Family -> the column that says how much leaked, its name for a person, and its value where nothing does."""


@dataclass(frozen=True)
class CellOutcome:
    """What became of one run of a sweep.

    Parameters
    ----------
    name : str
        Of its folder below ``cells``.
    labels : dict of str to str
        Axis -> value.
    status : {"done", "failed", "not applicable"}
    reason : str
        Why it is not done.
    seconds : float
    summary : dict or None
        The content of its ``summary.json``.
    """

    name: str
    labels: dict[str, str]
    status: str
    reason: str
    seconds: float
    summary: dict[str, Any] | None = None


@dataclass(frozen=True)
class SweepTable:
    """A sweep's rows.

    Parameters
    ----------
    axes : dict of str to list of str
        Axis -> its values, in their order.
    frame : DataFrame
        One row per cell and attack; a cell without an attack, or that is not done, has one row. Axes are in columns
        ``axis.<name>``.
    """

    axes: dict[str, list[str]]
    frame: pd.DataFrame

    def family(self, family: Family) -> pd.DataFrame:
        """The rows of one family of attacks, with those of cells that are not done."""
        return self.frame[(self.frame["family"] == family) | (self.frame["status"] != DONE)]

    @property
    def families(self) -> list[Family]:
        """The families that any cell attacked by."""
        return [family for family in LEAKAGE if (self.frame["family"] == family).any()]


def sweep_table(axes: Sequence[str], outcomes: Sequence[CellOutcome]) -> SweepTable:
    """The table of a sweep's cells.

    Columns: ``cell``, ``status``, ``reason``, ``axis.*``, ``attack``, ``family``, ``level``, ``verdict``,
    ``seconds``; ``accuracy`` of the global model after the last round with ``accuracy_low`` and ``accuracy_high``
    (95 %, over the held-out samples; in [0, 1]), ``loss``, ``epsilon`` (worst client).

    Reconstruction: ``psnr``, ``ssim`` (means), ``psnr_worst``, ``floor``, ``floor_psnr``, ``gain`` over that floor
    with ``gain_low`` and ``gain_high`` (95 %, over victims; dB), ``recovered`` of ``images``, ``labels_right`` of
    ``labels_of``, ``k``. Membership: ``auc``, ``auc_low``, ``auc_high``. Unlearning: ``damage``, ``damage_low``,
    ``damage_high`` (points).
    """
    values = {axis: list(dict.fromkeys(o.labels[axis] for o in outcomes)) for axis in axes}
    frame = pd.DataFrame([row for outcome in outcomes for row in _rows(outcome)])
    if "attack" in frame:  # the attack is an axis of every table; a cell that is not done has but its label
        labels = frame.get("axis.attack", pd.Series(index=frame.index, dtype="object"))
        frame["axis.attack"] = frame["attack"].fillna(labels)
    for name in ("attack", "family", "level", "verdict", "floor"):
        frame[name] = (frame[name] if name in frame else pd.Series(dtype="string")).astype("string")
    for column, _, _ in LEAKAGE.values():
        for end in ("", "_low", "_high"):
            name = f"{column}{end}"
            frame[name] = pd.to_numeric(frame[name]) if name in frame else math.nan
    for name in ("accuracy", "accuracy_low", "accuracy_high", "epsilon", "psnr"):
        frame[name] = pd.to_numeric(frame[name]) if name in frame else math.nan
    return SweepTable(values, frame)


def _rows(outcome: CellOutcome) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"cell": outcome.name, "status": outcome.status, "reason": outcome.reason}
    common |= {f"axis.{axis}": label for axis, label in outcome.labels.items()}
    if outcome.summary is None:
        return [common | {"seconds": outcome.seconds}]
    common |= _utility(outcome.summary["federation"])
    attacks = outcome.summary["attacks"]
    if not attacks:
        return [common | {"seconds": outcome.seconds}]
    return [common | _leakage(name, found) for name, found in attacks.items()]


def _utility(federation: dict[str, Any]) -> dict[str, Any]:
    judged = [row for row in federation.get("rounds", []) if row.get("accuracy") is not None]
    result: dict[str, Any] = {}
    if judged:
        accuracy, samples = float(judged[-1]["accuracy"]), int(federation.get("held-out samples", 0))
        result |= {"accuracy": accuracy, "loss": number(judged[-1]["loss"])}
        if samples:
            interval = wilson(round(accuracy * samples), samples)
            result |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    spent = [number(one["epsilon"]) for one in federation.get("privacy", {}).values()]
    if spent:
        result["epsilon"] = min(spent)
    return result


def _leakage(name: str, found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "attack": name,
        "family": found["family"],
        "level": found["level"],
        "verdict": found["verdict"],
        "seconds": number(found["seconds"]),
    }
    metrics = found["metrics"]
    if found["family"] == "membership":
        return row | _ends("auc", metrics["auc"])
    if found["family"] == "unlearning":
        return row | _ends("damage", metrics["damage"], 100.0)
    row |= {"images": found["images"], "k": number(found["k"])}
    if found["level"] == "failed":
        return row
    best = found["best_floor"]
    return row | {
        "psnr": number(metrics["psnr"]["mean"]),
        "psnr_worst": number(metrics["psnr"]["worst"]),
        "ssim": number(metrics["ssim"]["mean"]),
        "floor": best,
        "floor_psnr": number(found["floors"][best]["psnr"]["mean"]),
        **_ends("gain", found["above_best_floor"]),
        "recovered": found["recovered"],
        "labels_right": found["labels"]["right"],
        "labels_of": found["labels"]["of"],
    }


def _ends(name: str, described: dict[str, Any], scale: float = 1.0) -> dict[str, float]:
    return {
        name: number(described["mean"]) * scale,
        f"{name}_low": number(described["low"]) * scale,
        f"{name}_high": number(described["high"]) * scale,
    }


__all__ = ["DONE", "FAILED", "LEAKAGE", "REFUSED", "CellOutcome", "SweepTable", "sweep_table"]
