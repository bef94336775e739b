"""Linear classifiers, one class against the rest: their regularised, perturbed objective, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedattack.errors import NotApplicable, RunFailed
from fedattack.task import trained_parameters

LinearLoss = Literal["logistic", "ridge"]

_STEPS = 200
_SMALLEST = 2.0**-30
_ENOUGH = 1e-13
"""Gradient beside the sum of its summands' sizes: what float64 can tell from zero."""


@dataclass(frozen=True)
class LinearObjective:
    """sum_i l(w' x_i, y_i) + l2 * n / 2 * |w|^2 + b' w, minimised over w, (d,).

    The losses are log(1 + exp(-y w' x)) and (w' x - y)^2 / 2. The convention and the noise b are those of Guo et al.
    (Certified data removal from machine learning models, 2020, section 3).
    """

    inputs: Tensor  # float64 (n, d)
    targets: Tensor  # float64 (n,): -1 or 1, any number for "ridge"
    l2: float
    noise: Tensor  # float64 (d,): b
    loss: LinearLoss = "logistic"

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, places: Tensor) -> LinearObjective:
        """The objective of the samples at `places`, int64 or bool, with the same noise."""
        return replace(self, inputs=self.inputs[places], targets=self.targets[places])

    def gradient(self, weights: Tensor) -> Tensor:
        """Of the whole objective, (d,)."""
        return self.inputs.T @ self._slopes(weights) + self.l2 * len(self) * weights + self.noise

    def hessian(self, weights: Tensor) -> Tensor:
        """Of the whole objective, (d, d)."""
        if self.loss == "ridge":
            found = self.inputs.T @ self.inputs
        else:
            share = torch.sigmoid(self.inputs @ weights)
            found = self.inputs.T @ (self.inputs * (share * (1 - share))[:, None])
        found.diagonal().add_(self.l2 * len(self))
        return found

    def newton_step(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """The Hessian's inverse times `gradient`, (d,)."""
        factor = torch.linalg.cholesky(self.hessian(weights))
        return torch.cholesky_solve(gradient[:, None], factor)[:, 0]

    def minimum(self, start: Tensor) -> tuple[Tensor, int]:
        """Where the gradient vanishes, as far as float64 can tell, and the Newton steps it took.

        Steps are halved until the gradient is shorter, which a Newton step of a strictly convex objective can always
        achieve. Raises RunFailed where it does not vanish.
        """
        weights, steps = start.clone(), 0
        gradient = self.gradient(weights)
        while float(gradient.norm()) > _ENOUGH * self._scale(weights) and steps < _STEPS:
            step, length, steps = self.newton_step(weights, gradient), 1.0, steps + 1
            while length > _SMALLEST:
                found = self.gradient(weights - length * step)
                if float(found.norm()) <= (1 - length / 4) * float(gradient.norm()):
                    break
                length /= 2
            else:
                break
            weights, gradient = weights - length * step, found
        if not float(gradient.norm()) <= 1e4 * _ENOUGH * self._scale(weights):
            raise RunFailed(
                f"a linear model does not converge: gradient {float(gradient.norm()):.2g}, {steps} Newton steps; "
                "raise the L2 term"
            )
        return weights, steps

    def _slopes(self, weights: Tensor) -> Tensor:
        """Derivative of each sample's loss by its answer, (n,)."""
        answers = self.inputs @ weights
        if self.loss == "ridge":
            return answers - self.targets
        return -self.targets * torch.sigmoid(-self.targets * answers)

    def _scale(self, weights: Tensor) -> float:
        """Size of the gradient's summands."""
        sizes = self.inputs.norm(dim=1) @ self._slopes(weights).abs()
        return float(sizes + self.l2 * len(self) * weights.norm() + self.noise.norm()) or 1.0


@dataclass(frozen=True)
class LinearHead:
    """A model's last layer, which is linear and answers its logits; `alone`: nothing else is trained."""

    name: str
    biased: bool
    width: int  # of its inputs, the bias's 1 among them
    classes: int
    alone: bool

    def inputs(
        self, model: nn.Module, state: Mapping[str, Tensor], images: Tensor, chunk: int = 256
    ) -> Tensor:
        """What the head sees of images (N, C, H, W), float64 (N, d); a last column of ones is the bias."""
        seen: list[Tensor] = []
        hook = model.get_submodule(self.name).register_forward_pre_hook(
            lambda _, given: seen.append(given[0])
        )
        try:
            with torch.no_grad():
                for part in images.split(chunk):
                    functional_call(model, dict(state), (part.to(state[f"{self.name}.weight"]),))
        finally:
            hook.remove()
        found = torch.cat(seen).double()
        return torch.cat([found, found.new_ones(len(found), 1)], 1) if self.biased else found

    def state(self, weights: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's tensors by name, of rows (classes, d) as in :meth:`inputs`."""
        kernel = like[f"{self.name}.weight"]
        found = {f"{self.name}.weight": weights[:, : kernel.shape[1]].to(kernel)}
        if self.biased:
            found[f"{self.name}.bias"] = weights[:, -1].to(kernel)
        return found


def linear_head(model: nn.Module, image_shape: tuple[int, ...], what: str) -> LinearHead:
    """The linear layer whose answer is the model's; NotApplicable, for `what`, where there is none."""
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    answers: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: answers.update({name: out}))
        for name, part in layers
    ]
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *image_shape))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for name, part in layers:
        if name in answers and answers[name] is logits:
            trained = trained_parameters(model)
            alone = trained.keys() <= {f"{name}.weight", f"{name}.bias"}
            biased = part.bias is not None
            return LinearHead(name, biased, part.in_features + biased, part.out_features, alone)
    raise NotApplicable(
        f"{what} needs a model whose last layer is linear and answers the logits, which {type(model).__name__} is "
        "not; use a model with a linear head, or mechanism 'retrain'"
    )
