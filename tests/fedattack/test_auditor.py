"""The auditor's figures and verdicts, on victims made for the purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from fedattack.audit import reconstruction_verdict
from fedattack.audit.membership import audit_membership
from fedattack.audit.reconstruction import audit_reconstruction
from fedattack.audit.unlearning import audit_unlearning
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import DataError, RunFailed
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import Interval, tpr_at_fpr
from fedattack.observation import Auxiliary, MembershipScores, Observation, Reconstruction, Scenario, Update

CLASSES = 10


def faces(count: int, seed: int, size: int = 16) -> Tensor:
    """Smooth images around a common mean, like aligned faces."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 0.55 + 0.18 * torch.randn(count, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").clamp(0, 1)


def scene(victims: int = 6, batch: int = 1, auxiliary: bool = True, seed: int = 0):
    """Observations and truths of `victims` clients; the update itself plays no part in an audit."""
    model = ModelConfig(name="tiny-cnn", classes=CLASSES, channels=3, image_size=16, activation="relu")
    scenario = Scenario(model, TrainingConfig(batch_size=batch), CompressionConfig(rate=0.1))
    shapes = ((8, 3, 3, 3), (8,))
    update = Update(
        ("body.0.weight", "body.0.bias"), shapes, torch.arange(0, 224, 10), torch.ones(23), "gradient"
    )
    weights = {name: torch.zeros(shape) for name, shape in zip(update.names, update.shapes, strict=True)}
    public = Auxiliary(faces(64, 99), None, "other faces") if auxiliary else None
    private = faces(victims * batch, seed + 1).split(batch)
    labels = torch.arange(victims * batch).remainder(CLASSES).split(batch)
    observations, truths = [], []
    for client in range(victims):
        observations.append(Observation(1, client, scenario, weights, update, batch, 200, public))
        ids = tuple(range(client * batch, (client + 1) * batch))
        truths.append(GroundTruth(1, client, private[client], labels[client], ids))
    return observations, truths


def noisy(truths, sigma: float, seed: int = 0) -> list[Reconstruction]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Reconstruction(
            (t.images + sigma * torch.randn(t.images.shape, generator=generator)).clamp(0, 1), t.labels, 0.1
        )
        for t in truths
    ]


def test_recovered_images_are_called_so() -> None:
    observations, truths = scene()
    found = audit_reconstruction("a", observations, noisy(truths, 0.003), truths, 1.5)
    assert found.level == "leak"
    assert found.verdict.startswith("private images recovered: mean 5")
    assert "above the best floor (auxiliary mean" in found.verdict
    assert "6 of 6 images" in found.verdict
    assert "labels: 6 of 6 right" in found.verdict
    assert found.summary["recovered"] == 6
    assert found.summary["seconds"] == pytest.approx(1.5)
    assert found.summary["k"] == 23
    assert found.summary["k_per_pixel"] == pytest.approx(23 / 768)
    assert found.summary["rate"] == pytest.approx(23 / 224)
    assert found.summary["kept_per_layer"]["body.0.weight"] == {"kept": 22.0, "of": 216}


def test_records_hold_the_reference_scores() -> None:
    observations, truths = scene()
    answers = noisy(truths, 0.1)
    found = audit_reconstruction("a", observations, answers, truths, 6.0)
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
    assert "no more than guessing explains" in found.verdict
    assert found.summary["best_floor"] == "auxiliary mean"
    assert found.summary["above_best_floor"]["mean"] == pytest.approx(0.0, abs=1e-5)


