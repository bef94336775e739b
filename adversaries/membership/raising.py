"""Weights under which chosen samples, and as little else as can be, are predicted worse."""

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

STEPS = 2
"""Gauss-Newton steps: the losses are far from linear in a step of this length."""
HALVINGS = 8
"""Most halvings of a step that does not bring the losses closer to what is asked for."""
ITERATIONS, TOLERANCE = 40, 1e-3
RIDGE = 0.01
"""Relative to the mean squared norm of a sample's gradient."""
CHUNK = 256


def raise_losses(
    model: ModelConfig, weights: dict[str, Tensor], samples: Candidates, rise: Tensor, seed: int
) -> dict[str, Tensor]:
    """`weights`, moved as little as it takes for each sample's cross-entropy to rise by `rise`, (N,), in nats.

    With the samples' gradients as the rows of J, a step is the least one that solves ``J d = rise`` up to a ridge,
    ``d = J^T (J J^T + r I)^-1 rise``; samples of rise 0 are held where they are. Plain ascent, ``d ~ J^T rise``, goes
    where all samples agree instead. Eval mode; only trained parameters move. `seed` seeds one probe, which sizes
    the ridge.
    """
    module = build_model(model).eval()
    names = trained_parameters(module)
    fixed = {name: tensor for name, tensor in weights.items() if name not in names}
    moved = {name: weights[name] for name in names}
    batches = list(zip(samples.images.split(CHUNK), samples.labels.split(CHUNK), strict=True))
    probe = 2.0 * torch.randint(2, rise.shape, generator=torch.Generator().manual_seed(seed)) - 1
    goal = _losses(module, fixed, moved, batches) + rise.float()
    for _ in range(STEPS):

        def back(shares: Tensor, at: dict[str, Tensor] = moved) -> dict[str, Tensor]:
            total = {name: torch.zeros_like(tensor) for name, tensor in at.items()}
            for batch, part in zip(batches, shares.split(CHUNK), strict=True):
                _, pull = vjp(lambda w, one=batch: _losses(module, fixed, w, [one]), at)
                total = {name: total[name] + tensor for name, tensor in pull(part)[0].items()}
            return total

        def system(shares: Tensor, at: dict[str, Tensor] = moved) -> Tensor:
            return jvp(lambda w: _losses(module, fixed, w, batches), (at,), (back(shares, at),))[1]

        ridge = RIDGE * (probe @ system(probe)) / len(probe)
        missing = goal - _losses(module, fixed, moved, batches)
        shares, _ = conjugate_gradients(
            lambda c, r=ridge, s=system: s(c) + r * c, missing, ITERATIONS, TOLERANCE
        )
        step = back(shares)
        for halving in range(HALVINGS + 1):
            nearer = {name: moved[name] + tensor / 2**halving for name, tensor in step.items()}
            if (goal - _losses(module, fixed, nearer, batches)).norm() < missing.norm():
                moved = nearer
                break
    return weights | {name: tensor.detach() for name, tensor in moved.items()}


def _losses(
    module: torch.nn.Module,
    fixed: dict[str, Tensor],
    moved: dict[str, Tensor],
    batches: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Cross-entropy of each sample, (N,)."""
    parts = [
        cross_entropy(functional_call(module, {**fixed, **moved}, (x,)), y, reduction="none")
        for x, y in batches
    ]
    return torch.cat(parts)


def in_turn(count: int, parts: int, turn: int) -> Tensor:
    """Which of `count` samples have their turn, bool (N,): every `parts`-th, another set in each of `parts` turns."""
    return torch.arange(count) % parts == turn % parts
