"""What an audit of forgetting says, against computations of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats
from sklearn.metrics import roc_auc_score

from fedattack.audit.forgetting import FORGETTING, MISLABELLED, RANDOM, Shadows, audit_forgetting
from fedattack.audit.forgetting_scores import (
    challenge_epsilon,
    klom,
    population_test,
    tug_of_war,
    u_lira,
)
from fedattack.errors import DataError

TRAININGS, TARGETS = 64, 24


def scene(gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coins, scores that lie `gap` higher where the coin fell, around a level of each sample's own; a control."""
    rng = np.random.default_rng(seed)
    asked = rng.permuted(np.tile((np.arange(TRAININGS) % 2 == 0)[:, None], (1, TARGETS)), axis=0)
    levels = 5 * rng.normal(size=TARGETS)
    scores, control = levels + rng.normal(size=(2, TRAININGS, TARGETS))
    return asked, scores + gap * asked, control


def parted(asked: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(asked, scores, np.nan), np.where(asked, np.nan, scores)


def test_the_likelihood_ratio_is_of_gaussians_of_the_other_half() -> None:
    asked, scores, _ = scene(1.5)
    found = u_lira(*parted(asked, scores))
    expected, truth = [], []
    half = TRAININGS // 2
    for t in range(TRAININGS):
        others = np.arange(half, TRAININGS) if t < half else np.arange(half)
        for k in range(TARGETS):
            inside, outside = (scores[others, k][asked[others, k] == side] for side in (True, False))
            ratio = [
                -(((scores[t, k] - side.mean()) / side.std(ddof=1)) ** 2) / 2 - math.log(side.std(ddof=1))
                for side in (inside, outside)
            ]
            expected.append(ratio[0] - ratio[1])
            truth.append(asked[t, k])
    order = np.lexsort((found.target, found.training))
    np.testing.assert_allclose(found.scores[order], expected)
    np.testing.assert_array_equal(found.unlearned[order], truth)
    assert found.auc.mean == pytest.approx(roc_auc_score(truth, expected))
    # of two unit normals 1.5 apart, told by a known level
    assert found.auc.mean == pytest.approx(stats.norm.cdf(1.5 / math.sqrt(2)), abs=0.03)


def test_one_threshold_misses_what_each_samples_own_level_hides() -> None:
    asked, scores, _ = scene(1.5)
    sides = parted(asked, scores)
    assert population_test(*sides).auc.mean < 0.62
    assert u_lira(*sides).auc.mean > 0.8
    nulls = [u_lira(*parted(*scene(0.0, seed)[:2])).auc for seed in range(20)]
    assert np.mean([null.mean for null in nulls]) == pytest.approx(0.5, abs=0.015)
    assert sum(null.low < 0.5 < null.high for null in nulls) >= 17
    asked, scores, _ = scene(0.0)
    with pytest.raises(DataError, match="train more shadows"):
        u_lira(*parted(asked[:12], scores[:12]))


def test_divergence_of_margins() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(1, 2, (200, 1)), rng.normal(0, 1, (150, 1))
    p, q = (stats.norm(side.mean(), side.std(ddof=1)) for side in (theirs, ours))
    expected, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -12, 12)
    assert klom(ours, theirs)[0] == pytest.approx(expected, rel=1e-6)
    edges = np.linspace(min(ours.min(), theirs.min()), max(ours.max(), theirs.max()), 21)
    shares = [np.histogram(side, edges)[0] / len(side) + 1e-5 for side in (theirs, ours)]
    shares = [share / share.sum() for share in shares]
    assert klom(ours, theirs, "histogram")[0] == pytest.approx(
        float((shares[0] * np.log(shares[0] / shares[1])).sum())
    )


def brute_force(ours: np.ndarray, theirs: np.ndarray, delta: float = 1e-5) -> float:
    """The challenge's epsilon over every pair of thresholds between values, and what lies in or outside them."""
    values = np.unique(np.concatenate([ours, theirs]))
    borders = [-np.inf, *((values[1:] + values[:-1]) / 2), np.inf]
    best = 0.0
    for low in borders:
        for high in borders:
            for outside in (False, True):
                told = [((side > low) & (side < high)) != outside for side in (ours, theirs)]
                fnr, fpr = 1 - told[0].mean(), told[1].mean()
                if fnr == 0 and fpr == 0:
                    return math.inf
                if fnr and fpr:
                    ratios = [(1 - delta - fpr) / fnr, (1 - delta - fnr) / fpr]
                    best = max([best, *(math.log(ratio) for ratio in ratios if ratio > 0)])
    return best


def test_the_challenges_epsilon() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(0.7, 1, (12, 5)), rng.normal(0, 1, (12, 5))
    ours[:, 4] += 20
    ours[:3, 0] = theirs[:3, 0]  # ties
    found = challenge_epsilon(ours, theirs)
    expected = [brute_force(*pair) for pair in zip(ours.T, theirs.T, strict=True)]
    np.testing.assert_allclose(found.epsilon, expected)
    assert math.isinf(found.epsilon[4])
    assert found.cap == pytest.approx(math.log(11))
    assert max(found.epsilon[:4]) <= found.cap
    scores = [0.0 if math.isinf(e) else 2.0 ** -math.floor(e / 0.5) for e in expected]
    assert found.score == pytest.approx(np.mean(scores))


def test_tug_of_war() -> None:
    found = tug_of_war(np.array([[0.5, 1.0, 0.9]]), np.array([[0.4, 0.9, 0.9]]))
    np.testing.assert_allclose(found, [0.9 * 0.9 * 1.0])


def shadows(gap: float, accuracy: float = 0.9) -> Shadows:
    asked, scores, control = scene(gap, seed=1)
    rng = np.random.default_rng(3)
    kinds = np.array([RANDOM] * (TARGETS // 2) + [MISLABELLED] * (TARGETS // 2))
    probes = rng.normal(size=(2, TRAININGS, TARGETS))
    others = rng.normal(size=(4, TRAININGS, 7))
    accuracies = np.full((TRAININGS, 3), accuracy)
    return Shadows(
        asked=asked,
        after=scores,
        control=control,
        probed=asked[::-1],
        probes_before=probes[0] + asked[::-1],
        probes_after=probes[1] + 3 * asked[::-1],
        retained=(others[0], others[1]),
        held_out=(others[2], others[3]),
        accuracies=(accuracies, accuracies),
        samples=np.arange(TARGETS),
        labels=np.zeros(TARGETS, np.int64),
        kinds=kinds,
        classes=np.arange(200) % 10,
    )


def test_verdicts() -> None:
    told, traces, clean = (audit_forgetting("ascent", shadows(gap)) for gap in (4.0, 1.0, 0.0))
    assert (told.level, traces.level) == ("leak", "partial")
    assert told.verdict.startswith("not forgotten: U-LiRA AUC 0.99")
    assert "one threshold for all samples sees" in told.verdict
    assert clean.level in ("none", "undecided")
    assert clean.level == ("none" if clean.summary["metrics"]["auc"]["high"] < 0.55 else "undecided")
    at_chance = audit_forgetting("ascent", shadows(0.0, accuracy=0.1))
    assert at_chance.level == "undecided"
    assert "at chance" in at_chance.verdict
    # what is retained got easier to tell
    m = told.summary["metrics"]
    assert m["retained_auc_before"]["mean"] < 0.85 < m["retained_auc"]["mean"]
    assert "of 40" not in FORGETTING.beside(told)[3]
    assert [row["kind"] for row in told.records] == [RANDOM] * 12 + [MISLABELLED] * 12
