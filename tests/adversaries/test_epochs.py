"""DLF: several local passes with images of their own, tied by what no order of the images changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hcgla_scenes import scenario, smooth_images
from torch import Tensor

from adversaries.inversion.gradients import epochs_for
from adversaries.inversion.matching.match import Match
from adversaries.reconstruction.matching.dlf import DLF, disagreement, together
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation, Scenario, Update
from fedattack.training import batch_positions, local_update

CPU = torch.device("cpu")


def fedavg(batch: int, steps: int, rate: float = 0.02, **how: Any) -> Scenario:
    training = TrainingConfig(protocol="fedavg", batch_size=batch, local_steps=steps, learning_rate=rate)
    return scenario(5, training=training, name="none", **how)


def send(scene: Scenario, images: Tensor, labels: Tensor, seed: int) -> Observation:
    """What a client sends that shuffles by a seed nobody else knows."""
    weights = initial_weights(scene.model, 7)
    batches = batch_positions(len(labels), scene.training, seed, 1, 0)
    found = local_update(build_model(scene.model), weights, images, labels, batches, scene.training)
    names, changes = zip(*found.update.items(), strict=True)
    values = torch.cat([change.flatten() for change in changes])
    update = Update(names, tuple(tuple(c.shape) for c in changes), None, values, "delta")
    return Observation(1, 0, scene, weights, update, len(labels))


def test_the_prior_sees_which_images_there_are_and_not_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(96, 3, 3, 3, generator=generator)
    one = smooth_images(4, 8, seed=1)
    passes = torch.stack([one, one[[2, 0, 3, 1]], one.flip(0)])[None]
    assert float(disagreement(passes, kernels)) == pytest.approx(0.0, abs=1e-10)
    other = torch.stack([one, smooth_images(4, 8, seed=2), one])[None]
    found = float(disagreement(other, kernels))
    assert found > 0.1
    # Over all pairs, each pass with itself included: of nine, four hold the other.
    largest = [torch.nn.functional.conv2d(x, kernels, padding=1).amax(0) for x in other[0, :2]]
    assert found == pytest.approx(4 / 9 * float((largest[0] - largest[1]).square().mean()), rel=1e-4)
    assert torch.equal(disagreement(torch.cat([passes, other]), kernels)[1:], disagreement(other, kernels))


def test_passes_have_images_of_their_own() -> None:
    def orders(size: int, steps: int, declared: int) -> tuple[tuple[tuple[int, ...], ...], int]:
        schedule, passes = epochs_for(fedavg(size, steps), declared)
        return schedule.orders, passes

    assert orders(2, 4, 4) == (((0, 1), (2, 3), (4, 5), (6, 7)), 2)
    assert orders(2, 5, 3) == (((0, 1), (2,), (3, 4), (5,), (6, 7)), 3)  # the third is broken off
    assert orders(2, 2, 4) == (((0, 1), (2, 3)), 1)
    assert orders(0, 3, 2) == (((0, 1),) * 3, 1)  # nothing to shuffle


def test_images_of_all_passes_are_matched_within_their_label_and_averaged() -> None:
    images, labels = smooth_images(3, 8, seed=4), torch.tensor([2, 1, 2])
    noise = 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    second = images[[2, 1, 0]] + noise
    broken_off = images[[2]]
    found = together(
        Match(torch.cat([images, second, broken_off]), 0.0, [], 0, 0, torch.tensor([2, 1, 2, 2, 1, 2, 2])), 3
    )
    assert found.labels.tolist() == labels.tolist()
    torch.testing.assert_close(found.images[:2], images[:2] + noise[[2, 1]] / 2)
    torch.testing.assert_close(found.images[2], images[2] + noise[0] / 3)
    # An image of another label is never taken, however near.
    swapped = Match(torch.cat([images, images[[1, 0, 2]]]), 0.0, [], 0, 0, torch.cat([labels, labels]))
    assert not torch.allclose(together(swapped, 3).images[1], images[1], atol=0.01)


def test_labels_come_back_in_order_and_the_answer_is_the_attackers_alone() -> None:
    scene = fedavg(2, 5, model="tiny-cnn", size=8)
    images, labels = smooth_images(4, 8, seed=3), torch.tensor([3, 1, 4, 0])
    attack = DLF(iterations=4)
    attack.check(scene)
    seen = send(scene, images, labels, seed=5)
    (answer,) = attack.run([seen], 0, CPU)
    assert answer.images.shape == images.shape
    assert answer.labels.tolist() == sorted(answer.labels.tolist())
    assert answer.details["passes"] == 3
    (again,) = attack.run([seen], 0, CPU)
    assert torch.equal(answer.images, again.images)
    (other,) = attack.run([seen], 1, CPU)
    assert not torch.equal(answer.images, other.images)
    (single,) = attack.run([send(fedavg(0, 2, model="tiny-cnn", size=8), images, labels, 5)], 0, CPU)
    assert single.details["passes"] == 1


def test_soft_labels_tell_no_images_apart() -> None:
    with pytest.raises(ConfigError, match="'labels' = 'joint'"):
        DLF(labels="joint")
