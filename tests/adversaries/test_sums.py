"""Secure aggregation: sums that are one gradient are attacked, and sums that are none are refused by everybody."""

from __future__ import annotations

import dataclasses

import honest_answers
import pytest
import torch
from malicious_scenes import batch_of, observe, scenario, total

from adversaries.inversion.evidence import one_gradient
from adversaries.reconstruction.malicious.imprint import Imprint
from adversaries.reconstruction.matching.inverting_gradients import InvertingGradients
from fedattack.config import CompressionConfig, DefenseConfig, TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.observation import EVERYONE, Scenario

HIDDEN = DefenseConfig(names=("secure-aggregation",))
CPU = torch.device("cpu")


def summed(attack: str, **compression: object) -> Scenario:
    """The scene that an attack applies to, as the server sees a sum over clients of it."""
    return dataclasses.replace(
        honest_answers.made(honest_answers.scene_of(attack)),
        training=TrainingConfig(batch_size=0),
        compression=CompressionConfig.model_validate(compression),
        defense=HIDDEN,
    )


@pytest.mark.parametrize("name", honest_answers.reconstruction_attacks())
@pytest.mark.parametrize("compressor", ["topk", "randomk", "topk-qsgd", "dgc"])
def test_sums_of_sparse_updates_are_refused(name: str, compressor: str) -> None:
    scene = summed(name, name=compressor, rate=0.1)
    with pytest.raises(NotApplicable, match="secure-aggregation"):
        honest_answers.build(name).check(scene)


@pytest.mark.parametrize("name", honest_answers.reconstruction_attacks())
def test_dense_sums_are_not_refused_for_being_sums(name: str) -> None:
    attack, scene = honest_answers.build(name), summed(name, name="none")
    if attack.needs.sums == "single":  # trained for one client's batch
        with pytest.raises(NotApplicable, match="one large batch of all clients"):
            attack.check(scene)
    else:
        attack.check(scene)


def test_sums_of_several_local_steps_and_of_signs_are_refused() -> None:
    scene = summed("ig", name="topk", rate=0.1)
    several = TrainingConfig(protocol="fedavg", batch_size=0, local_steps=3)
    with pytest.raises(NotApplicable, match="those clients that sent it"):
        InvertingGradients().check(dataclasses.replace(scene, training=several))
    with pytest.raises(NotApplicable, match="clients' signs"):
        one_gradient.check_one_gradient(summed("ig", name="sign"), signs=True)
    one_gradient.check_one_gradient(summed("ig", name="topk", rate=1.0))


@pytest.mark.parametrize("name", ["ig", "hcgla", "gauss-newton", "analytic", "imprint", "loki"])
def test_sums_of_pruned_updates_are_refused(name: str) -> None:
    scene = summed(name, name="none")
    pruned = dataclasses.replace(scene, defense=DefenseConfig(names=("prune", *HIDDEN.names)))
    with pytest.raises(NotApplicable, match="defence 'prune' under 'secure-aggregation'"):
        honest_answers.build(name).check(pruned)


def test_a_sparse_sum_is_refused_by_what_was_seen() -> None:
    """Read from disk, an observation may lack the defence that hid the clients: its client is enough."""
    images, labels = batch_of(2)
    scene = scenario("lenet-zhu", 2, compression=CompressionConfig(name="topk", rate=0.1))
    seen = observe(Imprint(), scene, images, labels, honest=True)
    one_gradient.as_gradient(seen)
    with pytest.raises(NotApplicable, match="those clients that sent it"):
        one_gradient.as_gradient(dataclasses.replace(seen, client=EVERYONE))


def test_a_dense_sum_is_one_larger_batch() -> None:
    attack, scene = Imprint(), scenario("imprint", 4, 128)
    batches = [batch_of(4, seed) for seed in (1, 2, 3)]
    seen = total([observe(attack, scene, images, labels) for images, labels in batches])
    (answer,) = attack.run([seen], 0, CPU)
    assert answer.details["status"] == "certified"
    assert sorted(answer.labels.tolist()) == sorted(torch.cat([labels for _, labels in batches]).tolist())
