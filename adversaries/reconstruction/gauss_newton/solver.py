"""Damped Gauss-Newton without matrices, its noise annealed by the residual itself.

With x = mean + S z and the scaled residual r, one step minimises |r + J S dz|^2 / s^2 + |z + dz|^2 by conjugate
gradients. The noise level s follows the residual down, s = min(s, c rms(r)), so that the prior fills in what the
residual does not yet determine and fades as it comes to do so.

ReLU's gradient jumps wherever a unit switches, and its derivative says nothing of it. So each kink is smoothed over
normal noise on the unit's input, as wide as the image is still unknown: that turns jumps into slopes which tell how
many units must switch. The width follows the residual down, and falls by itself where the residual does not.

Where the gradient is a surrogate for several local steps, each step that is taken is followed by a short one of the
point between the weights before and after, down the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence.one_gradient import FIRST_POINT
from adversaries.inversion.evidence.whitening import Whitening, relaxed
from adversaries.inversion.gradients.products import Linearisation, Network
from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from fedattack.config import Positive, Share, Strength, Weight
from fedattack.registry import check_values

Draw = Callable[[], Tensor]
"""A fresh z ~ N(0, I), (B, C, H, W)."""


@dataclass(frozen=True)
class Settings:
    """How to solve; for most settings see :class:`~adversaries.reconstruction.gauss_newton.attack.GaussNewton`.

    Half of the `products` go to the `starts` in equal shares, and the one of lowest residual goes on; none is tried
    after one that has come below :data:`PROMISING`. Below `hybrid_below` the image is whitened by half.
    `tolerance`, relative, and `inner` are of conjugate gradients: their iterations at first, :data:`GROWTH` times
    as many after each full step that would have used more. `solved`: a residual that ends the search.
    """

    products: Annotated[int, Field(ge=100)] = 8000
    starts: Positive = 3
    noise: Strength | None = None
    kink: Weight = 1.0
    hybrid_below: Weight = 0.05
    hop: Weight = 1.0
    tolerance: Share = 0.05
    inner: Positive = 25
    solved: Weight = 1e-6

    def __post_init__(self) -> None:
        check_values(self, "gauss-newton")


GROWTH = 1.5
MOST_INNER = 600
LEAST_INNER = 5
SMALLEST_STEP = 0.02
FAILURES = 3
"""Failed steps in a row after which a descent has stalled."""

WIDEST = 0.15
"""Noise level that kinks are never wider than."""

SLOW = 0.97
"""A step that leaves more than this share of the residual narrows the kinks."""

PROMISING = 0.03
"""A start that has come to this residual has found the way down, more often than not."""

REACH = 0.05
"""How far a surrogate's point moves after a step, at most."""

HYBRID_DEVIATION = 0.3
"""Deviation of a pixel after the switch."""


@dataclass
class Solution:
    """The iterate of lowest residual (B, C, H, W), not clamped, and that residual: rms over the sent entries, scaled.

    `history`: residuals after each accepted step of the descent it came from; `residuals`: of each start, then of
    each hop; `start`: which led to it; `hops_kept`: hops that lowered the residual; `point`: a surrogate's.
    """

    images: Tensor
    rms: float
    history: list[float] = field(default_factory=list)
    products: int = 0
    residuals: list[float] = field(default_factory=list)
    start: int = 0
    hops: int = 0
    hops_kept: int = 0
    point: float = 0.0


