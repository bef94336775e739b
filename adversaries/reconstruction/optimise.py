"""Minimisers that treat many independent problems side by side.

Row v of a (V, N) tensor is one problem's variables. Evaluations are shared, decisions are not: every row has its own
step length, its own L-BFGS memory and its own best point, so that a row's result does not depend on its companions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Variables (V, N) -> losses (V,) and gradients (V, N)."""

Notify = Callable[[int, Tensor], None]
"""Called after each evaluation with (evaluations so far, current losses (V,))."""

LineSearch = Literal["none", "armijo", "wolfe"]

_CHECK_EVERY = 10
"""Iterations between looks at whether everybody has finished (a look waits for an accelerator)."""

_MAX_TRIALS = 20
_ARMIJO = 1e-4
_CURVATURE = 0.9


def ignore(evaluations: int, losses: Tensor) -> None:
    """A :data:`Notify` that does nothing."""


@dataclass
class Outcome:
    """What a minimiser leaves.

    Attributes
    ----------
    variables : Tensor
        (V, N): each row's point of lowest loss.
    losses : Tensor
        (V,): its loss; infinite where no finite value was ever met.
    history : list of Tensor
        (V,) per iteration: the loss of each row's current point.
    recoveries : Tensor
        int64 (V,): how often a row had to go back to its best point because its loss was not finite.
    """

    variables: Tensor
    losses: Tensor
    history: list[Tensor] = field(default_factory=list)
    recoveries: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class _Best:
    """Each row's lowest loss so far and where it was."""

    def __init__(self, variables: Tensor, losses: Tensor) -> None:
        self.variables = variables.clone()
        self.losses = torch.where(losses.isfinite(), losses, torch.inf)

    def offer(self, variables: Tensor, losses: Tensor) -> None:
        better = losses < self.losses  # False for NaN
        self.variables = torch.where(better[:, None], variables, self.variables)
        self.losses = torch.where(better, losses, self.losses)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


