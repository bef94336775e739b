"""Conjugate gradients and Levenberg-Marquardt against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from adversaries.inversion.solvers.levenberg_marquardt import Damping, Step, levenberg_marquardt


def matrix(rank: int) -> Tensor:
    root = torch.randn(12, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return root @ root.T


def test_conjugate_gradients_solve_with_and_without_a_preconditioner() -> None:
    system, right = matrix(12), torch.arange(12.0).double()
    plain, capped = conjugate_gradients(system.mv, right, 60, 1e-12)
    torch.testing.assert_close(plain, torch.linalg.solve(system, right))
    assert not capped
    inverse = torch.linalg.inv(system)
    once, capped = conjugate_gradients(system.mv, right, 1, 1e-10, inverse.mv)
    torch.testing.assert_close(once, plain)
    assert not capped
    assert conjugate_gradients(system.mv, right, 3, 1e-12)[1]


def test_conjugate_gradients_end_where_nothing_more_comes_in() -> None:
    values = torch.logspace(0, -9, 400, dtype=torch.float64)
    truth = values.sqrt()
    calls = {0.0: 0, 1e-4: 0}
    for stalled in calls:

        def counted(x: Tensor, stalled: float = stalled) -> Tensor:
            calls[stalled] += 1
            return values * x

        found, _ = conjugate_gradients(counted, values * truth, 2000, 1e-12, stalled=stalled)
        assert float((found - truth).norm() / truth.norm()) < 0.02
    assert calls[1e-4] < calls[0.0] / 2
    assert calls[1e-4] % 50 == 0
    assert conjugate_gradients(values.mul, truth, 9, 1e-3, lambda g: g * torch.nan)[0].eq(0).all()


def rosenbrock(x: Tensor) -> tuple[Tensor, Callable[[float], Step]]:
    left = torch.stack([10 * (x[0] ** 2 - x[1]), x[0] - 1])

    def prepare(gained: float) -> Step:
        assert 0 < gained <= 1
        jacobian = torch.tensor([[20 * float(x[0]), -10], [1, 0]], dtype=x.dtype)
        gram = jacobian.T @ jacobian
        return lambda damping: torch.linalg.solve(gram + damping * torch.eye(2).double(), -jacobian.T @ left)

    return left, prepare


def test_levenberg_marquardt_walks_the_valley_and_never_up() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    x, left, _ = levenberg_marquardt(rosenbrock, start, 100, Damping(), gain=0.0)
    torch.testing.assert_close(x, torch.ones(2).double())
    assert float(left.norm()) < 1e-12
    sizes = [float(levenberg_marquardt(rosenbrock, start, n, Damping())[1].norm()) for n in range(8)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 8


def test_levenberg_marquardt_stays_where_no_step_helps() -> None:
    def backwards(x: Tensor) -> tuple[Tensor, Callable[[float], Step]]:
        return x, lambda gained: lambda damping: x

    start = torch.ones(2)
    x, _, damping = levenberg_marquardt(backwards, start, 5, Damping(1e-12, jump=1e-8, tries=3))
    assert x is start
    assert damping == 1e-8 * 100
