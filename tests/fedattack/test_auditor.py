"""The auditor's figures and verdicts, on victims made for the purpose."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from audit_scenes import CLASSES, noisy, scene
from scipy import stats
from skimage.metrics import structural_similarity

from fedattack.audit import reconstruction_verdict as rule
from fedattack.audit.family import get_family
from fedattack.audit.reconstruction import audit_reconstruction
from fedattack.audit.unlearning import audit_unlearning
from fedattack.errors import DataError
from fedattack.groundtruth import GroundTruth
from fedattack.metrics.pixels import MeanSquaredError
from fedattack.observation import Reconstruction


def test_recovered_images_are_called_so() -> None:
    observations, truths = scene()
    found = audit_reconstruction("a", observations, noisy(truths, 0.003), truths, 1.5)
    assert found.level == "leak"
    assert found.verdict.startswith("private images recovered: mean 5")
    assert "above the best floor (auxiliary mean" in found.verdict
    assert "6 of 6 images" in found.verdict
    assert "the labels do leak: 6 of 6 right (best answer without the update: 1.0)" in found.verdict
    assert found.summary["recovered"] == 6
    assert found.summary["seconds"] == pytest.approx(1.5)
    assert found.summary["k"] == 23
    assert found.summary["k_measuring"] == 22  # one is the last layer's bias
    assert found.summary["k_per_pixel"] == pytest.approx(23 / 768)
    assert found.summary["rate"] == pytest.approx(23 / 224)
    assert found.summary["kept_per_layer"]["body.0.weight"] == {"kept": 22.0, "of": 216}


def test_records_hold_the_reference_scores() -> None:
    observations, truths = scene()
    answers = noisy(truths, 0.1)
    more = {"mse": MeanSquaredError()}
    found = audit_reconstruction("a", observations, answers, truths, 6.0, metrics=more)
    for row, answer, truth in zip(found.records, answers, truths, strict=True):
        a, b = answer.images[0].double().numpy(), truth.images[0].double().numpy()
        assert row["psnr"] == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()))
        assert row["ssim"] == pytest.approx(
            structural_similarity(a, b, data_range=1.0, channel_axis=0), abs=1e-6
        )
        assert row["floor.flat grey.psnr"] == pytest.approx(-10 * math.log10(((b - 0.5) ** 2).mean()))
        assert row["psnr_paper_scale"] == pytest.approx(row["psnr"] + 48.1308, abs=1e-4)
        others = [t.images[0].double().numpy() for t in truths if t is not truth]
        expected = np.mean([-10 * math.log10(((a - o) ** 2).mean()) for o in others])
        assert row["control_psnr"] == pytest.approx(expected, abs=1e-5)
        assert row["seconds"] == pytest.approx(1.0)
    psnrs = [row["psnr"] for row in found.records]
    described = found.summary["metrics"]["psnr"]
    assert (described["mean"], described["worst"], described["best"]) == pytest.approx(
        (np.mean(psnrs), min(psnrs), max(psnrs))
    )
    assert described["low"] < described["mean"] < described["high"]
    assert found.summary["metrics"]["mse"]["worst"] == max(row["mse"] for row in found.records)


def test_answering_the_prior_is_no_leakage() -> None:
    observations, truths = scene()
    mean = observations[0].auxiliary.images.mean(dim=0, keepdim=True)
    answers = [Reconstruction(mean.clone(), (t.labels + 1) % CLASSES, 0.1) for t in truths]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.level == "none"
    assert found.verdict.startswith("no leakage beyond the prior")
    assert "labels: 0 of 6 right (best answer without the update: 1.0, no more than that)" in found.verdict
    assert found.summary["best_floor"] == "auxiliary mean"
    assert found.summary["above_best_floor"]["mean"] == pytest.approx(0.0, abs=1e-5)


def test_the_attacks_own_prior_is_a_floor() -> None:
    observations, truths = scene()
    priors = noisy(truths, 0.05, seed=1)
    answers = [
        Reconstruction(a.images, (a.labels + 1) % CLASSES, 0.1, floors={"prior": p.images})
        for a, p in zip(noisy(truths, 0.05, seed=2), priors, strict=True)
    ]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.summary["best_floor"] == "prior"
    assert found.level == "none"
    assert torch.equal(found.images["prior"], torch.cat([p.images for p in priors]))


def test_some_of_the_image_is_partial_leakage() -> None:
    observations, truths = scene(victims=8)
    mean = observations[0].auxiliary.images.mean(dim=0, keepdim=True)
    answers = [Reconstruction(0.6 * mean + 0.4 * t.images, t.labels, 0.1) for t in truths]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.level == "partial"
    assert found.summary["recovered"] == 0
    assert found.summary["above_best_floor"]["low"] > 0
    assert found.summary["above_control"]["low"] > 0


def test_a_better_prior_is_not_taken_for_leakage() -> None:
    """Images that are as good on another's truth beat the floor without knowing the victim."""
    observations, truths = scene(victims=8, auxiliary=False)
    mean = torch.cat([t.images for t in truths]).mean(dim=0, keepdim=True)
    answers = [Reconstruction(mean.clone(), (t.labels + 1) % CLASSES, 0.1) for t in truths]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.summary["above_best_floor"]["low"] > 0
    assert found.summary["above_control"]["mean"] == pytest.approx(0.0, abs=0.5)
    assert found.level == "none"
    assert "no better on its own victim than on another's image" in found.verdict


