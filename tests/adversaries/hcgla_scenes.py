"""Scenes for the tests of HCGLA: a real client, a real compressor, a real wire."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.evidence.client import ImitatedClient
from adversaries.reconstruction.hcgla import HCGLA
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.models import initial_weights
from fedattack.observation import Auxiliary, Observation, Scenario, Update


def smooth_images(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """Random images with the low frequencies of natural ones, float32 (N, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return (fine + 0.02 * torch.randn(fine.shape, generator=generator)).clamp(0, 1)


def scenario(
    classes: int,
    rate: float = 0.001,
    model: str = "lenet-zhu",
    activation: str = "sigmoid",
    size: int = 32,
    training: TrainingConfig | None = None,
    **compression: object,
) -> Scenario:
    """A resolved scenario with exact global top-k unless told otherwise."""
    resolved = ModelConfig.model_validate(
        {"name": model, "classes": classes, "channels": 3, "image_size": size, "activation": activation}
    )
    settings = CompressionConfig.model_validate({"name": "topk", "rate": rate} | compression)
    return Scenario(resolved, training or TrainingConfig(), settings)


def observe(
    scene: Scenario,
    images: Tensor,
    labels: Tensor,
    client: int = 0,
    auxiliary: Tensor | None = None,
    seed: int = 7,
) -> Observation:
    """What the server sees of a client with this batch, which is also its batch size."""
    training = scene.training.model_copy(update={"batch_size": len(images)})
    scene = dataclasses.replace(scene, training=training)
    weights = initial_weights(scene.model, seed)
    seen = ImitatedClient(scene, weights, seed).observe(images, labels, client)
    public = None if auxiliary is None else Auxiliary(auxiliary, source="test")
    return dataclasses.replace(seen, auxiliary=public)


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over images, data range 1, clamped."""
    return float((-10 * torch.log10((images.clamp(0, 1) - truth).square().mean((1, 2, 3)))).mean())


def fixed_observation(path: str, images: Tensor | None = None, labels: Tensor | None = None) -> Observation:
    """The observation in a file, made from `images` and `labels` first where these are given."""
    scene = scenario(40, rate=0.05, size=16)
    if images is not None and labels is not None:
        seen = observe(scene, images, labels, auxiliary=smooth_images(40, 16, seed=11))
        update = seen.update
        held = {"indices": update.indices, "values": update.values, "weights": seen.weights}
        torch.save(held, path)
    held = torch.load(path, weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in held["weights"].items()}
    update = Update(tuple(shapes), tuple(shapes.values()), held["indices"], held["values"])
    training = scene.training.model_copy(update={"batch_size": 2})
    public = Auxiliary(smooth_images(40, 16, seed=11), source="test")
    return Observation(
        1, 0, dataclasses.replace(scene, training=training), held["weights"], update, 2, auxiliary=public
    )


def answers_digest(observation: Observation) -> dict[str, str]:
    """SHA-256 of everything that each method of HCGLA answers."""
    attacks = {
        "gauss-newton": HCGLA(method="gauss-newton", schedule=(1.0, 0.3), modes=64),
        "matching": HCGLA(method="matching", iterations=12),
        "published": HCGLA(method="matching", preset="published", iterations=12, restarts=2),
        "adam": HCGLA(method="matching", optimizer="signed-adam", start="random", iterations=8),
    }
    digests = {}
    for name, attack in attacks.items():
        (answer,) = attack.run([observation], 3, torch.device("cpu"))
        digest = hashlib.sha256(answer.images.numpy().tobytes() + answer.labels.numpy().tobytes())
        digest.update(repr((answer.loss, answer.label_confidence, answer.history, answer.details)).encode())
        digest.update(answer.floors["prior"].numpy().tobytes())
        digests[name] = digest.hexdigest()
    return digests
