"""What an update carries beside one gradient: local steps, clipping, and residuals of earlier rounds.

They follow from a guess of the images, for the server knows everything else: for local steps and clipping by
*defect correction* (Stetter, Numer. Math. 1978): the simulated update minus the gradient's share is
subtracted, and the guess is improved on what is left; for what was held back (Stich et al., "Sparsified SGD
with memory", NeurIPS 2018; Lin et al., "Deep gradient compression", ICLR 2018) by *peeling*: each round's
reconstruction says what that round held back, which the next update carries.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from adversaries.inversion.evidence import defences
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.one_gradient import accumulates, gradient_unit
from adversaries.inversion.gradients.schedule import Schedule, schedules_for
from adversaries.reconstruction.hcgla.measurements import BOUNDING, ROUNDING, Reading
from fedattack.config import CompressionConfig, TrainingConfig
from fedattack.defenses import ClientDefenses
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation, Scenario, Update
from fedattack.training import batch_gradient, local_update


def check_orders(scenario: Scenario, clients: tuple[int, ...]) -> None:
    """NotApplicable where nobody can try the orders of the local batches of every client with so many samples."""
    agreed = scenario.training.batch_size * scenario.training.local_steps
    for number, size in enumerate(clients, 1):
        try:
            schedules_for(scenario, min(size, agreed or size))
        except NotApplicable:
            if number == len(clients):
                raise
        else:
            return


def constant_reading(evidence: Evidence) -> Reading:
    """How an update reads as mean gradient, as far as no image is needed to tell."""
    received, noise = evidence.observation, evidence.noise
    training = received.scenario.training
    if accumulates(received.scenario):  # what is held back keeps its noise
        noise *= math.sqrt(received.round)
    if received.update.kind == "gradient":
        return Reading(offset=evidence.beside, noise=noise)
    largest = max(float(received.weights[name].abs().max()) for name in received.update.names)
    # Each step rounds the new weights to 24 bits, and the learning rate magnifies that.
    rounding = 2.0**-24 / math.sqrt(3) * largest * math.sqrt(training.local_steps) / -gradient_unit(received)
    return Reading(offset=evidence.beside, rounding=rounding, noise=noise)


def matchable(evidence: Evidence) -> Observation:
    """A received update as entries of one (mean) gradient, as far as no image is needed to tell.

    Once something was subtracted, the smallest entry sent bounds the others no more: what is left looks like
    entries that were drawn at random, and the scenario says so.
    """
    received = evidence.observation
    scenario = plain_scenario(received.scenario)
    if evidence.beside is not None and scenario.compression.name in BOUNDING:
        scenario = dataclasses.replace(
            scenario, compression=scenario.compression.model_copy(update={"name": "randomk"})
        )
    return dataclasses.replace(received, update=evidence.gradient, scenario=scenario)


class LocalSteps:
    """One client's local training, imitated on guesses of its images, with what earlier rounds held back.

    `labels`, int64 (B,), are the inferred ones. NotApplicable as
    :func:`~adversaries.inversion.gradients.schedule.schedules_for`.
    """

    def __init__(self, evidence: Evidence, labels: Tensor) -> None:
        self._evidence, self._received = evidence, evidence.observation
        self._labels, self._carry = labels.cpu(), evidence.carried
        scenario = self._received.scenario
        self._training = scenario.training
        self._schedules = schedules_for(scenario, len(labels))
        self._clipping = defences.clipping(scenario)
        self._update = evidence.rescaled

    @property
    def several(self) -> bool:
        """Whether the update is more than one gradient at the weights that were sent out."""
        return self._training.local_steps > 1

    @property
    def clipped(self) -> bool:
        """Whether the update may have been clipped."""
        return self._clipping is not None

    @property
    def carries(self) -> bool:
        """Whether the update holds residuals of earlier rounds."""
        return self._carry is not None

    @cached_property
    def _model(self) -> torch.nn.Module:
        return build_model(self._received.scenario.model).double()

    def reading(self, images: Tensor) -> Reading:
        """How the update reads as one gradient, if these are the images, (B, C, H, W)."""
        if not (self.several or self.clipped):
            return self._constant
        gradient = self._simulate(images, Schedule((tuple(range(len(images))),)), _one_step(self._training))
        sent = self._update.indices
        shown = gradient if sent is None else gradient[sent]
        mean = self._likeliest(images)[1]
        scale = float(shown @ (mean if sent is None else mean[sent]) / shown.square().sum())
        if scale <= 0:  # steps so long that they turn the gradient round: no share of it is left to read
            scale = 1.0
        return dataclasses.replace(self._constant, scale=scale, offset=self._carried(mean - scale * gradient))

    def simulate(self, images: Tensor) -> Tensor:
        """The mean gradient, float64 (numel,), that the client would have had from these images."""
        return self._likeliest(images)[1]

    def order(self, images: Tensor) -> list[list[int]]:
        """The likeliest assignment of the images to the steps' batches."""
        return [list(batch) for batch in self._likeliest(images)[0].orders]

    @cached_property
    def _constant(self) -> Reading:
        return constant_reading(self._evidence)

    def _carried(self, offset: Tensor) -> Tensor:
        return offset if self._carry is None else offset + self._carry

    def _likeliest(self, images: Tensor) -> tuple[Schedule, Tensor]:
        """The order of the batches under which the images explain the update best, and its mean gradient."""
        found = [
            (order, self._simulate(images, order, self._training, self._clipping))
            for order in self._schedules
        ]
        return min(found, key=lambda one: self._misfit(one[1])) if len(found) > 1 else found[0]

    def _misfit(self, mean: Tensor) -> float:
        expected = self._carried(mean)
        sent = expected if self._update.indices is None else expected[self._update.indices]
        return float((sent - self._update.values).square().sum())

    def _simulate(
        self,
        images: Tensor,
        schedule: Schedule,
        training: TrainingConfig,
        defenses: ClientDefenses | None = None,
    ) -> Tensor:
        weights, pixels = self._received.weights, images.detach().double().cpu()
        step = batch_gradient if defenses is None else defenses.gradient
        batches = [np.array(batch) for batch in schedule.orders]
        update = local_update(self._model, weights, pixels, self._labels, batches, training, step).update
        update = update if defenses is None else defenses.update(update)
        flat = torch.cat([update[name].flatten() for name in self._update.names])
        return flat if training.protocol == "fedsgd" else flat / gradient_unit(self._received)


