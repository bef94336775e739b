"""Figures of several targets pooled: candidates that share a client, a person or a sample are not independent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedattack.errors import DataError
from fedattack.metrics.membership import auc_reach, checked
from fedattack.metrics.statistics import FEWEST, Interval

_UNKNOWN = float("nan")

_ENOUGH = 20
"""Units of a kind from which the variance between them is trusted."""


def auc_influence(scores: ArrayLike, is_member: ArrayLike) -> tuple[float, NDArray[np.float64]]:
    """AUC, and how much each candidate moves it, (N,): the centred placements over the number of their kind.

    Members' and non-members' parts each sum to 0. Ties count half, as in :func:`~.membership.auc`. (DeLong, DeLong
    and Clarke-Pearson, Comparing the areas under two or more correlated ROC curves, 1988; by midranks as Sun and Xu,
    2014.) DataError as there.
    """
    values, member = checked(scores, is_member)
    ranks, moved = stats.rankdata(values), np.empty(len(values))
    for side in (member, ~member):
        below = (ranks[side] - stats.rankdata(values[side])) / (
            ~side
        ).sum()  # share of the others that lie below
        moved[side] = (below - below.mean()) / side.sum()
        if side is member:
            area = float(below.mean())
    return area, np.where(member, moved, -moved)


def clustered_interval(
    estimate: float,
    influence: ArrayLike,
    is_member: ArrayLike,
    clients: ArrayLike,
    units: ArrayLike,
    confidence: float = 0.95,
) -> Interval:
    """Interval of an estimate whose candidates, (N,), come from drawn clients and from drawn people or samples.

    Variance between units (a unit may be a candidate of many clients), and what clients add to that of independent
    candidates (Cameron, Gelbach and Miller, Robust inference with multiway clustering, 2011), where there are
    :data:`~.statistics.FEWEST` clients or more: fewer are taken as they are. Student's t with Satterthwaite's degrees
    of freedom. For one client, and units of one candidate each, the variance is DeLong's. It is what resampling
    clients and units comes to; resampling clients, and candidates inside them, counts the candidates' own spread
    twice, and misses that targets share them. Ends are unknown (NaN) with fewer than two units of either kind.
    """
    moved, member = np.asarray(influence, dtype=np.float64).copy(), np.asarray(is_member, dtype=bool)
    _, client = np.unique(np.asarray(clients), return_inverse=True)
    names, unit = np.unique(np.asarray(units), return_inverse=True)
    for side in (member, ~member):
        count = len(np.unique(unit[side]))
        if count < 2:
            return Interval(estimate, _UNKNOWN, _UNKNOWN, len(names), confidence)
        moved[side] *= np.sqrt(count / (count - 1))

    def squares(of: NDArray[np.int64]) -> float:
        return float((np.bincount(of, weights=moved) ** 2).sum())

    within, drawn, more = squares(unit), int(client.max()) + 1, 0.0
    if drawn >= FEWEST:
        _, cell = np.unique(client * len(names) + unit, return_inverse=True)
        more = max(0.0, squares(client) * drawn / (drawn - 1) - squares(cell))
    variance = within + more
    if variance == 0:
        return Interval(estimate, estimate, estimate, len(names), confidence)
    freedom = variance**2 / (within**2 / (len(names) - 1) + more**2 / max(1, drawn - 1))
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance))
    low, high = max(0.0, estimate - reach), min(1.0, estimate + reach)
    return Interval(estimate, low, high, len(names), confidence, float(np.sqrt(variance)))


def pooled_auc(
    scores: ArrayLike,
    is_member: ArrayLike,
    clients: ArrayLike | None = None,
    units: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Interval:
    """AUC of candidates pooled over clients, with :func:`clustered_interval`.

    Where a kind has fewer than 20 units, or candidates are told apart so well that it shrinks to a point or reaches 0
    or 1, it is the wider, at either end, of that and the score interval of so many: every area from which the one
    that was found is no further than Hanley and McNeil's standard error allows (Newcombe, Confidence intervals for an
    effect size measure based on the Mann-Whitney statistic, part 2, 2006, method 5). `clients` and `units`, (N,), say
    whom each candidate was asked about and which candidates are one person or sample; None: one client, each
    candidate a unit. `spread` is the clustered standard error. DataError as :func:`~.membership.auc`.
    """
    values, member = checked(scores, is_member)
    clients = np.zeros(len(values), dtype=np.int64) if clients is None else np.asarray(clients)
    units = np.arange(len(values)) if units is None else np.asarray(units)
    if clients.shape != values.shape or units.shape != values.shape:
        raise DataError(
            f"{len(values)} scores need as many clients and units; got shapes {clients.shape} and {units.shape}"
        )
    area, moved = auc_influence(values, member)
    found = clustered_interval(area, moved, member, clients, units, confidence)
    return at_least_score(found, member, units)


def at_least_score(found: Interval, is_member: ArrayLike, units: ArrayLike) -> Interval:
    """The interval of an AUC, where it cannot be trusted the wider of it and the score interval.

    See :func:`pooled_auc`.
    """
    member = np.asarray(is_member, dtype=bool)
    counts = unit_counts(member, units)
    if min(counts) >= _ENOUGH:
        if 0 < found.low < found.high < 1:
            return found
        counts = int(member.sum()), int((~member).sum())
    low, high = auc_reach(found.mean, *counts, found.confidence)
    if found.known:
        low, high = min(low, found.low), max(high, found.high)
    return replace(found, low=low, high=high)


def unit_counts(is_member: ArrayLike, units: ArrayLike) -> tuple[int, int]:
    """How many distinct units there are among the members, and among the non-members."""
    member, unit = np.asarray(is_member, dtype=bool), np.asarray(units)
    return len(np.unique(unit[member])), len(np.unique(unit[~member]))
