"""Solvers that mechanisms share: a Hessian known by its products alone, or by the steps of a training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from fedattack.errors import RunFailed
from fedattack.unlearning.central import Central, Positions
from fedattack.unlearning.history import Weights

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector, (P,) to (P,)."""


def gauss_newton(
    central: Central, flat: Tensor, base: Weights, vector: Tensor, positions: Positions
) -> Tensor:
    """The Gauss-Newton matrix of the summed cross-entropies times a vector, (P,); counts as two gradients.

    ``sum_i J_i' (diag(p_i) - p_i p_i') J_i v``, J the logits' derivative: never negative, and the Hessian itself
    where the logits are linear in the weights (Schraudolph, 2002). BatchNorm by its running statistics.
    """
    total = torch.zeros_like(flat)
    for part in np.array_split(positions, -(-len(positions) // central.chunk) or 1):
        point = flat.detach().requires_grad_()
        logits = central.logits(point, base, central.samples(part)[0])
        probe = torch.zeros_like(logits, requires_grad=True)
        (pulled,) = torch.autograd.grad(logits, point, probe, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, probe, vector, retain_graph=True)  # J v
        shares = logits.detach().softmax(1)
        weighted = shares * (pushed - (shares * pushed).sum(1, keepdim=True))
        total += torch.autograd.grad(logits, point, weighted)[0]
    central.count(2 * len(positions))
    return total


@dataclass(frozen=True)
class Solved:
    """What :func:`conjugate_gradients` found."""

    solution: Tensor
    products: int  # matrix-vector products it took
    residual: float  # of the system, as a share of the right-hand side


def conjugate_gradients(product: Product, right: Tensor, tolerance: float, most: int) -> Solved:
    """Solve product(x) = right for a symmetric matrix, from x = 0, until the residual is `tolerance` times as long.

    The solution so far is kept at a direction along which the matrix is not positive, or after `most` products.
    """
    x, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), residual @ residual
    whole = float(size) ** 0.5
    count = 0
    while count < most and float(size) ** 0.5 > tolerance * whole:
        image = product(direction)
        count += 1
        curved = direction @ image
        if not float(curved) > 0:
            return Solved(x, count, float(size) ** 0.5 / whole)
        length = size / curved
        x += length * direction
        residual -= length * image
        new = residual @ residual
        direction = residual + (new / size) * direction
        size = new
    return Solved(x, count, float(size) ** 0.5 / whole if whole else 0.0)


def minimise(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, tolerance: float, most: int
) -> Tensor:
    """The minimum of a smooth convex function by L-BFGS, float64 like `start`.

    Parameters
    ----------
    evaluate : callable
        Value and gradient.
    tolerance : float
        Largest entry of the gradient at the minimum; RunFailed where it is not reached in `most` iterations.
    """

    def both(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = evaluate(torch.from_numpy(point.copy()))
        return float(value), gradient.double().numpy()

    options = {"maxiter": most, "maxfun": 2 * most, "maxcor": 30, "gtol": tolerance, "ftol": 0.0}
    found = minimize(both, start.double().numpy(), jac=True, method="L-BFGS-B", options=options)
    worst = float(np.abs(found.jac).max())
    if not worst <= tolerance:
        raise RunFailed(
            f"training to convergence stopped at a gradient of {worst:.2g} after {found.nit} iterations (tolerance "
            f"{tolerance:.2g}): {found.message}"
        )
    return torch.from_numpy(found.x)


@dataclass
class CompactBFGS:
    """The Hessian that a few steps and the changes of the gradient along them tell of.

    The compact form of Byrd, Nocedal and Schnabel (1994), theorem 2.3, with the last pair's s'y / s's on the first
    diagonal, as DeltaGrad has it (Wu et al., 2020, algorithm 2).

    Parameters
    ----------
    memory : int
        How many pairs are kept.
    """

    memory: int = 2
    pairs: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)

    def add(self, step: Tensor, change: Tensor, most: float = math.inf) -> bool:
        """Take a pair (P,), (P,) in; False, and nothing is kept, where the function curves downwards or too much.

        `most`: the largest curvature that a pair may bring, ``y'y / s'y``.
        """
        curved = float(step @ change)
        if not 0 < float(change @ change) <= most * curved:
            self.pairs.clear()
            return False
        length = step.norm()  # the matrix does not depend on it, its equations' condition does
        self.pairs.append((step / length, change / length))
        if len(self.pairs) > self.memory:
            self.pairs.popleft()
        return True

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian times a vector, (P,); zero without any pair."""
        if not self.pairs:
            return torch.zeros_like(vector)
        s, y = (torch.stack(parts, 1) for parts in zip(*self.pairs, strict=True))  # (P, m)
        inner = s.T @ y
        sigma = inner[-1, -1] / (s[:, -1] @ s[:, -1])
        lower, diagonal = torch.tril(inner, -1), torch.diag(torch.diag(inner))
        middle = torch.cat(
            [torch.cat([sigma * (s.T @ s), lower], 1), torch.cat([lower.T, -diagonal], 1)]
        )  # (2m, 2m)
        outer = torch.cat([sigma * s, y], 1)
        return sigma * vector - outer @ torch.linalg.solve(middle, outer.T @ vector)