def _one_step(training: TrainingConfig) -> TrainingConfig:
    return TrainingConfig(batch_size=training.batch_size, learning_rate=training.learning_rate)


class Remembered:
    """One client's memory as the server can follow it, in units of the mean gradient.

    What the client had in mind is computed from the reconstruction of each round; what it sent is known.
    """

    def __init__(self) -> None:
        self._residual: Tensor | None = None
        self._momentum: Tensor | None = None
        self.rounds: list[int] = []

    def evidence(self, received: Observation, like: Evidence | None = None) -> Evidence:
        """The client's next update, read with what it holds beside its own mean gradient."""
        carry = self._residual
        if carry is not None and self._momentum is not None:
            carry = carry + received.scenario.compression.momentum * self._momentum
        return Evidence(received, carry, followed=True, like=like)

    def follow(self, received: Observation, images: Tensor, labels: Tensor) -> None:
        """Take in one more round, answered by `images` (B, C, H, W) and `labels` int64 (B,)."""
        compression = received.scenario.compression
        if not accumulates(received.scenario):
            return
        evidence = self.evidence(received)
        own = LocalSteps(evidence, labels).simulate(images)
        intended = own if evidence.carried is None else own + evidence.carried
        update = evidence.rescaled
        if compression.name == "dgc":
            before = torch.zeros_like(own) if self._momentum is None else self._momentum
            self._momentum = _without(compression.momentum * before + own, update)
        self._residual = _without(intended, update, compression)
        self.rounds.append(received.round)


def _without(intended: Tensor, update: Update, compression: CompressionConfig | None = None) -> Tensor:
    """`intended` less what was sent: nothing stays of an entry sent as it was, at most a step of a rounded one."""
    left = intended.clone()
    sent = slice(None) if update.indices is None else update.indices
    if compression is None or compression.name not in ROUNDING:
        left[sent] = 0
        return left
    steps = torch.cat([_step(values, compression.levels) for _, _, _, values in update.layers()])
    left[sent] = (intended[sent] - update.values).clamp(-steps, steps)
    return left


def _step(values: Tensor, levels: int) -> Tensor:
    """The quantiser's step at each of one tensor's sent values, whose largest is its scale."""
    largest = values.abs().max() if values.numel() else torch.zeros(())
    return (largest.double() / levels).expand(len(values))


def plain_scenario(scenario: Scenario) -> Scenario:
    """The scenario in which the same client sends entries of one gradient itself, and keeps nothing."""
    training, compression = scenario.training, scenario.compression
    if training.protocol == "fedavg":
        training = _one_step(training)
    name = "topk" if compression.name == "dgc" else compression.name
    compression = compression.model_copy(update={"name": name, "error_feedback": False})
    return dataclasses.replace(scenario, training=training, compression=compression)
