"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]

_LOOK = 50
"""Iterations between looks at whether the solution still grows."""


def conjugate_gradients(
    system: Linear,
    right: Tensor,
    most: int,
    tolerance: float,
    precondition: Linear | None = None,
    stalled: float = 0.0,
) -> tuple[Tensor, bool]:
    """Solve system(x) = right, symmetric and positive (semi-)definite; x, and whether it hit `most` iterations.

    Parameters
    ----------
    tolerance : float
        Relative to the norm of `right`, in the preconditioner's metric.
    precondition : callable, optional
        An approximation of the inverse of `system`; where it answers numbers that are not finite, x is zero.
    stalled : float
        Stop where 50 iterations change the norm of x by less than this share, as they do where only the null space
        of a semi-definite system is left; 0: never.
    """

    def solved(residual: Tensor) -> Tensor:
        return residual if precondition is None else precondition(residual)

    x, residual = torch.zeros_like(right), right.clone()
    direction = solved(residual).clone()
    size = (residual * direction).sum()
    enough = float(size) * tolerance**2
    if not 0 < enough < float("inf"):
        return x, False
    grown = 0.0
    for count in range(1, most + 1):
        image = system(direction)
        curved = (direction * image).sum()
        if not bool(curved > 0):
            return x, False
        length = size / curved
        x.add_(direction * length)
        residual.sub_(image * length)
        near = solved(residual)
        new = (residual * near).sum()
        if float(new) <= enough:
            return x, False
        if stalled and count % _LOOK == 0:
            before, grown = grown, float(x.norm())
            if abs(grown - before) < stalled * grown:
                return x, False
        direction.mul_(new / size).add_(near)
        size = new
    return x, True
