"""Steps in the span of samples' gradients: up their losses, and what of a step each sample accounts for.

With the gradients of N samples as the rows of J, never formed, and a ridge r, both solve ``(J J^T + r I) a = b``.
Eval mode; only trained parameters move.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import cross_entropy

from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from fedattack.config import ModelConfig
from fedattack.models import build_model
from fedattack.observation import Candidates
from fedattack.task import trained_parameters

State = dict[str, Tensor]

ITERATIONS, TOLERANCE = 40, 1e-3
RIDGE = 0.01
"""Relative to the mean squared norm of a sample's gradient."""
CHUNK = 256


def raise_losses(model: ModelConfig, weights: State, samples: Candidates, rise: Tensor, seed: int) -> State:
    """`weights`, moved as little as it takes for each sample's cross-entropy to rise by `rise`, (N,), in nats.

    To first order: one Gauss-Newton step, the least that solves ``J d = rise`` up to the ridge, which is
    ``d = J^T (J J^T + r I)^-1 rise``. Samples of rise 0 are held, as far as losses are linear. Plain ascent,
    ``d ~ J^T rise``, goes where all samples agree instead. `seed` seeds one probe, which sizes the ridge.
    """
    span = _Span(model, weights, samples, seed)
    step = span.back(span.solve(rise.float(), span.start), span.start)
    return weights | {name: (span.start[name] + tensor).detach() for name, tensor in step.items()}


def accounted_for(model: ModelConfig, weights: State, after: State, samples: Candidates, seed: int) -> Tensor:
    """How much of the step from `weights` to `after` each sample's descent explains, all at once, float64 (N,).

    The shares ``a`` of least squares with a ridge, ``after - weights ~ -J^T a``; `seed` as in :func:`raise_losses`.
    """
    span = _Span(model, weights, samples, seed)
    change = {name: weights[name] - after[name] for name in span.start}
    along = jvp(span.losses, (span.start,), (change,))[1]
    return span.solve(along, span.start).double()


class _Span:
    """The samples' losses as a function of the trained parameters, and its derivatives both ways."""

    def __init__(self, model: ModelConfig, weights: State, samples: Candidates, seed: int) -> None:
        self.module = build_model(model).eval()
        names = trained_parameters(self.module)
        self.fixed = {name: tensor for name, tensor in weights.items() if name not in names}
        self.start = {name: weights[name] for name in names}
        self.batches = list(zip(samples.images.split(CHUNK), samples.labels.split(CHUNK), strict=True))
        draws = torch.randint(2, samples.labels.shape, generator=torch.Generator().manual_seed(seed))
        self.probe = 2.0 * draws - 1

    def losses(self, at: State) -> Tensor:
        """Cross-entropies, (N,)."""
        return torch.cat([self._loss(at, batch) for batch in self.batches])

    def back(self, shares: Tensor, at: State) -> State:
        """J^T shares."""
        total = {name: torch.zeros_like(tensor) for name, tensor in at.items()}
        for batch, part in zip(self.batches, shares.split(CHUNK), strict=True):
            pull = vjp(lambda w, batch=batch: self._loss(w, batch), at)[1]
            total = {name: total[name] + tensor for name, tensor in pull(part)[0].items()}
        return total

    def solve(self, right: Tensor, at: State) -> Tensor:
        """(J J^T + r I)^-1 right."""

        def gram(shares: Tensor) -> Tensor:
            return jvp(self.losses, (at,), (self.back(shares, at),))[1]

        ridge = RIDGE * (self.probe @ gram(self.probe)) / len(self.probe)
        return conjugate_gradients(lambda c: gram(c) + ridge * c, right, ITERATIONS, TOLERANCE)[0].detach()

    def _loss(self, at: State, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = functional_call(self.module, {**self.fixed, **at}, (batch[0],))
        return cross_entropy(logits, batch[1], reduction="none")


def in_turn(count: int, parts: int, turn: int) -> Tensor:
    """Which of `count` samples have their turn, bool (N,): every `parts`-th, another set in each of `parts` turns."""
    return torch.arange(count) % parts == turn % parts
