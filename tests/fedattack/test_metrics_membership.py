"""Membership scores against stored references, scikit-learn and simulated chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from fedattack.errors import DataError
from fedattack.metrics import membership

REFERENCES = {
    "minus_ce": "loss_correct(-cross_entropy)",
    "pm_loss_shipped": "pm_LOSS_as_shipped(-softmax)",
    "rmia_off_g1": "rmia_offline_paper_allrefs_a0.3_gamma1",
    "rmia_on_g2": "rmia_online_paper_gamma2",
    "attack_R": "attack_R_empirical",
    "lira_online": "lira_online",
    "lira_off1": "lira_offline_one_sided_paper",
    "metric_modified_entropy": "metric_modified_entropy",
    "metric_gap_correctness": "metric_gap_correctness",
}


@pytest.mark.parametrize(("stored", "expected"), REFERENCES.items())
def test_reference_scores(shared_dir, stored: str, expected: str) -> None:
    folder = shared_dir / "checks" / "membership"
    scores = np.load(folder / "clf_noisy_scores.npz", allow_pickle=False)[stored]
    member = np.load(folder / "clf_noisy.npz", allow_pickle=False)["membership"][0]
    figures = json.loads((folder / "clf_noisy_expected.json").read_text())[expected]
    assert membership.auc(scores, member) == pytest.approx(figures["auc"], abs=1e-6)
    for share, name in ((0.01, "one_fpr"), (0.001, "one_tenth_fpr")):
        if name in figures:
            assert membership.tpr_at_fpr(scores, member, share).tpr.mean == pytest.approx(
                figures[name], abs=1e-9
            )


def _scores(shift: float, members: int = 300, nonmembers: int = 200, seed: int = 0):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(shift, 1, members), rng.normal(0, 1, nonmembers)])
    return scores, np.arange(members + nonmembers) < members


def test_operating_point_is_the_last_allowed_one() -> None:
    scores, member = _scores(1.0)
    fpr, tpr, _ = roc_curve(member, scores)
    for share in (0.1, 0.01, 0.001):
        point = membership.tpr_at_fpr(scores, member, share)
        assert point.tpr.mean == pytest.approx(tpr[fpr <= share][-1])
        assert point.fpr <= share
        assert point.true_positives == round(point.tpr.mean * 300)
        assert point.tpr.low <= point.tpr.mean <= point.tpr.high
    assert membership.tpr_at_fpr(scores, member, 0.001).false_positives == 0


def test_chance_floors_are_what_shuffling_scores() -> None:
    scores, member = _scores(0.0, members=60, nonmembers=150)
    rng = np.random.default_rng(2)
    shuffles = [rng.permutation(member) for _ in range(800)]
    areas = [membership.auc(scores, m) for m in shuffles[:300]]
    chance = membership.chance_auc(60, 150)
    assert np.std(areas) * 1.96 == pytest.approx(chance.high - 0.5, rel=0.12)
    point = membership.tpr_at_fpr(scores, member, 0.02)
    rates = [membership.tpr_at_fpr(scores, m, 0.02).tpr.mean for m in shuffles]
    assert np.mean(rates) == pytest.approx(point.chance_mean, rel=0.15)
    assert np.mean(np.array(rates) > point.chance_high) <= 0.045
    assert np.mean(np.array(rates) >= point.tpr.mean - 1e-12) == pytest.approx(point.p_value, abs=0.04)
    mean, high = membership.chance_balanced_accuracy(scores, member, seed=0)
    accuracies = [membership.balanced_accuracy(scores, m) for m in shuffles[:300]]
    assert mean == pytest.approx(np.mean(accuracies), abs=0.004)
    assert high == pytest.approx(np.quantile(accuracies, 0.975), abs=0.01)


def test_balanced_accuracy_of_a_perfect_and_a_useless_score() -> None:
    member = np.array([True, True, False, False])
    assert membership.balanced_accuracy([3, 2, 1, 0], member) == 1.0
    assert membership.balanced_accuracy([1, 1, 1, 1], member) == 0.5


@pytest.mark.parametrize(
    ("scores", "member", "words"),
    [
        ([0.1, np.nan], [True, False], "not finite"),
        ([0.1, 0.2], [True, True], "one of each"),
        ([0.1, 0.2, 0.3], [True, False], "per candidate"),
        ([0.1, 0.2], [1, 0], "booleans"),
    ],
)
def test_bad_input_is_refused(scores, member, words: str) -> None:
    with pytest.raises(DataError, match=words):
        membership.auc(scores, member)
