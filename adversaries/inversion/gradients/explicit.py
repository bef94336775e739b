"""Gradients of any feed-forward network of common layers, with the second derivative written out.

The network is traced once (``torch.fx``) into :mod:`~adversaries.inversion.gradients.layers`; an evaluation is
four passes over that list. To autograd the whole of it is one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.gradients.batch_norm import BatchNorm
from adversaries.inversion.gradients.closed_form import Weights
from adversaries.inversion.gradients.layers import Directions, Maybe, Saved, add
from adversaries.inversion.gradients.network import Network, fold, trace
from adversaries.inversion.gradients.sent import BatchNormMode, Layout, Prediction, targets_of
from fedattack.config import ModelConfig
from fedattack.models import build_model
from fedattack.models.normalise import normaliser

_JOINT_UP_TO = 32_000_000
"""Numbers, over all victims, of the gradients that are worth holding at once."""


class Passes:
    """The first two passes at images (V, B, C, H, W) and targets (V, B, classes), and the other two on request.

    `gradients` (V, network.size) are those of the mean cross-entropy, the wanted tensors side by side, in
    `room` if given.
    """

    def __init__(self, network: Network, images: Tensor, targets: Tensor, room: Tensor | None = None) -> None:
        self._network, self._shape = network, images.shape
        steps, reached = network.steps, network.reached
        victims, batch = images.shape[:2]
        self._saved: list[Saved] = [{} for _ in steps]
        values = [images.flatten(0, 1)]
        for step, saved in zip(steps, self._saved, strict=True):
            values.append(step.layer.forward(saved, victims, *[values[i] for i in step.inputs]))
        self._shares = values[-1].softmax(1)
        self._deltas: list[Maybe] = [None] * len(values)
        self._deltas[-1] = (self._shares - targets.flatten(0, 1)) / batch
        # A compiler cannot write into pieces of one tensor, but joins separate ones at no cost.
        compiling = torch.compiler.is_compiling()
        pieces = network.pieces(images, victims) if compiling else []
        if room is None:
            room = images.new_empty(0 if compiling else victims, network.size)
        self.gradients = room
        parts = network.grouped(pieces) if compiling else network.parts(room)
        for position in range(len(steps) - 1, -1, -1):
            delta = self._deltas[position + 1]
            if delta is None:
                continue
            step, saved = steps[position], self._saved[position]
            if parts[position]:
                step.layer.gradients(saved, delta, parts[position])
            if any(reached[i] for i in step.inputs):
                for i, below in zip(step.inputs, step.layer.backward(saved, delta), strict=True):
                    if reached[i]:
                        self._deltas[i] = add(self._deltas[i], below)
        if compiling:
            self.gradients = torch.cat([piece.flatten(1) for piece in pieces], 1)

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance (V, channels) of every BatchNorm layer's input."""
        pairs = zip(self._network.steps, self._saved, strict=True)
        return [step.layer.moments(saved) for step, saved in pairs if isinstance(step.layer, BatchNorm)]

    def pull(self, directions: Maybe, moments: Sequence[tuple[Maybe, Maybe]] = ()) -> tuple[Tensor, Tensor]:
        """Gradient of <gradients, directions> + <moments, their weights> at the images and at the targets."""
        steps = self._network.steps
        victims, batch = self._shape[:2]
        tangents: list[Maybe] = [None] * (len(steps) + 1)
        along: Sequence[Directions] = [[None] * len(step.layer.names) for step in steps]
        if directions is not None:
            given = self._network.parts(directions)
            along = [[*ours, *none[len(ours) :]] for ours, none in zip(given, along, strict=True)]
            for position, step in enumerate(steps):
                below = [tangents[i] for i in step.inputs]
                tangents[position + 1] = step.layer.push(self._saved[position], below, along[position])
        top = tangents[-1]
        shifts: list[Maybe] = [None] * len(tangents)
        if top is not None:
            weighted = self._shares * top
            shifts[-1] = (weighted - self._shares * weighted.sum(1, keepdim=True)) / batch
        held = list(moments)
        for position in range(len(steps) - 1, -1, -1):
            step, saved = steps[position], self._saved[position]
            shift, delta = shifts[position + 1], self._deltas[position + 1]
            found = step.layer.pull(saved, shift, None if directions is None else delta, along[position])
            extra = None
            if held and isinstance(step.layer, BatchNorm):
                extra = step.layer.moments_adjoint(saved, *held.pop())
            for i, below_shift in zip(step.inputs, found, strict=True):
                shifts[i] = add(shifts[i], below_shift, extra)
        at_images = shifts[0]
        images = self._shares.new_zeros(self._shape) if at_images is None else at_images.reshape(self._shape)
        targets = torch.zeros_like(self._shares) if top is None else -top / batch
        return images, targets.unflatten(0, (victims, batch))


