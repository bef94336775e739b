"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    system: Callable[[Tensor], Tensor], right: Tensor, most: int, tolerance: float
) -> tuple[Tensor, bool]:
    """Solve system(x) = right, symmetric and positive definite.

    Parameters
    ----------
    system : callable
        x -> A x, both shaped as `right`.
    right : Tensor
    most : int
        Iterations at most.
    tolerance : float
        Relative to the norm of `right`.

    Returns
    -------
    x : Tensor
    capped : bool
        Whether it ended before the tolerance was met.
    """
    x, residual, direction = torch.zeros_like(right), right.clone(), right.clone()
    size = residual.square().sum()
    enough = float(size) * tolerance**2
    if not enough > 0:
        return x, False
    for _ in range(most):
        image = system(direction)
        length = size / (direction * image).sum()
        x.add_(direction * length)
        residual.sub_(image * length)
        new = residual.square().sum()
        if float(new) <= enough:
            return x, False
        direction.mul_(new / size).add_(residual)
        size = new
    return x, True
