"""What would change a verdict: runs of a sweep that differ in one setting alone, beside each other."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from fedattack.audit.family import get_family
from fedattack.reporting.sweep.table import DONE, SEED, SweepTable

_AXIS = "axis."


def pairs_of_runs(table: SweepTable, family: str) -> pd.DataFrame:
    """Every two runs of a family's attacks that differ in one axis alone, the earlier value first.

    Columns: ``setting``, ``from``, ``to``, ``from_level``, ``to_level``, ``moved`` (whether the levels differ),
    ``change`` of the leakage in the unit of the family (NaN where either run has none), ``from_cell``, ``to_cell``.
    """
    frame = table.frame
    frame = frame[(frame["status"] == DONE) & (frame["family"] == family)]
    axes = [str(name) for name in frame.columns if str(name).startswith(_AXIS)]
    column = get_family(family).leakage.column
    found: list[dict[str, Any]] = []
    for axis in axes:
        others = [name for name in axes if name != axis]
        groups = (
            [group for _, group in frame.groupby(others, sort=False, dropna=False)] if others else [frame]
        )
        for group in groups:
            rows = sorted(group.to_dict("records"), key=lambda row: _place(table, axis, row))
            for first, then in itertools.combinations(rows, 2):
                if first[axis] == then[axis] or pd.isna(first[axis]) or pd.isna(then[axis]):
                    continue
                found.append(_pair(axis, first, then, column))
    return pd.DataFrame(found, columns=list(_pair(_AXIS, _EMPTY, _EMPTY, "")))


_EMPTY: Mapping[Any, Any] = {_AXIS: "", "level": "", "": 0.0, "cell": ""}


def _pair(axis: str, first: Mapping[Any, Any], then: Mapping[Any, Any], column: str) -> dict[str, Any]:
    return {
        "setting": axis.removeprefix(_AXIS),
        "from": first[axis],
        "to": then[axis],
        "from_level": first["level"],
        "to_level": then["level"],
        "moved": first["level"] != then["level"],
        "change": then[column] - first[column],
        "from_cell": first["cell"],
        "to_cell": then["cell"],
    }


def _place(table: SweepTable, axis: str, row: Mapping[Any, Any]) -> int:
    order = table.axes.get(axis.removeprefix(_AXIS), [])
    return order.index(row[axis]) if row[axis] in order else len(order)


def what_would_change(table: SweepTable, family: str) -> list[dict[str, Any]]:
    """One row for each setting and each two of its values; those that move the verdict most often first.

    "setting", "from", "to", "pairs", "moved" (pairs whose levels differ), "often" (the commonest two levels among
    those that moved, else among all), "mean", "least" and "most" (NaN where unknown) of the change of the leakage.
    Seeds are no setting: where runs differ by nothing else, chance moved the verdict.
    """
    pairs = pairs_of_runs(table, family)
    pairs = pairs[pairs["setting"] != SEED.removeprefix(_AXIS)]
    rows = []
    for (setting, first, then), group in pairs.groupby(["setting", "from", "to"], sort=False):
        moved = group[group["moved"]]
        told = moved if len(moved) else group
        ((levels, _),) = Counter(zip(told["from_level"], told["to_level"], strict=True)).most_common(1)
        changes = group["change"].dropna()
        ends = (changes.mean(), changes.min(), changes.max()) if len(changes) else (math.nan,) * 3
        row = {"setting": setting, "from": first, "to": then, "pairs": len(group), "moved": len(moved)}
        rows.append(
            row | {"often": levels} | dict(zip(("mean", "least", "most"), map(float, ends), strict=True))
        )
    return sorted(rows, key=lambda row: (-row["moved"] / row["pairs"], -abs(_zero(row["mean"]))))


def _zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
