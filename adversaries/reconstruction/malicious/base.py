"""Attacks that read images off the rows of a first linear layer: all they share but the weights that are sent."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adversaries.base import Progress
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.first_layer import first_layer
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.labels.label_strategies import infer
from adversaries.inversion.evidence.one_gradient import gradient_unit, mean_gradient
from adversaries.inversion.solvers.peeling import Rows, Sample, agreeing, peel
from adversaries.needs import Needs
from adversaries.reconstruction.base import CERTIFIED, OneByOne, failed
from adversaries.seats import MaliciousServer
from fedattack.config import Share
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.models.normalise import per_pixel
from fedattack.observation import Observation, Reconstruction

_ROUNDING = 2.0**-22
"""Of float32 sums, relative to the layer's largest bias entry."""

UNKNOWN_BATCH = 32
"""Samples expected of a client that trains on all it has, until it declares them."""

_LABELLED = 0.1
"""Relative misfit of the replay above which an image's label counts as a guess."""


class ReplayedClient:
    """One observation, float64: what the first layer (K, d) sent, and what it would send of an image.

    `weight` and `bias` answer to what the layer is given, :meth:`rows` are as of one that is given pixels.
    """

    def __init__(self, observation: Observation, device: torch.device) -> None:
        self.observation = observation
        self._layer = first_layer(observation.scenario.model)
        module = build_model(observation.scenario.model)
        module.load_state_dict(observation.weights)
        self.module = module.double().eval().requires_grad_(False).to(device)
        linear = self.module.get_submodule(self._layer.name)
        linear.register_forward_hook(lambda _, inputs, output: self._shifted(output))
        self.weight, self.bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        self._shift: Tensor | None = None
        self._device = device

    def _shifted(self, output: Tensor) -> Tensor:
        """Pre-activations with a zero added that is differentiated by."""
        self._shift = torch.zeros_like(output, requires_grad=True)
        return output + self._shift

    @property
    def vague(self) -> bool:
        """Whether what the rows hold cannot be replayed to the digit: values are rounded, or the weights moved."""
        scenario = self.observation.scenario
        return scenario.training.local_steps > 1 or scenario.compression.name in ("qsgd", "topk-qsgd")

    @property
    def times(self) -> tuple[float, ...]:
        """How much of the mean gradient's share one image may have: all, or some of the local steps' batches."""
        training, samples = self.observation.scenario.training, self.observation.num_examples
        steps, batch = training.local_steps, training.batch_size or samples
        if steps == 1 or batch >= samples:
            return (1.0,)
        visits = math.ceil(steps * batch / samples)
        return tuple(count * samples / (batch * steps) for count in range(1, visits + 1))

    def rows(self) -> Rows:
        """What the layer sent; entries that were not sent are zero, and as uncertain as the threshold."""
        observation = self.observation
        update = mean_gradient(observation)
        sent = update.dense()
        vectors = sent[self._layer.weight].to(self._device).double()
        scalars = sent[self._layer.bias].to(self._device).double()
        normalised = per_pixel(observation.scenario.model, vectors)
        if normalised is not None:
            vectors = vectors * normalised[1] + scalars[:, None] * normalised[0]
        noise = torch.full_like(scalars, _ROUNDING * float(scalars.abs().max()))
        compression = observation.scenario.compression
        if observation.update.kind == "delta":  # the client's new weights were rounded
            largest = torch.maximum(self.weight.abs().amax(1), self.bias.abs())
            noise = noise + 2.0**-24 * largest / -gradient_unit(observation)
        if update.kept < update.numel:
            noise = noise + update.threshold
        if compression.name in ("qsgd", "topk-qsgd"):
            scale = vectors.abs().max() if compression.norm == "max" else vectors.norm()
            noise = noise + scale / compression.levels
        return Rows(scalars, vectors, noise, float(scalars.abs().max()))

    def replay(self, inputs: Tensor) -> Tensor:
        """d loss / d pre-activation of every neuron, (N, C, K): for inputs (N, d), each with each label."""
        logits = self.module(inputs.reshape(-1, *self.observation.scenario.image_shape))
        assert self._shift is not None
        slopes = [
            torch.autograd.grad(logits[:, label].sum(), self._shift, retain_graph=True)[0]
            for label in range(logits.shape[1])
        ]
        jacobian = torch.stack(slopes, 1)
        shares = logits.detach().softmax(1)
        return (shares[:, None] @ jacobian - jacobian) / self.observation.num_examples


