"""The two Hessians of a scrub: the released code's difference of two gradients, and that of the retained data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from fedattack.unlearning.central import Central, Positions
from fedattack.unlearning.history import History

_CHUNK = 256  # samples whose answers are differentiated at once


@dataclass(frozen=True)
class RankOne:
    """The matrix ``vector vector' / scale``, (P, P); zero where `scale` is."""

    vector: Tensor  # (P,)
    scale: float

    def solve(self, right: Tensor, rows: Tensor, damping: float, factor: float) -> Tensor:
        """``(factor * matrix + damping * I)^-1 right`` on the parameters `rows` alone (Sherman and Morrison)."""
        if not self.scale:
            return right / damping
        own = self.vector[rows]
        weight = factor / self.scale
        return (right - own * (weight * (own @ right) / (damping + weight * (own @ own)))) / damping

    @property
    def norm(self) -> float:
        """Largest eigenvalue."""
        return float(self.vector @ self.vector) / self.scale if self.scale else 0.0


def released_hessian(central: Central, history: History) -> RankOne:
    """What the released code takes for the Hessian: ``(G1 - G2)(G1 - G2)' / |w1 - w2|_1``.

    G and w are of the last two epochs of the training, which is trained again from the last checkpoint before them:
    w the parameters at an epoch's end, G the sum of its batches' mean gradients, without weight decay, over the
    number of samples. Of a training of fewer than two epochs its two halves; zero where it has a single step.
    """
    training = central.scenario.training
    total = central.rounds * training.local_steps
    epoch = max(1, -(-len(central) // (training.batch_size or len(central))))
    epoch = min(epoch, total // 2)
    first = total - 2 * epoch  # step, from 0, with which the last epoch but one begins
    start = max(round for round in history.checkpoints if round * training.local_steps <= first)
    decay = training.weight_decay if training.protocol == "fedavg" else 0.0
    summed = [torch.zeros_like(central.flat(history.weights)) for _ in range(2)]
    ends = list(summed)
    number = start * training.local_steps
    for step in central.walk(history.checkpoint(start), first_round=start + 1):
        if number == total:
            ends[1] = step.before
        elif number >= first:
            which = (number - first) // epoch
            if which == 1 and number == first + epoch:
                ends[0] = step.before
            if len(step.batch):
                summed[which] += step.gradient - decay * step.before
        number += 1
    change = (summed[0] - summed[1]) / len(central)
    return RankOne(change, float((ends[0] - ends[1]).abs().sum()) if epoch else 0.0)


def gauss_newton_product(
    central: Central, flat: Tensor, base: Mapping[str, Tensor], vector: Tensor, positions: Positions
) -> Tensor:
    """The Gauss-Newton matrix of the summed cross-entropies times a vector, (P,); counts as two gradients.

    ``sum_i J_i' (diag p_i - p_i p_i') J_i`` with J the logits' Jacobian and p their softmax: never indefinite, and
    the Hessian itself where the logits are linear in the parameters (Schraudolph, Neural Computation 14(7), 2002).
    """
    total = torch.zeros_like(flat)
    for part in np.array_split(positions, -(-len(positions) // _CHUNK)) if len(positions) else []:
        images, _ = central.samples(part)
        point = flat.detach().requires_grad_()
        logits = central.logits(point, base, images)
        # J v as the derivative of u' J v by u, which needs no forward mode of the model's layers
        u = torch.zeros_like(logits, requires_grad=True)
        (back,) = torch.autograd.grad(logits, point, u, create_graph=True)
        (along,) = torch.autograd.grad(back, u, vector, retain_graph=True)
        chance = logits.detach().softmax(1)
        curved = chance * (along - (chance * along).sum(1, keepdim=True))
        (found,) = torch.autograd.grad(logits, point, curved)
        total += found
    central.count(2 * len(positions))
    return total


@dataclass(frozen=True)
class Solved:
    """What a linear system was solved to."""

    solution: Tensor
    products: int  # matrix-vector products it took
    residual: float  # as a share of the right-hand side


def solve(
    product: Callable[[Tensor], Tensor], right: Tensor, rows: Tensor, tolerance: float, most: int
) -> Solved:
    """Conjugate gradients on the parameters `rows` alone, of which the solution is.

    `product`, (P,) to (P,), is to be symmetric and positive on them.
    """
    if not len(rows):
        return Solved(right[rows], 0, 0.0)
    whole = torch.zeros_like(right)
    wanted = right[rows]
    count = 0

    def restricted(values: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        whole[rows] = torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).to(whole)
        image: np.ndarray = product(whole)[rows].double().numpy()
        return image

    size = len(rows)
    operator = LinearOperator((size, size), matvec=restricted, dtype=np.float64)
    found, _ = cg(operator, wanted.double().numpy(), rtol=tolerance, maxiter=most)
    used = count
    rest = np.linalg.norm(restricted(found) - wanted.double().numpy())
    norm = float(wanted.norm())
    return Solved(torch.from_numpy(found).to(right), used, float(rest) / norm if norm else 0.0)
