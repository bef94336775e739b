"""Forgetting by one Newton step towards the minimum without the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.unlearning.curvature import gauss_newton, minimise, solve
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.linear import linear_head
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Objective, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.trajectory import remaining

_FLAT = 1e-9
"""Largest entry of the mean gradient of a model that is trained to convergence."""
_MOST = 100_000
"""Iterations of L-BFGS until then."""


@dataclass
class Newton(Mechanism):
    """One Newton step: ``w + (H + l n I)^-1 (sum of the forgotten gradients + l k w)``, H of the n samples left.

    What Guo et al. (2020) certify for linear models and Sekhari et al. (2021) for convex ones, without their noise.
    `l` is ``training.weight_decay``. All samples are forgotten in one step, by conjugate gradients on products with
    the Gauss-Newton matrix of the summed cross-entropies, which is the Hessian of a linear model. The step goes to
    the minimum only where the model is at one: a linear model is trained to its own before it is released (and so is
    a retrained one). In a deep model, which is not at one, a damped step is little more than the forgotten samples'
    gradient, scaled.

    Parameters
    ----------
    converge : bool
        Train a linear model to convergence (weight decay above 0).
    damping : float, optional
        Added to `l` in the step; None: 0 for a linear model that was trained to convergence, 0.01 for others.
    tolerance : float
        Residual of the step's equations, as a share of the right-hand side.
    iterations : int
        Most products with the Hessian.
    """

    runs: ClassVar[Literal["server", "central"]] = "central"
    curves: ClassVar[Literal["left", "all"]] = "left"  # whose Hessian
    converge: bool = True
    damping: Annotated[float, Field(ge=0)] | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    iterations: Annotated[int, Field(ge=1)] = 100

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse (ConfigError) a linear model whose minimum may lie at infinity."""
        super().check(name, scenario, clients)
        if self._converges(scenario) and not scenario.training.weight_decay:
            raise ConfigError(
                f"setting 'training.weight_decay' = 0: {name!r} trains a linear model to convergence, which it may "
                "never reach without weight decay; accepted: more than 0, or unlearning.converge=false"
            )

    def minimises(self, scenario: Scenario) -> Objective | None:
        """Of a linear model that is trained to convergence its loss and weight decay."""
        return Objective("softmax", scenario.training.weight_decay) if self._converges(scenario) else None

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """A linear model at its minimum on what is not excluded; another as it is."""
        if not self._converges(history.scenario):
            return history.weights
        central, base, decay = trainer.central(), history.weights, history.scenario.training.weight_decay
        left = remaining(central, excluded.get(0, frozenset()))

        def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
            point = flat.requires_grad_()
            loss = central.loss(point, base, left) / len(left) + decay / 2 * point @ point
            central.count(len(left))
            return loss.detach(), torch.autograd.grad(loss, point)[0]

        return central.weights(minimise(evaluate, central.flat(base), _FLAT, _MOST), base)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`; DataError where nothing is left."""
        excluded, before = merged(history.excluded, deletions), history.excluded.get(0, frozenset())
        central, scenario = trainer.central(), history.scenario
        after, converged = excluded.get(0, frozenset()), self._converges(scenario)
        if not converged:  # the step is rough, and convolutions in float64 take six times as long
            central = replace(central, dtype=torch.float32)
        lost = central.retained(frozenset(range(len(central))) - (after - before))
        left = remaining(central, after)
        curving = left if self.curves == "left" else central.retained(before)
        flat, decay = central.flat(history.weights), scenario.training.weight_decay
        damping = (0.0 if converged else 0.01) if self.damping is None else self.damping
        extra = len(curving) * (decay + damping)

        def product(vector: Tensor) -> Tensor:
            return gauss_newton(central, flat, history.weights, vector, curving) + extra * vector

        right = central.gradient(flat, history.weights, lost) + decay * len(lost) * flat
        found = solve(product, right, self.tolerance, self.iterations)
        distance = float(found.solution.norm())
        details: dict[str, Any] = {
            "products": found.products,
            "residual": found.residual,
            "distance": distance,
        }
        if found.residual > 2 * self.tolerance:  # worked out anew, in which rounding has a part
            details["warning"] = (
                f"the step's equations are solved to {found.residual:.2g} of their right-hand side after "
                f"{found.products} products; raise 'unlearning.iterations' or 'unlearning.damping'"
            )
        weights = central.weights(flat + found.solution, history.weights)
        return Forgotten(weights, excluded, 0, details=details)

    def _converges(self, scenario: Scenario) -> bool:
        """Whether the model is linear, and to be trained to convergence."""
        try:
            head = linear_head(build_model(scenario.model), scenario.image_shape, "")
        except NotApplicable:
            return False
        return self.converge and head.alone