@dataclass(frozen=True)
class Reading:
    """A linear map from neurons to the rows that are read.

    `signs` (K,): each neuron's row is multiplied by it first; None: ones. `following`, int64 (K,): the neuron whose
    row is then taken off, -1 for none; None: for all none. `sweeps` as for the peeling of the rows.
    """

    signs: Tensor | None = None
    following: Tensor | None = None
    sweeps: int | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Values (..., K) of neurons -> of rows."""
        if self.signs is not None:
            values = values * self.signs
        if self.following is not None:
            values = values - values[..., self.following.clamp(min=0)] * (self.following >= 0)
        return values

    def rows(self, sent: Rows) -> Rows:
        """What the rows hold, from what the neurons' rows do."""
        noise = sent.noise
        if self.following is not None:
            noise = noise + noise[self.following.clamp(min=0)] * (self.following >= 0)
        scalars = self(sent.scalars)
        return Rows(scalars, self(sent.vectors.T).T.contiguous(), noise, float(scalars.abs().max()))


@dataclass
class RowReading(MaliciousServer, OneByOne):
    """A malicious server's attack that reads images off the first linear layer's gradient.

    Parameters
    ----------
    tolerance : float
        Relative misfit between what a row holds and what the image read from it would have put there, up to which
        the image is believed.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs(update="steps", entries="rows", sums="dense", fresh=True, first_layer=True)

    tolerance: Share = 1e-4

    @abstractmethod
    def _reading(self, client: ReplayedClient) -> Reading:
        """How the neurons' rows become rows that hold few images; NotApplicable for weights not this attack's."""

    def _figures(self, client: ReplayedClient) -> dict[str, Any]:
        """What else goes into the details."""
        return {"rows": len(client.bias)}

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Read the rows; nothing is drawn."""
        self.check(observation.scenario)
        try:
            client = ReplayedClient(observation, device)
            found, rows, left = self._read(client, progress)
        except NotApplicable as reason:
            return failed(self.name, observation, str(reason))
        unread = float(left.vectors.norm() / rows.vectors.norm().clamp_min(1e-300))
        return answer(self.name, observation, client.vague, found, unread, **self._figures(client))

    def _read(
        self, client: ReplayedClient, progress: Progress, before: int = 0
    ) -> tuple[list[Sample], Rows, Rows]:
        """Images in the rows of one client, beside those found `before`; the rows, and what is left of them."""
        reading = self._reading(client)
        rows, batch = reading.rows(client.rows()), client.observation.num_examples
        limit = batch - before

        def told(found: int) -> None:
            progress((before + found) / batch, f"{before + found} of {batch} images")

        def replay(inputs: Tensor) -> Tensor:
            return reading(client.replay(inputs))

        if client.vague:
            found, left = agreeing(rows, replay, limit, times=client.times, progress=told)
        else:
            found, left = peel(
                rows,
                replay,
                int(client.observation.scenario.model.classes or 1),
                limit,
                tolerance=self.tolerance,
                sweeps=reading.sweeps,
                progress=told,
            )
        return found, rows, left


def answer(
    name: str, observation: Observation, vague: bool, found: Sequence[Sample], unread: float, **figures: Any
) -> Reconstruction:
    """Found images first; the other places hold the prior, and the details, with `figures` in them, say so.

    `vague` as for :class:`ReplayedClient`; `unread`: share of the rows' norm that no image explains.
    """
    batch = observation.num_examples
    named = torch.tensor([sample.label for sample in found], dtype=torch.int64)
    images = prior_image(observation).expand(batch, -1, -1, -1).clone()
    notes = []
    if found:
        read = torch.stack([sample.input for sample in found]).clamp(0, 1).float().cpu()
        images[: len(found)] = read.reshape(-1, *observation.scenario.image_shape)
    if len(found) < batch:
        named = torch.cat([named, _other_labels(observation, named)])
        notes.append(f"{batch - len(found)} of {batch} images were not read: their places hold the prior")
    if vague:
        notes.append(
            "rounded values or several local steps: images are approximate, and believed where rows agree on them"
        )
    status = "partial" if found else "failed"
    if len(found) == batch:
        status = "certified" if unread <= CERTIFIED and not vague else "approximate"
    return Reconstruction(
        images=images,
        labels=named,
        loss=unread,
        label_confidence=sum(sample.misfit <= _LABELLED for sample in found) / batch,
        method=name,
        floors=floors(observation, named),
        details={
            "status": status,
            "k": observation.update.kept,
            "iterations": max((sample.sweep + 1 for sample in found), default=0),
            "batch": batch,
            "recovered": len(found),
            "share": len(found) / batch,
            "alone": sum(sample.sweep == 0 for sample in found),
            "misfit": [sample.misfit for sample in found],
            "pixel_error": [sample.error for sample in found],
            "rows_alone": [sample.support for sample in found],
            "unread": unread,
            "notes": notes,
            **figures,
        },
    )


def _other_labels(observation: Observation, found: Tensor) -> Tensor:
    """Labels of the batch that no image was found for, from the head's gradient."""
    everyone = infer("auto", Evidence(observation)).values.tolist()
    for label in found.tolist():
        if label in everyone:
            everyone.remove(label)
    return torch.tensor(everyone[: observation.num_examples - len(found)], dtype=torch.int64)
