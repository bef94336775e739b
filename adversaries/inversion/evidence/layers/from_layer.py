"""A model played from one of its layers on: labels, and local steps, of samples whose inputs there are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adversaries.inversion.evidence.first_layer import Played
from adversaries.inversion.gradients.schedule import step_weights
from fedattack.config import TrainingConfig
from fedattack.models import build_model
from fedattack.models.normalise import bare
from fedattack.observation import Observation
from fedattack.task import trained_parameters
from fedattack.training import training_mode

_CELLS = 2**25
"""Numbers held at once while labels are compared."""


@dataclass(frozen=True)
class Told:
    """Labels int64 (B,) that explain each sample's dL/dz best; relative misfits of these, and of the next, (B,)."""

    labels: Tensor
    misfit: Tensor
    second: Tensor


@dataclass(frozen=True)
class Steps:
    """A client's local steps over samples whose inputs at a layer are known.

    Attributes
    ----------
    steps, labels : Tensor
        int64 (B,): in which step each sample was, and its label.
    misfit, second : Tensor
        (B,): of each sample's dL/dz, as in :class:`Told`, at the weights of its step.
    back : Tensor
        (B, m): each sample's part of the mean gradient's dL/dz, played.
    gradients : dict of str to Tensor
        The mean gradient over the round of every tensor from the layer on.
    """

    steps: Tensor
    labels: Tensor
    misfit: Tensor
    second: Tensor
    back: Tensor
    gradients: dict[str, Tensor]


