"""GradInversion: which statistics it aims at, and that smoothness weighs what it does in the paper."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hcgla_scenes import observe, scenario, smooth_images

from adversaries.reconstruction.matching.gradinversion import GradInversion, statistics_known
from fedattack.config import TrainingConfig
from fedattack.metrics import match, psnr
from fedattack.models import build_model
from fedattack.observation import Observation
from fedattack.training import local_update

CPU = torch.device("cpu")
LABELS = torch.tensor([1, 3])


def seen(training: TrainingConfig, size: int = 8) -> Observation:
    scene = scenario(5, size=size, model="resnet20", activation="relu", name="none", training=training)
    images = smooth_images(2, size)
    observation = observe(scene, images, LABELS)
    sent = local_update(
        build_model(scene.model), observation.weights, images, LABELS, [np.arange(2)], training
    )
    update = torch.cat([tensor.flatten() for tensor in sent.update.values()])
    return dataclasses.replace(
        observation,
        update=dataclasses.replace(observation.update, values=update),
        buffers=sent.buffers if training.batch_norm == "train" else {},
    )


def test_a_new_models_statistics_are_not_aimed_at() -> None:
    """A client with frozen BatchNorm tells nothing of its batch's, and (0, 1) was never anybody's."""
    frozen = seen(TrainingConfig(batch_size=2, batch_norm="eval"))
    assert not statistics_known(frozen)
    (answer,) = GradInversion(iterations=3, restarts=2).run([frozen], 0, CPU)
    assert "batch-norm" not in answer.details["matching.regularisers"]
    assert answer.details["BatchNorm statistics"].startswith("not aimed at")
    trained = dict(frozen.weights)
    name = next(name for name in trained if name.endswith("running_mean"))
    trained[name] = trained[name] + 0.1
    assert statistics_known(dataclasses.replace(frozen, weights=trained))
    own = seen(TrainingConfig(batch_size=2))
    assert statistics_known(own)
    (answer,) = GradInversion(iterations=3, restarts=2).run([own], 0, CPU)
    assert "batch-norm" in answer.details["matching.regularisers"]


@pytest.mark.slow
def test_smoothness_pays_with_frozen_statistics() -> None:
    frozen = seen(TrainingConfig(batch_size=2, batch_norm="eval"), size=16)
    images = smooth_images(2, 16)
    quality = {}
    for tv in (1e-4, None):
        (answer,) = GradInversion(iterations=120, restarts=2, tv=tv).run([frozen], 0, CPU)
        order = list(match(answer.images, images).order)
        quality[tv] = float(psnr(answer.images[order], images).mean())
    assert quality[None] > quality[1e-4] + 2
