"""Intervals against closed forms, scipy and their own promise of coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedattack.errors import ConfigError
from fedattack.metrics import statistics


def test_bootstrap_of_many_values_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    found = statistics.bootstrap_mean(values, seed=1)
    reach = 1.96 * values.std() / math.sqrt(2000)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert statistics.bootstrap_mean(values, seed=1) == statistics.bootstrap_mean(values, seed=1)
    assert statistics.bootstrap_mean(values, seed=1) != statistics.bootstrap_mean(values, seed=2)


def test_images_of_one_batch_are_no_independent_evidence() -> None:
    victims = np.repeat([10.0, 20.0, 30.0, 40.0], 25)
    groups = np.repeat([0, 1, 2, 3], 25)
    alone = statistics.bootstrap_mean([10.0, 20.0, 30.0, 40.0], seed=0)
    grouped = statistics.bootstrap_mean(victims, seed=0, groups=groups)
    assert (grouped.low, grouped.high, grouped.count) == (alone.low, alone.high, 4)
    naive = statistics.bootstrap_mean(victims, seed=0)
    assert naive.high - naive.low < 0.5 * (grouped.high - grouped.low)


def test_one_victim_has_no_interval() -> None:
    found = statistics.paired_difference([30.0], [10.0], seed=0)
    assert found.mean == 20.0
    assert not found.known


def test_paired_difference_covers_student() -> None:
    a, b = np.array([3.0, 5.0, 9.0]), np.array([1.0, 4.0, 5.0])
    found = statistics.paired_difference(a, b, seed=0)
    student = stats.ttest_rel(a, b).confidence_interval()
    assert found.low <= student.low + 1e-12
    assert found.high >= student.high - 1e-12


def test_paired_difference_seldom_calls_noise_significant() -> None:
    rng = np.random.default_rng(5)
    false_alarms = sum(
        statistics.paired_difference(*rng.normal(size=(2, 3)), seed=s, replicates=200).low > 0
        for s in range(400)
    )
    assert false_alarms / 400 < 0.05  # one-sided 2.5 % nominal


def test_binomial_intervals() -> None:
    exact = statistics.clopper_pearson(0, 520)
    assert (exact.low, exact.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 520)))
    n, k, z = 40, 9, stats.norm.ppf(0.975)
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    score = statistics.wilson(k, n)
    assert (score.low, score.high) == (pytest.approx(centre - reach), pytest.approx(centre + reach))


def test_difference_of_shares_newcombe_example() -> None:
    # Newcombe (1998), table II, contrast a: 56/70 - 48/80, method 10; his samples differ in size, so only one side of
    # the construction is compared here, with equal sizes worked out from the two Wilson intervals.
    found = statistics.share_difference(0.8, 0.6, 100)
    one, two = statistics.wilson(80, 100), statistics.wilson(60, 100)
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - math.hypot(0.8 - one.low, two.high - 0.6))
    assert found.high == pytest.approx(0.2 + math.hypot(one.high - 0.8, 0.6 - two.low))
    assert 0 < found.low < 0.2 < found.high


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.bootstrap_mean([], 0),
        lambda: statistics.bootstrap_mean([1.0, math.nan], 0),
        lambda: statistics.bootstrap_mean([1.0, 2.0], 0, confidence=1.0),
        lambda: statistics.bootstrap_mean([1.0, 2.0], 0, groups=[1]),
        lambda: statistics.paired_difference([1.0], [1.0, 2.0], 0),
        lambda: statistics.clopper_pearson(3, 2),
        lambda: statistics.wilson(0, 0),
    ],
)
def test_bad_input_is_refused(call) -> None:
    with pytest.raises(ConfigError):
        call()