class _Descent:
    """One descent: where it is, and what its steps so far taught about noise, damping and effort."""

    def __init__(self, network: Network, prior: Whitening, images: Tensor, settings: Settings) -> None:
        self._network, self._settings = network, settings
        self._basis, self._centre = prior, prior.mean
        self._ratio = settings.noise or (1.4 if network.kinked else 0.5)
        self._noise, self._damping, self._cap = math.inf, 0.0, settings.inner
        self._hybrid = len(images) == 1 and not network.kinked
        self._free = False
        self._failures = self._last = 0
        self._width = settings.kink * WIDEST
        self._z = prior.whiten(images)
        self._point = FIRST_POINT
        if network.movable:
            network.put(self._point)
        self._at = network.linearise(images, self._width)
        self._anneal()
        self.best = Solution(images.detach(), network.rms(images), point=network.point)
        self.best.history.append(self.best.rms)

    def run(self, budget: int, told: Callable[[float], None]) -> None:
        """Step until the budget is spent, the residual is as good as zero, or nothing helps; `told` each residual."""
        best, self._last = self.best, self._network.products + budget
        if self._network.movable:
            # Another descent may have moved it.
            self._place(self._point)
        while (
            self._network.products < self._last
            and self._failures < FAILURES
            and best.rms > self._settings.solved
        ):
            if self._hybrid and self._at.rms < self._settings.hybrid_below:
                self._basis, self._free = relaxed(self._basis, HYBRID_DEVIATION), True
                self._hybrid = False
            if not self._step():
                self._failures += 1
                continue
            self._failures = 0
            # Smooth kinks are for finding the way; what is answered fits without them.
            exact = self._network.rms(self._at.images.detach()) if self._network.kinked else self._at.rms
            best.history.append(exact)
            if exact < best.rms:
                best.images, best.rms, best.point = self._at.images.detach(), exact, self._network.point
            told(best.rms)

    def _anneal(self) -> None:
        self._noise = min(self._noise, self._ratio * self._at.rms)
        self._width = min(self._width, self._settings.kink * self._noise)

    def _narrow(self, factor: float) -> None:
        """Smooth less: what smoothing adds to the residual may be most of what is left of it."""
        if self._network.kinked:
            self._width *= factor
            self._at = self._network.linearise(self._at.images, self._width)

    def _objective(self, at: Linearisation, z: Tensor) -> float:
        return self._network.count * (at.rms / self._noise) ** 2 + float(z.square().sum())

    def _step(self) -> bool:
        """Try one step; whether it lowered the objective."""
        if self._free:
            # No pull to any image: every step is measured from where it starts.
            self._centre, self._z = self._at.images.detach(), torch.zeros_like(self._z)
        change, capped = self._solve()
        before, step = self._objective(self._at, self._z), 1.0
        while step >= SMALLEST_STEP:
            z = self._z + step * change
            at = self._network.linearise(self._centre + self._basis.turn(z), self._width)
            if self._objective(at, z) < before:
                break
            step /= 2
        else:
            self._damping = max(0.3, 3 * self._damping)
            self._noise *= 1.5
            self._narrow(0.5)
            self._cap = max(LEAST_INNER, self._cap // 2)
            return False
        slow = at.rms > SLOW * self._at.rms
        self._at, self._z = at, z
        self._damping = self._damping / 3 if self._damping > 0.1 else 0.0
        if capped and step == 1:
            self._cap = min(MOST_INNER, int(self._cap * GROWTH))
        if self._network.movable:
            self._place(self._better_point())
        self._anneal()
        if slow:
            self._narrow(0.7)
        return True

    def _place(self, point: float) -> None:
        self._point = point
        self._network.put(point)
        self._at = self._network.linearise(self._at.images, self._width)

    def _better_point(self) -> float:
        """Where within reach the residual is least: the foot of a parabola through three points, or one of them."""
        network, images = self._network, self._at.images.detach()

        def square(point: float) -> float:
            network.put(point)
            return network.rms(images) ** 2

        low, here, high = max(0.0, self._point - REACH), self._point, min(1.0, self._point + REACH)
        squares = {point: square(point) for point in (low, here, high)}
        if low < here < high:
            bend = squares[low] + squares[high] - 2 * squares[here]
            if bend > 0:
                lowest = here + (here - low) * (squares[low] - squares[high]) / (2 * bend)
                lowest = min(high, max(low, lowest))
                squares[lowest] = square(lowest)
        return min(squares, key=squares.__getitem__)

    def _solve(self) -> tuple[Tensor, bool]:
        """The change of z, and whether conjugate gradients could have used more iterations."""
        at, basis = self._at, self._basis
        precision, damping = 1 / self._noise**2, 1 + self._damping
        right = -basis.back(at.pull(at.residual)) * precision - self._z

        def system(v: Tensor) -> Tensor:
            return basis.back(at.pull(at.push(basis.turn(v)))) * precision + damping * v

        affordable = max(1, (self._last - self._network.products) // 2)
        return conjugate_gradients(system, right, min(self._cap, affordable), self._settings.tolerance)


def solve(
    network: Network, prior: Whitening, draw: Draw, settings: Settings, progress: Progress = no_progress
) -> Solution:
    """Find images whose gradient is what was sent, chosen among starts and hops (of `draw`) by residual alone."""
    spent = network.products
    last = spent + settings.products
    residuals: list[float] = []

    def told(residual: float) -> None:
        share = min(1.0, (network.products - spent) / settings.products)
        progress(share, f"residual {min([residual, *residuals]):.2g}")

    def descend(images: Tensor, budget: int) -> _Descent:
        descent = _Descent(network, prior, images, settings)
        descent.run(min(budget, last - network.products), told)
        residuals.append(descent.best.rms)
        return descent

    leader, chosen = None, 0
    for start in range(settings.starts):
        z = draw() if start else _apart(network, draw())
        descent = descend(prior.mean + prior.turn(z), settings.products // (2 * settings.starts))
        if leader is None or descent.best.rms < leader.best.rms:
            leader, chosen = descent, start
        if descent.best.rms < PROMISING:
            break
    assert leader is not None
    leader.run(last - network.products, told)
    best, tried, kept = leader.best, len(residuals), 0
    residuals[chosen] = best.rms
    while settings.hop and best.rms > settings.solved and last - network.products >= 2 * settings.inner:
        shake = settings.hop * min(1.0, best.rms)
        found = descend(best.images + shake * prior.turn(draw()), settings.products).best
        if found.rms < best.rms:
            best, kept = found, kept + 1
    best.start, best.products, best.residuals = chosen, network.products - spent, residuals
    best.hops, best.hops_kept = len(residuals) - tried, kept
    return best


def _apart(network: Network, z: Tensor) -> Tensor:
    """Zero, the prior's mean, but for images that share a label: equal ones would stay equal for ever."""
    seen: set[int] = set()
    for position, label in enumerate(network.labels.tolist()):
        if label not in seen:
            z[position] = 0
        seen.add(label)
    return z
