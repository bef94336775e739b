"""Forgetting in a linear model by one Newton step a removal, with a certificate of how little can be left."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedattack.errors import ConfigError, DataError
from fedattack.files import write_tensors
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.unlearning.certificate import Certified, OneVsRest, budget
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.linear import LinearHead, LinearLoss, linear_head
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.trajectory import kept_tensors, state_file

log = logging.getLogger("fedattack.unlearning")

_DESTROYED = 0.05
"""Share of right answers on what it learnt from that noise may cost before people are warned."""


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
    l2 : float, optional
        Of the mean loss plus l2 / 2 |w|^2; None: ``training.weight_decay``.
    scale : float, optional
        What the inputs are multiplied by, the bias's 1 too; None: one over the root of their number, so that no image
        is longer than 1.
    sigma : float
        Deviation of b; 0 certifies nothing, so that every removal trains anew.
    batch : int
        Removals in one Newton step: fewer steps, and a bound that grows with their square.
    fresh : bool
        Draw b anew in a training without some samples; else b is in every release, and cancels in their difference.
    """

    runs: ClassVar[Literal["server", "central"]] = "central"
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

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """Train the last layer to its minimum on what is not excluded."""
        gone = excluded.get(0, frozenset())
        served = _Served(self, history, trainer)
        model = served.trained(gone, served.central.retained(gone), None)
        return served.released(model, gone)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`, position after position; DataError where nothing is left."""
        excluded, before = merged(history.excluded, deletions), history.excluded.get(0, frozenset())
        after = excluded.get(0, frozenset())
        served = _Served(self, history, trainer)
        model, allowed = served.kept(before), budget(self.sigma, self.epsilon, self.delta)
        bounds, intervals = list[float](), list[int]()
        new = sorted(after - before)
        for place in range(0, len(new), self.batch):
            group = new[place : place + self.batch]
            left = served.central.retained(before | frozenset(new[: place + len(group)]))
            if not len(left):
                raise DataError(
                    "setting 'unlearning.mechanism' = 'certified': no sample is left to learn from"
                )
            model = served.problem(left).removed(model, served.problem(group))
            served.central.count(3 * len(left) + len(group))
            bounds.append(model.beta)
            if model.beta > allowed:
                intervals.append(model.removals - len(group))
                model = served.trained(after, left, model)
        certificate = {
            "beta": model.beta,
            "budget": allowed,
            "removals": model.removals,
            "retrained": model.retrained,
            "sigma": self.sigma,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "covers": "the model"
            if served.head.alone
            else "the last layer alone: those below it were trained on the forgotten samples",
        }
        details = {"sigma": self.sigma, "bounds": bounds, "intervals": intervals}
        if warning := served.warning(model):
            details |= {"warning": warning}
        return Forgotten(served.released(model, after), excluded, 0, certificate, details)

    def _l2(self, scenario: Scenario) -> float:
        return self.l2 or scenario.training.weight_decay


class _Served:
    """The samples as the last layer sees them, and the models that were kept for each set of removed positions."""

    def __init__(self, settings: CertifiedRemoval, history: History, trainer: Trainer) -> None:
        self.settings, self.history, self.central = settings, history, trainer.central()
        central, scenario = self.central, history.scenario
        self.head: LinearHead = linear_head(build_model(scenario.model), scenario.image_shape, "'certified'")
        state = {
            name: t.to(central.dtype) if t.is_floating_point() else t for name, t in history.weights.items()
        }
        inputs = self.head.inputs(central.model, state, central.images.to(central.dtype))
        central.count(len(central))
        classes = torch.tensor([1]) if self.head.classes == 2 else torch.arange(self.head.classes)
        targets = 2.0 * (central.labels == classes[:, None]).double() - 1
        self.scale = settings.scale or inputs.shape[1] ** -0.5
        self.whole = OneVsRest(self.scale * inputs, targets, settings._l2(scenario), settings.loss)

    def problem(self, positions: Collection[int]) -> OneVsRest:
        return self.whole.rows(torch.tensor(list(positions), dtype=torch.int64))

    def trained(self, gone: Collection[int], left: Collection[int], model: Certified | None) -> Certified:
        """The minimum on the positions `left`; noise as in `model`, or drawn."""
        key = len(gone) if self.settings.fresh else 0
        problem = self.problem(left)
        nothing = torch.zeros(len(problem.targets), problem.inputs.shape[1], dtype=torch.float64)
        draws = torch.randn(nothing.shape, generator=self.central.rng("certified removal", key))
        noise = self.settings.sigma * draws.double()
        found, steps = problem.trained(noise, nothing if model is None else model.weights)
        self.central.count(int(3 * steps * len(left)))
        lost = 0.0 if model is None else model.accuracy_lost
        if model is None and self.settings.sigma and not gone:
            silent, steps = problem.trained(nothing, found.weights)
            self.central.count(int(3 * steps * len(left)))
            lost = problem.accuracy(silent.weights) - problem.accuracy(found.weights)
        return replace(found, retrained=0 if model is None else model.retrained + 1, accuracy_lost=lost)

    def warning(self, model: Certified) -> str:
        if model.accuracy_lost <= _DESTROYED:
            return ""
        return (
            f"noise of deviation {self.settings.sigma:g} costs {100 * model.accuracy_lost:.1f} points of accuracy on "
            "what was learnt; lower 'unlearning.certified.sigma', or raise the L2 term"
        )

    def released(self, model: Certified, gone: Collection[int]) -> Weights:
        """The model with its last layer replaced; what the next removal needs is kept."""
        tally = torch.tensor([model.removals, model.retrained, model.accuracy_lost], dtype=torch.float64)
        tensors = {"weights": model.weights, "noise": model.noise, "bounds": model.bounds, "tally": tally}
        write_tensors(state_file(self.history.folder, "certified", gone), tensors)
        rows = torch.cat([-model.weights, model.weights]) / 2 if self.head.classes == 2 else model.weights
        return {**self.history.weights, **self.head.state(self.scale * rows, self.history.weights)}

    def kept(self, gone: Collection[int]) -> Certified:
        tensors = kept_tensors(state_file(self.history.folder, "certified", gone))
        removals, retrained, lost = tensors.pop("tally").tolist()
        return Certified(**tensors, removals=int(removals), retrained=int(retrained), accuracy_lost=lost)
