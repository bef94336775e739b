"""Damped Gauss-Newton steps on a sum of squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[float], Tensor | None]
"""Damping -> the step that minimises the linearised residual plus the damping's penalty; None: it has none."""

Linearise = Callable[[Tensor], tuple[Tensor, Callable[[float], Step]]]
"""x -> (what is left of the data there, a maker of :data:`Step`, told what share of the norm the last step took)."""


@dataclass(frozen=True)
class Damping:
    """How the damping follows what steps bring."""

    start: float = 1e-3
    least: float = 1e-12
    rise: float = 10.0  # factor after a step that does not lower the residual,
    jump: float = 0.0  # and the least damping then
    fall: float = 0.1  # factor after one that does,
    slow: float | None = None  # and by less than 30 percent; None: `fall`
    tries: int = 7  # dampings tried for one step


def normal_steps(gram: Tensor, right: Tensor, shape: torch.Size) -> Step:
    """Steps of `shape` from J'J (k, k) and J' left (k,), the damping in units of the mean diagonal."""

    def step(damping: float) -> Tensor:
        damped = gram.clone()
        damped.diagonal().add_(damping * gram.diagonal().mean())
        factor = torch.linalg.cholesky_ex(damped)[0]
        return torch.cholesky_solve(right[:, None], factor)[:, 0].reshape(shape)

    return step


def levenberg_marquardt(
    linearise: Linearise,
    x: Tensor,
    iterations: int,
    damping: Damping,
    *,
    settled: float = 0.0,
    gain: float = 1e-4,
    trusted: float = float("inf"),
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, Tensor, float]:
    """Lower the norm of what is left from `x` on, never raising it (Marquardt 1963).

    Ends below norm `settled`, and with a step that lowers the norm by less than the share `gain` at a damping
    below `trusted`. Answers x, what is left there, and the damping for the next step.
    """
    left, prepare = linearise(x)
    size, level, gained = float(left.norm()), damping.start, 1.0
    for iteration in range(iterations):
        if size < settled:
            break
        step, improved = prepare(gained), False
        for _ in range(damping.tries):
            change = step(level)
            if change is None:
                return x, left, level
            trial_left, trial_prepare = linearise(x + change)
            trial = float(trial_left.norm())
            if trial < size:
                gained, improved = 1 - trial / size, True
                x, left, prepare, size = x + change, trial_left, trial_prepare, trial
                fall = damping.fall if damping.slow is None or gained > 0.3 else damping.slow
                level = max(level * fall, damping.least)
                break
            level = max(level * damping.rise, damping.jump)
        progress((iteration + 1) / iterations)
        if not improved or (gained < gain and level < trusted):
            break
    return x, left, level
