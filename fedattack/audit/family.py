"""What an audit hands on to tables, figures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fedattack.metrics import (
    Interval,
    bootstrap_mean,
)


def _ends(values: Sequence[float]) -> dict[str, float]:
    return {"worst": float(min(values)), "best": float(max(values))}


Family = Literal["reconstruction", "membership", "unlearning"]
Level = Literal["leak", "partial", "none", "undecided", "failed"]

SHOWN = "shown to the model"
"""Panel of what a defence made of the private images."""

HEADLINES: dict[Family, dict[Level, str]] = {
    "reconstruction": {
        "leak": "private images recovered",
        "partial": "partial leakage",
        "none": "no leakage beyond the prior",
        "undecided": "undecided",
        "failed": "the attack failed",
    },
    "membership": {
        "leak": "members identified",
        "partial": "membership leaks",
        "none": "no leakage beyond chance",
        "undecided": "undecided",
        "failed": "the attack failed",
    },
    "unlearning": {
        "leak": "the request damages the model",
        "partial": "slight damage",
        "none": "no damage beyond random deletion",
        "undecided": "undecided",
        "failed": "the attack failed",
    },
}
"""Level of a verdict -> the words it starts with."""


@dataclass(frozen=True)
class AuditResult:
    """One attack, scored.

    Parameters
    ----------
    attack : str
        Its name in this run.
    family : {"reconstruction", "membership", "unlearning"}
    records : list of dict
        One flat row per private image, candidate or seed.
    summary : dict
        Means, worst cases, floors and intervals by name; see :func:`fedattack.storage.records.summary_document`.
    verdict : str
        What the figures say, in words.
    level : {"leak", "partial", "none", "undecided", "failed"}
        The verdict's class; the thresholds are those of :mod:`fedattack.audit.reconstruction_verdict`.
    images : dict of str to Tensor
        "original", "reconstruction" and one entry per floor, float32 (N, C, H, W), in the order of `records`; a
        row of NaN where there is no reconstruction.
    curves : dict
        Series for figures: "histories" (label -> losses), "roc" (label -> rates).
    """

    attack: str
    family: Family
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    verdict: str
    level: Level
    images: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)


def describe(
    values: Sequence[float],
    seed: int,
    groups: Sequence[int] | None = None,
    worst: Literal["min", "max"] = "min",
) -> dict[str, float | int | None]:
    """Mean, worst, best and bootstrap interval of one metric.

    Parameters
    ----------
    values : sequence of float
        One per image; NaN (nothing to score) is left out, infinity (identical images) is left out of the mean
        and counted, unless every value is infinite.
    seed : int
        Seeds the bootstrap.
    groups : sequence of int, optional
        The victim of each value.
    worst : {"min", "max"}
        Which end is the attacker's worst.

    Returns
    -------
    dict
        "mean", "worst", "best", "low", "high" (None where unknown), "count", and "identical" where any value was
        infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    place = np.arange(len(array)) if groups is None else np.asarray(groups)
    place, array = place[~np.isnan(array)], array[~np.isnan(array)]
    if not len(array):
        return {"mean": None, "worst": None, "best": None, "low": None, "high": None, "count": 0}
    finite = np.isfinite(array)
    ends = (float(array.min()), float(array.max()))
    if worst == "max":
        ends = (ends[1], ends[0])
    described: dict[str, float | int | None] = {"mean": float(array[0]), "worst": ends[0], "best": ends[1]}
    described |= {"low": None, "high": None, "count": len(array)}
    if finite.any():
        interval = bootstrap_mean(array[finite], seed, place[finite])
        described |= interval_fields(interval)
    if not finite.all():
        described["identical"] = int((~finite).sum())
    return described


def interval_fields(interval: Interval) -> dict[str, float | None]:
    """An interval as plain fields: "mean", "low", "high" (None where unknown)."""
    ends = {"low": interval.low, "high": interval.high} if interval.known else {"low": None, "high": None}
    return {"mean": interval.mean, **ends}
