"""The digits experiment: SemSim of a classifier's answers, weighed by another on degradations seen and unseen."""

from __future__ import annotations

import pytest

from fedattack.metrics.degradations import ARMS
from simulations.bench.semsim import SEEN, UNSEEN, one_seed, run


def test_fourteen_degradations_of_which_six_are_unseen() -> None:
    names = [name for name, _ in ARMS]
    assert (len(SEEN), len(UNSEEN)) == (8, 6)
    assert set(SEEN + UNSEEN) <= set(names)
    assert not set(SEEN) & set(UNSEEN)


@pytest.mark.slow
def test_semsim_follows_the_judge() -> None:
    """On one of the two seeds that no choice was made on; the benchmark has all three."""
    one = one_seed(1)
    found = one["figures"]
    assert found["semsim_seen_auc"] >= 0.88
    assert found["semsim_unseen_auc"] >= 0.78
    for part in ("seen", "unseen"):
        # The classifier that answered knows more than what learned from its answers: that is said, not hidden.
        assert found[f"labeller_{part}_auc"] > found[f"semsim_{part}_auc"] > found[f"psnr_{part}_auc"]
        assert 0.4 < found[f"regcorr_{part}_auc"] < 1
    assert 0.8 < one["labeller_and_judge_agree"] < 1


@pytest.mark.slow
def test_figures_are_means_over_seeds() -> None:
    found = run(quick=True)
    (one,) = found["seeds"]
    assert one["figures"]["semsim_seen_auc"] == found["semsim_seen_auc"] == found["worst_semsim_seen_auc"]
    assert found["originals_tested"] == one["originals_tested"] <= 40
