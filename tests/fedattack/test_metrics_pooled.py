"""Pooled AUCs against DeLong, resampling by hand and simulated truth; what a privacy guarantee allows."""

from __future__ import annotations

import numpy as np
import pytest
from audit_scenes import targets
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedattack.audit.membership_pool import Pool
from fedattack.errors import DataError
from fedattack.metrics import allowed_auc, allowed_tpr, auc_influence, pooled_auc


def _scores(shift: float, members: int = 300, nonmembers: int = 200, seed: int = 0):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(shift, 1, members), rng.normal(0, 1, nonmembers)])
    return scores, np.arange(members + nonmembers) < members


def test_one_target_agrees_with_delong_and_with_resampling() -> None:
    scores, member = _scores(0.7)
    scores = scores.round(1)  # many ties
    wins = (scores[member][:, None] > scores[~member]) + 0.5 * (scores[member][:, None] == scores[~member])
    deviation = np.sqrt(wins.mean(1).var(ddof=1) / 300 + wins.mean(0).var(ddof=1) / 200)
    found = pooled_auc(scores, member)
    assert found.mean == pytest.approx(roc_auc_score(member, scores))
    assert found.spread == pytest.approx(deviation, rel=1e-9)
    ends = wins.mean() + np.array([-1, 1]) * stats.norm.ppf(0.975) * deviation
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=0.001)
    rng, areas = np.random.default_rng(1), []
    for _ in range(500):
        m, n = rng.choice(scores[member], member.sum()), rng.choice(scores[~member], (~member).sum())
        areas.append(roc_auc_score(np.arange(len(scores)) < len(m), np.concatenate([m, n])))
    assert found.spread == pytest.approx(np.std(areas), rel=0.08)


def test_influence_is_what_leaving_a_candidate_out_changes() -> None:
    scores, member = _scores(0.4, 40, 30)
    area, moved = auc_influence(scores, member)
    for place in (0, 17, 45, 69):
        kept = np.arange(70) != place
        kind = member.sum() if member[place] else (~member).sum()
        without = roc_auc_score(member[kept], scores[kept])
        assert (area - without) * (kind - 1) / kind == pytest.approx(moved[place])
    assert moved[member].sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("clients", "design"),
    [
        (1, {"shared": False, "unit": 0.0, "offset": 0.0, "spread": 0.0}),
        (10, {"shared": False, "unit": 0.0, "offset": 0.0, "spread": 0.0}),
        (10, {"shared": True, "unit": 1.0, "offset": 1.0, "spread": 0.5}),
        (100, {"shared": True, "unit": 1.0, "offset": 0.5, "spread": 0.5}),
    ],
)
def test_pooled_intervals_cover_the_true_auc(clients: int, design: dict) -> None:
    pools = [Pool.of(targets(clients, 40, 0.5, seed=seed, **design)) for seed in range(100)]
    found = [pool.auc() for pool in pools]
    more = (
        Pool.of(targets(clients, 40, 0.5, seed=seed, **design)) for seed in range(1000, 1400 - 3 * clients)
    )
    truth = np.mean([auc_influence(pool.scores, pool.is_member)[0] for pool in more])
    covered = sum(one.low <= truth <= one.high for one in found)
    print(f"{clients} clients, {design}: true AUC {truth:.3f}, covered in {covered} of 100")
    assert 90 <= covered <= 99


def test_few_candidates_told_apart_have_a_wide_interval() -> None:
    found = pooled_auc([3.0, 2.0, 1.0, 0.0], np.array([True, True, False, False]))
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low < 0.4
    with pytest.raises(DataError, match="as many clients and units"):
        pooled_auc([1.0, 0.0], np.array([True, False]), units=[1])


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 1e-5), (2.0, 0.01), (8.0, 0.1)])
def test_what_a_guarantee_allows(epsilon: float, delta: float) -> None:
    rates = np.linspace(0, 1, 100_001)
    curve = [allowed_tpr(rate, epsilon, delta) for rate in rates]
    assert allowed_auc(epsilon, delta) == pytest.approx(np.trapezoid(curve, rates), abs=1e-6)
    assert allowed_tpr(0.01, epsilon, delta) == pytest.approx(
        min(np.exp(epsilon) * 0.01 + delta, 1 - np.exp(-epsilon) * (0.99 - delta))
    )
    # Randomised response reaches the bound where delta is 0.
    if not delta:
        flipped = 1 / (1 + np.exp(epsilon))
        assert allowed_tpr(flipped, epsilon, 0.0) == pytest.approx(1 - flipped)
    assert (allowed_tpr(0.01, np.inf, 0.0), allowed_auc(np.inf, 0.0)) == (1.0, 1.0)
