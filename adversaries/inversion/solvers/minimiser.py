"""Minimisers that treat many independent problems side by side.

Row v of a (V, N) tensor is one problem's variables. Evaluations are shared, decisions are not: every row has
its own step length, its own L-BFGS memory and its own best point, so that a row's result does not depend on
its companions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Variables (V, N) -> losses (V,) and gradients (V, N)."""

Notify = Callable[[int, Tensor], None]
"""Called after each iteration with (iterations so far, current losses (V,))."""

LineSearch = Literal["none", "armijo"]

_CHECK_EVERY = 10
"""Iterations between looks at whether everybody has finished (a look waits for an accelerator)."""
_PROGRESS = 1e-3
"""Share of the loss by which it must fall to count as progress, under patience."""


@dataclass
class Outcome:
    """What a minimiser leaves."""

    variables: Tensor  # (V, N): each row's point of lowest loss
    losses: Tensor  # (V,): its loss; infinite where no finite value was ever met
    history: list[Tensor]  # (V,) per iteration: the loss of each row's current point
    recoveries: Tensor  # int64 (V,): how often a row went back to its best point as its loss was not finite


@dataclass(frozen=True)
class Rules:
    """What all minimisers have in common; L-BFGS knows no decay and no noise."""

    learning_rate: float = 1.0
    stop: float = -math.inf  # a row below this loss has finished
    patience: int = 0  # so has one whose lowest loss has not fallen by a thousandth for this long; 0: never
    decay: int = (
        0  # divide the learning rate by ten after 3/8, 5/8 and 7/8 of this many iterations; 0: keep it
    )
    project: Callable[[Tensor], Tensor] | None = (
        None  # row by row: where each step is put back to, as into a box
    )
    noise: Callable[[int], Tensor] | None = None  # iteration -> (V, N) added to the step, in learning rates
    # Told now and then which rows have finished (list of V bool); `evaluate` may answer zeros for these then.
    rest: Callable[[list[bool]], None] | None = None

    def rate(self, iteration: int) -> float:
        """Learning rate of the step that leads to this 1-based iteration."""
        passed = sum(iteration > self.decay * eighths // 8 for eighths in (3, 5, 7)) if self.decay else 0
        return self.learning_rate * 0.1**passed


class Minimiser(ABC):
    """A minimiser of V independent problems from `start` (V, N), and its whole state.

    Everything it knows between two iterations is in the tensors of :meth:`state`; one that was restored from
    them goes on as if it had never stopped.
    """

    STATE: ClassVar[tuple[str, ...]] = (
        "x", "f", "g", "best_x", "best_f", "done", "recoveries", "mark", "marked_at",
    )  # fmt: skip
    """Attributes that make the state; tensors whose first axis is the row."""

    def __init__(self, evaluate: Evaluate, start: Tensor, rules: Rules) -> None:
        self._evaluate, self.rules = evaluate, rules
        self.x = start.clone()
        rows = len(start)
        self.iteration = 0
        self.history: list[Tensor] = []
        self.f, self.g = start.new_zeros(rows), torch.zeros_like(start)
        self.best_x, self.best_f = self.x, self.f
        self.done = torch.zeros(rows, dtype=torch.bool, device=start.device)
        self.recoveries = torch.zeros(rows, dtype=torch.int64, device=start.device)
        self.mark = torch.full_like(self.f, torch.inf)
        self.marked_at = torch.zeros_like(self.recoveries)
        # Where no row can finish before its time nobody has to ask whether it has.
        self._masked = rules.stop > -math.inf or rules.patience > 0

    def run(self, iterations: int, notify: Notify = lambda iteration, losses: None) -> Outcome:
        """Go on until so many iterations have passed in all, or every row has finished."""
        if not self.history:
            self._begin()
        while self.iteration < iterations:
            if self.iteration % _CHECK_EVERY == 0 and self._all_done():
                break
            self.iteration += 1
            self._step()
            if self._masked:
                self._finish_rows()
            self.history.append(self.f)
            notify(self.iteration, self.f)
        return Outcome(self.best_x, self.best_f, self.history, self.recoveries)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next iteration depends on, and the history."""
        kept = {name: getattr(self, name) for name in self.STATE}
        kept["history"] = torch.stack(self.history)
        kept["iteration"] = torch.tensor(self.iteration)
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` handed out."""
        for name in self.STATE:
            setattr(self, name, state[name])
        self.history = list(state["history"])
        self.iteration = int(state["iteration"])
        self._masked = self._masked or bool(self.done.any())

    def _begin(self) -> None:
        self.f, self.g = self._evaluate(self.x)
        lost = ~self.f.isfinite()
        self.best_x = self.x.clone()
        self.best_f = torch.where(lost, torch.inf, self.f)
        self.done = (self.f < self.rules.stop) | lost
        self._masked = self._masked or bool(lost.any())
        self.history = [self.f]

    def _all_done(self) -> bool:
        if not self._masked:
            return False
        done = self.done.tolist()
        if self.rules.rest is not None:
            self.rules.rest(done)
        return all(done)

    @abstractmethod
    def _step(self) -> None:
        """One iteration: move x, f and g of the rows that have not finished."""

    def _offer(self, x: Tensor, f: Tensor) -> None:
        """Keep x (V, N) of loss f (V,) in the rows where it is the best so far."""
        better = f < self.best_f  # False for NaN
        self.best_x = torch.where(better[:, None], x, self.best_x)
        self.best_f = torch.where(better, f, self.best_f)

    def _finish_rows(self) -> None:
        if self.rules.patience:
            progress = self.best_f < self.mark - _PROGRESS * self.mark.abs().nan_to_num(posinf=0.0)
            self.mark = torch.where(progress, self.best_f, self.mark)
            self.marked_at = torch.where(progress, self.iteration, self.marked_at)
            self.done = self.done | (self.iteration - self.marked_at >= self.rules.patience)
        self.done = self.done | (self.f < self.rules.stop)
