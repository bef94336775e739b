"""What updates carry beside one gradient: local steps, residuals of earlier rounds, rounded values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hcgla_scenes import psnr, scenario, smooth_images
from torch import Tensor

from adversaries.inversion.evidence.one_gradient import mean_gradient
from adversaries.inversion.evidence.priors import gaussian_prior
from adversaries.inversion.gradients.schedule import schedules_for
from adversaries.reconstruction.hcgla import HCGLA
from adversaries.reconstruction.hcgla.annealed_gauss_newton import solve
from adversaries.reconstruction.hcgla.measurements import value_precision
from adversaries.reconstruction.hcgla.memory import Remembered
from fedattack.compression import Memory, build_compressor, decode, encode
from fedattack.config import Config, TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario, UpdateKind
from fedattack.rng import torch_rng
from fedattack.training import batch_positions, local_update
from simulations.pipeline import attack_folder, simulate

CPU = torch.device("cpu")
PUBLIC = Auxiliary(smooth_images(60, 12, seed=21), source="test")


def answer_of(
    scene: Scenario, images: Tensor, labels: Tensor, memory: Memory | None = None, round: int = 1
) -> tuple[Observation, Memory]:
    """What the server sees of a real client, and what the client keeps."""
    weights = initial_weights(scene.model, 7 + round)
    model = build_model(scene.model)
    batches = batch_positions(len(labels), scene.training, 3, round, 0)
    result = local_update(model, weights, images, labels, batches, scene.training)
    names = [name for name, _ in model.named_parameters()]
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    compressor = build_compressor(scene.compression, names, shapes)
    packet, kept = compressor.compress(result.update, memory or Memory(), round, torch_rng(1, "test", round))
    kind: UpdateKind = "gradient" if scene.training.protocol == "fedsgd" else "delta"
    update = decode(encode(packet), names, shapes, kind, scene.compression, round)
    seen = Observation(round, 0, scene, weights, update, result.num_examples, auxiliary=PUBLIC)
    return seen, kept


def small(training: TrainingConfig | None = None, rate: float = 0.15, **compression: Any) -> Scenario:
    return scenario(60, rate=rate, size=12, training=training, **compression)


def local(steps: int, rate: float = 0.02, **settings: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"protocol": "fedavg", "local_steps": steps, "learning_rate": rate} | settings
    )


def flat_memory(kept: Memory, role: str) -> Tensor:
    return kept.tensors[role].double()


# Which images are in which step


def test_orders_of_the_local_batches() -> None:
    def orders(training: TrainingConfig, samples: int) -> list[list[list[int]]]:
        found = schedules_for(small(training), samples)
        return [[list(batch) for batch in schedule.orders] for schedule in found]

    cases = ((0, 5), (4, 4), (4, 2))
    assert [len(orders(local(3, batch_size=size), samples)) for size, samples in cases] == [1] * 3
    assert orders(local(3, batch_size=0), 2)[0] == [[0, 1]] * 3
    found = orders(local(2, batch_size=2), 4)
    assert len(found) == 6
    assert len({str(order) for order in found}) == 6
    assert all(sorted(order[0] + order[1]) == [0, 1, 2, 3] for order in found)
    with pytest.raises(NotApplicable, match="another epoch"):
        orders(local(3, batch_size=1), 2)
    with pytest.raises(NotApplicable, match="120 orders"):
        orders(local(5, batch_size=1), 5)


@pytest.mark.parametrize(
    "training",
    [local(2), local(3, 0.05, momentum=0.9), local(2, 0.02, weight_decay=0.1)],
    ids=["plain", "momentum", "decay"],
)
def test_local_steps_on_one_image_are_corrected_for(training: TrainingConfig) -> None:
    image = smooth_images(1, 12, seed=5)
    seen, _ = answer_of(small(training), image, torch.tensor([17]))
    (answer,) = HCGLA().run([seen], 0, CPU)
    assert answer.method == "gauss-newton"
    assert answer.labels.tolist() == [17]
    assert answer.details["explained"]
    assert answer.details["batches"] == [[0]] * training.local_steps
    assert psnr(answer.images, image) > 40
    # Read as one gradient, the same update leads nowhere near.
    taken = dataclasses.replace(seen, update=mean_gradient(seen), scenario=small())
    naive = solve(taken, answer.labels, gaussian_prior(PUBLIC, (3, 12, 12)))
    assert psnr(naive.images, image) < psnr(answer.images, image) - 10


@pytest.mark.slow
def test_two_images_in_turn_and_their_order() -> None:
    images, labels = smooth_images(2, 12, seed=6), torch.tensor([23, 9])
    training = local(2, 0.01, batch_size=1)
    seen, _ = answer_of(small(training, rate=0.5), images, labels)
    (answer,) = HCGLA().run([seen], 0, CPU)
    assert answer.labels.tolist() == [9, 23]
    assert psnr(answer.images, images.flip(0)) > 30
    first = int(batch_positions(2, training, 3, 1, 0)[0][0])
    assert answer.details["batches"][0] == [answer.labels.tolist().index(int(labels[first]))]


def test_long_steps_end_in_the_last_answer_that_was_explained() -> None:
    image = smooth_images(1, 12, seed=5)
    seen, _ = answer_of(small(local(5, 20.0)), image, torch.tensor([17]))
    (answer,) = HCGLA().run([seen], 0, CPU)
    assert answer.method == "gauss-newton"
    assert answer.certificate is not None
    assert answer.details["explained"] == (answer.certificate <= 1.5)
    assert torch.isfinite(answer.images).all()


# Residuals of earlier rounds


@pytest.mark.parametrize(
    "compression",
    [
        {"error_feedback": True},
        {"name": "randomk", "error_feedback": True},
        {"name": "dgc", "momentum": 0.7},
    ],
    ids=["topk", "randomk", "dgc"],
)
@pytest.mark.parametrize("training", [None, local(2)], ids=["fedsgd", "fedavg"])
def test_a_memory_is_followed_from_the_images(
    compression: dict[str, Any], training: TrainingConfig | None
) -> None:
    scene = small(training, **compression)
    unit = 1.0 if training is None else -training.learning_rate * training.local_steps
    memory, followed = Memory(), Remembered()
    for round in (1, 2, 3):
        image, label = smooth_images(1, 12, seed=round), torch.tensor([11 * round])
        seen, memory = answer_of(scene, image, label, memory, round)
        followed.follow(seen, image, label)
    carry = followed.evidence(seen).carried
    expected = flat_memory(memory, "residual")
    if "momentum" in memory.tensors:
        expected = expected + 0.7 * flat_memory(memory, "momentum")
    assert carry is not None
    torch.testing.assert_close(carry * unit, expected, rtol=1e-3, atol=3e-7)
    assert followed.rounds == [1, 2, 3]


def test_a_rounded_entry_leaves_at_most_a_step() -> None:
    scene = small(name="topk-qsgd", error_feedback=True)
    image, label = smooth_images(1, 12, seed=1), torch.tensor([11])
    seen, memory = answer_of(scene, image, label)
    followed = Remembered()
    followed.follow(seen, image, label)
    carry = followed.evidence(seen).carried
    assert carry is not None
    torch.testing.assert_close(carry, flat_memory(memory, "residual"), rtol=1e-3, atol=1e-6)
    followed = Remembered()
    followed.follow(seen, torch.rand(1, 3, 12, 12, generator=torch_rng(3, "test")), label)
    carry = followed.evidence(seen).carried
    assert carry is not None
    assert (
        float(carry[seen.update.indices].abs().max()) <= float(seen.update.values.abs().max()) / 127 * 1.001
    )


def three_rounds(**compression: Any) -> tuple[list[Observation], list[Tensor]]:
    scene, memory, seen = small(**compression), Memory(), []
    images = list(smooth_images(3, 12, seed=9).split(1))
    for round, image in enumerate(images, 1):
        one, memory = answer_of(scene, image, torch.tensor([11 * round]), memory, round)
        seen.append(one)
    return seen, images


@pytest.mark.parametrize(
    "compression",
    [
        pytest.param({"error_feedback": True}, id="topk"),
        pytest.param({"name": "dgc"}, id="dgc", marks=pytest.mark.slow),
    ],
)
def test_rounds_are_peeled(compression: dict[str, Any]) -> None:
    seen, images = three_rounds(**compression)
    answers = HCGLA().run(seen[::-1], 0, CPU)[::-1]
    for round, (answer, image) in enumerate(zip(answers, images, strict=True), 1):
        assert answer.method == "gauss-newton"
        assert answer.labels.tolist() == [11 * round]
        assert answer.details["peeled_rounds"] == list(range(1, round))
        assert psnr(answer.images, image) > 40
    (alone,) = HCGLA(method="gauss-newton").run(seen[2:], 0, CPU)
    assert alone.details["peeled_rounds"] == []
    assert psnr(alone.images, images[2]) < psnr(answers[2].images, images[2]) - 10
    # Repeatable, and what comes later does not change what was answered before.
    again = HCGLA().run(seen[:2], 0, CPU)
    assert all(torch.equal(one.images, other.images) for one, other in zip(answers[:2], again, strict=True))


def test_matching_is_peeled_too() -> None:
    seen, images = three_rounds(error_feedback=True)
    answers = HCGLA(method="matching", iterations=40).run(seen[:2], 0, CPU)
    (alone,) = HCGLA(method="matching", iterations=40).run(seen[1:2], 0, CPU)
    assert psnr(answers[1].images, images[1]) > psnr(alone.images, images[1]) + 3


# Rounded values


@pytest.mark.parametrize("name", ["topk-qsgd", "qsgd"])
def test_rounded_values_are_believed_to_their_step(name: str) -> None:
    image = smooth_images(1, 12, seed=5)
    seen, _ = answer_of(small(name=name), image, torch.tensor([17]))
    assert value_precision(seen.update.values) == 2.0**-22
    (answer,) = HCGLA(method="gauss-newton").run([seen], 0, CPU)
    assert answer.details["explained"]
    assert psnr(answer.images, image) > 26
    assert psnr(answer.floors["prior"], image) < 18


def test_the_softmax_of_rounded_features_is_differentiated() -> None:
    from adversaries.inversion.gradients import closed_form
    from adversaries.reconstruction.hcgla.least_squares import Problem
    from adversaries.reconstruction.hcgla.measurements import read_update

    seen, _ = answer_of(small(name="topk-qsgd"), smooth_images(1, 12, seed=5), torch.tensor([17]))
    prior = gaussian_prior(PUBLIC, (3, 12, 12))
    chain = closed_form.describe(seen.scenario.model)
    measured = read_update(chain, seen, torch.tensor([17]), 0.1, 0)
    posed = Problem(chain, seen.weights, measured, prior.mean, prior.factor(), 0.03, 1e-5, 256, CPU)
    assert not posed.exact
    z = 0.1 * torch.randn(1, prior.size, dtype=torch.float64, generator=torch_rng(2, "test"))
    anchor = posed.anchor(posed.evaluate(z, 0.3, posed.anchor()))
    state = posed.evaluate(z, 0.3, anchor)
    _, joint = posed.jacobian(state)
    for position in (0, 5, 300):
        shift = torch.zeros_like(z)
        shift[0, position] = 1e-5
        ahead, behind = (posed.evaluate(z + sign * shift, 0.3, anchor) for sign in (1, -1))
        slope = (ahead.joint_residual / ahead.joint_noise - behind.joint_residual / behind.joint_noise) / 2e-5
        error = (joint[position].double() - slope).norm() / slope.norm()
        assert float(error) < 1e-3


# In a run


def federation(folder: Path, **changes: object) -> Config:
    settings = {
        "image-size": 12,
        "model.classes": 60,
        "labels": "random",
        "compression": 0.15,
        "compression.error_feedback": True,
        "clients": 2,
        "rounds": 2,
        "attack": "hcgla",
        "attack-rounds": 2,
        "engine": "inline",
        "engine.threads": 1,
        "run-dir": str(folder),
        "federation.evaluate": False,
    }
    return Config.from_mapping(settings | changes)


def answers_of(found: dict[str, dict[str, Reconstruction]]) -> dict[str, Reconstruction]:
    return found["hcgla"]


@pytest.mark.slow
def test_a_run_gives_the_attack_the_history_and_audits_what_was_asked(tmp_path: Path) -> None:
    run = simulate(federation(tmp_path / "run", **{"output.save_observations": True}))
    found = answers_of(run.reconstructions)
    assert sorted(found) == ["round-0002-client-00000", "round-0002-client-00001"]
    assert {record["round"] for record in run.audits["hcgla"].records} == {2}
    for answer in found.values():
        assert answer.method == "gauss-newton"
        assert answer.details["peeled_rounds"] == [1]
    assert np.mean([record["psnr"] for record in run.audits["hcgla"].records]) > 35
    later = attack_folder(tmp_path / "run", federation(tmp_path / "later"), truth=tmp_path / "run" / "truth")
    for key, answer in found.items():
        assert torch.equal(answers_of(later.reconstructions)[key].images, answer.images)
    assert len(answers_of(later.reconstructions)) == 4
