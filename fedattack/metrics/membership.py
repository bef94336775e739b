"""Scores of membership inference: who was in the training data, and what pure chance would have scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from fedattack.errors import DataError
from fedattack.metrics.statistics import Interval, clopper_pearson
from fedattack.rng import numpy_rng


@dataclass(frozen=True)
class OperatingPoint:
    """True-positive rate where the false-positive rate is at most a given one."""

    max_fpr: float  # the false-positive rate that was allowed
    tpr: Interval  # share of members found, with its exact (Clopper-Pearson) interval
    fpr: float  # the false-positive rate really spent
    true_positives: int
    false_positives: int
    members: int
    nonmembers: int
    chance_mean: float  # of `tpr` when the scores know nothing (exact, negative hypergeometric)
    chance_high: float  # its 97.5 % quantile
    p_value: float  # chance of at least this many hits when the scores know nothing


def auc(scores: ArrayLike, is_member: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a random member outscores a random non-member.

    `scores` (N,): higher means "more likely a member". Raises DataError, as all below that take scores, if the
    lengths differ, a score is not a number, or there is no member or no non-member.
    """
    values, member = checked(scores, is_member)
    inside = int(member.sum())
    return float((stats.rankdata(values)[member].mean() - (inside + 1) / 2) / (len(values) - inside))


def auc_deviation(area: float, members: int, nonmembers: int) -> float:
    """Standard error of an AUC under exponential scores (Hanley and McNeil, The meaning and use of the area under a
    receiver operating characteristic (ROC) curve, 1982).
    """
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (members - 1) * (q1 - area**2) + (nonmembers - 1) * (q2 - area**2)
    return float(np.sqrt(max(0.0, spread) / (members * nonmembers)))


