"""Solvers that mechanisms share: a Hessian known by its products alone, or by the steps of a training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize, root
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from fedattack.errors import RunFailed
from fedattack.unlearning.central import Central, Positions

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector, (P,) to (P,)."""

_POLISH = 100
"""Newton steps on the gradient after the search for a minimum, at most."""

_CHUNK = 256  # samples whose answers are differentiated at once


def gauss_newton(
    central: Central, flat: Tensor, base: Mapping[str, Tensor], vector: Tensor, positions: Positions
) -> Tensor:
    """The Gauss-Newton matrix of the summed cross-entropies times a vector, (P,); counts as two gradients.

    ``sum_i J_i' (diag(p_i) - p_i p_i') J_i v``, J the logits' derivative: never negative, and the Hessian itself
    where the logits are linear in the weights (Schraudolph, 2002). BatchNorm by its running statistics.
    """
    total = torch.zeros_like(flat)
    for part in np.array_split(positions, -(-len(positions) // _CHUNK) or 1):
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
    """What a linear system was solved to."""

    solution: Tensor
    products: int  # matrix-vector products it took
    residual: float  # as a share of the right-hand side


def solve(product: Product, right: Tensor, tolerance: float, most: int, rows: Tensor | None = None) -> Solved:
    """Solve product(x) = right by conjugate gradients, until the residual is `tolerance` times as long or `most`.

    `product` is to be symmetric and positive; `rows`, int64: on these entries alone, of which the solution is.
    """
    whole = torch.zeros_like(right)
    rows = torch.arange(len(right)) if rows is None else rows
    if not len(rows):
        return Solved(right[rows], 0, 0.0)
    wanted = right[rows].double().numpy()
    count = 0

    def restricted(values: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        whole[rows] = torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).to(whole)
        image: np.ndarray = product(whole)[rows].double().numpy()
        return image

    size = len(rows)
    operator = LinearOperator((size, size), matvec=restricted, dtype=np.float64)
    found, _ = cg(operator, wanted, rtol=tolerance, maxiter=most)
    used = count
    rest, norm = float(np.linalg.norm(restricted(found) - wanted)), float(np.linalg.norm(wanted))
    return Solved(torch.from_numpy(found).to(right), used, rest / norm if norm else 0.0)


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
    point, worst = found.x, float(np.abs(found.jac).max())
    if not worst <= tolerance and math.isfinite(worst):
        # Near the minimum the value is the same to rounding, which ends the search; the gradient still tells the way.
        options = {"fatol": tolerance, "maxiter": _POLISH}
        nearer = root(lambda point: both(point)[1], point, method="krylov", options=options).x
        left = float(np.abs(both(nearer)[1]).max())
        if left < worst:
            point, worst = nearer, left
    if not worst <= tolerance:
        raise RunFailed(
            f"training to convergence stopped at a gradient of {worst:.2g} after {found.nit} iterations (tolerance "
            f"{tolerance:.2g}): {found.message}"
        )
    return torch.from_numpy(point)


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
        """Take a pair (P,), (P,) in; False, and it is left out, where the function curves downwards or too much.

        `most`: the largest curvature that a pair may bring, ``y'y / s'y``.
        """
        curved = float(step @ change)
        if not 0 < float(change @ change) <= most * curved:
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
        inside = torch.linalg.lstsq(middle, (outer.T @ vector)[:, None], driver="gelsd").solution[:, 0]
        return sigma * vector - outer @ inside
