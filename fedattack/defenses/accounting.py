"""What Gaussian noise guarantees: exact composition without sampling, Renyi accounting with Poisson sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp

from fedattack.errors import ConfigError

ORDERS: tuple[float, ...] = (
    *(1 + step / 10 for step in range(1, 100)),
    *range(11, 65),
    *(80, 96, 128, 192, 256, 384, 512),
)
"""Renyi orders that are tried."""

UNIT_WORDS = {
    "sample": "one sample there or zero (zero-out)",
    "client": "all that a client sends there or zero (zero-out)",
}
"""What may be there or not, in words, with the adjacency for which epsilon is accounted."""

_REACH = 14.0
_STEPS_PER_SIGMA = 40


@dataclass(frozen=True)
class Privacy:
    """What one client's noise guarantees over the rounds it took part in.

    `epsilon`, at `delta`, is for what the client really does: fixed-size batches, no amplification by sampling;
    infinite where there is no guarantee (`note` says why). `sampled_epsilon` is what DP-SGD accountants print: the
    same noise as if each batch had been a Poisson sample; None for "client", since the server knows who answered.

    Both hold for zero-out adjacency: the unit's contribution is there, or is zero. `replacement_epsilon` holds where
    another unit stands in its place, which moves a clipped sum twice as far.
    """

    epsilon: float
    delta: float
    unit: Literal["client", "sample"]  # what may be there or not: all a client sends, or one sample
    releases: int  # noised releases that can hold the unit
    sampled_epsilon: float | None = None
    note: str = ""
    replacement_epsilon: float = math.inf


def gaussian_epsilon(noise: float, releases: int, delta: float) -> float:
    """Smallest epsilon of `releases` composed Gaussian mechanisms of L2 sensitivity 1, exactly.

    `noise` is the standard deviation over sensitivity; the composition is one Gaussian mechanism of noise
    ``noise / sqrt(releases)`` (Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, 2018,
    theorem 8; Dong, Roth and Su, Gaussian Differential Privacy, 2022, corollary 3.3).
    """
    _check_delta(delta)
    if releases == 0:
        return 0.0
    if noise <= 0:
        return math.inf
    mu = math.sqrt(releases) / noise
    wanted = math.log(delta)

    def excess(epsilon: float) -> float:
        first = float(log_ndtr(mu / 2 - epsilon / mu))
        second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
        # log(exp(first) - exp(second)): both are tiny for a large epsilon
        gap = second - first
        return (first + math.log(-math.expm1(gap)) if gap < 0 else -math.inf) - wanted

    if excess(0.0) <= 0:
        return 0.0
    top = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1.0
    return float(brentq(excess, 0.0, top, xtol=1e-12, rtol=1e-12))


def renyi_divergence(order: float, rate: float, noise: float) -> float:
    """Renyi divergence of one Poisson-sampled Gaussian mechanism of L2 sensitivity 1.

    ``log(E[((1 - q) + q exp((2z - 1) / (2 s^2)))^order]) / (order - 1)`` with z ~ N(0, s^2), order > 1, `rate` q in
    [0, 1] and `noise` s > 0, by the trapezoid rule, which converges geometrically for such integrands (Mironov,
    Talwar and Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019, equation 2).
    """
    if rate == 0:
        return 0.0
    if rate == 1:
        return order / (2 * noise * noise)
    low, high = -_REACH * noise, order + _REACH * noise
    points = max(2001, round((high - low) / noise * _STEPS_PER_SIGMA))
    z, step = np.linspace(low, high, points, retstep=True)
    density = -(z * z) / (2 * noise * noise) - math.log(noise * math.sqrt(2 * math.pi))
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise * noise))
    moment = float(logsumexp(density + order * ratio)) + math.log(float(step))
    return max(0.0, moment / (order - 1))


@lru_cache(maxsize=4096)
def sampled_epsilon(
    rate: float, noise: float, releases: int, delta: float, orders: tuple[float, ...] = ORDERS
) -> float:
    """Epsilon of `releases` Poisson-sampled Gaussian mechanisms, by Renyi accounting; the best of `orders` counts.

    `rate` and `noise` as in :func:`renyi_divergence`. Conversion: Canonne, Kamath and Steinke, The Discrete Gaussian
    for Differential Privacy, 2020, proposition 12.
    """
    _check_delta(delta)
    if releases == 0 or rate == 0:
        return 0.0
    if noise <= 0:
        return math.inf
    best = math.inf
    for order in orders:
        spent = releases * renyi_divergence(order, rate, noise)
        best = min(best, spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return max(0.0, best)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta}: accepted: above 0 and below 1")