class _Gradients(torch.autograd.Function):
    """(images, targets) -> flat gradients (V, size) of the wanted tensors, then moments of the BatchNorm inputs."""

    @staticmethod
    def forward(ctx: Any, network: Network, statistics: bool, images: Tensor, targets: Tensor) -> Any:
        ctx.passes = passes = Passes(network, images, targets)
        ctx.set_materialize_grads(False)
        moments = [one for pair in passes.moments() for one in pair] if statistics else []
        return (passes.gradients, *moments)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> Any:
        moments = list(zip(weights[1::2], weights[2::2], strict=True))
        images, targets = ctx.passes.pull(weights[0], moments)
        return None, None, images, targets if ctx.needs_input_grad[3] else None


class ExplicitGradients:
    """A network of common layers: all victims in one pass, where they are not too heavy; see :func:`gradient_model`.

    NotApplicable if the network holds a layer that :func:`trace` does not know.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        layout: Layout,
        labels: Tensor | None,
        batch_norm: BatchNormMode,
    ) -> None:
        device = layout.sent.values.device
        own = {
            name: tensor.detach().float().to(device)
            for name, tensor in weights.items()
            if tensor.is_floating_point()
        }
        steps = trace(build_model(model), own, batch_norm, normaliser(model))
        self._layout, self.sent = layout, layout.sent
        shapes = {segment.name: segment.shape for segment in self.sent.segments}
        channels, side, classes = model.resolved
        self._folded = Network(fold(steps, (channels, side, side), device), shapes)
        # Folded layers have no BatchNorm inputs to take statistics of.
        self._whole = Network(steps, shapes)
        self.joint = len(self.sent.values) * self._whole.size <= _JOINT_UP_TO
        self._room: Tensor | None = None
        self._targets: Tensor | None = None
        if labels is not None:
            self._targets = F.one_hot(labels.to(device), classes).float()

    def predict(
        self,
        images: Tensor,
        victims: slice,
        *,
        whole: bool = False,
        shares: Tensor | None = None,
        statistics: bool = False,
    ) -> Prediction:
        targets = targets_of(shares, self._targets, victims)
        network = self._whole if statistics else self._folded
        gradients, *moments = _Gradients.apply(network, statistics, images, targets)
        square = gradients.square().sum(1) if whole else None
        pairs = tuple(zip(moments[::2], moments[1::2], strict=True))
        return Prediction(self._entries(gradients, victims), square, pairs)

    @torch.no_grad()
    def slope(
        self, images: Tensor, victims: slice, distance: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        targets = targets_of(None, self._targets, victims)
        passes = Passes(self._folded, images, targets, self._gradient_room(images))
        losses, weights = distance(self._entries(passes.gradients, victims), victims)
        if not self._layout.dense:
            # Padding repeats a position that was not sent; whatever the distance says about it counts for nothing.
            weights = weights * self.sent.valid[victims]
            weights = self._layout.spread(weights, self._folded.sizes, victims)
        return losses, passes.pull(weights)[0]

    def _gradient_room(self, images: Tensor) -> Tensor | None:
        """Kept between calls: fresh memory of this size costs more in page faults than in arithmetic."""
        if torch.compiler.is_compiling():
            return None
        if self._room is None or len(self._room) != len(images):
            self._room = images.new_empty(len(images), self._folded.size)
        return self._room

    def _entries(self, gradients: Tensor, victims: slice) -> Tensor:
        """What was sent of the flat gradients (V', size)."""
        if self._layout.dense:
            return gradients
        return self._layout.select(gradients.split(self._folded.sizes, 1), victims)
