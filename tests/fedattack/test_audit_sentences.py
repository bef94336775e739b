"""Verdicts word for word: every figure, margin and plural of a sentence on figures small enough to check."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from audit_scenes import noisy, scene, scored

from fedattack.audit import (
    audit_membership,
    audit_reconstruction,
    audit_unlearning,
    family,
    membership,
    membership_told,
    reconstruction,
    unlearning,
)
from fedattack.audit import reconstruction_verdict as rule
from fedattack.audit.family import AuditResult
from fedattack.metrics import Interval, OperatingPoint
from fedattack.observation import EVERYONE

NO = Interval(0.02, math.nan, math.nan, 1)


@pytest.mark.parametrize(
    ("shares", "damage", "runs", "level", "sentence"),
    [
        (
            (0.8, 0.72, 0.795), Interval(0.075, 0.02, 0.13, 5), 5, "leak",
            "the request damages the model: accuracy 80.0 % before, 72.0 % after the request, 7.5 points below the "
            "deletion of as many random samples (79.5 %); 95 % interval of the damage +2.0 to +13.0 points",
        ),
        (
            (0.8, 0.75, 0.8), Interval(0.05, 0.002, 0.098, 5), 5, "leak",
            "the request damages the model: accuracy 80.0 % before, 75.0 % after the request, 5.0 points below the "
            "deletion of as many random samples (80.0 %); 95 % interval of the damage +0.2 to +9.8 points",
        ),
        (
            (0.8, 0.79, 0.8), Interval(0.01, 0.002, 0.018, 5), 5, "partial",
            "slight damage: accuracy 80.0 % before, 79.0 % after the request, 1.0 points below the deletion of as "
            "many random samples (80.0 %); 95 % interval of the damage +0.2 to +1.8 points",
        ),
        (
            (0.8, 0.8, 0.795), Interval(-0.005, -0.012, 0.004, 4), 4, "none",
            "no damage beyond random deletion: accuracy 80.0 % before, 80.0 % after the request, 0.5 points above "
            "the deletion of as many random samples (79.5 %); 95 % interval of the damage -1.2 to +0.4 points",
        ),
        (
            (0.8, 0.7, 0.72), Interval(0.02, -0.03, 0.07, 3), 3, "undecided",
            "undecided: accuracy 80.0 % before, 70.0 % after the request, 2.0 points below the deletion of as many "
            "random samples (72.0 %); 95 % interval of the damage -3.0 to +7.0 points; about 1 more seed would tell",
        ),
        (
            (0.8, 0.7, 0.72), NO, 1, "undecided",
            "undecided: accuracy 80.0 % before, 70.0 % after the request, 2.0 points below the deletion of as many "
            "random samples (72.0 %); 1 seed and no interval; at least 2 more seeds would tell",
        ),
        (
            (0.8, 0.7, 0.72), Interval(0.02, math.nan, math.nan, 2), 2, "undecided",
            "undecided: accuracy 80.0 % before, 70.0 % after the request, 2.0 points below the deletion of as many "
            "random samples (72.0 %); 2 seeds and no interval; at least 1 more seed would tell",
        ),
    ],
)  # fmt: skip
def test_damage_in_words(
    shares: tuple[float, float, float], damage: Interval, runs: int, level: str, sentence: str
) -> None:
    assert unlearning.verdict_of(*shares, damage, runs) == (level, sentence)


def tail(p_value: float = 0.5, found: int = 1, members: int = 40) -> OperatingPoint:
    return OperatingPoint(0.01, NO, 0.0, found, 0, members, 40, 0.02, 0.1, p_value)


CHANCE = Interval(0.5, 0.4, 0.6, 80)


@pytest.mark.parametrize(
    ("auc", "at", "candidates", "level", "words"),
    [
        (Interval(0.9, 0.8, 0.97, 80), tail(), (40, 40), "leak", "members identified: AUC 0.900 [0.800, 0.970]"),
        (Interval(0.89, 0.8, 0.97, 80), tail(), (40, 40), "partial", "membership leaks: AUC 0.890"),
        (Interval(0.61, 0.501, 0.7, 80), tail(), (40, 40), "partial", "membership leaks: AUC 0.610"),
        (Interval(0.6, 0.501, 0.7, 80), tail(), (40, 40), "undecided", "undecided: AUC 0.600"),
        (Interval(0.61, 0.5, 0.7, 80), tail(), (40, 40), "undecided", "undecided: AUC 0.610"),
        (Interval(0.5, 0.4, 0.6, 80), tail(0.0049, 9), (40, 40), "partial", "membership leaks: AUC 0.500"),
        (Interval(0.95, 0.4, 0.99, 80), tail(0.0049, 9), (40, 40), "partial", "membership leaks: AUC 0.950"),
        (Interval(0.5, 0.4, 0.6, 80), tail(0.005, 9), (40, 40), "undecided", "undecided: AUC 0.500"),
        (Interval(0.3, 0.2, 0.49, 80), tail(), (40, 40), "undecided", "the scores run backwards"),
        (Interval(0.5, 0.45, 0.5499, 80), tail(), (40, 40), "none", "no leakage beyond chance: AUC 0.500"),
        (Interval(0.5, 0.45, 0.55, 80), tail(), (40, 40), "undecided", "undecided: AUC 0.500"),
        (Interval(0.5, 0.45, 0.5999, 80), tail(), (400, 400), "none", "no leakage beyond chance"),
        (Interval(0.5, 0.45, 0.6, 80), tail(), (400, 400), "undecided", "undecided"),
        (Interval(0.5, 0.45, 0.59, 80), tail(), (400, 20), "undecided", "undecided"),
    ],
)  # fmt: skip
def test_membership_in_words(
    auc: Interval, at: OperatingPoint, candidates: tuple[int, int], level: str, words: str
) -> None:
    found, text = membership.verdict_of(auc, CHANCE, at, candidates)
    assert found == level
    assert words in text
    assert f", chance 0.500 [0.400, 0.600]{'' if level in ('none', 'leak', 'partial') else '; '}" in text
    assert text.endswith(f"at 1 % false positives {at.true_positives} of 40 members found (chance: 0.8)")


def test_further_candidates_are_counted_from_the_smaller_side() -> None:
    auc = Interval(0.55, 0.4, 0.7, 80)
    needed = membership._candidates_needed(0.55)
    for candidates in ((30, 90), (90, 30)):
        assert (
            f"about {needed - 30:,} more members" in membership.verdict_of(auc, CHANCE, tail(), candidates)[1]
        )
    scores = torch.cat([torch.linspace(0, 1, 12), torch.linspace(0, 1, 60)])
    result = audit_membership("a", [scored(scores, np.arange(72) < 12)])
    turned = audit_membership("a", [scored(scores, np.arange(72) >= 12)])
    for one in (result, turned):
        few = int(one.verdict.partition("about ")[2].partition(" more")[0].replace(",", ""))
        assert few == membership._candidates_needed(one.summary["metrics"]["auc"]["mean"]) - 12


def test_the_statistic_is_a_remark_where_it_has_a_name() -> None:
    asked = [scored(torch.linspace(0, 1, 8), np.arange(8) > 3)]
    named = audit_membership("a", asked, statistic="cosine", references=3)
    assert membership_told.remarks(named)[:3] == [
        "a: 4 members and 4 non-members, 1 target client",
        "statistic: cosine",
        "reference models: 3",
    ]
    anybody = audit_membership("a", [dataclasses.replace(asked[0], client=EVERYONE)])
    told = "a: 4 members and 4 non-members, asked about members of anybody"
    assert membership_told.remarks(anybody)[0] == told
    assert not any("statistic" in one for one in membership_told.remarks(audit_membership("a", asked)))


def _result(rounds: tuple[int, ...], steps: int = 1, protocol: str = "fedsgd") -> AuditResult:
    scenario = {
        "model": {"name": "mlp"},
        "training": {"local_steps": steps, "protocol": protocol},
        "defense": {"names": []},
    }
    summary = {"scenario": scenario, "batch": [2], "auxiliary": None}
    return AuditResult("a", "reconstruction", [{"round": r} for r in rounds], summary, "", "none")


def test_what_held_is_told_from_the_round_before_the_attack() -> None:
    federation = {"rounds": [{"round": r, "accuracy": a} for r, a in ((1, 0.2), (2, 0.5), (3, 0.4))]}
    told = family._assumptions
    assert told(_result((1,)), {}) == [
        "mlp at its initial weights", "batch 2, 1 local step", "no public images granted"
    ]  # fmt: skip
    assert told(_result((2,)), federation)[0] == "mlp at 20.0 % accuracy"
    assert told(_result((3, 4)), federation)[0] == "mlp at 40.0 % to 50.0 % accuracy"
    assert told(_result((1, 2)), federation)[0] == "mlp at its initial weights and 20.0 % accuracy"
    assert told(_result(()), federation)[0] == "mlp at 40.0 % accuracy"
    assert told(_result(()), {}) == ["batch 2, 1 local step", "no public images granted"]
    assert told(_result((2,), 3, "fedavg"), federation)[1] == "batch 2, 3 local steps"
    assert told(_result((2,), 3), federation)[1] == "batch 2, 1 local step"


def test_a_reconstruction_in_cells() -> None:
    observations, truths = scene(victims=6)
    answers = noisy(truths, 0.05)
    result = audit_reconstruction("a", observations, answers, truths, 12.0)
    s, row = result.summary, result.records[0]
    cells = {name: text(s) for name, text in reconstruction.RECONSTRUCTION.table_columns([s])}
    psnr, best = s["metrics"]["psnr"], s["floors"][s["best_floor"]]["psnr"]["mean"]
    assert cells["PSNR, dB"] == f"{psnr['mean']:.1f}\n{psnr['low']:.1f}…{psnr['high']:.1f}"
    assert (cells["worst"], cells["best\nfloor"]) == (f"{psnr['worst']:.1f}", f"{best:.1f}")
    assert cells["SSIM"] == f"{s['metrics']['ssim']['mean']:.3f}"
    assert cells["k\n(image)"] == "23\n(22)"
    assert cells["labels\n(floor)"] == f"6/6\n({s['labels']['floor']:.1f})"
    details = {name: text(row) for name, text in reconstruction._details(result)}
    assert (details["SSIM"], details["PSNR, dB"]) == (f"{row['ssim']:.3f}", f"{row['psnr']:.1f}")
    assert (details["label"], details["status"], details["time"]) == ("right", "scored", "2.0 s")
    remarks = "; ".join(reconstruction._remarks(result))
    scale = s["paper_scale"]
    assert remarks.endswith(f"would read {scale['psnr']['mean']:.1f} dB and {scale['ssim']['mean']:.3f}")
    assert "time: 12 s in all, 2.0 s a victim" in remarks
    assert reconstruction.RECONSTRUCTION.leakage.nothing == 0.0
    names = [name for name, _, _ in reconstruction._score_rows(result)]
    assert names[-1] == "control: scored against other victims"
    assert not any("was shown" in name for name in names)
    shown = [dataclasses.replace(truth, shown=truth.images) for truth in truths]
    both = audit_reconstruction("a", observations, answers, shown, 12.0)
    assert reconstruction._score_rows(both)[1][0] == "the same, against what the model was shown"


def gain(low: float, mean: float, high: float) -> Interval:
    return Interval(mean, low, high, 8)


@pytest.mark.parametrize(
    ("floor", "control", "more", "level"),
    [
        (gain(0.5, 4, 8), gain(0.5, 4, 8), {}, "partial"),
        (gain(0.5, 4, 8), gain(0.0, 4, 8), {}, "undecided"),
        (gain(0.0, 4, 8), gain(0.5, 4, 8), {}, "undecided"),
        (gain(0.5, 4, 8), None, {}, "undecided"),
        (gain(0.5, 4, 8), gain(0.5, 1, 2.9), {}, "none"),
        (gain(0.5, 4, 8), gain(0.5, 1, 3.0), {}, "partial"),
        (gain(0.5, 1, 2.9), gain(0.5, 1, 2.9), {}, "partial"),
        (gain(-0.5, 1, 2.9), gain(-0.5, 1, 2.9), {}, "none"),
        (gain(-0.5, 1, 3.0), gain(-0.5, 1, 3.0), {}, "undecided"),
        (gain(-2, -1, -0.1), gain(-2, -1, 0), {}, "failed"),
        (gain(-7, -3, 1), gain(-7, -3, 1), {}, "failed"),
        (gain(-0.5, 1, 2.9), gain(-0.5, 1, 2.9), {"shown": (9.0, 0)}, "undecided"),
        (gain(-0.5, 1, 2.9), gain(-0.5, 1, 2.9), {"shown": (40.0, 1)}, "partial"),
        (gain(-9, -8, -7), gain(-9, -8, -7), {"labels": rule.Labels(8, 8, 1.0, True)}, "partial"),
        (gain(-0.5, 1, 2.9), gain(-0.5, 1, 2.9), {"recovered": 3}, "partial"),
        (gain(-0.5, 1, 2.9), gain(-0.5, 1, 2.9), {"recovered": 4}, "leak"),
    ],
)  # fmt: skip
def test_the_level_of_a_reconstruction(
    floor: Interval, control: Interval | None, more: dict, level: str
) -> None:
    found = rule.Findings(8, 0, 15.0, 0.5, "grey", 12.0, floor, control)
    assert rule.reconstruction(dataclasses.replace(found, **more))[0] == level


def test_floors_stand_below_the_score_the_highest_first() -> None:
    described = {
        name: {"psnr": {"mean": mean}} for name, mean in (("a", 9.0), ("b", None), ("c", 12.0), ("d", 0.5))
    }
    result = AuditResult("x", "reconstruction", [], {"metrics": {}, "floors": described}, "", "none")
    assert [name for name, _, _ in family.score_rows(result)] == [
        "x",
        "floor: c",
        "floor: a",
        "floor: d",
        "floor: b",
    ]
    one, two = (
        audit_unlearning(
            "u",
            {"before": [0.8] * n, "after": [0.7] * n, "random": [0.8] * n},
            requests=1,
            mechanism="retrain",
        )
        for n in (1, 2)
    )
    assert unlearning._remarks(one)[0] == "u: 1 seed"
    assert unlearning._remarks(two)[0] == "u: 2 seeds"