def test_the_attacks_own_prior_is_a_floor() -> None:
    observations, truths = scene()
    priors = noisy(truths, 0.05, seed=1)
    answers = [
        Reconstruction(a.images, a.labels, 0.1, floors={"prior": p.images})
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
    answers = [Reconstruction(mean.clone(), t.labels, 0.1) for t in truths]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.summary["above_best_floor"]["low"] > 0
    assert found.summary["above_control"]["mean"] == pytest.approx(0.0, abs=0.5)
    assert found.level == "none"
    assert "no better on its own victim than on another's image" in found.verdict


@pytest.mark.parametrize(
    ("control", "level"),
    [
        (Interval(12.0, 5.0, 19.0, 8), "partial"),
        (Interval(12.0, -14.0, 38.0, 2), "undecided"),  # alike by as much as it gains, but two victims only
        (Interval(0.3, -0.2, 0.8, 32), "none"),  # as good on anybody's image: a better prior
    ],
)
def test_the_control_decides_what_a_gain_over_the_floor_means(control: Interval, level: str) -> None:
    gain = Interval(8.0, 5.0, 11.0, control.count)
    found, words = reconstruction_verdict.reconstruction(
        8, 0, 21.0, 0.7, "flat grey", 13.0, gain, control, (8, 8, True), 0
    )
    assert found == level
    assert ("too few victims" in words) == (level == "undecided")


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
    assert "one victim only" in weak.verdict
    assert weak.summary["above_best_floor"]["low"] is None
    assert weak.summary["above_control"] is None
    assert audit_reconstruction("a", observations, noisy(truths, 0.002), truths, 1.0).level == "leak"
    assert audit_reconstruction("a", observations, noisy(truths, 0.9), truths, 1.0).level == "none"


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
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.summary["missing"] == 2
    assert "2 without a usable reconstruction" in found.verdict
    assert [row["status"] for row in found.records].count("scored") == 4
    assert torch.isnan(found.images["reconstruction"][1]).all()
    nothing = audit_reconstruction("a", observations, [None] * 6, truths, 1.0)
    assert nothing.level == "failed"


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
    with pytest.raises(RunFailed, match="answered images of shape"):
        audit_reconstruction(
            "a",
            observations,
            [Reconstruction(torch.zeros(1, 1, 4, 4), truths[0].labels, 0.0)] * 2,
            truths,
            1.0,
        )


def _member_scores(shift: float, count: int = 400):
    rng = np.random.default_rng(7)
    scores = np.concatenate([rng.normal(shift, 1, count), rng.normal(0, 1, count)])
    return MembershipScores(torch.tensor(scores), "loss"), np.arange(2 * count) < count


@pytest.mark.parametrize(
    ("shift", "level", "words"),
    [
        (3.0, "leak", "members identified: AUC 0.98"),
        (0.6, "partial", "membership leaks: AUC 0.6"),
        (0.0, "none", "no leakage beyond chance: AUC"),
        (-0.6, "undecided", "run backwards"),
    ],
)
def test_membership_verdicts(shift: float, level: str, words: str) -> None:
    scores, member = _member_scores(shift)
    found = audit_membership("fedmia", scores, member, clients=[3], seconds=2.0)
    assert found.level == level
    assert words in found.verdict
    assert found.summary["count"] == 800
    assert (
        found.summary["floors"]["chance"]["auc"]["low"]
        < 0.5
        < found.summary["floors"]["chance"]["auc"]["high"]
    )
    tail = found.summary["metrics"]["tpr_at_1_percent_fpr"]
    assert tail["true_positives"] == tpr_at_fpr(scores.scores, member, 0.01).true_positives
    assert len(found.records) == 800
    assert found.records[0]["client"] == 3


def test_a_few_certain_members_are_leakage_at_an_auc_of_chance() -> None:
    scores, member = _member_scores(0.0)
    scores.scores[:30] += 20.0
    scores.scores[30:400] -= 0.22  # the rest hidden, so that the AUC stays at chance
    found = audit_membership("fedmia", scores, member)
    assert found.summary["metrics"]["auc"]["mean"] == pytest.approx(0.5, abs=0.03)
    assert found.level == "partial"


def test_several_targets_are_averaged() -> None:
    first, member = _member_scores(0.6)
    second, _ = _member_scores(1.2)
    both = audit_membership("fedmia", [first, second], [member, member], clients=[0, 4])
    one, two = audit_membership("x", first, member), audit_membership("x", second, member)
    mean = both.summary["metrics"]["auc"]
    assert mean["mean"] == pytest.approx(np.mean([a.summary["metrics"]["auc"]["mean"] for a in (one, two)]))
    assert mean["worst"] == pytest.approx(one.summary["metrics"]["auc"]["mean"])
    assert set(both.curves["roc"]) == {"client 0", "client 4"}
    with pytest.raises(DataError, match="one of each per target"):
        audit_membership("x", [first, second], [member])


@pytest.mark.parametrize(
    ("after", "level"),
    [([0.70, 0.72, 0.69], "leak"), ([0.89, 0.893, 0.886], "partial"), ([0.90, 0.92, 0.91], "none")],
)
def test_unlearning_is_measured_against_random_deletion(after: list[float], level: str) -> None:
    found = audit_unlearning(
        "u", [0.92, 0.93, 0.92], after, [0.905, 0.91, 0.90], requests=20, mechanism="retrain", seconds=3.0
    )
    assert found.level == level
    assert found.summary["metrics"]["damage"]["mean"] == pytest.approx(
        np.mean([0.905, 0.91, 0.90]) - np.mean(after)
    )
    assert len(found.records) == 3


def test_one_unlearning_run_needs_the_number_of_test_samples() -> None:
    few = audit_unlearning("u", 0.92, 0.80, 0.90, requests=5, mechanism="retrain", test_samples=50)
    many = audit_unlearning("u", 0.92, 0.80, 0.90, requests=5, mechanism="retrain", test_samples=2000)
    unknown = audit_unlearning("u", 0.92, 0.80, 0.90, requests=5, mechanism="retrain")
    assert (few.level, many.level, unknown.level) == ("none", "leak", "undecided")
    assert many.summary["metrics"]["damage"]["interval_over"] == "test samples"
    with pytest.raises(DataError, match="shares"):
        audit_unlearning("u", 92.0, 80.0, 90.0, requests=5, mechanism="retrain")


def test_thresholds_of_a_recovered_image() -> None:
    assert reconstruction_verdict.image_recovered(30.0, 0.9, 24.0, 24.0)
    assert not reconstruction_verdict.image_recovered(29.9, 0.95, 10.0, 10.0)
    assert not reconstruction_verdict.image_recovered(35.0, 0.89, 10.0, 10.0)
    assert not reconstruction_verdict.image_recovered(35.0, 0.95, 30.0, 10.0)
    assert not reconstruction_verdict.image_recovered(35.0, 0.95, 10.0, 30.0)


def test_verdict_sentence_in_full() -> None:
    over = Interval(48.2, 44.0, 52.0, 8)
    level, text = reconstruction_verdict.reconstruction(
        8, 8, 63.0, 1.0, "auxiliary mean", 14.8, over, over, (8, 8, True), 0
    )
    none = reconstruction_verdict.reconstruction(
        8, 0, 14.9, 0.4, "auxiliary mean", 14.8, Interval(0.1, -0.4, 0.6, 8), over, (8, 8, True), 0
    )
    assert none[0] == "none"
    assert none[1].endswith("the labels do leak: 8 of 8 right")
    assert level == "leak"
    assert text == (
        "private images recovered: mean 63.0 dB, SSIM 1.000, 48.2 dB above the best floor (auxiliary mean 14.8 dB); "
        "95 % interval of the gain +44.0 to +52.0 dB; 8 of 8 images at 30 dB and SSIM 0.9 or more; "
        "labels: 8 of 8 right"
    )


def test_labels_are_weighed_against_guessing() -> None:
    observations, truths = scene(victims=6)  # labels 0..5
    wrong = [Reconstruction(a.images, (a.labels + 1) % CLASSES, 0.1) for a in noisy(truths, 0.1)]
    wrong[0] = noisy(truths, 0.1)[0]
    lucky = audit_reconstruction("a", observations, wrong, truths, 1.0).summary["labels"]
    assert lucky == {"right": 1, "of": 6, "beyond_guessing": False}
    right = audit_reconstruction("a", observations, noisy(truths, 0.1), truths, 1.0).summary["labels"]
    assert right == {"right": 6, "of": 6, "beyond_guessing": True}
    same = [GroundTruth(1, t.client, t.images, torch.tensor([3]), t.sample_ids) for t in truths]
    everybody = audit_reconstruction("a", observations, noisy(same, 0.1), same, 1.0).summary["labels"]
    assert everybody == {"right": 6, "of": 6, "beyond_guessing": False}
