"""First-order minimisers, several victims at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.inversion.solvers.minimiser import Evaluate, Minimiser, Rules


class _FirstOrder(Minimiser):
    """Steps along a direction made from the gradient; a row that meets NaN goes back to its best, half as fast."""

    STATE = (*Minimiser.STATE, "damping")
    MOMENTS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, evaluate: Evaluate, start: Tensor, rules: Rules) -> None:
        super().__init__(evaluate, start, rules)
        self.damping = start.new_ones(len(start), 1)
        for name in self.MOMENTS:
            setattr(self, name, torch.zeros_like(start))

    @abstractmethod
    def _change(self, rate: float) -> Tensor:
        """The step (V, N) at the current gradient."""

    def _step(self) -> None:
        rules = self.rules
        rate = rules.rate(self.iteration)
        change = self._change(rate)
        if rules.noise is not None:
            change = change.add(rules.noise(self.iteration), alpha=rate)
        x = torch.addcmul(self.x, self.damping, change)
        if rules.project is not None:
            x = rules.project(x)
        if self._masked:
            x = torch.where(self.done[:, None], self.x, x)
        f, g = self._evaluate(x)
        # Sums of finite numbers that overflow only cost a closer look.
        if not bool((f.sum() + g.sum()).isfinite()):
            x, f, g = self._recover(x, f, g)
        if self._masked:
            f = torch.where(self.done, self.f, f)
        self.x, self.f, self.g = x, f, g
        self._offer(x, f)

    def _recover(self, x: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lost = ~self.done & ~(f.isfinite() & g.isfinite().all(1))
        if not bool(lost.any()):
            return x, f, g
        self.recoveries = self.recoveries + lost
        self.damping = torch.where(lost[:, None], self.damping / 2, self.damping)
        for name in self.MOMENTS:
            getattr(self, name)[lost] = 0.0
        x = torch.where(lost[:, None], self.best_x, x)
        f_best, g_best = self._evaluate(x)
        return x, torch.where(lost, f_best, f), torch.where(lost[:, None], g_best, g)


class Adam(_FirstOrder):
    """Adam (Kingma and Ba 2015) with the usual constants, as ``torch.optim.Adam``."""

    MOMENTS = ("first", "second")
    STATE = (*_FirstOrder.STATE, *MOMENTS)
    first: Tensor
    second: Tensor

    def _change(self, rate: float) -> Tensor:
        self.first.lerp_(self.g, 0.1)
        self.second.mul_(0.999).addcmul_(self.g, self.g, value=0.001)
        root = (1 - 0.999**self.iteration) ** 0.5
        spread = self.second.sqrt().div_(root).add_(1e-8)
        return self.first.div(spread).mul_(-rate / (1 - 0.9**self.iteration))


class Sgd(_FirstOrder):
    """Gradient descent with momentum, as ``torch.optim.SGD``."""

    MOMENTS = ("velocity",)
    STATE = (*_FirstOrder.STATE, *MOMENTS)
    velocity: Tensor

    def __init__(self, evaluate: Evaluate, start: Tensor, rules: Rules, momentum: float = 0.0) -> None:
        super().__init__(evaluate, start, rules)
        self._momentum = momentum

    def _change(self, rate: float) -> Tensor:
        self.velocity.mul_(self._momentum).add_(self.g)
        return self.velocity * -rate
