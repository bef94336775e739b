"""A sweep's table: a row per cell and attack, from the summaries of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedattack.audit.family import Leakage, get_family, interval_fields
from fedattack.metrics import wilson
from fedattack.metrics.statistics import student_mean
from fedattack.storage.plain import number

DONE, FAILED, REFUSED = "done", "failed", "not applicable"


@dataclass(frozen=True)
class CellOutcome:
    """What became of one run of a sweep: its folder below ``cells``, labels by axis, why it is not done, summary."""

    name: str
    labels: dict[str, str]
    status: str
    reason: str
    seconds: float
    summary: dict[str, Any] | None = None


@dataclass(frozen=True)
class SweepTable:
    """A sweep's rows: one per cell and attack; a cell without an attack, or that is not done, has one.

    `axes` holds the values of each axis in their order; in the frame they are in columns ``axis.<name>``.
    """

    axes: dict[str, list[str]]
    frame: pd.DataFrame

    def family(self, family: str) -> pd.DataFrame:
        """The rows of one family of attacks, with those of cells that are not done."""
        return self.frame[(self.frame["family"] == family) | (self.frame["status"] != DONE)]

    @property
    def families(self) -> list[str]:
        """The families that any cell attacked by."""
        return list(dict.fromkeys(self.frame["family"].dropna()))

    def records(self) -> list[dict[str, Any]]:
        """The rows in JSON's own types."""
        return list(json.loads(self.frame.to_json(orient="records")))


def sweep_table(axes: Sequence[str], outcomes: Sequence[CellOutcome]) -> SweepTable:
    """The table of a sweep's cells.

    Columns: ``cell``, ``status``, ``reason``, ``axis.*``, ``attack``, ``family``, ``level``, ``verdict``,
    ``seconds``; ``accuracy`` in [0, 1] of the last global model with ``accuracy_low`` and ``accuracy_high`` (95 %,
    over the held-out samples), ``loss``, ``epsilon`` (worst client). What leaked stands in the column that the
    family's :class:`Leakage` names, with ``_low`` and ``_high`` (95 %), beside the family's further columns.
    """
    values = {axis: list(dict.fromkeys(o.labels[axis] for o in outcomes)) for axis in axes}
    frame = pd.DataFrame([row for outcome in outcomes for row in _rows(outcome)])
    if "attack" in frame:  # the attack is an axis of every table; a cell that is not done has but its label
        labels = frame.get("axis.attack", pd.Series(index=frame.index, dtype="object"))
        frame["axis.attack"] = frame["attack"].fillna(labels)
    for name in ("attack", "family", "level", "verdict", "floor"):
        frame[name] = (frame[name] if name in frame else pd.Series(dtype="string")).astype("string")
    columns = [get_family(name).leakage.column for name in frame["family"].dropna().unique()]
    ends = [f"{column}{end}" for column in ["accuracy", *columns] for end in ("", "_low", "_high")]
    for name in [*ends, "epsilon"]:
        frame[name] = pd.to_numeric(frame[name]) if name in frame else math.nan
    return SweepTable(values, frame)


SEED = "axis.seed"


def over_seeds(table: SweepTable) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone, together: a row for each attack and the other axes.

    Columns: those axes, ``attack``, ``family``, ``seeds``, ``mean`` with ``low`` and ``high`` (Student's t, 95 %,
    over the seeds; None of one), and ``worst``, what leaked most. Empty where seed is no axis of more than one value.
    """
    frame = table.frame
    if SEED not in frame or frame[SEED].nunique() < 2:
        return []
    others = [str(name) for name in frame.columns if str(name).startswith("axis.") and name != SEED]
    keys = [*others, *(name for name in ("attack",) if name not in others)]
    rows = []
    done = frame[(frame["status"] == DONE) & frame["family"].notna()]
    for chosen, group in done.groupby(keys, sort=False, dropna=False):
        family = str(group["family"].iloc[0])
        values = group[get_family(family).leakage.column].dropna()
        if len(values):
            found = student_mean(values.to_numpy())
            labels = dict(zip(keys, chosen, strict=True)) | {
                "attack": group["attack"].iloc[0],
                "family": family,
            }
            rows.append(
                labels | {"seeds": len(values)} | interval_fields(found) | {"worst": float(values.max())}
            )
    return rows


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
    family = get_family(found["family"])
    return row | family.sweep(found) | _ends(family.leakage, found)


def _ends(leakage: Leakage, found: dict[str, Any]) -> dict[str, float]:
    described = leakage.read(found) or {}
    ends = {"": "mean", "_low": "low", "_high": "high"}
    return {f"{leakage.column}{end}": number(described.get(key)) * leakage.scale for end, key in ends.items()}
