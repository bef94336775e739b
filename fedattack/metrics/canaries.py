"""What canaries measure of a promise of noise: lower bounds of epsilon from one run, and the Gaussian estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri

from fedattack.defenses.accounting import gaussian_epsilon
from fedattack.errors import ConfigError

LARGEST = 100.0
"""Epsilons, and ratios of shift to noise, beyond this are not told apart."""


def one_run_p_value(count: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Chance of so many right guesses, at most, if the mechanism were (epsilon, delta)-differentially private.

    `count` units are each there by a fair coin, `guesses` of them are guessed about, a number fixed beforehand, and
    `right` guesses are right (Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run, 2023,
    theorem 5.2). May exceed 1.
    """
    _check(count, guesses, right)
    at_least = stats.binom.sf(
        np.arange(-1, guesses), guesses, expit(epsilon)
    )  # P[Bin >= j], j = 0, ..., guesses
    steps = np.arange(1, right + 1)
    alpha = ((at_least[right - steps] - at_least[right]) / steps).max(initial=0.0)
    return float(at_least[right] + 2 * count * delta * alpha)


def one_run_bound(count: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """Largest epsilon at `delta` that the guesses refute; it holds for whatever the mechanism is.

    See :func:`one_run_p_value`. 0 where even epsilon 0 is not refuted.
    """

    def excess(epsilon: float) -> float:
        return one_run_p_value(count, guesses, right, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    return float(brentq(excess, 0.0, LARGEST, xtol=1e-9))


def gaussian_refuted(mu: float, count: int, guesses: int, right: int, confidence: float = 0.95) -> bool:
    """Whether the guesses refute that each unit shifts the release by at most `mu` deviations of Gaussian noise.

    Of a mechanism that is f-DP with f the trade-off of N(0, 1) against N(mu, 1); arguments as
    :func:`one_run_p_value` (Mahloujifar, Melis and Chaudhuri, Auditing f-Differential Privacy in One Run, 2025,
    algorithm for guesses with abstention).
    """
    _check(count, guesses, right)
    tail = (1 - confidence) * guesses / count
    correct, wrong = tail * right / guesses, tail * (guesses - right) / guesses
    for number in range(right - 1, -1, -1):
        before = wrong
        wrong = max(wrong, float(ndtr(ndtri(correct) - mu)))
        correct += number / (guesses - number) * (wrong - before)
        if correct > 1:
            return True
    return correct + wrong > guesses / count


def gaussian_bound(count: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """Epsilon at `delta` of the most noise that the guesses refute; it holds for Gaussian noise.

    See :func:`gaussian_refuted`. Both this bound and :func:`one_run_bound` are larger the more guesses are right and
    depend on nothing else, so that at most one run in twenty has either above the truth.
    """
    low, high = 0.0, LARGEST
    if not gaussian_refuted(1e-9, count, guesses, right, confidence):
        return 0.0
    while high - low > 1e-4 * max(1.0, low):
        middle = (low + high) / 2
        if gaussian_refuted(middle, count, guesses, right, confidence):
            low = middle
        else:
            high = middle
    return shift_epsilon(low, delta)


def shift_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon at `delta` of Gaussian noise that a unit shifts by `mu` deviations; 0 for `mu` not above 0."""
    return gaussian_epsilon(1 / mu, 1, delta) if mu > 0 else 0.0


@dataclass(frozen=True)
class GaussianEstimate:
    """`mu`, by how many deviations of the noise a canary shifts its score, and epsilon; both with 95 % ends.

    An estimate and no bound: the true epsilon may lie on either side. `least`, which the true one falls short of in
    one run in a thousand, is a bound where scores are normal, as Gaussian noise makes them.
    """

    mu: float
    error: float  # standard error of `mu`
    epsilon: float
    low: float
    high: float
    least: float


def gaussian_estimate(
    scores: NDArray[np.float64], present: NDArray[np.bool_], inclusions: NDArray[np.float64], delta: float
) -> GaussianEstimate | None:
    """Estimate epsilon from scores that are normal about `inclusions` times a shift where present, about 0 elsewhere.

    Andrew et al., One-shot Empirical Privacy Estimation for Federated Learning, 2024: normal distributions are fitted
    to both sides, with one variance, and ``mu`` is the distance of their means over the deviation.

    Parameters
    ----------
    scores, present, inclusions : ndarray, shape (m,)
        Score of each canary, whether it was there, and how many releases could hold it (above 0, not necessarily
        whole): a score's variance is proportional to these. ``mu`` is for a canary of their mean.

    Returns
    -------
    GaussianEstimate or None
        None with fewer than two canaries on either side, or without any spread.
    """
    if min(present.sum(), (~present).sum()) < 2:
        return None
    even = scores / np.sqrt(inclusions)  # of one variance
    residual, means, spread = even.copy(), [], 0.0
    for side in (present, ~present):
        weight = np.sqrt(inclusions[side])
        mean = float((even[side] * weight).sum() / inclusions[side].sum())
        residual[side] -= mean * weight
        means.append(mean)
        spread += 1 / float(inclusions[side].sum())
    deviation = math.sqrt(float(np.square(residual).sum()) / (len(scores) - 2))
    if deviation == 0:
        return None
    typical = float(inclusions.mean())
    mu = (means[0] - means[1]) * math.sqrt(typical) / deviation
    error = math.sqrt(typical * spread + mu * mu / (2 * (len(scores) - 2)))
    reach = float(ndtri(0.975)) * error
    low, high = (shift_epsilon(mu + sign * reach, delta) for sign in (-1, 1))
    # of normal scores the distance is noncentral t
    unit, freedom = math.sqrt(typical * spread), len(scores) - 2
    span = 8 * error / unit + 1
    least = brentq(lambda c: stats.nct.sf(mu / unit, freedom, c) - 1e-3, mu / unit - span, mu / unit + span)
    return GaussianEstimate(
        mu, error, shift_epsilon(mu, delta), low, high, shift_epsilon(least * unit, delta)
    )


def guessed(count: int, share: float) -> int:
    """How many of `count` canaries are guessed about: an even number, at least 2, about `share` of them."""
    return min(count // 2, max(1, round(share * count / 2))) * 2


def right_guesses(evidence: NDArray[np.float64], present: NDArray[np.bool_], guesses: int) -> int:
    """How many guesses are right: half of them say "in", of the highest `evidence`, half "out", of the lowest."""
    order, half = np.argsort(evidence, kind="stable"), guesses // 2
    return int((~present[order[:half]]).sum() + present[order[len(order) - half :]].sum())


def _check(count: int, guesses: int, right: int) -> None:
    if not 0 <= right <= guesses <= count or guesses < 1:
        raise ConfigError(
            f"{right} of {guesses} guesses about {count} canaries right: accepted: 0 <= right <= guesses <= canaries"
        )