class FromLayer:
    """The model in float64 and in the client's mode, its module `layer` given what it is told and not what it would.

    Exact where all that is above the layer depends on the image through the layer alone.
    """

    def __init__(self, observation: Observation, layer: str, device: torch.device) -> None:
        self._module = build_model(bare(observation.scenario.model)).to(device)
        self._module.load_state_dict(observation.weights)
        self._module = training_mode(self._module.double(), observation.scenario.training.batch_norm)
        for part in self._module.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.eval()
        self._image = torch.zeros(observation.scenario.image_shape, dtype=torch.float64, device=device)
        self.weights: dict[str, Tensor] = {
            name: parameter.detach() for name, parameter in trained_parameters(self._module).items()
        }
        self._given: Tensor | None = None
        self._classes = observation.scenario.model.resolved[2]
        self._answer: Tensor = self._image
        there = self._module.get_submodule(layer)
        there.register_forward_pre_hook(lambda *_: None if self._given is None else (self._given,))
        there.register_forward_hook(lambda *given: setattr(self, "_answer", given[2]))

    def _forward(self, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits of inputs of the layer, (B, n), or of images (B, C, H, W) as the first layer sees them."""
        self._given = inputs if inputs.ndim == 2 else None
        blank = self._image.expand(len(inputs), *self._image.shape)
        return functional_call(self._module, dict(weights), (blank if inputs.ndim == 2 else inputs,))

    def play(self, inputs: Tensor, labels: Tensor, weights: Mapping[str, Tensor] | None = None) -> Played:
        """Gradients of a batch with labels int64 (B,), whose inputs of the layer (B, n) are given, or its images.

        Of inputs, the gradients are of the tensors from the layer on; of images, (B, C, H, W) as the first layer sees
        them, of all.
        """
        given = {name: tensor.detach().requires_grad_() for name, tensor in (weights or self.weights).items()}
        loss = nn.functional.cross_entropy(self._forward(inputs, given), labels.to(inputs.device))
        found = torch.autograd.grad(loss, [*given.values(), self._answer], allow_unused=True)
        gradients = {name: g for name, g in zip(given, found[:-1], strict=True) if g is not None}
        if inputs.ndim > 2:
            gradients = {name: gradients.get(name, torch.zeros_like(given[name])) for name in given}
        back = found[-1] if found[-1] is not None else torch.zeros_like(self._answer)
        return Played(gradients, back)

    def slopes(self, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """dL/dz (B, classes, m) of each sample's own loss, for every label that it could have."""
        given = {name: tensor.detach().requires_grad_() for name, tensor in (weights or self.weights).items()}
        logits = self._forward(inputs, given)
        rows = [
            torch.autograd.grad(logits[:, c].sum(), self._answer, retain_graph=True)[0]
            for c in range(logits.shape[1])
        ]
        slope = torch.stack(rows, 1)
        return logits.detach().softmax(1)[:, None] @ slope - slope

    def told(self, inputs: Tensor, back: Tensor, weights: Mapping[str, Tensor] | None = None) -> Told:
        """The labels of inputs (B, n) by their own losses' dL/dz there, `back` (B, m)."""
        labels, best, second = [], [], []
        chunk = max(1, _CELLS // (self._classes * back.shape[1]))
        for places in torch.arange(len(inputs)).split(chunk):
            wrong = back[places, None] - self.slopes(inputs[places], weights)
            sizes = wrong.norm(dim=2) / back[places].norm(dim=1, keepdim=True).clamp_min(1e-300)
            least = sizes.topk(min(2, self._classes), dim=1, largest=False)
            labels.append(least.indices[:, 0])
            best.append(least.values[:, 0])
            second.append(least.values[:, -1])
        return Told(torch.cat(labels), torch.cat(best), torch.cat(second))

    def followed(
        self,
        inputs: Tensor,
        back: Tensor,
        sizes: Sequence[int],
        training: TrainingConfig,
        most: float,
    ) -> Steps | None:
        """The local steps of batches of so many samples, found one after the other; None where a step does not show.

        Samples of the first step have the dL/dz, `back` (B, m) as parts of the mean gradient over the round, that the
        weights sent out give them, and no others have; their step then gives the next weights, from this layer on.
        `most` is the misfit up to which samples are believed. Over one step all samples are in it.
        """
        counts = _counts(training, len(sizes))
        weights = dict(self.weights)
        left = torch.arange(len(inputs), device=inputs.device)
        steps, labels = (
            torch.zeros(len(inputs), dtype=torch.int64),
            torch.zeros(len(inputs), dtype=torch.int64),
        )
        misfit, second = torch.zeros(len(inputs)).to(back), torch.zeros(len(inputs)).to(back)
        played_back = torch.zeros_like(back)
        velocity: dict[str, Tensor] = {}
        total: dict[str, Tensor] = {}
        for step, size in enumerate(sizes):
            share = counts[step] / sum(counts) / size
            told = self.told(inputs[left], back[left] / share, weights)
            picked = told.misfit.argsort()[:size]
            if len(sizes) > 1 and float(told.misfit[picked[-1]]) > most:
                return None
            these = left[picked]
            where = these.cpu()
            steps[where], labels[where] = step, told.labels[picked].cpu()
            misfit[these], second[these] = told.misfit[picked], told.second[picked]
            played = self.play(inputs[these], told.labels[picked], weights)
            played_back[these] = played.back * (counts[step] / sum(counts))
            _move(weights, velocity, total, played.gradients, counts[step] / sum(counts), training)
            keep = torch.ones(len(left), dtype=torch.bool, device=left.device)
            keep[picked] = False
            left = left[keep]
        return Steps(steps, labels, misfit, second, played_back, total)

    def replayed(
        self, images: Tensor, labels: Tensor, steps: Tensor, training: TrainingConfig
    ) -> dict[str, Tensor]:
        """The round's mean gradient of images (B, C, H, W), as the first layer sees them, each in its step."""
        counts = _counts(training, training.local_steps)
        weights, velocity, total = dict(self.weights), dict[str, Tensor](), dict[str, Tensor]()
        for step in range(training.local_steps):
            these = (steps == step).nonzero()[:, 0]
            slopes = self.play(
                images[these.to(images.device)], labels[these.to(labels.device)], weights
            ).gradients
            _move(weights, velocity, total, slopes, counts[step] / sum(counts), training)
        return total


def _move(
    weights: dict[str, Tensor],
    velocity: dict[str, Tensor],
    total: dict[str, Tensor],
    slopes: Mapping[str, Tensor],
    share: float,
    training: TrainingConfig,
) -> None:
    """One step of SGD, in place; `total` is the sum of the steps' gradients, each by its share."""
    for name, slope in slopes.items():
        total[name] = total.get(name, torch.zeros_like(slope)) + slope * share
        velocity[name] = training.momentum * velocity.get(name, torch.zeros_like(slope)) + slope
        weights[name] = weights[name] - training.learning_rate * velocity[name]


def _counts(training: TrainingConfig, steps: int) -> list[float]:
    """How often each step's gradient enters the weights."""
    return step_weights(training.model_copy(update={"local_steps": steps}))