def auc_difference(
    first: ArrayLike,
    second: ArrayLike,
    is_member: ArrayLike,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Interval:
    """AUC of `first` less that of `second`, scores of the same samples (N,).

    DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", Biometrics 1988; with `groups` (whose samples they are) over groups instead of samples
    (Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 1997). Unknown below three units.
    """
    (a, member), (b, _) = checked(first, is_member), checked(second, is_member)
    inside, outside = int(member.sum()), int((~member).sum())
    parts = np.zeros(len(member))
    difference = auc(a, member) - auc(b, member)
    for values, sign in ((a, 1.0), (b, -1.0)):
        ranks = stats.rankdata(values)
        beyond = np.where(member, 1.0 / outside, -1.0 / inside)
        own = np.zeros(len(member))
        for side in (member, ~member):
            own[side] = stats.rankdata(values[side])
        placed = (ranks - own) * beyond + np.where(member, 0.0, 1.0)
        parts += sign * placed
    parts = (parts - difference) / np.where(member, inside, outside)
    units = (
        np.arange(len(member)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    count = int(units.max()) + 1
    if count < 3:
        return Interval(difference, np.nan, np.nan, count, confidence)
    spread = float(np.sqrt(count / (count - 1) * np.square(np.bincount(units, parts)).sum()))
    reach = float(stats.norm.ppf((1 + confidence) / 2)) * spread
    ends = difference - reach, difference + reach
    return Interval(difference, *ends, count, confidence, spread * float(np.sqrt(count)))


def auc_reach(area: float, members: int, nonmembers: int, confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the score interval of an AUC; see :func:`fedattack.metrics.pooled_auc`."""
    z = float(stats.norm.ppf((1 + confidence) / 2))

    def beyond(true: float) -> float:
        return abs(area - true) - z * auc_deviation(true, members, nonmembers)

    tiny = 1e-9  # at 0 and 1 the standard error is 0
    low = float(brentq(beyond, 0.0, area - tiny)) if area > tiny and beyond(area - tiny) < 0 else area
    high = float(brentq(beyond, area + tiny, 1.0)) if area < 1 - tiny and beyond(area + tiny) < 0 else area
    return low, high


def auc_power(members: int, nonmembers: int, area: float, confidence: float = 0.95) -> float:
    """Probability that scores whose true AUC is `area` (above 0.5) score above what chance does.

    Normal approximation with :func:`auc_deviation` under the alternative (Hanley and McNeil, 1982).
    """
    threshold = chance_auc(members, nonmembers, confidence).high
    return float(stats.norm.sf((threshold - area) / auc_deviation(area, members, nonmembers)))


def chance_auc(members: int, nonmembers: int, confidence: float = 0.95) -> Interval:
    """The AUC of scores that know nothing: 0.5, with the Mann-Whitney interval of so few samples."""
    if members < 1 or nonmembers < 1:
        raise DataError(f"{members} members and {nonmembers} non-members: at least one of each is needed")
    deviation = np.sqrt((members + nonmembers + 1) / (12 * members * nonmembers))
    reach = float(stats.norm.ppf((1 + confidence) / 2) * deviation)
    return Interval(0.5, max(0.0, 0.5 - reach), min(1.0, 0.5 + reach), members + nonmembers, confidence)


def tpr_at_fpr(scores: ArrayLike, is_member: ArrayLike, max_fpr: float) -> OperatingPoint:
    """True-positive rate at the last point of the ROC curve whose false-positive rate is at most `max_fpr`.

    With fewer than ``1 / max_fpr`` non-members the point allows no false positive at all; the counts say so (Carlini
    et al., Membership Inference Attacks From First Principles, 2022).
    """
    values, member = checked(scores, is_member)
    members, nonmembers = int(member.sum()), int((~member).sum())
    hits, false = hits_at_fpr(values, member, max_fpr)
    # Without knowledge the ranking is a random shuffle: members drawn before the (allowed + 1)-th non-member.
    null = stats.nhypergeom(members + nonmembers, members, min(_allowed(max_fpr, nonmembers) + 1, nonmembers))
    return OperatingPoint(
        max_fpr=max_fpr,
        tpr=clopper_pearson(hits, members),
        fpr=false / nonmembers,
        true_positives=hits,
        false_positives=false,
        members=members,
        nonmembers=nonmembers,
        chance_mean=float(null.mean()) / members,
        chance_high=float(null.ppf(0.975)) / members,
        p_value=chance_of_hits(hits, members, nonmembers, max_fpr),
    )


def hits_at_fpr(values: NDArray[np.float64], member: NDArray[np.bool_], max_fpr: float) -> tuple[int, int]:
    """Members and non-members above :func:`bar_at_fpr`."""
    called = values > bar_at_fpr(values, member, max_fpr)
    return int(called[member].sum()), int(called[~member].sum())


def bar_at_fpr(values: NDArray[np.float64], member: NDArray[np.bool_], max_fpr: float) -> float:
    """The score of the first non-member that is not allowed: what lies above is called a member."""
    outside = np.sort(values[~member])[::-1]
    allowed = _allowed(max_fpr, len(outside))
    return float(outside[allowed]) if allowed < len(outside) else -np.inf


def chance_of_hits(hits: int, members: int, nonmembers: int, max_fpr: float) -> float:
    """Chance of at least so many hits at `max_fpr` when the scores know nothing: a negative hypergeometric tail."""
    allowed = min(_allowed(max_fpr, nonmembers), nonmembers - 1)
    # The first hits + allowed of the ranking then hold at most `allowed` non-members.
    return float(stats.hypergeom.cdf(allowed, members + nonmembers, nonmembers, hits + allowed))


def _allowed(max_fpr: float, nonmembers: int) -> int:
    """False positives that a rate allows."""
    return int(np.floor(max_fpr * nonmembers + 1e-9))


def balanced_accuracy(scores: ArrayLike, is_member: ArrayLike) -> float:
    """Largest mean of true-positive and true-negative rate over all thresholds.

    The threshold is chosen on the scored candidates: chance is above 0.5, see :func:`chance_balanced_accuracy`.
    """
    values, member = checked(scores, is_member)
    order, last = _thresholds(values)
    return (max(0.0, float(np.cumsum(_steps(member)[order])[last].max())) + 1) / 2


def chance_balanced_accuracy(
    scores: ArrayLike, is_member: ArrayLike, seed: int, replicates: int | None = None
) -> tuple[float, float]:
    """Mean and 97.5 % quantile of :func:`balanced_accuracy` when memberships are shuffled among these scores.

    `replicates` None: 1000, and fewer, down to 200, for thousands of scores.
    """
    values, member = checked(scores, is_member)
    _, last = _thresholds(values)
    steps = _steps(member)
    rng = numpy_rng(seed, "balanced accuracy")
    best = np.empty(replicates or int(np.clip(2_000_000 // len(values), 200, 1000)))
    for index in range(len(best)):
        best[index] = max(0.0, np.cumsum(rng.permutation(steps))[last].max())
    accuracy = (best + 1) / 2
    return float(accuracy.mean()), float(np.quantile(accuracy, 0.975))


def _thresholds(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ranking, highest first, and the last place of each tie in it."""
    order = np.argsort(-values, kind="stable")
    return order, np.append(np.nonzero(np.diff(values[order]))[0], len(values) - 1)


def _steps(member: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What each candidate adds to true-positive minus false-positive rate."""
    return np.where(member, 1 / member.sum(), -1 / (~member).sum())


def roc_points(scores: ArrayLike, is_member: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False- and true-positive rates of the ROC curve, both rising from 0 to 1."""
    values, member = checked(scores, is_member)
    fpr, tpr, _ = roc_curve(member, values, drop_intermediate=False)
    return fpr, tpr


def checked(scores: ArrayLike, is_member: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Finite scores (N,), float64, and memberships (N,), bool, with one of each kind; else DataError."""
    values, member = np.asarray(scores, dtype=np.float64), np.asarray(is_member)
    if values.ndim != 1 or values.shape != member.shape:
        raise DataError(
            f"{values.shape} scores for {member.shape} memberships: one of each per candidate is needed"
        )
    if member.dtype != np.bool_:
        raise DataError(f"memberships must be booleans, not {member.dtype}")
    if not np.isfinite(values).all():
        raise DataError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} membership scores are not finite"
        )
    if member.all() or not member.any():
        raise DataError(
            f"{int(member.sum())} members and {int((~member).sum())} non-members: one of each is needed"
        )
    return values, member