def test_one_leaked_image_among_many_is_not_averaged_away() -> None:
    observations, truths = scene(victims=8)
    answers = noisy(truths, 0.4)
    answers[3] = noisy(truths, 0.001)[3]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.level == "partial"
    assert "1 of 8 images" in found.verdict


def test_one_victim_is_no_statistic() -> None:
    observations, truths = scene(victims=1)
    weak = audit_reconstruction("a", observations, noisy(truths, 0.1), truths, 1.0)
    assert weak.level == "undecided"
    assert "1 victim only, so no interval; at least 2 more victims would tell" in weak.verdict
    assert weak.summary["above_best_floor"]["low"] is None
    assert weak.summary["above_control"] is None
    assert audit_reconstruction("a", observations, noisy(truths, 0.002), truths, 1.0).level == "leak"
    assert audit_reconstruction("a", observations, noisy(truths, 0.9), truths, 1.0).level == "failed"


def test_batches_are_matched_and_victims_are_the_units() -> None:
    observations, truths = scene(victims=3, batch=3)
    order = torch.tensor([2, 0, 1])
    answers = [Reconstruction(a.images[order], a.labels[order], 0.1) for a in noisy(truths, 0.02)]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert len(found.records) == 9
    assert found.summary["metrics"]["psnr"]["worst"] > 25
    assert found.summary["matched_by"] == ["labels"]
    assert found.summary["count"] == 3
    assert found.summary["k_per_pixel"] == pytest.approx(23 / (3 * 768))
    wrong = [Reconstruction(a.images, a.labels.new_zeros(3), 0.1) for a in answers]
    assert audit_reconstruction("a", observations, wrong, truths, 1.0).summary["matched_by"] == ["MSE"]


def test_identical_images_are_infinite_and_counted() -> None:
    observations, truths = scene()
    answers = noisy(truths, 0.01)
    answers[0] = Reconstruction(truths[0].images.clone(), truths[0].labels, 0.0)
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    psnr = found.summary["metrics"]["psnr"]
    assert psnr["identical"] == 1
    assert psnr["best"] == math.inf
    assert psnr["mean"] == pytest.approx(np.mean([row["psnr"] for row in found.records[1:]]))
    exact = [Reconstruction(t.images.clone(), t.labels, 0.0) for t in truths]
    everything = audit_reconstruction("a", observations, exact, truths, 1.0)
    assert everything.level == "leak"
    assert "identical" in everything.verdict


def test_failed_reconstructions_are_counted_not_hidden() -> None:
    observations, truths = scene()
    answers: list[Reconstruction | None] = list(noisy(truths, 0.01))
    answers[1] = None
    answers[2] = Reconstruction(torch.full((1, 3, 16, 16), math.nan), truths[2].labels, 0.1)
    answers[3] = Reconstruction(torch.zeros(1, 1, 4, 4), truths[3].labels, 0.0)
    nothing = {"prior": torch.zeros(0, 3, 16, 16)}
    answers[4] = Reconstruction(answers[4].images, answers[4].labels, 0.1, floors=nothing)
    reasons = {observations[1].key: "its update is all zeros"}
    found = audit_reconstruction("a", observations, answers, truths, 1.0, reasons=reasons)
    told = [one["reason"] for one in found.summary["failed"]]
    assert [one["key"][-1] for one in found.summary["failed"]] == ["1", "2", "3", "4"]
    assert told == [
        "its update is all zeros",
        "it answered pixels that are not finite",
        "it answered images of shape (1, 1, 4, 4), and the private batch is (1, 3, 16, 16)",
        "its floor 'prior' answered no image",
    ]
    assert found.summary["missing"] == 4
    assert "4 victims failed (round-0001-client-00001: its update is all zeros), left out" in found.verdict
    assert [row["status"] for row in found.records][1:5] == [f"failed: {reason}" for reason in told]
    assert found.summary["metrics"]["psnr"]["count"] == found.summary["labels"]["of"] == 2
    assert torch.isnan(found.images["reconstruction"][1]).all()
    lost = audit_reconstruction("a", observations, [None] * 6, truths, 1.0, reasons=reasons)
    assert lost.level == "failed"
    assert lost.verdict == (
        "the attack failed: none of 6 images was reconstructed (round-0001-client-00000: no answer)"
    )


