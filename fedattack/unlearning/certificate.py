"""What a removal may leave in linear models: the Newton step, the bound of its residual, and what noise hides."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import eigvalsh
from torch import Tensor

from fedattack.files import write_tensors
from fedattack.models import build_model
from fedattack.unlearning.central import Central
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.linear import LinearLoss, LinearObjective, linear_head
from fedattack.unlearning.trajectory import kept_tensors, state_file


def budget(sigma: float, epsilon: float, delta: float) -> float:
    """The gradient residual that noise of deviation `sigma` hides (Guo et al., 2020, theorem 3)."""
    return sigma * epsilon / math.sqrt(2 * math.log(1.5 / delta))


@dataclass(frozen=True)
class Certified:
    """K linear models, one class against the rest (one alone for two classes), and what removals left in them."""

    weights: Tensor  # float64 (K, d)
    noise: Tensor  # float64 (K, d): b of each objective
    bounds: Tensor  # float64 (K,): of the gradient residuals
    removals: int = 0  # since the last training
    retrained: int = 0
    accuracy_lost: float = 0.0  # by the noise, on the samples it was trained on

    @property
    def beta(self) -> float:
        """Bound of the residual of the K objectives together, whose noise is one vector of K * d draws."""
        return float(self.bounds.norm())


@dataclass(frozen=True)
class OneVsRest:
    """The objectives of K linear models on the same samples."""

    inputs: Tensor  # float64 (n, d)
    targets: Tensor  # float64 (K, n): -1 or 1
    l2: float
    loss: LinearLoss

    def objectives(self, noise: Tensor) -> list[LinearObjective]:
        """Of each class."""
        pairs = zip(self.targets, noise, strict=True)
        return [LinearObjective(self.inputs, y, self.l2, b, self.loss) for y, b in pairs]

    def rows(self, places: Tensor) -> OneVsRest:
        """Of the samples at `places`, int64."""
        return replace(self, inputs=self.inputs[places], targets=self.targets[:, places])

    def trained(self, noise: Tensor, start: Tensor) -> tuple[Certified, float]:
        """The models at their minima, from `start` (K, d), and the Newton steps that each took in the mean."""
        found = [one.minimum(w) for one, w in zip(self.objectives(noise), start, strict=True)]
        weights = torch.stack([w for w, _ in found])
        left = [float(one.gradient(w).norm()) for one, w in zip(self.objectives(noise), weights, strict=True)]
        return Certified(weights, noise, torch.tensor(left).double()), float(np.mean([s for _, s in found]))

    def removed(self, model: Certified, gone: OneVsRest) -> Certified:
        """One Newton step on these samples, which are left, for all of `gone` (Guo et al., 2020, section 3.3).

        ``w + H^-1 (sum of gone gradients)``; the residual grows by no more than ``gamma |X| |step| |X step|``
        (corollary 1), gamma = 1/4 for the logistic loss and 0 for the quadratic one.
        """
        gamma, d = 0.25 if self.loss == "logistic" else 0.0, self.inputs.shape[1]
        gram = (self.inputs.T @ self.inputs).numpy()
        size = math.sqrt(max(0.0, float(eigvalsh(gram, subset_by_index=[d - 1, d - 1])[0])))
        silent = torch.zeros_like(model.noise)
        steps = torch.stack(
            [
                kept.newton_step(w, lost.gradient(w))
                for kept, lost, w in zip(
                    self.objectives(silent), gone.objectives(silent), model.weights, strict=True
                )
            ]
        )
        grown = gamma * size * steps.norm(dim=1) * (self.inputs @ steps.T).norm(dim=0)
        removals = model.removals + len(gone.inputs)
        return replace(model, weights=model.weights + steps, bounds=model.bounds + grown, removals=removals)

    def accuracy(self, weights: Tensor) -> float:
        """Share of right answers."""
        logits, truth = self.inputs @ weights.T, self.targets
        right = logits.sign() == truth.T if len(truth) == 1 else logits.argmax(1) == truth.argmax(0)
        return float(right.double().mean())


class LastLayer:
    """A holder's samples as the last layer of its model sees them, and the models kept for each set of removals.

    Raises NotApplicable for a model whose last layer is not linear. `scale` None: one over the root of the inputs'
    number. Every pass over the samples is counted, a Newton step of K models as three.
    """

    def __init__(
        self, history: History, central: Central, loss: LinearLoss, l2: float, scale: float | None
    ) -> None:
        self.history, self.central = history, central
        scenario, like = history.scenario, central.dtype
        self.head = linear_head(build_model(scenario.model), scenario.image_shape, "'certified'")
        state = {name: t.to(like) if t.is_floating_point() else t for name, t in history.weights.items()}
        inputs = self.head.inputs(central.model, state, central.images)
        central.count(len(central))
        classes = torch.tensor([1]) if self.head.classes == 2 else torch.arange(self.head.classes)
        targets = 2.0 * (central.labels == classes[:, None]).double() - 1
        self.scale = scale or self.head.width**-0.5
        self._all = OneVsRest(self.scale * inputs, targets, l2, loss)

    def problem(self, positions: Collection[int]) -> OneVsRest:
        """The objectives of the samples at `positions`."""
        return self._all.rows(torch.tensor(list(positions), dtype=torch.int64))

    def draws(self, key: int) -> Tensor:
        """Standard normal numbers, float64 (K, d)."""
        shape = len(self._all.targets), self._all.inputs.shape[1]
        return torch.randn(shape, generator=self.central.rng("certified removal", key)).double()

    def trained(self, positions: Collection[int], noise: Tensor, start: Tensor | None) -> Certified:
        """The minima on the samples at `positions`."""
        found, steps = self.problem(positions).trained(
            noise, torch.zeros_like(noise) if start is None else start
        )
        self.central.count(int(3 * steps * len(positions)))
        return found

    def released(self, model: Certified) -> Weights:
        """The history's model with its last layer replaced."""
        rows = torch.cat([-model.weights, model.weights]) / 2 if self.head.classes == 2 else model.weights
        return {**self.history.weights, **self.head.state(self.scale * rows, self.history.weights)}

    def keep(self, model: Certified, gone: Collection[int]) -> None:
        """Write what the next removal starts from, once the positions `gone` are forgotten."""
        tally = torch.tensor([model.removals, model.retrained, model.accuracy_lost], dtype=torch.float64)
        tensors = {"weights": model.weights, "noise": model.noise, "bounds": model.bounds, "tally": tally}
        write_tensors(state_file(self.history.folder, "certified", gone), tensors)

    def kept(self, gone: Collection[int]) -> Certified:
        """What :meth:`keep` wrote; RunFailed where it did not."""
        tensors = kept_tensors(state_file(self.history.folder, "certified", gone))
        removals, retrained, lost = tensors.pop("tally").tolist()
        return Certified(**tensors, removals=int(removals), retrained=int(retrained), accuracy_lost=lost)
