"""What several federated mechanisms do with clients' updates: average, project, compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedattack.observation import Scenario
from fedattack.unlearning.history import ClientUpdate, Weights


def length(change: Weights) -> float:
    """L2 norm over all tensors."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in change.values()))


def moved(weights: Weights, updates: Iterable[ClientUpdate], tied: Mapping[str, str]) -> Weights:
    """The weights after the mean of the updates, weighted by examples; as they were where there is none."""
    total, after = 0, {name: tensor.double() for name, tensor in weights.items()}
    means: Weights = {}
    for update in updates:
        total += update.examples
        shift = {name: tensor - after[name] for name, tensor in update.buffers.items()}
        for name, tensor in (update.change | shift).items():
            part = update.examples * tensor.double()
            means[name] = means[name] + part if name in means else part
    after |= {name: after[name] + mean / total for name, mean in means.items()}
    after |= {name: after[kept] for name, kept in tied.items()}
    return {name: tensor.to(weights[name].dtype) for name, tensor in after.items()}


def flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named tensors as one vector (P,), float64."""
    return torch.cat([tensors[name].double().reshape(-1) for name in names])


def stepped(weights: Weights, step: Tensor, names: Sequence[str], tied: Mapping[str, str]) -> Weights:
    """The weights after a flat step (P,) of the named tensors."""
    pieces = step.split([weights[name].numel() for name in names])
    after = dict(weights)
    for name, piece in zip(names, pieces, strict=True):
        after[name] = (weights[name].double() + piece.view_as(weights[name])).to(weights[name].dtype)
    return after | {name: after[kept] for name, kept in tied.items()}


def told(scenario: Scenario, what: str) -> dict[str, Any]:
    """The record's warning that `what` comes from updates of which only a part was sent; {} where all was."""
    compression = scenario.compression
    if compression.name == "none":
        return {}
    return {
        "warning": f"clients compress what they send ({compression.name}): {what} is that of what was sent"
    }
