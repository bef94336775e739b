"""Scenes for the malicious server's attacks: a client's real update, at the weights that an attack sends."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.seats import MaliciousServer
from fedattack.compression import Memory, build_compressor, decode, encode
from fedattack.config import CompressionConfig, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.metrics import match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import EVERYONE, Auxiliary, Observation, Reconstruction, Scenario
from fedattack.training import batch_positions, local_update

SIZE = 8
NONE = CompressionConfig(name="none")


def pictures(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """Smooth images (N, 1, S, S) in [0, 1] that resemble one another, as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    fine = torch.rand(count, 1, size, size, generator=generator)
    return (0.7 * smooth + 0.3 * fine).clamp(0, 1)


PUBLIC = Auxiliary(pictures(400, seed=900), torch.arange(400) % 10)


def scenario(
    model: str,
    batch: int,
    width: int | None = None,
    *,
    classes: int = 10,
    training: TrainingConfig | None = None,
    compression: CompressionConfig = NONE,
    activation: str | None = None,
) -> Scenario:
    """A resolved scenario of ten-class grey images."""
    config = ModelConfig.model_validate(
        {"name": model, "width": width, "activation": activation, "classes": classes}
    )
    training = training or TrainingConfig(batch_size=batch)
    return Scenario(resolve(config, 1, SIZE, 10), training, compression)


def observe(
    attack: ReconstructionAttack,
    scene: Scenario,
    images: Tensor,
    labels: Tensor,
    *,
    public: Auxiliary | None = PUBLIC,
    seed: int = 0,
    honest: bool = False,
) -> Observation:
    """What the server sees of a client with this batch."""
    weights = initial_weights(scene.model, seed)
    if not honest and isinstance(attack, MaliciousServer):
        weights = attack.arm(scene, weights, seed, public)
    steps = [np.arange(len(images))] * scene.training.local_steps
    if 0 < scene.training.batch_size < len(images) and scene.training.local_steps > 1:
        steps = batch_positions(len(images), scene.training, seed, 1, 0)
    result = local_update(build_model(scene.model), weights, images, labels, steps, scene.training)
    names = tuple(result.update)
    shapes = tuple(tuple(tensor.shape) for tensor in result.update.values())
    packet, _ = build_compressor(scene.compression, names, shapes).compress(
        result.update, Memory(), 1, torch.Generator().manual_seed(seed)
    )
    kind = "gradient" if scene.training.protocol == "fedsgd" else "delta"
    update = decode(encode(packet), names, shapes, kind, scene.compression, round=1)
    return Observation(1, 0, scene, weights, update, len(images), auxiliary=public)


def total(parts: list[Observation], weights: dict[str, Tensor] | None = None) -> Observation:
    """What secure aggregation lets through: the sum, weighted by examples; `weights` where clients' differed."""
    first, examples = parts[0], sum(part.num_examples for part in parts)
    values = torch.stack([part.update.values * (part.num_examples / examples) for part in parts]).sum(0)
    training = first.scenario.training.model_copy(update={"batch_size": 0})
    hidden = DefenseConfig(names=("secure-aggregation",))
    return dataclasses.replace(
        first,
        client=EVERYONE,
        weights=weights or first.weights,
        update=dataclasses.replace(first.update, values=values),
        num_examples=examples,
        scenario=dataclasses.replace(first.scenario, training=training, defense=hidden),
    )


def batch_of(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and labels, drawn independently."""
    labels = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(seed))
    return pictures(count, seed=seed), labels


def scored(answer: Reconstruction, images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """PSNR of each private image, capped at 150, and how many were found with their label."""
    order = list(match(answer.images, images).order)
    quality = psnr(answer.images[order], images).clamp(max=150)
    return quality, int(((answer.labels[order] == labels) & (quality > 40)).sum())
