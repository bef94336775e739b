"""What an update carries beside one gradient: local steps, clipping, and residuals of earlier rounds.

They follow from a guess of the images, for the server knows everything else: the weights it sent, the agreed
training and clipping, and which entries were sent. :class:`LocalSteps` answers, for a guess, how the update reads as
entries of one gradient (*defect correction*: the simulated update minus the gradient's share is subtracted, and the
guess is improved on what is left). :class:`Remembered` follows one client's memory from round to round (*peeling*:
each round's reconstruction says what that round held back, which the next update carries).

References
----------
Stetter, "The defect correction principle and discretization methods", Numer. Math. 1978; Stich et al.,
"Sparsified SGD with memory", NeurIPS 2018, and Lin et al., "Deep gradient compression", ICLR 2018 (the memories).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries.inversion.evidence import defences
from adversaries.reconstruction.hcgla.measurements import BOUNDING, ROUNDING, Reading, corrected
from fedattack.config import CompressionConfig, TrainingConfig
from fedattack.defenses import ClientDefenses
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation, Scenario, Update
from fedattack.training import batch_gradient, local_update

MAX_ORDERS = 24
"""Orders of the local batches that are tried for one guess; each costs a simulation of the client."""

Batches = list[NDArray[np.int64]]


def check_orders(training: TrainingConfig, clients: tuple[int, ...]) -> None:
    """Refuse local batches whose orders nobody can try, of every one of the clients with so many samples.

    Raises
    ------
    NotApplicable
        As :func:`orders`.
    """
    for number, size in enumerate(clients, 1):
        try:
            orders(training, min(size, training.batch_size * training.local_steps or size))
        except NotApplicable:
            if number == len(clients):
                raise
        else:
            return


def remembers(compression: CompressionConfig) -> bool:
    """Whether clients keep what they did not send for later rounds."""
    return compression.name == "dgc" or (compression.error_feedback and compression.name != "none")


def orders(training: TrainingConfig, samples: int) -> list[Batches]:
    """Which of a client's `samples` may have been in each local step's batch.

    The server knows the batch size and the number of distinct samples, not the draw: every assignment of samples to
    steps is a candidate, and one only where all samples are in every step.

    Raises
    ------
    NotApplicable
        If samples are seen again in another batch (several epochs of several batches), or the orders are too many.
    """
    size, steps = training.batch_size, training.local_steps
    if steps == 1 or size == 0 or samples <= size:
        return [[np.arange(samples)] * steps]
    if samples != steps * size:
        raise NotApplicable(
            f"training.local_steps = {steps} with training.batch_size = {size}: {samples} samples are drawn anew in "
            "another epoch, and in which batches they meet is not known; use batch_size 0 or fewer local_steps"
        )
    count = math.factorial(samples) // math.factorial(size) ** steps
    if count > MAX_ORDERS:
        raise NotApplicable(
            f"training.local_steps = {steps} with training.batch_size = {size}: {count:,} orders of the samples are "
            f"possible, and at most {MAX_ORDERS} are tried; use fewer local_steps or batch_size 0"
        )
    return [[np.array(batch) for batch in order] for order in _assignments(tuple(range(samples)), size)]


def _assignments(samples: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Ordered partitions of `samples` into batches of `size`."""
    if not samples:
        yield []
        return
    for batch in itertools.combinations(samples, size):
        rest = tuple(sample for sample in samples if sample not in batch)
        for later in _assignments(rest, size):
            yield [batch, *later]


def mean_gradient(observation: Observation) -> Update:
    """A received update as the mean gradient of its local steps, entry by entry; a gradient is one already."""
    update, training = observation.update, observation.scenario.training
    if update.kind == "gradient":
        return update
    values = -update.values / (training.learning_rate * training.local_steps)
    return dataclasses.replace(update, values=values, kind="gradient")


def constant_reading(received: Observation, carry: Tensor | None = None) -> Reading:
    """How an update reads as (mean) gradient, as far as no image is needed to tell.

    Parameters
    ----------
    received : Observation
        As it came.
    carry : Tensor or None
        float64 (numel,), in units of :func:`mean_gradient`: what earlier rounds held back.
    """
    training, names = received.scenario.training, received.update.names
    noise = defences.noise(received)
    if remembers(received.scenario.compression):  # what is held back keeps its noise
        noise *= math.sqrt(received.round)
    if received.update.kind == "gradient":
        return Reading(offset=carry, noise=noise)
    weights = torch.cat([received.weights[name].double().cpu().flatten() for name in names])
    # Each step rounds the new weights to 24 bits, and the learning rate magnifies that.
    error = 2.0**-24 / math.sqrt(3) * float(weights.abs().max())
    rounding = error / (training.learning_rate * math.sqrt(training.local_steps))
    if training.weight_decay and training.local_steps == 1:
        decay = training.weight_decay * weights
        return Reading(offset=decay if carry is None else carry + decay, rounding=rounding, noise=noise)
    return Reading(offset=carry, rounding=rounding, noise=noise)


