"""What a verdict may claim: runs that could not tell, null and effect, the sentences, and every threshold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from audit_scenes import CLASSES, faces, noisy, scene, scored
from scipy import stats

from fedattack.audit import audit_membership, audit_reconstruction, audit_unlearning, headline
from fedattack.audit import reconstruction_verdict as rule
from fedattack.audit.family import at_chance, further_units, gain_level
from fedattack.audit.membership import verdict_of as membership_verdict
from fedattack.audit.reconstruction import _labels
from fedattack.audit.reconstruction_verdict import Findings, Labels
from fedattack.audit.unlearning import verdict_of as unlearning_verdict
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import (
    Interval,
    OperatingPoint,
    auc_power,
    chance_auc,
    constant_hits,
    labels_right,
    paired_difference,
    pooled_auc,
    tpr_at_fpr,
    units_needed,
)
from fedattack.observation import Auxiliary, Reconstruction

NAN = float("nan")
TIGHT = Interval(0.2, -0.5, 0.9, 12, 0.95, 1.1)
WIDE_ENOUGH = Interval(8.0, 5.0, 11.0, 8, 0.95, 3.0)


def findings(gain: Interval, control: Interval | None = None, **more) -> Findings:
    base = Findings(8, 0, 15.0, 0.4, "flat grey", 12.0, gain, gain if control is None else control)
    return dataclasses.replace(base, **more)


def level(gain: Interval, control: Interval | None = None, **more) -> str:
    return rule.reconstruction(findings(gain, control, **more))[0]


def with_gains(truths, gains, right: bool = False) -> list[Reconstruction]:
    """Answers between grey and each victim (negative: beyond grey), so many dB above the grey floor."""
    answers = []
    for truth, gain in zip(truths, gains, strict=True):
        images = truth.images + 10 ** (-gain / 20) * (0.5 - truth.images)
        answers.append(Reconstruction(images, truth.labels if right else (truth.labels + 1) % CLASSES, 0.1))
    return answers


# --- runs whose verdict was wrong ----------------------------------------


def test_four_candidates_told_apart_at_chance_are_undecided() -> None:
    member = np.array([True, True, False, False])
    found = audit_membership(
        "fedmia",
        [scored([3.0, 2.0, 1.0, 0.0], member)],
        accuracy=0.0,
        chance_accuracy=0.1,
        test_samples=120,
    )
    assert found.level == "undecided"
    assert "AUC 1.000 [0.386, 1.000], chance 0.500 [0.000, 1.000]" in found.verdict
    assert "about 1 more member and as many non-members would tell" in found.verdict
    assert "the model is at chance (accuracy 0.0 %, commonest class 10.0 %)" in found.verdict


@pytest.mark.parametrize("accuracy", [0.0, 0.106])
def test_a_model_at_chance_has_nothing_to_lose(accuracy: float) -> None:
    def audit(share: float):
        return audit_unlearning(
            "u", dict.fromkeys(("before", "after", "random"), [share] * 3), requests=4, mechanism="retrain",
            test_samples=180, chance_accuracy=0.1,
        )  # fmt: skip

    assert audit(accuracy).level == "undecided"
    assert "the model is at chance" in audit(accuracy).verdict
    assert audit(0.6).level == "none"


def test_below_its_floor_an_attack_failed_and_labels_still_leak() -> None:
    observations, truths = scene(victims=8, auxiliary=False)
    gains = -4.3 + 0.2 * np.arange(-4, 4)
    failed = audit_reconstruction("ig", observations, with_gains(truths, gains), truths, 1.0)
    assert failed.level == "failed"
    assert failed.verdict.startswith("the attack failed: ")
    assert "dB below the best floor" in failed.verdict
    leaking = audit_reconstruction("ig", observations, with_gains(truths, gains, True), truths, 1.0)
    assert leaking.level == "partial"
    assert "the labels do leak: 8 of 8 right (best answer without the update: 1.0)" in leaking.verdict


def test_six_candidates_are_undecided() -> None:
    member = np.array([True] * 3 + [False] * 3)
    found = audit_membership("fedmia", [scored([0.2, 0.5, 0.9, 0.4, 0.6, 0.8], member)])
    assert found.level == "undecided"
    assert "AUC 0.444 [0.000, 1.000]" in found.verdict
    assert "more members and as many non-members would tell" in found.verdict


def test_one_member_and_one_non_member_are_undecided() -> None:
    found = audit_membership("fedmia", [scored([0.5, 0.5], [True, False])])
    assert found.level == "undecided"
    assert found.summary["metrics"]["auc"]["low"] < 0.1


@pytest.mark.parametrize("gains", [[-4.0, 11.0], [-2.0, 4.0]])
def test_two_victims_are_undecided_and_have_no_interval(gains: list[float]) -> None:
    observations, truths = scene(victims=2, auxiliary=False)
    found = audit_reconstruction("hcgla", observations, with_gains(truths, gains), truths, 1.0)
    assert found.level == "undecided"
    assert "2 victims only, so no interval; at least" in found.verdict
    assert "interval of the gain" not in found.verdict
    assert found.summary["above_best_floor"]["low"] is found.summary["metrics"]["psnr"]["low"] is None


def test_a_wide_interval_is_undecided_and_says_how_many_victims_would_tell() -> None:
    observations, truths = scene(victims=4, auxiliary=False)
    gains = [-2.0, 2.0, 4.0, 9.6]
    found = audit_reconstruction("ig", observations, with_gains(truths, gains), truths, 1.0)
    assert found.level == "undecided"
    real = [row["psnr"] - row["floor.flat grey.psnr"] for row in found.records]
    over_control = [row["psnr"] - row["control_psnr"] for row in found.records]
    needed = max(
        units_needed(float(np.std(d, ddof=1)), max(float(np.mean(d)), 3 - float(np.mean(d))))
        for d in (real, over_control)
    )
    assert f"about {needed - 4} more victims would tell" in found.verdict


def test_rounds_that_differ_have_a_verdict_each() -> None:
    early, truths = scene(victims=4, auxiliary=False)
    late = [dataclasses.replace(o, round=10) for o in early]
    again = [dataclasses.replace(t, round=10) for t in truths]
    answers = with_gains(again, [0.5, 1.0, 1.5, 0.8]) + noisy(truths, 0.001)
    found = audit_reconstruction("hcgla", [*late, *early], answers, [*truths, *again], 1.0)
    assert found.level == "leak"
    assert found.verdict.startswith("private images recovered in round 1: mean 60")
    assert "4 of 4 images at 30 dB" in found.verdict
    assert "; in round 10 undecided: mean" in found.verdict
    assert "97.5 % interval of the gain" in found.verdict
    assert found.summary["metrics"]["psnr"]["low"] is found.summary["above_best_floor"]["low"] is None
    assert {r: f["level"] for r, f in found.summary["rounds"].items()} == {"1": "leak", "10": "undecided"}
    alike = noisy(truths, 0.001) + noisy(truths, 0.001, seed=1)
    alike = audit_reconstruction("hcgla", [*early, *late], alike, [*truths, *again], 1.0)
    assert "in round" not in alike.verdict
    assert "rounds" not in alike.summary
    assert alike.summary["above_best_floor"]["low"] > 30
    # Of one level, but 10 dB apart: no interval covers both.
    apart = noisy(truths, 0.001) + noisy(truths, 0.003)
    apart = audit_reconstruction("hcgla", [*early, *late], apart, [*truths, *again], 1.0)
    assert "in round 10 private images recovered: mean 50" in apart.verdict


@pytest.mark.parametrize("batch", [16, 80])
def test_every_class_equally_often_is_at_the_labels_floor(batch: int) -> None:
    observations, truths = scene(victims=4, batch=batch, auxiliary=False)
    rng = torch.Generator().manual_seed(3)
    truths = [dataclasses.replace(t, labels=torch.randint(CLASSES, (batch,), generator=rng)) for t in truths]
    constant = torch.arange(batch) % CLASSES
    answers = [Reconstruction(torch.full_like(t.images, 0.5), constant, 0.1) for t in truths]
    found = audit_reconstruction("plug-in", observations, answers, truths, 1.0)
    assert found.summary["labels"]["beyond_guessing"] is False
    assert found.summary["labels"]["right"] > 0.6 * 4 * batch
    assert "no more than that" in found.verdict
    assert found.level == "none"
    told = [dataclasses.replace(a, labels=t.labels) for a, t in zip(answers, truths, strict=True)]
    assert audit_reconstruction("plug-in", observations, told, truths, 1.0).level == "partial"


def moved(images: torch.Tensor) -> torch.Tensor:
    """Mirrored, shifted by 5 of 16 pixels and of half the contrast, as a transformation policy does."""
    return 0.5 + 0.5 * (torch.roll(images.flip(-1), 5, dims=-1) - 0.5)


def test_a_transformed_image_is_recognised_as_whose_it_is() -> None:
    observations, truths = scene(victims=8)
    shown = [dataclasses.replace(t, shown=moved(t.images)) for t in truths]
    answers = [Reconstruction(t.shown, (t.labels + 1) % CLASSES, 0.1) for t in shown]
    found = audit_reconstruction("hcgla", observations, answers, shown, 1.0)
    assert found.level == "leak"
    assert found.summary["recovered"] == 0  # pixels alone call every one of them safe
    assert found.summary["metrics"]["psnr"]["mean"] < 20
    assert "was shown identical (infinite dB), 8 of 8 images of it recovered" in found.verdict
    assert "8 of 8 private images rank first among 65 (by chance 0.1, p < 0.0001" in found.verdict
    told = found.summary["identified"]
    assert (told["first"], told["of"], told["gallery"]) == (8, 8, 65)
    assert told["p_value"] == pytest.approx(stats.binom.sf(7, 8, 1 / 65))
    assert told["low"] == pytest.approx(0.025 ** (1 / 8))  # Clopper and Pearson, all of 8
    assert [row["own_rank"] for row in found.records] == [1] * 8
    unmoved = [dataclasses.replace(t, shown=None) for t in shown]
    lit = [dataclasses.replace(a, images=moved(t.images)) for a, t in zip(answers, truths, strict=True)]
    assert audit_reconstruction("hcgla", observations, lit, unmoved, 1.0).level == "partial"


def test_a_transformed_image_that_is_not_rebuilt_is_no_leak() -> None:
    observations, truths = scene(victims=8)
    shown = [dataclasses.replace(t, shown=moved(t.images)) for t in truths]
    grey = [Reconstruction(torch.full_like(t.images, 0.5), (t.labels + 1) % CLASSES, 0.1) for t in shown]
    idle = audit_reconstruction("hcgla", observations, grey, shown, 1.0)
    assert idle.level in ("none", "failed")
    assert "against what the model was shown" in idle.verdict
    assert "0 of 8 private images rank first among 65" in idle.verdict
    alone = [dataclasses.replace(o, auxiliary=None) for o in observations[:2]]
    assert audit_reconstruction("hcgla", alone, grey[:2], shown[:2], 1.0).level == "undecided"


def test_batches_are_identified_as_wholes() -> None:
    observations, truths = scene(victims=8, batch=4)
    answers = [Reconstruction(moved(t.images)[[2, 0, 3, 1]], (t.labels + 1) % CLASSES, 0.1) for t in truths]
    found = audit_reconstruction("a", observations, answers, truths, 1.0)
    assert found.level == "partial"
    # 28 images of others and 64 public ones make 23 further batches of four
    assert "8 of 8 private batches rank first among 24" in found.verdict


NULL_KINDS = ("wrong victims", "noise", "floor", "public images")


def null_audit(kind: str, transformed: bool, batch: int, run: int) -> str:
    """The level of an audit of answers that know nothing of their own victim."""
    rng = np.random.default_rng([run, batch, transformed])
    observations, truths = scene(victims=8, batch=batch, seed=100 * run)
    if transformed:
        truths = [dataclasses.replace(t, shown=moved(t.images)) for t in truths]
    step = int(rng.integers(1, 8))
    images = {
        "wrong victims": [truths[(number + step) % 8].images for number in range(8)],
        "noise": [torch.tensor(rng.random(t.images.shape), dtype=torch.float32) for t in truths],
        "floor": [observations[0].auxiliary.images.mean(0, keepdim=True).expand(batch, -1, -1, -1)] * 8,
        "public images": list(faces(8 * batch, 7_000 + run).split(batch)),
    }[kind]
    named = [torch.tensor(rng.integers(0, CLASSES, batch)) for _ in truths]
    shown = [moved(one) if transformed else one for one in images]
    answers = [Reconstruction(one, labels, 0.1) for one, labels in zip(shown, named, strict=True)]
    return audit_reconstruction("a", observations, answers, truths, 1.0).level


@pytest.mark.parametrize("kind", NULL_KINDS)
def test_who_knows_nothing_of_the_victim_leaks_nothing(kind: str) -> None:
    assert not {null_audit(kind, transformed, 1, 0) for transformed in (False, True)} & {"leak", "partial"}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_of_200_null_runs_one_in_fifty_at_most_claims_leakage(batch: int) -> None:
    levels = [
        null_audit(kind, transformed, batch, run)
        for kind in NULL_KINDS
        for transformed in (False, True)
        for run in range(25)
    ]
    claimed = sum(level in ("leak", "partial") for level in levels)
    print(f"{claimed} of {len(levels)} null audits claim leakage")
    assert claimed <= 4


def test_one_headline_stands_above_all_attacks() -> None:
    observations, truths = scene(victims=6)
    leak = audit_reconstruction("hcgla", observations, noisy(truths, 0.003), truths, 1.0)
    leak = dataclasses.replace(leak, threat={"seat": "curious server", "assumptions": ["first round"]})
    idle = audit_membership("fedmia", [scored([0.5, 0.5], [True, False])])
    federation = {"rounds": [{"round": 1, "accuracy": 0.31}, {"round": 2, "accuracy": 0.35}]}
    assert headline([], federation) is None
    top = headline([idle, leak], federation)
    assert (top["level"], top["attack"], top["seat"]) == ("leak", "hcgla", "curious server")
    assert top["text"] == (
        "worst found: private images recovered, by hcgla, seat: curious server (tiny-cnn at its initial "
        "weights; batch 1, "
        "1 local step; 64 public images granted)"
    )
    assert top["assumptions"][-1] == "first round"
    more = audit_reconstruction("ig", observations, noisy(truths, 0.001), truths, 1.0)
    assert [headline(two)["attack"] for two in ([leak, more], [more, leak])] == ["ig", "ig"]
    later = [row | {"round": 3 - index % 2} for index, row in enumerate(leak.records)]
    assert (
        "(tiny-cnn at 31.0 % to 35.0 % accuracy; batch"
        in headline([dataclasses.replace(leak, records=later)], federation)["text"]
    )
    assert headline([idle], federation)["text"] == "undecided: fedmia cannot tell (model at 35.0 % accuracy)"
    failed = audit_reconstruction("ig", observations, [None] * 6, truths, 1.0)
    assert headline([failed])["text"].startswith("every attack failed")
    assert headline([idle, failed])["text"].startswith("undecided: fedmia, ig cannot tell")


def test_the_method_and_why_it_fell_back_stand_beside_the_score() -> None:
    observations, truths = scene(victims=3)
    answers = [dataclasses.replace(a, method="gauss-newton") for a in noisy(truths, 0.003)]
    why = {"why": "no curvature", "notes": ["slow"]}
    answers[2] = dataclasses.replace(answers[2], method="matching", details=why)
    found = audit_reconstruction("hcgla", observations, answers, truths, 1.0)
    assert found.verdict.endswith("; method gauss-newton (2 of 3), matching (1 of 3: no curvature; slow)")
    assert [row["notes"] for row in found.records] == ["", "", "no curvature; slow"]


# --- null and effect, 200 runs a family ----------------------------------------


@pytest.mark.parametrize("victims", [3, 8, 24])
def test_images_null_and_effect(victims: int) -> None:
    rng = np.random.default_rng(11)
    for effect, claimed in ((0.0, "partial"), (2 * rule.MARGIN, "none")):
        levels = []
        for run in range(200):
            gains = rng.normal([[effect], [effect + 1]], 2.0, (2, victims))  # over the floor and the control
            intervals = [paired_difference(g, np.zeros(victims), run, replicates=200) for g in gains]
            levels.append(level(*intervals))
        assert levels.count(claimed) <= 10


def test_labels_null_and_effect() -> None:
    """An answer drawn from the shares of all clients, and one that knows the labels."""
    rng = np.random.default_rng(5)
    shares = np.array([0.25, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05, 0.03, 0.02])
    beyond = {0: 0, 8: 0}
    for _ in range(200):
        truly = rng.choice(CLASSES, (6, 8), p=shares)
        guesses = rng.choice(CLASSES, (6, 8), p=shares)
        for known in beyond:
            rows = []
            for victim, (true, guess) in enumerate(zip(truly, guesses, strict=True)):
                answer = np.concatenate([true[:known], guess[known:]])
                right = labels_right(torch.tensor(answer), torch.tensor(true))
                rows += [
                    {"label": int(label), "label_right": ok, "client": victim, "victim": victim}
                    for label, ok in zip(true, right, strict=True)
                ]
            beyond[known] += bool(_labels([], rows).beyond)
    assert beyond[0] <= 10
    assert beyond[8] >= 190


@pytest.mark.parametrize("count", [10, 100, 400])
def test_membership_null_and_effect(count: int) -> None:
    rng = np.random.default_rng(2)
    member = np.arange(2 * count) < count
    levels: dict[float, list[str]] = {0.0: [], 0.3583: []}  # sqrt(2) * 0.2533: an AUC of 0.6
    for effect, found in levels.items():
        for _ in range(200):
            scores = rng.normal(size=2 * count) + effect * member
            area = pooled_auc(scores, member)
            tail = tpr_at_fpr(scores, member, 0.01)
            found.append(membership_verdict(area, chance_auc(count, count), tail, (count, count))[0])
    assert sum(one in ("leak", "partial") for one in levels[0.0]) <= 10
    assert levels[0.3583].count("none") <= 10
    if count == 400:
        assert levels[0.0].count("none") >= 180
        assert levels[0.3583].count("partial") >= 190


@pytest.mark.parametrize("seeds", [3, 6])
def test_damage_null_and_effect(seeds: int) -> None:
    rng = np.random.default_rng(3)
    levels: dict[float, list[str]] = {0.0: [], 0.04: []}
    for effect, found in levels.items():
        for run in range(200):
            random = rng.normal(0.8, 0.015, seeds)
            after = rng.normal(0.8 - effect, 0.015, seeds)
            audit = audit_unlearning(
                "u",
                {"before": random, "after": after, "random": random},
                requests=5,
                mechanism="retrain",
                seed=run,
            )
            found.append(audit.level)
    assert sum(one in ("leak", "partial") for one in levels[0.0]) <= 10
    assert levels[0.04].count("none") <= 10


# --- thresholds ----------------------------------------


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (Interval(1.0, 0.01, 2.0, 9), "partial"),
        (Interval(1.0, 0.0, 2.99, 9), "none"),
        (Interval(1.0, 0.0, 3.0, 9), "undecided"),
        (Interval(-1.0, -2.0, -0.01, 9), "failed"),
        (Interval(-1.0, -2.0, 0.0, 9), "none"),
        (Interval(-3.0, -9.0, 3.0, 9), "failed"),
        (Interval(-2.9, -9.0, 3.2, 9), "undecided"),
        (Interval(2.0, NAN, NAN, 2), "undecided"),
        (Interval(-3.0, NAN, NAN, 2), "failed"),
    ],
)
def test_what_an_interval_of_the_gain_says(gain: Interval, expected: str) -> None:
    assert gain_level(gain, 3.0) == expected


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (Interval(12.0, 5.0, 19.0, 8, 0.95, 8.0), "partial"),
        (Interval(12.0, -14.0, 38.0, 8, 0.95, 30.0), "undecided"),  # as much, but too few victims
        (Interval(0.3, -0.2, 0.8, 32), "none"),  # as good on anybody's image: a better prior
        (Interval(0.3, -2.4, 3.0, 32, 0.95, 8.0), "undecided"),
        (Interval(12.0, 0.0, 24.0, 8, 0.95, 14.0), "undecided"),
        (Interval(8.0, -1.0, 2.9, 8, 0.95, 14.0), "undecided"),  # no lower than the gain over the floor
    ],
)
def test_the_control_decides_what_a_gain_over_the_floor_means(control: Interval, expected: str) -> None:
    found, words = rule.reconstruction(findings(WIDE_ENOUGH, control))
    assert found == expected
    assert ("no better on its own victim than on another's image" in words) == (expected != "partial")
    assert ("more victim" in words) == (expected == "undecided")


def test_where_the_control_counts() -> None:
    assert level(TIGHT, Interval(9.0, 5.0, 13.0, 12)) == "none"
    missing = dataclasses.replace(findings(WIDE_ENOUGH), over_control=None)
    assert rule.reconstruction(missing)[0] == "undecided"
    wide = Interval(4.0, -1.0, 9.0, 8, 0.95, 6.0)
    assert level(wide, Interval(0.1, -1.0, 1.2, 8)) == "none"
    assert level(wide, Interval(5.0, 1.0, 9.0, 8)) == "undecided"
    below = Interval(-4.0, -6.0, -2.0, 8)
    assert level(below, Interval(-9.0, -9.5, -8.5, 8)) == "failed"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"recovered": 4}, "leak"),
        ({"recovered": 3}, "partial"),
        ({"labels": Labels(8, 8, 2.0, True)}, "partial"),
        ({"labels": Labels(8, 8, 8.0, False)}, "none"),
        ({"labels": Labels(2, 2, 0.2, None)}, "none"),
        ({"shown": (60.0, 1)}, "partial"),
        ({"shown": (20.0, 0)}, "undecided"),
    ],
)
def test_what_else_decides(more: dict, expected: str) -> None:
    assert level(TIGHT, **more) == expected


def test_the_number_of_further_units() -> None:
    # n victims reach t(n - 1) * 5 / sqrt(n): 2.02 dB at 26, 1.98 at 27.
    assert units_needed(5.0, 2.0) == 27
    assert further_units(Interval(2.0, -3.0, 7.0, 7, 0.95, 5.0), 3.0) == 20
    assert further_units(Interval(0.5, -3.0, 4.0, 7, 0.95, 5.0), 3.0) == units_needed(5.0, 2.5) - 7
    assert further_units(Interval(2.0, -3.0, 7.0, 90, 0.95, 5.0), 3.0) == 1
    assert units_needed(NAN, 1.0) == units_needed(0.1, 1.0) == 3


@pytest.mark.parametrize(
    ("accuracy", "chance", "samples", "idle"),
    [
        (0.12, 0.1, 100, True),
        (0.25, 0.1, 100, False),
        (0.11, 0.1, None, False),
        (0.1, 0.1, None, True),
        (None, 0.1, 100, False),
        (0.1, None, 100, False),
    ],
)
def test_when_a_model_is_at_chance(accuracy, chance, samples, idle: bool) -> None:
    assert bool(at_chance(accuracy, chance, samples)) == idle


def _tail(p_value: float) -> OperatingPoint:
    return OperatingPoint(0.01, Interval(0.02, 0.0, 0.1, 100), 0.01, 2, 1, 100, 100, 0.02, 0.06, p_value)


@pytest.mark.parametrize(
    ("auc", "count", "p_value", "idle", "expected"),
    [
        (Interval(0.90, 0.85, 0.95, 200), 100, 0.3, "", "leak"),
        (Interval(0.89, 0.85, 0.95, 200), 100, 0.3, "", "partial"),
        (Interval(0.89, 0.85, 0.95, 200), 100, 0.3, "at chance", "partial"),
        (Interval(0.59, 0.50, 0.68, 200), 100, 0.3, "", "undecided"),
        (Interval(0.57, 0.501, 0.64, 200), 100, 0.3, "", "undecided"),  # within what chance scores
        (Interval(0.50, 0.41, 0.549, 20), 10, 0.3, "", "none"),
        (Interval(0.50, 0.41, 0.55, 20), 10, 0.3, "", "undecided"),
        (Interval(0.50, 0.451, 0.549, 800), 400, 0.3, "at chance", "undecided"),
        (Interval(0.52, 0.46, 0.56, 800), 400, 0.3, "", "none"),  # and more than 80 % power
        (Interval(0.52, 0.40, 0.60, 800), 400, 0.3, "", "undecided"),
        (Interval(0.50, 0.42, 0.58, 200), 100, 0.3, "", "undecided"),  # 69 % power
        (Interval(0.50, 0.42, 0.58, 260), 130, 0.3, "", "none"),  # 80 % power
        (Interval(0.50, 0.40, 0.60, 200), 100, 0.0049, "", "partial"),
        (Interval(0.50, 0.40, 0.60, 200), 100, 0.0098, "", "undecided"),
        (Interval(0.50, 0.40, 0.60, 200), 100, 0.005, "", "undecided"),
        (Interval(0.40, 0.32, 0.48, 200), 100, 0.3, "", "undecided"),
        (Interval(0.40, 0.32, 0.52, 200), 100, 0.3, "", "none"),  # below 0.55, and not surely backwards
        (Interval(0.45, 0.41, 0.49, 200), 100, 0.3, "", "none"),  # within what chance scores
    ],
)
def test_membership_thresholds(auc, count, p_value, idle, expected: str) -> None:
    found, words = membership_verdict(auc, chance_auc(count, count), _tail(p_value), (count, count), idle)
    assert found == expected
    assert ("run backwards" in words) == (auc.mean == 0.40 and auc.high < 0.5)
    starts = {"leak": "members identified: ", "partial": "membership leaks: ", "undecided": "undecided: "}
    assert words.startswith(starts.get(expected, "no leakage beyond chance: "))


def test_power_is_that_of_simulated_scores() -> None:
    rng = np.random.default_rng(0)
    members, nonmembers = 60, 90
    high, hits = chance_auc(members, nonmembers).high, 0
    for _ in range(2000):
        inside, outside = rng.normal(0.3583, 1, members), np.sort(rng.normal(0, 1, nonmembers))
        hits += np.searchsorted(outside, inside).mean() / nonmembers > high
    assert auc_power(members, nonmembers, 0.6) == pytest.approx(hits / 2000, abs=0.03)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Interval(0.05, 0.01, 0.09, 5), "leak"),
        (Interval(0.049, 0.01, 0.09, 5), "partial"),
        (Interval(0.005, -0.01, 0.0199, 5), "none"),
        (Interval(0.005, -0.01, 0.02, 5), "undecided"),
        (Interval(-0.02, -0.05, 0.01, 5), "failed"),
        (Interval(0.06, -0.01, 0.13, 5), "undecided"),
    ],
)
def test_damage_thresholds(damage: Interval, expected: str) -> None:
    assert unlearning_verdict(0.9, 0.8, 0.85, damage, 5)[0] == expected
    assert unlearning_verdict(0.9, 0.8, 0.85, damage, 5, "at chance")[0] == "undecided"


def test_the_best_constant_multiset() -> None:
    assert constant_hits([0.1] * 10, [3]) == pytest.approx(0.1)
    assert constant_hits([0.6, 0.4], [0]) == 1.0
    assert constant_hits([0.6, 0.4], [1]) == 0.0
    assert constant_hits([0.1] * 10, list(range(10))) == pytest.approx(10)
    # Three of ten equally likely labels, named once each: a repeat can be right but once.
    assert constant_hits([0.1] * 10, [0, 0, 1]) == pytest.approx(0.6)
    assert constant_hits([0.9, 0.1], [0] * 9 + [1]) == 10.0
    rng = np.random.default_rng(1)
    shares = np.array([0.5, 0.3, 0.2])
    batches = [rng.choice(3, 4, p=shares).tolist() for _ in range(3000)]
    best = max(
        np.mean([sum(min(b.count(c), times[c]) for c in range(3)) for b in batches])
        for times in [(i, j, 4 - i - j) for i in range(5) for j in range(5 - i)]
    )
    assert np.mean([constant_hits(shares, b) for b in batches]) == pytest.approx(best, abs=0.02)


def test_labels_need_three_clients_and_more_than_luck() -> None:
    observations, truths = scene(victims=2, batch=8, auxiliary=False)
    found = audit_reconstruction("a", observations, with_gains(truths, [1.0, 1.0], True), truths, 1.0)
    assert found.summary["labels"]["beyond_guessing"] is None
    assert "too few clients to tell" in found.verdict
    # Three coins named right by three clients: an eighth of all guesses do as well.
    observations, truths = scene(victims=3, auxiliary=False)
    coins = [GroundTruth(1, t.client, t.images, torch.tensor([t.client % 2]), t.sample_ids) for t in truths]
    found = audit_reconstruction("a", observations, with_gains(coins, [1.0] * 3, True), coins, 1.0)
    assert found.summary["labels"] == {
        "right": 3,
        "of": 3,
        "floor": pytest.approx(1.5),
        "beyond_guessing": False,
    }


@pytest.mark.parametrize(
    ("labels", "looks", "beyond"),
    [([0, 1, 4], 1, True), ([0, 1, 4], 2, False), ([0, 1, 3], 1, False)],
)
def test_labels_of_few_clients_against_luck(labels: list[int], looks: int, beyond: bool) -> None:
    """Three of three right by luck: 0.008 among five equally common labels, 0.016 among four."""
    rows = [{"label": y, "label_right": True, "client": c, "victim": c} for c, y in enumerate(labels)]
    assert _labels([], rows, looks).beyond is beyond
    if looks == 1:
        assert _labels([], rows).beyond is beyond


def test_labels_are_tested_over_the_clients() -> None:
    truly = np.random.default_rng(8).integers(CLASSES, size=(4, 8))
    right = [8, 7, 8, 7]
    rows = [
        {"label": int(y), "label_right": place < right[c], "client": c, "victim": c}
        for c, batch in enumerate(truly)
        for place, y in enumerate(batch)
    ]
    counts = np.bincount(truly.ravel(), minlength=CLASSES)
    others = [counts - np.bincount(batch, minlength=CLASSES) for batch in truly]
    guesses = [
        [constant_hits([1 / CLASSES] * CLASSES, batch.tolist()) for batch in truly],
        [constant_hits(o / o.sum(), batch.tolist()) for o, batch in zip(others, truly, strict=True)],
    ]
    floor = max(guesses, key=sum)
    assert _labels([], rows).floor == pytest.approx(sum(floor))
    p = stats.ttest_1samp(np.array(right) - floor, 0.0, alternative="greater").pvalue
    looks = int(0.01 / p)  # as many as the test still bears
    assert looks >= 1
    assert _labels([], rows, looks).beyond is True
    assert _labels([], rows, looks + 1).beyond is False


def test_the_control_is_against_thirty_two_others() -> None:
    observations, truths = scene(victims=35)
    found = audit_reconstruction("a", observations, with_gains(truths, [3.0] * 35), truths, 1.0)
    grey_to_first = 0.5 + (1 - 10 ** (-3 / 20)) * (truths[0].images - 0.5)
    expected = [-10 * np.log10(float((grey_to_first - t.images).square().mean())) for t in truths[1:33]]
    assert found.records[0]["control_psnr"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_gaps_in_words() -> None:
    assert [rule.signed_gap(v) for v in (0.0, -0.04, -0.06)] == [
        "0.0 dB above",
        "0.0 dB above",
        "0.1 dB below",
    ]


# --- the sentences ----------------------------------------


def test_the_sentences_in_full() -> None:
    over = Interval(48.2, 44.0, 52.0, 8)
    lost = [{"key": "round-0001-client-00003", "reason": "its update is all zeros"}]
    found = Findings(10, 8, 63.0, 1.0, "auxiliary mean", 14.8, over, over, Labels(8, 8, 0.8, True), lost)
    assert rule.reconstruction(found) == (
        "leak",
        "mean 63.0 dB, SSIM 1.000, 48.2 dB above the best floor (auxiliary mean 14.8 dB); 95 % interval of the gain "
        "+44.0 to +52.0 dB; 8 of 10 images at 30 dB and SSIM 0.9 or more; the labels do leak: 8 of 8 right "
        "(best answer "
        "without the update: 0.8); 1 victim failed (round-0001-client-00003: its update is all zeros), left out of "
        "every mean",
    )
    unsure = Interval(3.4, -4.9, 11.8, 4, 0.95, 5.25)
    assert rule.reconstruction(findings(unsure, psnr=120.0)) == (
        "undecided",
        "mean 120.0 dB, SSIM 0.400, 3.4 dB above the best floor (flat grey 12.0 dB), counting no image for more than "
        "100 dB; 95 % interval of the gain -4.9 to +11.8 dB; about 8 more victims would tell",
    )
    scores = np.concatenate([np.linspace(0, 1, 40) + 0.2, np.linspace(0, 1, 40)])
    tail = tpr_at_fpr(scores, np.arange(80) < 40, 0.01)
    assert membership_verdict(Interval(0.68, 0.56, 0.79, 80), chance_auc(40, 40), tail, (40, 40)) == (
        "partial",
        "membership leaks: AUC 0.680 [0.560, 0.790], chance 0.500 [0.373, 0.627]; at 1 % false positives 8 of 40 "
        "members found (chance: 1.0)",
    )
    assert unlearning_verdict(0.9, 0.88, 0.895, Interval(0.015, -0.02, 0.05, 3, 0.95, 0.014), 3) == (
        "undecided",
        "undecided: accuracy 90.0 % before, 88.0 % after the request, 1.5 points below the deletion of as "
        "many random "
        "samples (89.5 %); 95 % interval of the damage -2.0 to +5.0 points; about 3 more seeds would tell",
    )
    unknown = unlearning_verdict(0.9, 0.88, 0.895, Interval(0.015, NAN, NAN, 1), 1)[1]
    assert unknown.endswith("1 seed and no interval; at least 2 more seeds would tell")


def test_another_photograph_of_the_person_is_ranked_too() -> None:
    observations, truths = scene(victims=8)
    rng = torch.Generator().manual_seed(4)
    alike = {
        t.key: (t.images + 0.05 * torch.randn(t.images.shape, generator=rng)).clamp(0, 1) for t in truths
    }
    found = audit_reconstruction("a", observations, noisy(truths, 0.05), truths, 1.0, photographs=alike)
    told = found.summary["person"]
    assert (told["first"], told["of"], told["gallery"]) == (8, 8, 65)
    granted = observations[0].auxiliary
    known = Auxiliary(torch.cat([*alike.values(), granted.images]), None, "with photographs of the victims")
    public = [dataclasses.replace(o, auxiliary=known) for o in observations]
    among = audit_reconstruction("a", public, noisy(truths, 0.05), truths, 1.0, photographs=alike)
    assert among.summary["person"]["first"] == 8  # the photograph is no rival of itself
    strangers = dict(zip(alike, faces(8, 321).split(1), strict=True))
    other = audit_reconstruction("a", observations, noisy(truths, 0.05), truths, 1.0, photographs=strangers)
    assert other.summary["person"]["first"] <= 1
    assert audit_reconstruction("a", observations, noisy(truths, 0.05), truths, 1.0).summary["person"] is None
