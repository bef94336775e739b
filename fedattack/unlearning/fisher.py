"""Forgetting by noise where the retained samples do not mind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad, vmap

from fedattack.unlearning.central import Central, Positions
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion

_CAP, _HEAD_CAP, _FLOOR, _BOOST, _CLASS_VARIANCE = 1e3, 1e2, 1e-8, 10.0, 1e-4
_AT_ONCE = 4_000_000  # numbers of per-sample gradients


@dataclass
class Fisher(Mechanism):
    """Fisher forgetting (Golatkar et al., Eternal sunshine of the spotless net, CVPR 2020), as its code has it.

    Each weight w becomes w + sqrt(v) N(0, 1), ``v = (alpha min(1 / (F + 1e-8), 1e3)) ** (2 power)``, F the diagonal
    of the Fisher information of the retained samples, labels taken in expectation. The cap is 1e2 in the head; v is
    averaged over each tensor's second axis, and ten times as large in the head and in tensors of one axis. The
    head's row of a class that is forgotten whole is drawn around 0 with variance 1e-3 (1e-4, ten times).

    Parameters
    ----------
    alpha : float
        Strength, above 0; the code's grid is 1e-8 to 1e-5.
    power : float
        Of F in the deviation: 0.5 as in the code, 0.25 as in the paper.
    """

    runs = "central"
    alpha: Annotated[float, Field(gt=0)] = 1e-6
    power: Annotated[float, Field(gt=0, le=1)] = 0.5

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`; see :meth:`Mechanism.forget`.

        `details`: "sigma", the deviation's root mean square; "before", "after", accuracy on the retained samples; a
        "warning" where more than 5 points of it are lost.
        """
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        central, base = trainer.central(), history.weights
        kept = central.retained(frozenset().union(*excluded.values()))
        with trainer.cost.clocked():
            flat = central.flat(base)
            information = diagonal(central, flat, base, kept)
            gone = _forgotten_classes(central, frozenset().union(*(d.positions for d in deletions)), kept)
            mean, variance = self.distribution(central, flat, information, gone)
            generator = central.rng("fisher", sum(map(len, history.excluded.values())))
            noise = torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
            after = mean + variance.sqrt() * noise
        details = _told(central, base, kept, flat, after, float(variance.mean().sqrt()))
        return Forgotten(central.weights(after, base), excluded, start, details=details)

    def distribution(
        self, central: Central, flat: Tensor, information: Tensor, gone: Collection[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of each weight after forgetting, (P,); `gone`: classes forgotten whole."""
        mean, spread = central.parts(flat.clone()), dict[str, Tensor]()
        head, rows = central.names[-1].rpartition(".")[0], sorted(gone)
        for name, known in central.parts(information).items():
            last = name.rpartition(".")[0] == head
            wide = (1 / (known + _FLOOR)).clamp(max=_HEAD_CAP if last else _CAP)
            variance = (self.alpha * wide) ** (2 * self.power)
            if known.dim() > 1:
                variance = variance.mean(1, keepdim=True).expand_as(known).clone()
            if last and rows:
                mean[name][rows], variance[rows] = 0.0, _CLASS_VARIANCE
            spread[name] = variance * (_BOOST if last or known.dim() == 1 else 1.0)
        return tuple(torch.cat([t.reshape(-1) for t in side.values()]) for side in (mean, spread))  # type: ignore[return-value]


def diagonal(central: Central, flat: Tensor, base: Weights, positions: Positions) -> Tensor:
    """Mean over samples of ``sum_y p_y (d log p_y / d w)^2``, (P,): as many backward passes as there are classes."""

    def log_odds(row: Tensor, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logs = central.logits(row, base, image[None])[0].log_softmax(-1)
        found = logs.gather(0, label[None])[0]
        return found, found.detach()

    total, classes = torch.zeros_like(flat), central.scenario.model.resolved[2]
    slopes = vmap(grad(log_odds, has_aux=True), in_dims=(None, 0, 0))
    for part in np.array_split(positions, -(-len(positions) // max(1, _AT_ONCE // len(flat))) or 1):
        if not len(part):
            continue
        images, labels = central.samples(part)
        for label in range(classes):
            slope, logs = slopes(flat, images, torch.full_like(labels, label))
            total += (logs.exp()[:, None] * slope**2).sum(0)
        central.count(classes * len(part))
    return total / max(1, len(positions))


def _forgotten_classes(central: Central, forgotten: Collection[int], kept: Positions) -> list[int]:
    gone = central.labels[sorted(forgotten)].unique().tolist()
    return sorted(set(gone) - set(central.labels[torch.from_numpy(kept)].tolist()))


def _told(
    central: Central, base: Weights, kept: Positions, before: Tensor, after: Tensor, sigma: float
) -> dict[str, Any]:
    """What the noise did to the accuracy on what is kept."""
    if not len(kept):
        return {"sigma": sigma}
    images, labels = central.samples(kept)
    with torch.no_grad():
        shares = [
            float((central.logits(flat, base, images).argmax(1) == labels).double().mean())
            for flat in (before, after)
        ]
    details: dict[str, Any] = {"sigma": sigma, "before": shares[0], "after": shares[1]}
    if shares[0] - shares[1] > 0.05:
        details["warning"] = (
            f"noise of sigma {sigma:.3g} costs {100 * (shares[0] - shares[1]):.1f} points of accuracy on the "
            "retained samples; lower 'unlearning.fisher.alpha'"
        )
    return details
