"""L-BFGS with a line search, several victims at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adversaries.inversion.solvers.minimiser import Evaluate, LineSearch, Minimiser, Rules

_MAX_TRIALS = 20
_ARMIJO = 1e-4


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

    TENSORS = ("steps", "changes", "sy", "yy", "age", "taken", "gamma")

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


class Lbfgs(Minimiser):
    """L-BFGS with a line search for each row (Liu and Nocedal 1989).

    One iteration is one evaluation of all rows. A row whose trial point passes its line search takes it and
    turns to its next direction at once; a row whose trial fails shortens its step, and does not hold the
    others up. The learning rate is the first step length tried; torch's first step of all is shorter, by 1 /
    |gradient|_1 where that is below 1.

    Parameters
    ----------
    line_search : {"none", "armijo"}
        "none" takes every step at full length, as ``torch.optim.LBFGS`` does by default; "armijo" backtracks until
        the loss has fallen enough.
    memory : int
        Pairs kept (m).
    block : int
        Without a line search: torch looks at its tolerances (1e-9 in step and loss) inside calls of this many
        iterations and gives up the rest of a call when one is met. 0: no tolerances.
    """

    STATE = (*Minimiser.STATE, "rate", "skip_until", "trials", "d", "fresh", "t")

    def __init__(
        self,
        evaluate: Evaluate,
        start: Tensor,
        rules: Rules,
        line_search: LineSearch = "armijo",
        memory: int = 20,
        block: int = 0,
    ) -> None:
        super().__init__(evaluate, start, rules)
        self._line_search, self._block = line_search, block
        self._store = _Memory(start, memory)
        rows = len(start)
        self.rate = torch.full((rows,), float(rules.learning_rate), dtype=start.dtype, device=start.device)
        self.skip_until, self.trials = torch.zeros_like(self.recoveries), torch.zeros_like(self.recoveries)
        self.fresh = torch.ones(rows, dtype=torch.bool, device=start.device)  # the memory is empty
        self.d, self.t = self.g, self.rate
        self._masked = True

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"store.{name}": getattr(self._store, name) for name in _Memory.TENSORS}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        for name in _Memory.TENSORS:
            setattr(self._store, name, state[f"store.{name}"])

    def _begin(self) -> None:
        super()._begin()
        self.d, self.t = -self.g, _first_step(self.g, self.rate)

    def _step(self) -> None:
        slope = _dot(self.g, self.d)
        move = ~self.done & (self.skip_until < self.iteration)
        trial = self.x + self.t[:, None] * self.d
        if self.rules.project is not None:
            trial = self.rules.project(trial)
        trial = torch.where(move[:, None], trial, self.x)
        f, g = self._evaluate(trial)
        finite = f.isfinite() & g.isfinite().all(1)
        self._offer(trial, torch.where(finite & move, f, torch.inf))
        accepted, failed = self._judge(move, finite, slope, f)
        self._remember(accepted, trial - self.x, g - self.g, f)
        self.x = torch.where(accepted[:, None], trial, self.x)
        self.f, self.g = torch.where(accepted, f, self.f), torch.where(accepted[:, None], g, self.g)
        if bool(failed.any()):
            self._retreat(failed)
        self._turn(accepted | failed)

    def _judge(self, move: Tensor, finite: Tensor, slope: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows take their trial and which give their line search up; the others get their next step length."""
        self.trials = self.trials + 1
        if self._line_search == "none":
            return move & finite, move & ~finite
        far = ~finite | (f > self.f + _ARMIJO * self.t * slope)
        accepted = move & ~far
        shorter = _next_step(self.t, self.f, f, slope, finite)
        self.t = torch.where(move & ~accepted, shorter, self.t)
        return accepted, move & ~accepted & (self.trials >= _MAX_TRIALS)

    def _remember(self, accepted: Tensor, step: Tensor, change: Tensor, f: Tensor) -> None:
        """Add the pairs of curvature; under torch's tolerances, let rows sleep to the end of their call."""
        if self._line_search == "none" and self._block:
            small = (self.t * self.d.abs().amax(1) <= 1e-9) | ((f - self.f).abs() < 1e-9)
            ends = (self.iteration + self._block - 1) // self._block * self._block
            self.skip_until = torch.where(accepted & small, ends, self.skip_until)
        least: float | Tensor = 1e-10
        if self._line_search != "none":
            least = 1e-10 * step.norm(dim=1) * change.norm(dim=1)
        keep = torch.nonzero(accepted & (_dot(step, change) > least))[:, 0]
        if len(keep):
            self._store.add(keep, step, change)
            self.fresh = self.fresh.index_fill(0, keep, False)

    def _retreat(self, failed: Tensor) -> None:
        """Back to the best point with an empty memory; a row that fails from there too has converged."""
        if self._line_search == "none":
            self.recoveries = self.recoveries + failed
            self.rate = torch.where(failed, self.rate / 2, self.rate)
            self.x = torch.where(failed[:, None], self.best_x, self.x)
            f, g = self._evaluate(self.x)
            self.f, self.g = torch.where(failed, f, self.f), torch.where(failed[:, None], g, self.g)
        else:
            self.done = self.done | (failed & self.fresh)
        self._store.forget(failed)
        self.fresh = self.fresh | failed

    def _turn(self, turn: Tensor) -> None:
        """The next direction and first step length of the rows that `turn`."""
        wanted = torch.where(self.fresh[:, None], -self.g, self._store.direction(self.g))
        self.d = torch.where(turn[:, None], wanted, self.d)
        slope = _dot(self.g, self.d)
        if self._line_search == "none":
            self.done = self.done | (turn & (slope > -1e-9))
        else:
            ascent = turn & (slope >= 0)
            if bool(ascent.any()):
                self._store.forget(ascent)
                self.fresh = self.fresh | ascent
                self.d = torch.where(ascent[:, None], -self.g, self.d)
        step = torch.where(self.fresh, _first_step(self.g, self.rate), self.rate)
        self.t = torch.where(turn, step, self.t)
        self.trials = torch.where(turn, 0, self.trials)


def _first_step(gradient: Tensor, rate: Tensor) -> Tensor:
    return rate * (1 / gradient.abs().sum(1).clamp(min=1e-30)).clamp(max=1.0)


def _next_step(t: Tensor, f: Tensor, f_new: Tensor, slope: Tensor, finite: Tensor) -> Tensor:
    """Next trial when backtracking: the parabola's minimum."""
    parabola = -slope * t * t / (2 * (f_new - f - slope * t)).clamp(min=1e-30)
    wanted = torch.where(finite & parabola.isfinite(), parabola, 0.1 * t)
    return torch.minimum(torch.maximum(wanted, 0.1 * t), 0.5 * t)
