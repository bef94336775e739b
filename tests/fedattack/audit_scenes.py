"""Victims made for the auditor: observations, truths and answers of a known quality."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedattack.audit.membership_pool import Scored
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.groundtruth import GroundTruth
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario, Update

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


def scored(scores, is_member, client: int = 0, first: int = 0, **more) -> Scored:
    """An answer about one target whose candidates are samples of their own, numbered from `first`."""
    values, member = np.asarray(scores, dtype=np.float64), np.asarray(is_member, dtype=bool)
    own = {"samples": first + np.arange(len(values)), "others": np.zeros(len(values), dtype=bool)}
    return Scored(client, values, member, **own | more)


def targets(
    clients: int,
    count: int,
    effect: float,
    *,
    shared: bool,
    unit: float,
    offset: float,
    spread: float,
    seed: int,
) -> list[Scored]:
    """Targets of `count` members and as many held-out samples, scores N(own, 1).

    A sample's own mean has the deviation `unit`, a client's `offset`, and its members' further `effect` the deviation
    `spread`. `shared`: all targets are asked about the same held-out samples.
    """
    rng = np.random.default_rng(seed)
    held, found = unit * rng.normal(size=count), []
    for client in range(clients):
        own = held if shared else unit * rng.normal(size=count)
        inside = unit * rng.normal(size=count) + effect + spread * rng.normal()
        scores = np.concatenate([inside, own]) + offset * rng.normal() + rng.normal(size=2 * count)
        out = np.arange(count) if shared else (2 * client + 1) * 10_000 + np.arange(count)
        samples = np.concatenate([(2 * client + 2) * 10_000 + np.arange(count), out])
        found.append(scored(scores, np.arange(2 * count) < count, client, samples=samples))
    return found