class _Memory:
    """L-BFGS memory of V rows in compact form (Byrd, Nocedal and Schnabel 1994), one ring per row.

    With S and Y the kept steps and gradient changes, R the part of S^T Y on and above the (chronological) diagonal
    and D its diagonal, the two-loop recursion's direction is -(gamma (g - Y a) + S c), where R a = S^T g and
    R^T c = D a - gamma Y^T (g - Y a). All rows are solved in a few batched products instead of 2 m small ones.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        rows, count = like.shape
        self.steps, self.changes = like.new_zeros(rows, size, count), like.new_zeros(rows, size, count)
        self.sy = like.new_zeros(rows, size, size, dtype=torch.float64)
        self.yy = torch.zeros_like(self.sy)
        self.age = torch.full((rows, size), -1, dtype=torch.int64, device=like.device)  # -1: empty
        self.taken = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.gamma = like.new_ones(rows)

    def forget(self, rows: Tensor) -> None:
        """Empty the memory of the rows (bool mask)."""
        self.age[rows] = -1
        self.steps[rows], self.changes[rows] = 0.0, 0.0
        self.sy[rows], self.yy[rows] = 0.0, 0.0

    def add(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        """Remember the pairs of `rows` (int64) among the pairs of all rows, `step` and `change` (V, N)."""
        slot = self.taken[rows] % self.age.shape[1]
        self.steps[rows, slot], self.changes[rows, slot] = step[rows], change[rows]
        self.age[rows, slot] = self.taken[rows]
        self.taken[rows] += 1
        with_changes = (self.changes @ torch.stack([step, change], 2)).double()[rows]
        self.sy[rows, :, slot] = (self.steps @ change[:, :, None])[..., 0].double()[rows]
        self.sy[rows, slot, :] = with_changes[..., 0]
        self.yy[rows, :, slot] = self.yy[rows, slot, :] = with_changes[..., 1]
        self.gamma[rows] = (_dot(step, change) / _dot(change, change))[rows]

    def direction(self, gradient: Tensor) -> Tensor:
        """Minus the approximate inverse Hessian times the gradient, (V, N)."""
        filled = self.age >= 0
        diagonal = self.sy.diagonal(dim1=1, dim2=2)
        # Scaled so that every pair has s^T y = 1: curvatures span many orders of magnitude along the way.
        scale = torch.where(filled, diagonal, 1.0).rsqrt()
        scaled = self.sy * scale[:, :, None] * scale[:, None, :]
        later = (self.age[:, :, None] <= self.age[:, None, :]) & filled[:, :, None] & filled[:, None, :]
        upper = torch.where(later, scaled, 0.0) + torch.diag_embed((~filled).double())
        s_g = (self.steps @ gradient[:, :, None])[..., 0].double() * scale
        y_g = (self.changes @ gradient[:, :, None])[..., 0].double() * scale
        gamma = self.gamma.double()[:, None]
        a = torch.linalg.solve(upper, s_g)
        pulled = y_g - (self.yy * scale[:, :, None] * scale[:, None, :] @ a[:, :, None])[..., 0]
        c = torch.linalg.solve(upper.transpose(1, 2), a - gamma * pulled)
        weights_y, weights_s = (a * scale).to(gradient.dtype), (c * scale).to(gradient.dtype)
        bent = gradient - (weights_y[:, None] @ self.changes)[:, 0]
        return -(self.gamma[:, None] * bent + (weights_s[:, None] @ self.steps)[:, 0])


def lbfgs(
    evaluate: Evaluate,
    start: Tensor,
    iterations: int,
    *,
    line_search: LineSearch = "armijo",
    learning_rate: float = 1.0,
    memory: int = 20,
    stop: float = 0.0,
    block: int = 0,
    notify: Notify = ignore,
) -> Outcome:
    """L-BFGS with a line search for each row.

    One iteration is one evaluation of all rows. A row whose trial point passes its line search takes it and turns to
    its next direction at once; a row whose trial fails shortens its step, and does not hold the others up.

    Parameters
    ----------
    evaluate : Evaluate
    start : Tensor
        (V, N).
    iterations : int
        Evaluations after the one at `start`.
    line_search : {"none", "armijo", "wolfe"}
        "none" takes every step at full length, as ``torch.optim.LBFGS`` does by default; "armijo" backtracks until
        the loss has fallen enough; "wolfe" brackets and bisects until the slope has levelled off too (strong Wolfe).
    learning_rate : float
        First step length tried. torch's first step of all is shorter, by 1 / |gradient|_1 where that is below 1.
    memory : int
        Pairs kept (m).
    stop : float
        A row below this loss has finished.
    block : int
        Without a line search: torch looks at its tolerances (1e-9 in step and loss) inside calls of this many
        iterations and gives up the rest of a call when one is met. 0: no tolerances.
    notify : Notify

    Returns
    -------
    Outcome

    References
    ----------
    Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.
    """
    x = start.clone()
    f, g = evaluate(x)
    best = _Best(x, f)
    store = _Memory(x, memory)
    rows = len(x)
    rate = torch.full((rows,), float(learning_rate), dtype=x.dtype, device=x.device)
    recoveries = torch.zeros(rows, dtype=torch.int64, device=x.device)
    skip_until = torch.zeros(rows, dtype=torch.int64, device=x.device)
    low, high = torch.zeros_like(rate), torch.full_like(rate, torch.inf)
    trials = torch.zeros(rows, dtype=torch.int64, device=x.device)
    done = (f < stop) | ~f.isfinite()
    d = -g
    fresh = torch.ones(rows, dtype=torch.bool, device=x.device)  # the memory is empty
    t = _first_step(g, rate)
    history = [f]
    for iteration in range(1, iterations + 1):
        slope = _dot(g, d)
        waiting = skip_until >= iteration
        move = ~done & ~waiting
        trial = torch.where(move[:, None], x + t[:, None] * d, x)
        f_new, g_new = evaluate(trial)
        finite = f_new.isfinite() & g_new.isfinite().all(1)
        best.offer(trial, torch.where(finite, f_new, torch.inf))
        trials = trials + 1
        if line_search == "none":
            accepted, failed = move & finite, move & ~finite
        else:
            far = ~finite | (f_new > f + _ARMIJO * t * slope)
            slope_new = _dot(g_new, d)
            if line_search == "wolfe":
                near = ~far & (slope_new < _CURVATURE * slope)
                far = far | (slope_new > -_CURVATURE * slope)
            else:
                near = torch.zeros_like(far)
            accepted = move & ~far & ~near
            high = torch.where(far, t, high)
            low = torch.where(near, t, low)
            failed = move & ~accepted & (trials >= _MAX_TRIALS)
            t = torch.where(
                move & ~accepted, _next_step(t, low, high, f, f_new, slope, finite, line_search), t
            )
        step, change = trial - x, g_new - g
        if line_search == "none" and block:
            small = (t * d.abs().amax(1) <= 1e-9) | ((f_new - f).abs() < 1e-9)
            ends = (iteration + block - 1) // block * block
            skip_until = torch.where(accepted & small, ends, skip_until)
        least = 1e-10 if line_search == "none" else 1e-10 * step.norm(dim=1) * change.norm(dim=1)
        curved = _dot(step, change) > least
        keep = torch.nonzero(accepted & curved)[:, 0]
        if len(keep):
            store.add(keep, step, change)
            fresh[keep] = False
        x = torch.where(accepted[:, None], trial, x)
        f, g = torch.where(accepted, f_new, f), torch.where(accepted[:, None], g_new, g)
        if bool(failed.any()):
            # Back to the best point with an empty memory; a row that fails from there too has converged.
            if line_search == "none":
                recoveries += failed
                rate = torch.where(failed, rate / 2, rate)
                x = torch.where(failed[:, None], best.variables, x)
                f_best, g_best = evaluate(x)
                f, g = torch.where(failed, f_best, f), torch.where(failed[:, None], g_best, g)
            else:
                done = done | (failed & fresh)
            store.forget(failed)
            fresh = fresh | failed
        turn = accepted | failed
        d = torch.where(turn[:, None], torch.where(fresh[:, None], -g, store.direction(g)), d)
        ascent = turn & (_dot(g, d) >= 0)
        if line_search == "none":
            done = done | (turn & (_dot(g, d) > -1e-9))
        elif bool(ascent.any()):
            store.forget(ascent)
            fresh = fresh | ascent
            d = torch.where(ascent[:, None], -g, d)
        t = torch.where(turn, torch.where(fresh, _first_step(g, rate), rate), t)
        low, high = torch.where(turn, 0.0, low), torch.where(turn, torch.inf, high)
        trials = torch.where(turn, 0, trials)
        done = done | (f < stop)
        history.append(f)
        notify(iteration, f)
        if iteration % _CHECK_EVERY == 0 and bool(done.all()):
            break
    return Outcome(best.variables, best.losses, history, recoveries)


def _first_step(gradient: Tensor, rate: Tensor) -> Tensor:
    return rate * (1 / gradient.abs().sum(1).clamp(min=1e-30)).clamp(max=1.0)


def _next_step(
    t: Tensor,
    low: Tensor,
    high: Tensor,
    f: Tensor,
    f_new: Tensor,
    slope: Tensor,
    finite: Tensor,
    line_search: LineSearch,
) -> Tensor:
    """Next trial: the parabola's minimum when backtracking, doubling or bisection when bracketing."""
    if line_search == "wolfe":
        return torch.where(high.isfinite(), (low + high) / 2, 2 * t)
    parabola = -slope * t * t / (2 * (f_new - f - slope * t)).clamp(min=1e-30)
    wanted = torch.where(finite & parabola.isfinite(), parabola, 0.1 * t)
    return torch.minimum(torch.maximum(wanted, 0.1 * t), 0.5 * t)


