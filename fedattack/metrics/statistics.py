"""Intervals: how far a figure from so many victims, members or seeds can be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedattack.errors import ConfigError
from fedattack.rng import numpy_rng

REPLICATES = 2000

FEWEST = 3
"""Independent units below which no interval is given: two victims say next to nothing about the spread."""


@dataclass(frozen=True)
class Interval:
    """A mean or a share with its confidence interval."""

    mean: float
    low: float  # NaN, as `high`, where there are fewer than FEWEST independent units
    high: float
    count: int  # independent units behind the estimate (victims, members, seeds)
    confidence: float = 0.95
    spread: float = float("nan")  # standard deviation between the units; NaN where unknown

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def bootstrap_mean(
    values: ArrayLike,
    seed: int,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
) -> Interval:
    """Percentile bootstrap interval of a mean of finite figures (else ConfigError), one per image, candidate or seed.

    `groups`, shape (N,), names the independent unit of each value (the victim of each image). Whole groups are
    resampled: images of one batch share an update, so counting them as independent would make the interval too
    narrow. There are no ends when there are fewer than :data:`FEWEST` groups. (Efron and Tibshirani, An Introduction
    to the Bootstrap, 1993, chapter 13.)
    """
    sums, counts = _group_sums(values, groups)
    _check_confidence(confidence)
    mean = float(sums.sum() / counts.sum())
    spread = float((sums / counts).std(ddof=1)) if len(sums) > 1 else float("nan")
    if len(sums) < FEWEST:
        return Interval(mean, float("nan"), float("nan"), len(sums), confidence, spread)
    drawn = numpy_rng(seed, "bootstrap").integers(len(sums), size=(replicates, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), len(sums), confidence, spread)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    seed: int,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
) -> Interval:
    """Interval of the mean of ``first - second``, both of the same units; otherwise as :func:`bootstrap_mean`.

    The wider, at either end, of the paired percentile bootstrap and Student's t interval over the groups. With the
    handful of victims that one run attacks the percentile bootstrap alone is too narrow.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ConfigError(
            f"a paired difference needs figures of the same units; got shapes {a.shape} and {b.shape}"
        )
    bootstrap = bootstrap_mean(a - b, seed, groups, confidence, replicates)
    if not bootstrap.known:
        return bootstrap
    reach = _student_reach(bootstrap.spread, bootstrap.count, confidence)
    low, high = min(bootstrap.low, bootstrap.mean - reach), max(bootstrap.high, bootstrap.mean + reach)
    return dataclasses.replace(bootstrap, low=low, high=high)


def student_mean(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of independent values, (n,), with Student's t interval; NaN ends below :data:`FEWEST` values.

    Values that are all alike have none either: it would have no width, and nothing but they tells how they spread.
    """
    _check_confidence(confidence)
    found = np.asarray(values, dtype=np.float64)
    mean, units = float(found.mean()), len(found)
    spread = float(found.std(ddof=1)) if units > 1 else 0.0
    reach = _student_reach(spread, units, confidence) if spread > 0 and units >= FEWEST else float("nan")
    return Interval(mean, mean - reach, mean + reach, units, confidence, spread)


def _student_reach(spread: float, units: int, confidence: float) -> float:
    """Half the width of Student's t interval of a mean."""
    return float(stats.t.ppf((1 + confidence) / 2, units - 1) * spread / np.sqrt(units))


def units_needed(spread: float, distance: float, confidence: float = 0.95, most: int = 100_000) -> int:
    """Fewest units whose Student's t interval reaches no further than `distance` (above 0) from its mean.

    A `spread` of NaN (unknown) asks for :data:`FEWEST`; `most` is the answer where not even so many are enough.
    """
    low, high = FEWEST, most
    while low < high:  # the reach falls with every unit
        middle = (low + high) // 2
        if _student_reach(spread, middle, confidence) > distance:
            low = middle + 1
        else:
            high = middle
    return low


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a binomial share (Clopper and Pearson, 1934)."""
    _check_counts(successes, trials)
    _check_confidence(confidence)
    tail, missed = (1 - confidence) / 2, trials - successes
    low = float(stats.beta.ppf(tail, successes, missed + 1)) if successes else 0.0
    high = float(stats.beta.isf(tail, successes + 1, missed)) if missed else 1.0
    return Interval(successes / trials, low, high, trials, confidence)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a binomial share (Wilson, 1927): narrower than the exact one, close to nominal coverage."""
    _check_counts(successes, trials)
    _check_confidence(confidence)
    score = stats.binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / trials, float(score.low), float(score.high), trials, confidence)


def share_difference(first: float, second: float, trials: int, confidence: float = 0.95) -> Interval:
    """Interval of the difference of two shares, each of `trials` samples (Newcombe, 1998, method 10).

    It treats the two as independent; two models scored on the same test samples agree on many of them, so the
    interval is then wider than need be. It covers the test samples only, not the randomness of training.
    """
    one, two = (wilson(round(share * trials), trials, confidence) for share in (first, second))
    difference = first - second
    low = difference - float(np.hypot(first - one.low, two.high - second))
    high = difference + float(np.hypot(one.high - first, second - two.low))
    return Interval(difference, low, high, trials, confidence)


def _group_sums(
    values: ArrayLike, groups: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    flat = np.asarray(values, dtype=np.float64)
    if flat.ndim != 1 or flat.size == 0 or not np.isfinite(flat).all():
        raise ConfigError(f"an interval needs finite figures in one dimension; got {_shown(flat)}")
    if groups is None:
        return flat, np.ones_like(flat)
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    if member.shape != flat.shape:
        raise ConfigError(f"{flat.size} figures need as many group numbers; got {member.size}")
    sums = np.bincount(member, weights=flat).astype(np.float64)
    return sums, np.bincount(member).astype(np.float64)


def _shown(values: NDArray[np.float64]) -> Sequence[float] | str:
    return values.tolist() if values.size <= 8 else f"{values.size} figures of shape {values.shape}"


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence}: must lie between 0 and 1, both excluded")


def _check_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise ConfigError(
            f"{successes} of {trials} is no share: at least one trial, successes in [0, trials]"
        )