def test_duplicated_private_images_do_not_count_as_control() -> None:
    observations, truths = scene(victims=2)
    twin = [truths[0], GroundTruth(1, 1, truths[0].images, truths[0].labels, (0,))]
    found = audit_reconstruction("a", observations, noisy(twin, 0.01), twin, 1.0)
    assert [row["control_psnr"] for row in found.records] == [None, None]


def test_the_bootstrap_is_seeded() -> None:
    observations, truths = scene()
    first, again, other = (
        audit_reconstruction("a", observations, noisy(truths, 0.1), truths, 1.0, seed=seed).summary
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_bad_requests_are_refused() -> None:
    observations, truths = scene(victims=2)
    answers = noisy(truths, 0.1)
    with pytest.raises(DataError, match="no truth for round-0001-client-00001"):
        audit_reconstruction("a", observations, answers, truths[:1], 1.0)
    with pytest.raises(DataError, match="one of each"):
        audit_reconstruction("a", observations, answers[:1], truths, 1.0)


@pytest.mark.parametrize(
    ("after", "level"),
    [([0.70, 0.72, 0.69], "leak"), ([0.89, 0.893, 0.886], "partial"), ([0.90, 0.92, 0.91], "none")],
)
def test_unlearning_is_measured_against_random_deletion(after: list[float], level: str) -> None:
    found = audit_unlearning(
        "u",
        {"before": [0.92, 0.93, 0.92], "after": after, "random": [0.905, 0.91, 0.90]},
        requests=20,
        mechanism="retrain",
        seconds=3.0,
    )
    assert found.level == level
    assert found.summary["metrics"]["damage"]["mean"] == pytest.approx(
        np.mean([0.905, 0.91, 0.90]) - np.mean(after)
    )
    ends = [r["accuracy"] for r in found.records if r["arm"] == "after"]
    assert ends == after
    assert {r["request"] for r in found.records} == {None}


def test_damage_is_parted_between_mechanism_and_request() -> None:
    """Points lost by the mechanism on random samples, by the request under retraining, and by both together."""
    before, after, random = [0.98, 0.975, 0.99], [0.10, 0.12, 0.09], [0.85, 0.84, 0.86]
    retrained = [0.969, 0.96, 0.975], [0.98, 0.972, 0.985]
    arms = {"before": before, "after": after, "random": random}
    exact = {"retrained_after": retrained[0], "retrained_random": retrained[1]}
    found = audit_unlearning("u", arms | exact, requests=10, mechanism="scrub")
    metrics = found.summary["metrics"]
    b, m1, m2, r1, r2 = map(np.array, (before, after, random, *retrained))
    wanted = {"algorithm": b - m2, "request": r2 - r1, "together": (m2 - m1) - (r2 - r1)}
    for name, values in wanted.items():
        assert metrics[name]["mean"] == pytest.approx(values.mean())
        assert (
            metrics[name]["low"]
            <= stats.t.interval(0.95, 2, values.mean(), values.std(ddof=1) / 3**0.5)[0] + 1e-9
        )
    total = metrics["request"]["mean"] + metrics["together"]["mean"]
    assert total == pytest.approx(metrics["damage"]["mean"])
    told = get_family("unlearning").beside(found)
    assert told[0].startswith("accuracy lost by the mechanism alone, forgetting random samples: +13.2 points")
    idle = audit_unlearning("u", arms, requests=10, mechanism="scrub", idle="nothing else is left")
    assert idle.level == "undecided"
    assert "nothing else is left" in idle.verdict


def test_one_training_does_not_tell_how_others_would_do() -> None:
    arms = {"before": [0.92], "after": [0.80], "random": [0.90]}
    few = audit_unlearning("u", arms, requests=5, mechanism="retrain", test_samples=50)
    many = audit_unlearning("u", arms, requests=5, mechanism="retrain", test_samples=2000)
    unknown = audit_unlearning("u", arms, requests=5, mechanism="retrain")
    assert {few.level, many.level, unknown.level} == {"undecided"}
    assert many.verdict.endswith("one training does not tell how others would do: raise unlearning.seeds")
    assert many.summary["metrics"]["damage"]["low"] > 0
    assert many.summary["metrics"]["damage"]["interval_over"] == "test samples"
    with pytest.raises(DataError, match="shares"):
        audit_unlearning("u", {arm: [92.0] for arm in arms}, requests=5, mechanism="retrain")


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), None, "inf"])  # as they were, and as stored
def test_a_model_that_was_destroyed_is_damage_and_no_error(broken) -> None:
    arms = {"before": [0.92, 0.93, 0.91], "after": [0.1, 0.1, 0.11], "random": [0.91, 0.92, 0.9]}
    losses = {"before": [0.2, 0.2, 0.2], "after": [2.0, broken, 3.0], "random": [0.2, 0.3, 0.2]}
    found = audit_unlearning("u", arms, losses=losses, requests=5, mechanism="scrub")
    assert found.level == "leak"
    assert "loss_gained" not in found.summary["metrics"]
    ends = [row["loss"] for row in found.records if row["arm"] == "after"]
    assert ends[::2] == [2.0, 3.0]
    assert not np.isfinite(ends[1])
    losses["after"][1] = 2.2
    whole = audit_unlearning("u", arms, losses=losses, requests=5, mechanism="scrub")
    assert whole.summary["metrics"]["loss_gained"]["mean"] == pytest.approx((1.8 + 1.9 + 2.8) / 3)


