"""How the ratings of a table came about: progress, checks, repeats, fast answers, agreement."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedattack.annotation.agreement import category_counts, fleiss_kappa, krippendorff_alpha, rating_matrix
from fedattack.annotation.table import HUMAN, latest, moment, votes
from fedattack.errors import DataError
from fedattack.metrics.statistics import Interval

FAST = 0.5
"""Seconds after the answer before it, within which an answer is marked as fast."""


@dataclass(frozen=True)
class Annotator:
    """One annotator's ratings. `checks`: failed and asked; `repeats`: answered otherwise and asked."""

    name: str
    kind: str
    rated: int
    undecided: int
    changed: int  # ratings that a later one of the same pair replaced
    checks: tuple[int, int]
    repeats: tuple[int, int]
    fast: int
    answers: int
    first: str
    last: str


@dataclass(frozen=True)
class Quality:
    """What a table's ratings are worth, of one protocol and of people or proxies.

    `kappa` is of the pairs that every annotator rated (None where there are none, or one annotator), `alpha` of those
    that two or more rated (None likewise). `fast_lines`: lines of answers that came within :data:`FAST` seconds.
    """

    protocol: str
    kind: str
    pairs: int
    tied: int
    majority: tuple[int, int]
    annotators: tuple[Annotator, ...]
    alpha: Interval | None
    kappa: Interval | None
    fast_lines: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        """The same for machines, counts by their names."""
        found = dataclasses.asdict(self) | {"majority": dict(zip(("1", "0"), self.majority, strict=True))}
        for one in found["annotators"]:
            one["checks"] = dict(zip(("failed", "asked"), one["checks"], strict=True))
            one["repeats"] = dict(zip(("changed", "asked"), one["repeats"], strict=True))
        return found


def quality(frame: pd.DataFrame, seed: int = 0, fast: float = FAST) -> list[Quality]:
    """Of a table of one protocol (:func:`read_table`), people first, then proxies, apart.

    A check is an original beside itself, to which 1 is right, or a wrong pair, to which 0 is; a check of a pair that
    the annotator rated is a repeat. "Cannot tell" fails a check.
    """
    return [
        _of_kind(frame[frame["annotator_type"] == kind], str(kind), seed, fast)
        for kind in sorted(set(frame["annotator_type"]))
    ]


def _of_kind(frame: pd.DataFrame, kind: str, seed: int, fast: float) -> Quality:
    kept, _ = latest(frame)
    counted = votes(frame)
    hurried = _fast(frame, fast) if kind == HUMAN else []
    matrix = rating_matrix(kept)
    return Quality(
        protocol=str(frame["protocol"].iloc[0]),
        kind=kind,
        pairs=len(counted),
        tied=int(((counted["share"] == 0.5).fillna(False)).sum()),
        majority=(int((counted["majority"] == 1).sum()), int((counted["majority"] == 0).sum())),
        annotators=tuple(
            _annotator(frame[frame["annotator_id"] == name], kept, hurried)
            for name in dict.fromkeys(frame["annotator_id"])
        ),
        alpha=_alpha(matrix, seed),
        kappa=_kappa(matrix, seed),
        fast_lines=tuple(hurried),
    )


def _annotator(mine: pd.DataFrame, kept: pd.DataFrame, hurried: Sequence[int]) -> Annotator:
    name = mine["annotator_id"].iloc[0]
    counting = kept[kept["annotator_id"] == name]
    labels = dict(zip(counting["pair_id"], counting["label"], strict=True))
    checks, repeats = [0, 0], [0, 0]
    asked = mine[mine["is_attention_check"].astype(bool)].drop_duplicates("pair_id", keep="last")
    for pair, label, one, other in asked[
        ["pair_id", "label", "original_sha256", "reconstruction_sha256"]
    ].itertuples(index=False, name=None):
        if pair in labels:
            tally, right = repeats, labels[pair]
        else:
            tally, right = checks, int(one == other)
        tally[0] += _code(label) != _code(right)
        tally[1] += 1
    times = sorted(mine["timestamp"], key=moment)
    ratings = int((~mine["is_attention_check"].astype(bool)).sum())
    return Annotator(
        name=str(name),
        kind=str(mine["annotator_type"].iloc[0]),
        rated=len(counting),
        undecided=int(counting["label"].isna().sum()),
        changed=ratings - len(counting),
        checks=(checks[0], checks[1]),
        repeats=(repeats[0], repeats[1]),
        fast=len(set(hurried) & set(mine.index)),
        answers=len(mine),
        first=times[0],
        last=times[-1],
    )


def _code(label: Any) -> int:
    return -1 if pd.isna(label) else int(label)


def _fast(frame: pd.DataFrame, fast: float) -> list[int]:
    """Lines of answers given so soon after the same annotator's answer before."""
    found: list[int] = []
    limit = datetime.timedelta(seconds=fast)
    for _, mine in frame.groupby("annotator_id"):
        moments = sorted(zip(map(moment, mine["timestamp"]), mine.index.tolist(), strict=True))
        if moments[0][0] == moments[-1][0]:  # filled in at once, as an import does, and not by a person
            continue
        found += [line for (before, _), (now, line) in itertools.pairwise(moments) if now - before < limit]
    return sorted(found)


def _alpha(matrix: np.ndarray, seed: int) -> Interval | None:
    try:
        return krippendorff_alpha(matrix, seed)
    except DataError:
        return None


def _kappa(matrix: np.ndarray, seed: int) -> Interval | None:
    """Of the pairs that all annotators rated."""
    complete = matrix[:, ~np.isnan(matrix).any(axis=0)]
    if len(matrix) < 2 or not complete.size:
        return None
    return fleiss_kappa(category_counts(complete), seed)
