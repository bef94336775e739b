"""Images that a trained network's hidden layer gives away, from one honest update: ``spear`` below convolutions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from adversaries.reconstruction.algebra.spear import Spear
from fedattack.compression import Memory, build_compressor, decode, encode
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.data.dataset import ImageDataset
from fedattack.errors import ConfigError
from fedattack.metrics import match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Auxiliary, Observation, Scenario
from fedattack.rng import numpy_rng, torch_rng
from fedattack.training import local_update
from simulations.bench.scenes import data_set

CASES = ((8, 1), (16, 1), (15, 5))
"""Images, and the local steps of one pass in which they are seen."""

SEEDS = 3
_CLIENTS, _EACH, _ROUNDS = 10, 16, 15
_TRAINING = TrainingConfig(protocol="fedavg", local_steps=5, batch_size=_EACH, learning_rate=0.05)
_NONE = CompressionConfig(name="none")

console = Console(stderr=True)


def run(data: Path | None = None, quick: bool = False, count: int | None = None) -> dict[str, Any]:
    """PSNR beside the floor of CIFAR-10 images below a trained ``cnn-mcmahan``, of a gradient or of 5 local steps.

    Of a client that took part in the training; ``--count``: how many seeds, each with clients, weights and batches
    of its own.
    """
    if data is None:
        raise ConfigError("case 'hidden-features' needs CIFAR-10; give the folder above CIFAR10/ as --data")
    pictures = data_set("cifar10", data)
    rows = []
    for images, steps in ((2, 1),) if quick else CASES:
        for seed in range(1 if quick else count or SEEDS):
            less: dict[str, Any] = {"rounds": 1, "turns": 1} if quick else {}
            row = attacked(pictures, seed, images, steps, **less)
            rows.append(row)
            console.print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    figures: dict[str, Any] = {}
    for images, steps in dict.fromkeys((int(row["images"]), int(row["steps"])) for row in rows):
        alike = [row for row in rows if (row["images"], row["steps"]) == (images, steps)]
        what = f"{images} images" if steps == 1 else f"{images} images in {steps} steps"
        figures |= {
            f"{what}: PSNR, dB, mean over seeds": float(np.mean([row["PSNR, dB"] for row in alike])),
            f"{what}: worst seed": min(row["PSNR, dB"] for row in alike),
            f"{what}: worst image": min(row["worst image, dB"] for row in alike),
            f"{what}: floor, dB": float(np.mean([row["floor, dB"] for row in alike])),
            f"{what}: CPU seconds": float(np.mean([row["CPU seconds"] for row in alike])),
        }
    return figures | {"rows": rows}


def attacked(
    pictures: ImageDataset,
    seed: int,
    count: int,
    steps: int = 1,
    rounds: int = _ROUNDS,
    turns: int | None = None,
) -> dict[str, float]:
    """Train a federation, attack one update of `count` images of its first client, and score the answer."""
    order = numpy_rng(seed, "bench.hidden-features").permutation(len(pictures))
    images, labels = pictures.tensors(order)
    model = resolve(ModelConfig(name="cnn-mcmahan"), images.shape[1], images.shape[2], 10)
    weights = _trained(model, images, labels, seed, rounds)
    public = Auxiliary(images[_CLIENTS * _EACH :])
    seen = _observed(model, weights, images[:count], labels[:count], steps, public, seed)
    attack = Spear() if turns is None else Spear(turns=turns)
    started = time.process_time()
    answer = attack.run([seen], seed, torch.device("cpu"))[0]
    spent = time.process_time() - started
    pairs = match(answer.images, images[:count]).order
    found = psnr(answer.images[list(pairs)], images[:count])
    floor = psnr(public.images.mean(0).expand(count, -1, -1, -1), images[:count])
    return {
        "seed": seed,
        "images": count,
        "steps": steps,
        "PSNR, dB": float(found.mean()),
        "worst image, dB": float(found.min()),
        "best image, dB": float(found.max()),
        "floor, dB": float(floor.mean()),
        "residual": float(answer.details["residual"]),
        "CPU seconds": spent,
    }


def _trained(model: ModelConfig, images: Tensor, labels: Tensor, seed: int, rounds: int) -> dict[str, Tensor]:
    """Honest FedAvg of clients that have the first images."""
    weights = initial_weights(model, seed)
    whole = [np.arange(_EACH)] * _TRAINING.local_steps
    for _ in range(rounds):
        updates = []
        for first in range(0, _CLIENTS * _EACH, _EACH):
            own = slice(first, first + _EACH)
            module = build_model(model)
            updates.append(local_update(module, weights, images[own], labels[own], whole, _TRAINING).update)
        for name in updates[0]:
            weights[name] = weights[name] + torch.stack([update[name] for update in updates]).mean(0)
    return weights


def _observed(
    model: ModelConfig,
    weights: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    steps: int,
    public: Auxiliary,
    seed: int,
) -> Observation:
    """One gradient, or one pass in several local steps, as it came over the wire."""
    training = TrainingConfig(batch_size=len(images))
    if steps > 1:
        training = TrainingConfig(
            protocol="fedavg", local_steps=steps, batch_size=len(images) // steps, learning_rate=0.01
        )
    batches = np.array_split(np.arange(len(images)), steps)
    sent = local_update(build_model(model), weights, images, labels, batches, training)
    names, shapes = list(sent.update), [tuple(part.shape) for part in sent.update.values()]
    draws = torch_rng(seed, "bench.hidden-features.wire")
    packet, _ = build_compressor(_NONE, names, shapes).compress(sent.update, Memory(), 1, draws)
    kind: Literal["gradient", "delta"] = "gradient" if steps == 1 else "delta"
    received = decode(encode(packet), names, shapes, kind, _NONE, round=1)
    scenario = Scenario(model, training, _NONE)
    return Observation(1, 0, scenario, weights, received, len(images), auxiliary=public)