def adam(
    evaluate: Evaluate,
    start: Tensor,
    iterations: int,
    *,
    learning_rate: float = 0.1,
    signed: bool = False,
    decay: bool = True,
    stop: float = 0.0,
    notify: Notify = ignore,
) -> Outcome:
    """Adam, or Adam on the gradient's sign (Geiping et al. 2020).

    Parameters
    ----------
    evaluate, start, stop, notify
        As for :func:`lbfgs`.
    iterations : int
        Steps.
    learning_rate : float
    signed : bool
        Feed Adam the sign of the gradient.
    decay : bool
        Divide the learning rate by ten after 3/8, 5/8 and 7/8 of the steps.

    Returns
    -------
    Outcome
    """
    x = start.clone()
    optimiser = torch.optim.Adam([x], lr=learning_rate)
    milestones = [iterations * eighths // 8 for eighths in (3, 5, 7)] if decay else []
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    f, g = evaluate(x)
    best = _Best(x, f)
    done = (f < stop) | ~f.isfinite()
    recoveries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    history = [f]
    for iteration in range(1, iterations + 1):
        before = x.clone()
        x.grad = torch.where(done[:, None], 0.0, g.sign() if signed else g)
        optimiser.step()
        schedule.step()
        x.copy_(torch.where(done[:, None], before, x))
        f, g = evaluate(x)
        lost = ~done & ~(f.isfinite() & g.isfinite().all(1))
        if bool(lost.any()):
            recoveries += lost
            x.copy_(torch.where(lost[:, None], best.variables, x))
            for moment in ("exp_avg", "exp_avg_sq"):
                optimiser.state[x][moment][lost] = 0.0
            f, g = evaluate(x)
        best.offer(x, f)
        done = done | (f < stop)
        history.append(f)
        notify(iteration, f)
        if iteration % _CHECK_EVERY == 0 and bool(done.all()):
            break
    return Outcome(best.variables, best.losses, history, recoveries)
