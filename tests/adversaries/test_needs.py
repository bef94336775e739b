"""Needs as data: what each refuses and says, what an outside attack must bring, who is left out of a run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import honest_answers
import pytest
import torch
from malicious_scenes import scenario

from adversaries import ATTACKS, ReconstructionAttack
from adversaries.base import Progress, no_progress
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.hcgla import HCGLA
from adversaries.reconstruction.matching.idlg import IDLG
from adversaries.reconstruction.matching.inverting_gradients import InvertingGradients
from adversaries.reconstruction.tensor import TensorAttack
from adversaries.refusals import (
    TABLE,
    applicable,
    attack_refusals,
    check_class,
    refusals,
    threat_model,
    words,
)
from fedattack.config import AttackConfig, CompressionConfig, DefenseConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Reconstruction, Scenario

FAMILIES = ("reconstruction", "membership", "unlearning")


@dataclass
class Shifted(ReconstructionAttack):
    """An attack from outside: the public mean, shifted."""

    needs: ClassVar[Needs] = Needs(update="gradient", sums="dense", fresh=True, first_layer=True, auxiliary=8)

    by: float = 0.0

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        answers = []
        for one in observations:
            assert one.auxiliary is not None
            shift = self.by + float(one.update.values.abs().mean())
            image = (one.auxiliary.images.mean(0, keepdim=True) + shift).clamp(0, 1)
            answers.append(
                Reconstruction(
                    image.repeat(one.num_examples, 1, 1, 1), torch.zeros(one.num_examples).long(), loss=shift
                )
            )
        return answers


def with_training(scene: Scenario, **settings: Any) -> Scenario:
    return dataclasses.replace(scene, training=TrainingConfig.model_validate(settings))


def with_compression(scene: Scenario, **settings: Any) -> Scenario:
    return dataclasses.replace(scene, compression=CompressionConfig.model_validate(settings))


LENET, MLP = scenario("lenet-zhu", 1), scenario("mlp", 2)
STEPS = {"protocol": "fedavg", "local_steps": 3}
SUMS = dataclasses.replace(MLP, defense=DefenseConfig(names=("secure-aggregation",)))
CLIPPED = DefenseConfig(names=("clip-noise",), options={"clip-noise": {"clip_norm": 1.0}})

CASES: dict[str, list[tuple[Needs, Scenario, Facts, str]]] = {
    "update": [
        (Needs(update="gradient"), with_training(MLP, **STEPS), Facts(), "local_steps = 3"),
        (Needs(update="steps"), with_compression(MLP, name="sign"), Facts(), "only signs"),
    ],
    "entries": [
        (
            Needs(entries="all"),
            with_compression(MLP, name="topk", rate=0.1),
            Facts(),
            "rate 0.1 leaves entries out",
        ),
        (
            Needs(entries="rows"),
            with_compression(MLP, name="randomk", rate=0.1),
            Facts(),
            "holes in every row",
        ),
    ],
    "values": [
        (Needs(values="rounded"), with_compression(MLP, name="sign"), Facts(), "as signs"),
        (Needs(values="exact"), with_compression(MLP, name="qsgd"), Facts(), "sent rounded"),
    ],
    "unclipped": [(Needs(unclipped=True), dataclasses.replace(MLP, defense=CLIPPED), Facts(), "clip-noise")],
    "undecayed": [
        (Needs(undecayed="steps"), with_training(MLP, weight_decay=0.1, **STEPS), Facts(), "3 local step"),
        (
            Needs(undecayed="delta"),
            with_training(MLP, weight_decay=0.1, protocol="fedavg"),
            Facts(),
            "0.1 over 1",
        ),
    ],
    "sums": [
        (Needs(sums="single"), SUMS, Facts(), "no update of one alone"),
        (
            Needs(sums="dense"),
            with_compression(SUMS, name="topk", rate=0.1),
            Facts(),
            "those clients that sent it",
        ),
    ],
    "fresh": [
        (
            Needs(fresh=True),
            with_compression(MLP, name="topk", error_feedback=True),
            Facts(rounds=(1, 3)),
            "from round 2 on",
        )
    ],
    "labels": [
        (Needs(labels="llg"), with_compression(LENET, name="topk", rate=0.1), Facts(), "labels = 'llg'")
    ],
    "distinct": [(Needs(distinct=True), with_training(MLP, batch_size=11), Facts(), "11 > 10 classes")],
    "images": [(Needs(images=1), MLP, Facts(), "one image")],
    "batch": [
        (Needs(batch="agreed"), with_training(MLP, batch_size=0), Facts(), "trained for one size"),
        (Needs(batch="same"), MLP, Facts(), "another batch in every round"),
    ],
    "hidden": [(Needs(hidden=True), LENET, Facts(), "'head' is followed by nothing")],
    "first_layer": [(Needs(first_layer=True), LENET, Facts(), "begins with 'body.0', Conv2d")],
    "head": [(Needs(head="biased"), scenario("two-layer", 2), Facts(), "no bias")],
    "activations": [(Needs(activations=("tanh",)), MLP, Facts(), "use --activation tanh")],
    "batch_norm": [
        (Needs(batch_norm="needed"), LENET, Facts(), "no BatchNorm"),
        (Needs(batch_norm="refused"), scenario("resnet20", 2), Facts(), "batch statistics"),
    ],
    "chain": [(Needs(chain=True), MLP, Facts(), "no chain of convolutions")],
    "block": [(Needs(block=TensorAttack.needs.block), MLP, Facts(), "lacks a wide two-layer head")],
    "width": [(Needs(width=65), MLP, Facts(), "width = 64 < 65")],
    "auxiliary": [(Needs(auxiliary=32), MLP, Facts(auxiliary=31), "31 auxiliary images")],
    "labelled": [(Needs(auxiliary=1, labelled=True), MLP, Facts(labelled=False), "no labels")],
    "helped": [],
    "clients": [(Needs(clients=3), MLP, Facts(drawn=2, clients=6), "2 of 6")],
    "held_out": [(Needs(held_out=True), MLP, Facts(held_out=0), "data.nonmembers': 0")],
    "others": [(Needs(others=True), MLP, Facts(honest=0), "malicious_clients")],
    "references": [
        (Needs(references=1), MLP, Facts(references=0), "at least one reference model; use --references 1"),
        (Needs(references=4), MLP, Facts(references=2), "at least 4 reference models; use --references 4"),
    ],
    "about": [],
    "people": [(Needs(people=True), MLP, Facts(people=False), "unit 'group' with data.withheld")],
    "foreign": [(Needs(foreign=True), MLP, Facts(foreign=False), "samples that nobody did")],
    "calibrates": [(Needs(calibrates=True), MLP, Facts(calibrates=False), "asks no client to work")],
    "certificate": [
        (
            Needs(certificate=True),
            MLP,
            Facts(certificate=False),
            "promises nothing that removals could use up",
        )
    ],
    "trains": [(Needs(trains="generate"), MLP, Facts(), "trains no generator")],
    "critic": [
        (
            Needs(trains="generate", critic=True),
            dataclasses.replace(
                MLP,
                model=MLP.model.model_copy(update={"name": "wgan-gp-mlp", "nets": "generator"}),
                training=TrainingConfig(task="wgan-gp", protocol="fedavg", local_steps=5),
            ),
            Facts(),
            "critics stay at home",
        )
    ],
    "members": [(Needs(members=True), MLP, Facts(members=0), "known members")],
}


def test_every_need_has_a_row_of_the_table_and_a_case() -> None:
    named = {field.name for field in fields(Needs)} - {"signs", "patches"}
    assert {row.field for row in TABLE} == named == set(CASES)


@pytest.mark.parametrize(
    ("needs", "scene", "facts", "part"), [case for cases in CASES.values() for case in cases]
)
def test_each_need_refuses_in_one_sentence_what_it_cannot_have(
    needs: Needs, scene: Scenario, facts: Facts, part: str
) -> None:
    (sentence,) = refusals(needs, scene, facts)
    assert part in sentence
    assert "\n" not in sentence
    assert words(needs, plain=True)
    assert refusals(Needs(trains=needs.trains if needs.critic else "classify"), scene, facts) == []
    # What is not known is not refused.
    if facts != Facts():
        assert refusals(needs, scene) == []


@pytest.mark.parametrize("name", honest_answers.reconstruction_attacks())
def test_a_small_scene_meets_each_attacks_needs(name: str) -> None:
    scene = honest_answers.drawn_scene(ATTACKS.get(name)())
    assert scene in honest_answers.SCENES


def test_letters_and_seats() -> None:
    def letters(name: str) -> tuple[str, list[str]]:
        found = threat_model(ATTACKS.get(name))
        assert found["assumptions"]
        return found["seat"], found["letters"]

    assert letters("ig") == ("curious server", ["C"])
    assert letters("hcgla") == ("curious server", ["C", "D"])
    assert letters("lti") == ("curious server", ["D"])
    assert letters("gradinversion") == ("curious server", ["E"])
    assert letters("imprint") == ("malicious server", ["F", "G"])
    assert letters("fedmia") == ("curious server", [])
    assert letters("unlearn-max-loss") == ("malicious client", [])
    pretrained = ATTACKS.get("ggl")(generator="package.module:Class")
    assert threat_model(pretrained, pretrained.needs_now(LENET))["letters"] == ["C"]


def test_an_attack_that_does_not_apply_is_left_out_and_the_others_run() -> None:
    attacks = {"ig": InvertingGradients(), "idlg": IDLG(), "tensor": TensorAttack()}
    kept, left_out = applicable(attacks, MLP)
    assert list(kept) == ["ig"]
    assert kept["ig"] is attacks["ig"]
    assert "one label" in left_out["idlg"]
    assert "two-layer" in left_out["tensor"]
    with pytest.raises(NotApplicable, match=r"(?s)'idlg': .*\n.*'tensor': "):
        applicable({name: attacks[name] for name in ("idlg", "tensor")}, MLP)
    assert applicable({}, MLP) == ({}, {})


def test_local_batches_in_too_many_orders_are_refused_where_every_client_has_too_many_samples() -> None:
    scene = with_compression(
        with_training(LENET, protocol="fedavg", local_steps=20, batch_size=1), name="topk"
    )
    (sentence,) = attack_refusals(HCGLA(), scene, Facts(samples=(50, 21)))
    assert "local_steps = 20" in sentence
    assert attack_refusals(HCGLA(), scene, Facts(samples=(50, 1))) == []
    assert attack_refusals(HCGLA(), scene) == []


@pytest.mark.parametrize(
    ("needs", "part"),
    [
        (Needs(chain=True, first_layer=True), "chain and first_layer"),
        (Needs(auxiliary=1, helped=True), "auxiliary and helped"),
        (Needs(labelled=True), "labelled without auxiliary"),
        (Needs(values="exact", signs=True), "values and signs"),
        (Needs(batch="same", images=1), "batch and images"),
        ("one update", "adversaries.needs.Needs"),
    ],
)
def test_needs_that_contradict_each_other(needs: Needs, part: str) -> None:
    made = type("Made", (Shifted,), {"needs": needs})
    with pytest.raises(ConfigError, match=re.escape(part)):
        check_class("made", made, AttackConfig.model_fields, FAMILIES)


def test_classes_that_break_the_contract() -> None:
    for name in ATTACKS:
        check_class(name, ATTACKS.get(name), AttackConfig.model_fields, FAMILIES)

    @dataclass
    class Shadowing(Shifted):
        victims: int = 3

    with pytest.raises(ConfigError, match=r"'attack\.victims' is a setting of every run"):
        check_class("shadowing", Shadowing, AttackConfig.model_fields, FAMILIES)
    foreign = type("Foreign", (Shifted,), {"family": "inference"})
    with pytest.raises(ConfigError, match=r"'inference', which nobody scores.*membership, reconstruction"):
        check_class("foreign", foreign, AttackConfig.model_fields, FAMILIES)
    for wrong in ("fedattack.models:ModelConfig", "fedattack.models:build_model"):
        with pytest.raises(ConfigError, match=r"below Attack of adversaries\.base"):
            ATTACKS.get(wrong)


def test_an_attack_from_outside_needs_no_line_elsewhere(tmp_path: Path) -> None:
    """Its scene is drawn from its needs, and its answer depends on what it was shown alone."""
    name = f"{__name__}:Shifted"
    assert honest_answers.scene_of(name)["model"] == "mlp"
    for seed in (1, 2):
        honest_answers.save_scene(tmp_path / str(seed) / name, name, seed)
    first, again, other = (honest_answers.answers(tmp_path / str(seed), [name]) for seed in (1, 1, 2))
    assert first == again != other