def as_gradient(received: Observation, carry: Tensor | None = None) -> Observation:
    """A received update as entries of one (mean) gradient, as far as no image is needed to tell.

    Once something was subtracted, the smallest entry sent bounds the others no more: what is left looks like entries
    that were drawn at random, and the scenario says so.
    """
    reading = constant_reading(received, carry)
    scenario = plain_scenario(received.scenario)
    if reading.offset is not None and scenario.compression.name in BOUNDING:
        scenario = dataclasses.replace(
            scenario, compression=scenario.compression.model_copy(update={"name": "randomk"})
        )
    update = corrected(mean_gradient(received).to("cpu"), reading)
    return dataclasses.replace(received, update=update, scenario=scenario)


class LocalSteps:
    """One client's local training, imitated on guesses of its images.

    Parameters
    ----------
    received : Observation
        As it came.
    labels : Tensor
        int64 (B,): the inferred labels.
    carry : Tensor or None
        float64 (numel,), in units of :func:`mean_gradient`: what earlier rounds held back.

    Raises
    ------
    NotApplicable
        See :func:`orders`.
    """

    def __init__(self, received: Observation, labels: Tensor, carry: Tensor | None = None) -> None:
        self._received, self._labels, self._carry = received, labels.cpu(), carry
        self._training = received.scenario.training
        self._orders = orders(self._training, len(labels))
        self._clipping = defences.clipping(received.scenario)
        self._update = mean_gradient(received)

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
        gradient = self._simulate(images, [np.arange(len(images))], _one_step(self._training))
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
        return [batch.tolist() for batch in self._likeliest(images)[0]]

    @cached_property
    def _constant(self) -> Reading:
        return constant_reading(self._received, self._carry)

    def _carried(self, offset: Tensor) -> Tensor:
        return offset if self._carry is None else offset + self._carry

    def _likeliest(self, images: Tensor) -> tuple[Batches, Tensor]:
        """The order of the batches under which the images explain the update best, and its mean gradient."""
        found = [
            (order, self._simulate(images, order, self._training, self._clipping)) for order in self._orders
        ]
        return min(found, key=lambda one: self._misfit(one[1])) if len(found) > 1 else found[0]

    def _misfit(self, mean: Tensor) -> float:
        expected = self._carried(mean)
        sent = expected if self._update.indices is None else expected[self._update.indices]
        return float((sent - self._update.values).square().sum())

    def _simulate(
        self,
        images: Tensor,
        batches: Batches,
        training: TrainingConfig,
        defenses: ClientDefenses | None = None,
    ) -> Tensor:
        weights, pixels = self._received.weights, images.detach().double().cpu()
        step = batch_gradient if defenses is None else defenses.gradient
        update = local_update(self._model, weights, pixels, self._labels, batches, training, step).update
        update = update if defenses is None else defenses.update(update)
        flat = torch.cat([update[name].flatten() for name in self._update.names])
        return (
            flat if training.protocol == "fedsgd" else -flat / (training.learning_rate * training.local_steps)
        )


def _one_step(training: TrainingConfig) -> TrainingConfig:
    return TrainingConfig(batch_size=training.batch_size, learning_rate=training.learning_rate)


class Remembered:
    """One client's memory as the server can follow it, in units of :func:`mean_gradient`.

    What the client had in mind is computed from the reconstruction of each round; what it sent is known.
    """

    def __init__(self) -> None:
        self._residual: Tensor | None = None
        self._momentum: Tensor | None = None
        self.rounds: list[int] = []

    def carry(self, compression: CompressionConfig) -> Tensor | None:
        """What the client's next update holds beside its own mean gradient, float64 (numel,); None: nothing."""
        if self._residual is None or self._momentum is None:
            return self._residual
        return self._residual + compression.momentum * self._momentum

    def follow(self, received: Observation, images: Tensor, labels: Tensor) -> None:
        """Take in one more round, answered by `images` (B, C, H, W) and `labels` int64 (B,)."""
        compression = received.scenario.compression
        if not remembers(compression):
            return
        carry = self.carry(compression)
        own = LocalSteps(received, labels, carry).simulate(images)
        intended = own if carry is None else own + carry
        update = mean_gradient(received)
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
    return dataclasses.replace(
        scenario,
        training=training,
        compression=compression.model_copy(
            update={
                "name": "topk" if compression.name == "dgc" else compression.name,
                "error_feedback": False,
            }
        ),
    )