def test_thresholds_of_a_recovered_image() -> None:
    assert rule.image_recovered(30.0, 0.9, 24.0, 24.0)
    assert not rule.image_recovered(29.9, 0.95, 10.0, 10.0)
    assert not rule.image_recovered(35.0, 0.89, 10.0, 10.0)
    assert not rule.image_recovered(35.0, 0.95, 30.0, 10.0)
    assert not rule.image_recovered(35.0, 0.95, 10.0, 30.0)


def test_labels_are_weighed_against_guessing() -> None:
    observations, truths = scene(victims=6)  # labels 0..5
    wrong = [Reconstruction(a.images, (a.labels + 1) % CLASSES, 0.1) for a in noisy(truths, 0.1)]
    wrong[0] = noisy(truths, 0.1)[0]
    lucky = audit_reconstruction("a", observations, wrong, truths, 1.0).summary["labels"]
    one = pytest.approx(1.0)
    assert lucky == {"right": 1, "of": 6, "floor": one, "beyond_guessing": False}
    right = audit_reconstruction("a", observations, noisy(truths, 0.1), truths, 1.0).summary["labels"]
    assert right == {"right": 6, "of": 6, "floor": one, "beyond_guessing": True}
    same = [GroundTruth(1, t.client, t.images, torch.tensor([3]), t.sample_ids) for t in truths]
    everybody = audit_reconstruction("a", observations, noisy(same, 0.1), same, 1.0).summary["labels"]
    assert everybody == {"right": 6, "of": 6, "floor": 6.0, "beyond_guessing": False}


def test_the_same_test_sample_lost_in_every_seed_is_no_damage_yet() -> None:
    """Three seeds agree on one sample in 500; over test samples that is nothing."""
    arms = {"before": [0.958] * 3, "after": [0.956] * 3, "random": [0.958] * 3}
    lost = [1.0] + [0.0] * 499
    alone = audit_unlearning("u", arms, requests=10, mechanism="retrain")
    both = audit_unlearning("u", arms, right_lost=lost, requests=10, mechanism="retrain")
    assert (alone.level, both.level) == ("partial", "none")
    low, high = stats.t.interval(0.95, 499, 0.002, np.std(lost, ddof=1) / 500**0.5)
    found = both.summary["metrics"]["damage"]
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["interval_over"] == "seeds and test samples"


def test_what_an_attack_wanted_is_told_as_damage_is() -> None:
    arms = {"before": [0.95] * 3, "after": [0.95] * 3, "random": [0.95] * 3}
    wanted = {"before": [0.2] * 3, "after": [0.9, 0.2, 0.4], "random": [0.2, 0.25, 0.3]}
    found = audit_unlearning(
        "u", arms, success=wanted, goal="images called 0", requests=5, mechanism="retrain"
    )
    assert found.level == "undecided"
    assert "images called 0 20.0 % before, 50.0 % after the request, 25.0 % after" in found.verdict
    assert found.verdict.endswith("more seeds would tell")
    sure = wanted | {"after": [0.9, 0.92, 0.94]}
    assert audit_unlearning("u", arms, success=sure, requests=5, mechanism="retrain").level == "leak"


def test_an_attack_that_diverged_is_scored_as_it_is_shown() -> None:
    observations, truths = scene()
    wild = [dataclasses.replace(a, images=100 * a.images) for a in noisy(truths, 0.1)]
    found = audit_reconstruction("a", observations, wild, truths, 1.0)
    assert found.summary["missing"] == 0
    assert found.summary["metrics"]["out_of_range_share"]["mean"] > 0.9
    assert np.isfinite([row["psnr_paper_scale"] for row in found.records]).all()
