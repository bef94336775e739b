"""What the released code of L-CODEC takes for a Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedattack.unlearning.central import Central
from fedattack.unlearning.history import History


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
