"""Bounds and estimates of epsilon from canaries, against closed forms, published values and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from fedattack.defenses.accounting import gaussian_epsilon
from fedattack.errors import ConfigError
from fedattack.metrics.canaries import (
    gaussian_bound,
    gaussian_estimate,
    guessed,
    one_run_bound,
    one_run_p_value,
    right_guesses,
)

DELTA = 1e-5


@pytest.mark.parametrize(
    ("count", "guesses", "ceiling"),
    [(100, 100, 3.49), (1000, 1000, 5.78), (5000, 5000, 7.28), (500, 50, 2.77), (2000, 200, 4.14)],
)
def test_the_largest_value_that_so_many_canaries_could_show(count: int, guesses: int, ceiling: float) -> None:
    assert one_run_bound(count, guesses, guesses, DELTA) == pytest.approx(ceiling, abs=0.005)
    assert one_run_bound(count, guesses, guesses // 2, DELTA) == 0.0


def test_the_bound_is_where_the_sums_of_the_theorem_meet_five_percent() -> None:
    count, guesses, right = 300, 40, 33
    epsilon = one_run_bound(count, guesses, right, 1e-3)
    chance = binom.pmf(np.arange(guesses + 1), guesses, 1 / (1 + math.exp(-epsilon)))
    beta = chance[right:].sum()
    alpha = max(chance[right - i : right].sum() / i for i in range(1, right + 1))
    assert beta + 2 * count * 1e-3 * alpha == pytest.approx(0.05, abs=1e-6)
    assert one_run_p_value(count, guesses, right, epsilon, 0.0) == pytest.approx(beta)


def test_without_delta_all_right_is_the_exact_binomial_bound() -> None:
    q = 0.05 ** (1 / 40)  # q^40 = 5 %
    assert one_run_bound(40, 40, 40, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)
    with pytest.raises(ConfigError, match="guesses"):
        one_run_bound(10, 20, 5, DELTA)


def scores(count: int, mu: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    present = rng.random(count) < 0.5
    return rng.standard_normal(count) + mu * present, present


@pytest.mark.parametrize(
    ("mu", "one_run", "estimate"),
    [(0.5, 0.71, 1.96), (1.0, 1.88, 4.47), (2.0, 3.73, 9.87), (4.0, 4.14, 24.5)],
)
def test_gaussian_scores_show_what_was_measured_before(mu: float, one_run: float, estimate: float) -> None:
    """Means over 20 seeds of 2,000 canaries beside those of another implementation, within their own spread."""
    rng, exact = np.random.default_rng(7), gaussian_epsilon(1 / mu, 1, DELTA)
    found = []
    for _ in range(20):
        values, present = scores(2000, mu, rng)
        right = right_guesses(values, present, guessed(2000, 0.1))
        fitted = gaussian_estimate(values, present, np.ones(2000), DELTA)
        assert fitted is not None
        row = one_run_bound(2000, 200, right, DELTA), gaussian_bound(2000, 200, right, DELTA)
        found.append((*row, fitted.epsilon, fitted.low <= exact <= fitted.high))
    bound, tighter, fit, covered = np.array(found).T
    assert bound.mean() == pytest.approx(one_run, abs=0.15)
    assert fit.mean() == pytest.approx(estimate, abs=0.25)
    assert fit.mean() == pytest.approx(exact, rel=0.1)
    assert (bound > exact).sum() <= 1
    assert (tighter > exact).sum() <= 1
    assert (tighter >= bound).all()
    assert covered.sum() >= 16


def test_gaussian_bound_covers_and_sees_half_the_noise() -> None:
    """Few canaries and all of them guessed about, where the bound is tightest: at most one in twenty above."""
    rng, exact = np.random.default_rng(3), gaussian_epsilon(1.0, 1, DELTA)
    known: dict[int, float] = {}

    def bound(mu: float) -> float:
        values, present = scores(60, mu, rng)
        right = right_guesses(values, present, 60)
        return known.setdefault(right, gaussian_bound(60, 60, right, DELTA))

    assert np.mean([bound(1.0) > exact for _ in range(400)]) <= 0.05 + 0.02
    values, present = scores(2000, 2.0, rng)
    assert gaussian_bound(2000, 200, right_guesses(values, present, 200), DELTA) > exact


def test_unequal_inclusions_are_put_on_one_scale() -> None:
    rng = np.random.default_rng(1)
    times = rng.integers(1, 9, 40_000).astype(float)
    present = rng.random(40_000) < 0.5
    values = times * present + 2.0 * np.sqrt(times) * rng.standard_normal(40_000)
    fitted = gaussian_estimate(values, present, times, DELTA)
    assert fitted is not None
    assert fitted.mu == pytest.approx(math.sqrt(times.mean()) / 2.0, rel=0.02)
    assert fitted.epsilon == pytest.approx(gaussian_epsilon(1 / fitted.mu, 1, DELTA))
    assert gaussian_estimate(values[:3], np.array([True, False, False]), times[:3], DELTA) is None


def test_standard_error_is_the_spread_over_runs() -> None:
    rng = np.random.default_rng(2)
    found = [gaussian_estimate(*scores(400, 1.5, rng), np.ones(400), DELTA) for _ in range(300)]
    spread = np.std([one.mu for one in found if one])
    assert np.mean([one.error for one in found if one]) == pytest.approx(spread, rel=0.12)


def test_guesses_are_an_even_number_fixed_beforehand() -> None:
    assert [guessed(count, 0.1) for count in (2, 3, 19, 500, 2000)] == [2, 2, 2, 50, 200]
    assert guessed(7, 1.0) == 6
    values = np.array([3.0, -1.0, 0.2, 5.0])
    assert right_guesses(values, np.array([True, False, False, True]), 4) == 4
    assert right_guesses(values, np.array([False, True, False, True]), 2) == 1
