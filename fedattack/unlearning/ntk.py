"""Forgetting by the step that a linearised network's minimum takes when samples leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.functional import one_hot

from fedattack.errors import NotApplicable
from fedattack.unlearning.central import Central, Positions
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion

_LARGEST = 12_000  # unknowns of one dense system
_AT_ONCE = 8_000_000  # numbers of one part of the Jacobian


@dataclass
class Ntk(Mechanism):
    """NTK scrubbing (Golatkar et al., Forgetting outside the box, ECCV 2020, equation 9 and its code).

    Around the initial weights the network is linear in its weights; under squared loss against one-hot labels its
    training ends at ``w_0 - G (G'G + n damping I)^-1 (f_0 - y)``, G' the Jacobian of the logits. The released weights
    move by the difference of that end without and with the samples.

    Parameters
    ----------
    damping : float
        Regulariser per sample, above 0; None: the training's weight decay, 1e-3 where it has none.
    matched : bool
        Make the step as long as the distance of the trained from the linearised weights suggests, as the code does:
        cos or sin of the angle between them times that distance, twice, is added to its length.
    """

    runs = "central"
    damping: Annotated[float, Field(gt=0)] | None = None
    matched: bool = False

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`; `details`: the length of the "step". NotApplicable where the system is too large."""
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        central, first = trainer.central(), history.checkpoint(0)
        damping = self.damping or central.scenario.training.weight_decay or 1e-3
        kept = central.retained(frozenset().union(*excluded.values()))
        before = central.retained(frozenset().union(*history.excluded.values()))
        with trainer.cost.clocked():
            whole, left = linear_ends(central, first, kept, np.setdiff1d(before, kept), damping)
            step, now = left - whole, central.flat(history.weights)
            if self.matched:
                step = step * matched_scale(step, now - central.flat(first) - whole)
        after = central.weights(now + step, history.weights)
        return Forgotten(after, excluded, start, details={"step": float(step.norm())})


def linear_ends(
    central: Central, first: Weights, kept: Positions, gone: Positions, damping: float
) -> tuple[Tensor, Tensor]:
    """Where training the linearised network on all of both, and on `kept` alone, ends; less `first`, (P,).

    NotApplicable where more than 12,000 equations are to be solved.
    """
    flat, classes = central.flat(first), central.scenario.model.resolved[2]
    unknowns, rows = len(flat), (len(kept) + len(gone)) * classes
    if min(unknowns, rows) > _LARGEST:
        raise NotApplicable(
            f"setting 'unlearning.mechanism' = 'ntk': {unknowns:,} weights and {rows:,} answers; a system of at most "
            f"{_LARGEST:,} is solved: fewer samples or a smaller model"
        )
    ridges = [damping * count for count in (len(kept) + len(gone), len(kept))]
    if unknowns <= rows:
        square, right = flat.new_zeros(unknowns, unknowns), torch.zeros_like(flat)
        systems = []
        for some in (kept, gone):
            for part, residual in _jacobian(central, flat, first, some):
                square.addmm_(part.T, part)
                right += part.T @ residual
            systems.append((square.clone(), right.clone()))
        return tuple(_ridge(*one, ridge) for one, ridge in zip(reversed(systems), ridges, strict=True))  # type: ignore[return-value]
    parts = [one for some in (kept, gone) for one in _jacobian(central, flat, first, some)]
    jacobian, residual = (torch.cat(side) for side in zip(*parts, strict=True))
    kernel = jacobian @ jacobian.T
    ends = []
    for count, ridge in zip((rows, len(kept) * classes), ridges, strict=True):
        ends.append(jacobian[:count].T @ _ridge(kernel[:count, :count], residual[:count], ridge))
    return ends[0], ends[1]


def _ridge(square: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``-(square + ridge I)^-1 right``; 0 where there is no sample."""
    if not ridge:
        return torch.zeros_like(right)
    return -torch.linalg.solve(square + ridge * torch.eye(len(square), dtype=square.dtype), right)


def _jacobian(
    central: Central, flat: Tensor, base: Weights, positions: Positions
) -> Iterator[tuple[Tensor, Tensor]]:
    """In parts: the Jacobian of the logits, (n C, P), and the logits less the one-hot labels, (n C,)."""
    classes = central.scenario.model.resolved[2]
    slope = vmap(jacrev(lambda row, image: central.logits(row, base, image[None])[0]), in_dims=(None, 0))
    at_once = max(1, _AT_ONCE // (classes * len(flat)))
    if not len(positions):
        return
    for part in np.array_split(positions, -(-len(positions) // at_once)):
        images, labels = central.samples(part)
        with torch.no_grad():
            residual = central.logits(flat, base, images) - one_hot(labels, classes)
        central.count(classes * len(part))
        yield slope(flat, images).flatten(0, 1), residual.flatten()


def matched_scale(step: Tensor, error: Tensor) -> float:
    """By what the code multiplies a step, given the trained weights' distance from the linearised ones."""
    length, off = float(step.norm()), float(error.norm())
    if not length or not off:
        return 1.0
    inner = float(step @ error) / (length * off)
    angle = math.acos(max(-1.0, min(1.0, inner)))
    more = math.sin(angle - math.pi / 2) if inner < 0 else math.cos(angle)
    return 1.0 + 2 * more * off / length
