"""Two runs' figures of the same victims, one less the other: what a setting did, not who was attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedattack.audit.reconstruction_verdict import COUNTED_DB
from fedattack.metrics import Interval, paired_difference
from fedattack.metrics.membership import auc, auc_difference


@dataclass(frozen=True, eq=False)
class Side:
    """An attack of one run: its records, and its summary."""

    records: pd.DataFrame
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """`difference`: the second run's `metric` less the first's, in the metric's own unit, over `units` of both."""

    metric: str
    difference: Interval
    units: int


def of_images(first: Side, second: Side, seed: int) -> list[Paired]:
    """Of each image that both reconstructed: every metric that scored both; intervals over the victims.

    Identical images count 100 dB, as in the verdict.
    """
    both = _matched(first, second, ["round", "client", "image", "sample"])
    names = [name for name in first.summary["scored_by"] if name in second.summary["scored_by"]]
    found = []
    for name in names:
        if f"{name}_1" not in both or f"{name}_2" not in both:
            continue
        rows = both.dropna(subset=[f"{name}_1", f"{name}_2"])
        if len(rows):
            a, b = (np.minimum(rows[f"{name}_{end}"].to_numpy(float), COUNTED_DB) for end in (1, 2))
            victims = rows["victim_1"].to_numpy(int) if "victim_1" in rows else None
            found.append(Paired(name, paired_difference(b, a, seed, victims), len(rows)))
    return found


def of_scores(first: Side, second: Side, seed: int) -> list[Paired]:
    """AUC over the candidates that both were asked about; people are resampled whole where they are known.

    Only where each run's candidates are all the other's, so that each AUC is the one that the run reports.
    """
    both = _matched(first, second, ["client", "sample", "is_member"])
    if len(both) != len(first.records) or len(both) != len(second.records):
        return []
    member = both["is_member"].to_numpy(bool)
    a, b = (both[f"score_{end}"].to_numpy(float) for end in (1, 2))
    told = [side.summary["metrics"]["auc"]["mean"] for side in (first, second)]
    if not all(
        math.isclose(auc(scores, member), mean, abs_tol=1e-9)
        for scores, mean in zip((a, b), told, strict=True)
    ):
        return []
    people = "group" if "group" in both else "group_1"
    known = people in both and both[people].notna().all()
    return [Paired("auc", auc_difference(b, a, member, both[people] if known else None), len(both))]


def of_damage(first: Side, second: Side, seed: int) -> list[Paired]:
    """Accuracy lost to the request beyond random deletion, at the end of each seed that both ran, in [-1, 1]."""
    damage = []
    for side in (first, second):
        rows = side.records[side.records["request"].isna()]
        arms = rows.pivot_table(index="run", columns="arm", values="accuracy")
        if not {"random", "after"} <= set(arms.columns):
            return []
        damage.append(arms["random"] - arms["after"])
    both = pd.concat(damage, axis=1, join="inner").dropna()
    if both.empty:
        return []
    difference = paired_difference(both.iloc[:, 1].to_numpy(), both.iloc[:, 0].to_numpy(), seed)
    return [Paired("damage", difference, len(both))]


def _matched(first: Side, second: Side, keys: Sequence[str]) -> pd.DataFrame:
    """The rows of both with the same keys; other columns with _1 and _2."""
    if any(not set(keys) <= set(side.records.columns) for side in (first, second)):
        return pd.DataFrame()
    a, b = (side.records.drop_duplicates(list(keys), keep=False) for side in (first, second))
    return a.merge(b, on=list(keys), suffixes=("_1", "_2"))
