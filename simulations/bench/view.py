"""The view of a round beside per-sample gradients that are formed: CPU seconds a candidate, and how far apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from adversaries.membership.per_sample import Gradients, products
from fedattack.config import ModelConfig
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, Update

_MODELS = {"mlp": ModelConfig(name="mlp", width=128), "resnet20": ModelConfig(name="resnet20")}
UPDATES = 10


def run(quick: bool = False) -> dict[str, Any]:
    """Norms, and products with 10 dense updates, of 32x32 colour images, on one thread of the CPU.

    Of ``mlp`` (128 ReLU, 394,634 numbers) and ``resnet20``: ``_vmap_ms`` and ``_view_ms`` a candidate, ``_ratio`` of
    the two, and ``_apart``, the largest difference of norms and of products, relative to norms.
    """
    figures: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, config in _MODELS.items():
            figures |= {
                f"{name}_{key}": value for key, value in _compare(config, 8 if quick else 192).items()
            }
    finally:
        torch.set_num_threads(threads)
    return figures


def _compare(config: ModelConfig, count: int) -> dict[str, float]:
    config = config.model_copy(update={"classes": 10, "channels": 3, "image_size": 32, "activation": "relu"})
    model, weights = build_model(config).eval(), initial_weights(config, 0)
    generator = torch.Generator().manual_seed(0)
    samples = Candidates(
        torch.rand(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)
    )
    named = list(model.named_parameters())
    shapes = tuple(tuple(parameter.shape) for _, parameter in named)
    numbers = sum(parameter.numel() for _, parameter in named)
    updates = [
        Update(tuple(name for name, _ in named), shapes, None, torch.randn(numbers, generator=generator))
        for _ in range(UPDATES)
    ]
    view = _timed(lambda: products(Gradients(model, weights, samples), updates))
    formed = _timed(lambda: _formed(model, weights, samples, torch.stack([u.values for u in updates])))
    (dots, norms), (wanted, lengths) = view[0], formed[0]
    scale = lengths * torch.stack([u.values.double().norm() for u in updates])[:, None]
    apart = max(float(((dots - wanted) / scale).abs().max()), float((norms / lengths - 1).abs().max()))
    return {
        "vmap_ms": 1e3 * formed[1] / count,
        "view_ms": 1e3 * view[1] / count,
        "ratio": formed[1] / view[1],
        "apart": apart,
    }


def _timed(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], float]:
    """What it gives, and the CPU seconds of the faster of two goes."""
    seconds = []
    for _ in range(2):
        started = time.process_time()
        found = work()
        seconds.append(time.process_time() - started)
    return found, min(seconds)


def _formed(
    model: nn.Module, weights: dict[str, Tensor], samples: Candidates, updates: Tensor
) -> tuple[Tensor, Tensor]:
    """By per-sample gradients, 2**25 numbers of them at a time."""
    trained = {name: weights[name] for name, _ in model.named_parameters()}

    def loss(moving: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, {**weights, **moving}, (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    chunk = 2**25 // updates.shape[1]
    dots, norms = [], []
    for images, labels in zip(samples.images.split(chunk), samples.labels.split(chunk), strict=True):
        rows = torch.cat([found.flatten(1) for found in each(trained, images, labels).values()], 1)
        dots.append((updates @ rows.T).double())
        norms.append(rows.norm(dim=1).double())
    return torch.cat(dots, 1), torch.cat(norms)
