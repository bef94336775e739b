"""Forgetting in a linear model by one Newton step a removal, with a certificate of how little can be left."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedattack.errors import ConfigError
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.unlearning.certificate import Certified, LastLayer, budget
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.linear import LinearLoss, linear_head
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Objective, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.trajectory import remaining

_DESTROYED = 0.05  # share of right answers on what it learnt that noise may cost unsaid


@dataclass
class CertifiedRemoval(Mechanism):
    """Certified removal (Guo et al., 2020): a Newton step a sample, trained anew where the bound is used up.

    The last layer is released as K logistic or ridge models, one class against the rest (their answers as logits; two
    classes: one model, half of it in either row), minimising ``sum_i l(w' x_i) + l2 n / 2 |w|^2 + b' w`` with b ~
    N(0, sigma^2) and the bias among the weights. The inputs are the pixels of a linear model, or what the trained
    layers below make of them: those stay as they are, and know what was forgotten. Removals come `batch` at a time in
    the order of their positions, as if each were a request; where the residual's bound passes ``sigma epsilon /
    sqrt(2 ln(1.5 / delta))`` the last layer is trained anew on what is left.

    Parameters
    ----------
    loss : str
        Of each model: "logistic", or "ridge", the squared distance to -1 or 1.
    l2 : float, optional
        Of the mean loss plus l2 / 2 |w|^2; None: ``training.weight_decay``.
    scale : float, optional
        What the inputs are multiplied by, the bias's 1 too; None: one over the root of their number, so that no image
        is longer than 1.
    sigma : float
        Deviation of b; 0 certifies nothing, so that every removal trains anew.
    epsilon, delta : float
        What is promised: released models with and without the forgotten are (epsilon, delta)-indistinguishable.
    batch : int
        Removals in one Newton step: fewer steps, and a bound that grows with their square.
    fresh : bool
        Draw b anew in a training without some samples; else b is in every release, and cancels in their difference.
    """

    runs: ClassVar[Literal["server", "central"]] = "central"
    certifies: ClassVar[bool] = True
    loss: LinearLoss = "logistic"
    l2: Annotated[float, Field(gt=0)] | None = None
    scale: Annotated[float, Field(gt=0)] | None = None
    sigma: Annotated[float, Field(ge=0)] = 1.0
    epsilon: Annotated[float, Field(gt=0)] = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    batch: Annotated[int, Field(ge=1)] = 1
    fresh: bool = False

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse a model without a linear head (NotApplicable), or an objective without an L2 term (ConfigError)."""
        super().check(name, scenario, clients)
        linear_head(build_model(scenario.model), scenario.image_shape, f"mechanism {name!r}")
        if not self._l2(scenario):
            raise ConfigError(
                f"setting 'training.weight_decay' = 0: mechanism {name!r} needs an L2 term, without which nothing "
                "bounds its steps; accepted: more than 0, there or in 'unlearning.l2'"
            )

    def minimises(self, scenario: Scenario) -> Objective | None:
        """Of a linear model the objective in the terms of its released rows, whose noise they may share."""
        head = linear_head(build_model(scenario.model), scenario.image_shape, "'certified'")
        decay = self._l2(scenario) / (self.scale or head.width**-0.5) ** 2
        if not head.alone:
            return None
        if head.classes == 2 and self.loss == "logistic":  # the softmax of -w/2 and w/2 is that model's
            return Objective("softmax", 2 * decay)
        return Objective(self.loss, decay)

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """Train the last layer to its minimum on what is not excluded."""
        gone, layer = excluded.get(0, frozenset()), self._layer(history, trainer)
        model = self._trained(layer, remaining(layer.central, gone))
        layer.keep(model, gone)
        return layer.released(model)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`, position after position; DataError where nothing is left."""
        excluded, before = merged(history.excluded, deletions), history.excluded.get(0, frozenset())
        after, layer = excluded.get(0, frozenset()), self._layer(history, trainer)
        model, allowed = layer.kept(before), budget(self.sigma, self.epsilon, self.delta)
        bounds, intervals = list[float](), list[int]()
        new = sorted(after - before)
        for place in range(0, len(new), self.batch):
            group = new[place : place + self.batch]
            left = remaining(layer.central, before | frozenset(new[: place + len(group)]))
            model = layer.problem(left).removed(model, layer.problem(group))
            layer.central.count(3 * len(left) + len(group))
            bounds.append(model.beta)
            if model.beta > allowed:
                intervals.append(model.removals - len(group))
                model = self._trained(layer, left, model)
        layer.keep(model, after)
        certificate = {
            "beta": model.beta,
            "budget": allowed,
            "removals": model.removals,
            "retrained": model.retrained,
            "sigma": self.sigma,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "covers": "the model"
            if layer.head.alone
            else "the last layer alone: those below it were trained on the forgotten samples",
        }
        details = {"sigma": self.sigma, "bounds": bounds, "intervals": intervals}
        if model.accuracy_lost > _DESTROYED:
            details["warning"] = (
                f"noise of deviation {self.sigma:g} costs {100 * model.accuracy_lost:.1f} points of accuracy on what "
                "was learnt; lower 'unlearning.sigma', or raise the L2 term"
            )
        return Forgotten(layer.released(model), excluded, 0, certificate, details)

    def _l2(self, scenario: Scenario) -> float:
        return self.l2 or scenario.training.weight_decay

    def _layer(self, history: History, trainer: Trainer) -> LastLayer:
        return LastLayer(history, trainer.central(), self.loss, self._l2(history.scenario), self.scale)

    def _trained(self, layer: LastLayer, left: Collection[int], old: Certified | None = None) -> Certified:
        """The minimum on the positions `left`, in place of an `old` model or none."""
        removed = len(layer.central) - len(left)
        if old is None or self.fresh:
            noise = self.sigma * layer.draws(removed if self.fresh else 0)
        else:
            noise = old.noise
        found = layer.trained(left, noise, None if old is None else old.weights)
        if old is not None:
            return replace(found, retrained=old.retrained + 1, accuracy_lost=old.accuracy_lost)
        if not self.sigma or removed:
            return found
        silent, problem = layer.trained(left, 0 * noise, found.weights), layer.problem(left)
        return replace(
            found, accuracy_lost=problem.accuracy(silent.weights) - problem.accuracy(found.weights)
        )
