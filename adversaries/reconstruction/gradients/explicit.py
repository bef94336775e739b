"""Gradients of any feed-forward network of common layers, with the second derivative written out.

The network is traced once (``torch.fx``) into :mod:`~adversaries.reconstruction.gradients.layers`; an evaluation is
four passes over that list. To autograd the whole of it is one operation.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adversaries.reconstruction.closed_form import ACTIVATIONS, Weights
from adversaries.reconstruction.gradients.layers import (
    Addition,
    BatchNorm,
    Convolution,
    Elementwise,
    Layer,
    Linear,
    Rearrangement,
    Relu,
    Saved,
    Sigmoid,
)
from adversaries.reconstruction.gradients.sent import (
    BatchNormMode,
    Layers,
    Prediction,
    lay_out,
    targets_of,
)
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Update

_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
}

_JOINT_UP_TO = 32_000_000
"""Numbers, over all victims, of the gradients that are worth holding at once."""


@dataclass(frozen=True)
class Step:
    """A layer and which values (0 is the images, i the output of step i) go into it."""

    layer: Layer
    inputs: tuple[int, ...]


def trace(module: nn.Module, weights: dict[str, Tensor], batch_norm: BatchNormMode) -> list[Step]:
    """The network as a list of layers, each after its inputs.

    Raises
    ------
    NotApplicable
        If it holds anything but convolutions, linear layers, BatchNorm, the common activations, average pooling,
        flattening and sums of two branches.
    """
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:
        raise NotApplicable(f"the model cannot be traced: {error}") from None
    parts = dict(module.named_modules())
    place: dict[fx.Node, int] = {}
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            place[node] = 0
        elif node.op == "output":
            if place[node.args[0]] != len(steps):
                raise NotApplicable("the model's output is not what its last layer gives")
        else:
            layer = _layer(node, parts, weights, batch_norm)
            inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if layer is None:
                place[node] = place[inputs[0]]
                continue
            steps.append(Step(layer, tuple(place[arg] for arg in inputs)))
            place[node] = len(steps)
    return steps


def fold(steps: Sequence[Step], image_shape: Sequence[int], device: torch.device) -> list[Step]:
    """Take BatchNorm with running statistics into the convolution before it, where that saves work.

    Folding replaces some nine passes over the activations by five over the weights.

    Parameters
    ----------
    steps : sequence of Step
    image_shape : sequence of int
        (C, H, W).
    device : torch.device
        Of the weights.
    """
    users = [0] * (len(steps) + 1)
    for step in steps:
        for i in step.inputs:
            users[i] += 1
    positions = _positions(steps, image_shape, device)
    kept: list[Step] = []
    place = [0]
    for number, step in enumerate(steps, start=1):
        below = step.inputs[0]
        before = kept[place[below] - 1] if below else None
        taken = None
        if isinstance(step.layer, BatchNorm) and users[below] == 1 and before is not None:
            inner = before.layer
            if isinstance(inner, Convolution) and 9 * positions[number] > 5 * inner.inputs:
                taken = step.layer.fold()
                if taken is not None:
                    kept[place[below] - 1] = Step(inner.folded(taken), before.inputs)
                    place.append(place[below])
        if taken is None:
            kept.append(Step(step.layer, tuple(place[i] for i in step.inputs)))
            place.append(len(kept))
    return kept


def _positions(steps: Sequence[Step], image_shape: Sequence[int], device: torch.device) -> list[int]:
    """Pixels of each value for one image."""
    with torch.no_grad():
        values = [torch.zeros(1, *image_shape, device=device)]
        for step in steps:
            values.append(step.layer.forward({}, 1, *(values[i] for i in step.inputs)))
    return [value[0, 0].numel() for value in values]


def _layer(
    node: fx.Node, parts: dict[str, nn.Module], weights: dict[str, Tensor], batch_norm: BatchNormMode
) -> Layer | None:
    """The layer of a node; None where it changes nothing."""
    if node.op == "call_module":
        name = str(node.target)
        part = parts[name]
        kind = type(part)
        if kind is nn.Identity:
            return None
        if isinstance(part, nn.Conv2d) and kind is nn.Conv2d and _plain(part):
            return Convolution(name, part, weights)
        if kind is nn.Linear:
            return Linear(name, weights)
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            return BatchNorm(name, part, weights, batch_norm == "train")
        if kind in _ACTIVATION_MODULES:
            return _activation(part)
        if isinstance(part, nn.Flatten) and (part.start_dim, part.end_dim) == (1, -1):
            return _flatten()
        if isinstance(part, nn.AdaptiveAvgPool2d) and part.output_size in (1, (1, 1)):
            return Rearrangement(lambda x: x.mean((2, 3), keepdim=True), _spread)
        if isinstance(part, nn.AvgPool2d) and kind is nn.AvgPool2d:
            return _average_pool(part)
        raise NotApplicable(f"layer {name!r} is a {kind.__name__}, which has no explicit second derivative")
    if node.op == "call_function" and node.target in (operator.add, torch.add) and not node.kwargs:
        if all(isinstance(arg, fx.Node) for arg in node.args):
            return Addition()
    flat = (node.op == "call_function" and node.target is torch.flatten) or (
        node.op == "call_method" and node.target == "flatten"
    )
    if flat and node.args[1:] == (1,) and not node.kwargs:
        return _flatten()
    raise NotApplicable(f"operation {node.target} has no explicit second derivative")


def _plain(part: nn.Conv2d) -> bool:
    return part.padding_mode == "zeros" and not isinstance(part.padding, str)


def _activation(part: nn.Module) -> Layer:
    if getattr(part, "approximate", "none") != "none" or (
        isinstance(part, nn.Softplus) and (part.beta, part.threshold) != (1, 20)
    ):
        raise NotApplicable(f"{part} has no explicit second derivative")
    if isinstance(part, nn.ReLU):
        return Relu()
    return (
        Sigmoid()
        if isinstance(part, nn.Sigmoid)
        else Elementwise(ACTIVATIONS[_ACTIVATION_MODULES[type(part)]])
    )


def _flatten() -> Layer:
    return Rearrangement(lambda x: x.flatten(1), lambda delta, like: delta.reshape(like.shape))


def _spread(delta: Tensor, like: Tensor) -> Tensor:
    return (delta / (like.shape[2] * like.shape[3])).expand_as(like)


def _average_pool(part: nn.AvgPool2d) -> Layer:
    def sides(value: Any) -> list[int]:
        return [value, value] if isinstance(value, int) else list(value)

    how: tuple[Any, ...] = (
        sides(part.kernel_size),
        sides(part.stride),
        sides(part.padding),
        part.ceil_mode,
        part.count_include_pad,
        part.divisor_override,
    )
    return Rearrangement(
        lambda x: torch.ops.aten.avg_pool2d(x, *how),
        lambda delta, like: torch.ops.aten.avg_pool2d_backward(delta, like, *how),
    )


class Passes:
    """The first two passes at some images, and the other two on request.

    Parameters
    ----------
    steps : sequence of Step
    wanted : sequence of str
        Tensors whose gradients are asked for.
    images : Tensor
        (V, B, C, H, W).
    targets : Tensor
        Soft (V, B, classes) or hard (V, B).
    """

    def __init__(self, steps: Sequence[Step], wanted: Sequence[str], images: Tensor, targets: Tensor) -> None:
        self._steps, self._wanted = steps, wanted
        self._shape = images.shape
        self._saved: list[Saved] = [{} for _ in steps]
        victims, batch = images.shape[:2]
        values = [images.flatten(0, 1)]
        for step, saved in zip(steps, self._saved, strict=True):
            values.append(step.layer.forward(saved, victims, *(values[i] for i in step.inputs)))
        self._shares = values[-1].softmax(1)
        flat = targets.flatten(0, 1)
        if not flat.is_floating_point():
            flat = F.one_hot(flat, self._shares.shape[1]).to(self._shares.dtype)
        # A value's gradient matters where a wanted tensor lies before it.
        reached = [False]
        for step in steps:
            ours = any(name in wanted for name in step.layer.names)
            reached.append(ours or any(reached[i] for i in step.inputs))
        self._deltas: list[Tensor | None] = [None] * len(values)
        self._deltas[-1] = (self._shares - flat) / batch
        self.gradients: dict[str, Tensor] = {}
        for position in range(len(steps) - 1, -1, -1):
            step, saved, delta = steps[position], self._saved[position], self._deltas[position + 1]
            if delta is None:
                continue
            if any(name in wanted for name in step.layer.names):
                found = step.layer.gradients(saved, delta)
                self.gradients |= dict(zip(step.layer.names, found, strict=True))
            if any(reached[i] for i in step.inputs):
                for i, below in zip(step.inputs, step.layer.backward(saved, delta), strict=True):
                    if reached[i]:
                        held = self._deltas[i]
                        self._deltas[i] = below if held is None else held + below

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance (V, channels) of every BatchNorm layer's input."""
        pairs = zip(self._steps, self._saved, strict=True)
        return [step.layer.moments(saved) for step, saved in pairs if isinstance(step.layer, BatchNorm)]

    def pull(
        self, directions: dict[str, Tensor], moments: Sequence[tuple[Tensor | None, Tensor | None]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Gradient of <gradients, directions> + <moments, their weights> at the images and at the targets."""
        steps = self._steps
        tangents: list[Tensor | None] = [None]
        ours = [[directions.get(name) for name in step.layer.names] for step in steps]
        for step, saved, along in zip(steps, self._saved, ours, strict=True):
            tangents.append(step.layer.push(saved, [tangents[i] for i in step.inputs], along))
        victims, batch = self._shape[:2]
        top = tangents[-1]
        shifts: list[Tensor | None] = [None] * len(tangents)
        if top is not None:
            weighted = self._shares * top
            shifts[-1] = (weighted - self._shares * weighted.sum(1, keepdim=True)) / batch
        held = list(moments)
        for position in range(len(steps) - 1, -1, -1):
            step, saved = steps[position], self._saved[position]
            found = step.layer.pull(saved, shifts[position + 1], self._deltas[position + 1], ours[position])
            extra = None
            if held and isinstance(step.layer, BatchNorm):
                extra = step.layer.moments_adjoint(saved, *held.pop())
            for i, below in zip(step.inputs, found, strict=True):
                for part in (below, extra):
                    if part is not None:
                        before = shifts[i]
                        shifts[i] = part if before is None else before + part
        at_images = shifts[0]
        images = torch.zeros(self._shape) if at_images is None else at_images.reshape(self._shape)
        targets = torch.zeros_like(self._shares) if top is None else -top / batch
        return images, targets.unflatten(0, (victims, batch))


class _Gradients(torch.autograd.Function):
    """(images, targets) -> gradients (V, size) of the wanted tensors, then moments of the BatchNorm inputs."""

    @staticmethod
    def forward(
        ctx: Any, backend: ExplicitGradients, statistics: bool, images: Tensor, targets: Tensor
    ) -> Any:
        passes = Passes(backend.steps(statistics), backend.names, images, targets)
        ctx.passes, ctx.names = passes, backend.names
        ctx.set_materialize_grads(False)
        gradients = [passes.gradients[name].flatten(1) for name in backend.names]
        moments = [one for pair in passes.moments() for one in pair] if statistics else []
        return (*gradients, *moments)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> Any:
        passes: Passes = ctx.passes
        names = ctx.names
        directions = {
            name: weight.reshape(passes.gradients[name].shape)
            for name, weight in zip(names, weights, strict=False)
            if weight is not None
        }
        moments = list(zip(weights[len(names) :: 2], weights[len(names) + 1 :: 2], strict=True))
        images, targets = passes.pull(directions, moments)
        return None, None, images, targets if ctx.needs_input_grad[3] else None


class ExplicitGradients:
    """A network of common layers: all victims in one pass, where they are not too heavy.

    Parameters
    ----------
    model : ModelConfig
        Resolved.
    weights : mapping of str to Tensor
        State dict that was sent out.
    updates, labels, layers, device
        As for :class:`~adversaries.reconstruction.gradients.chain.ChainGradients`.
    batch_norm : {"train", "eval"}
        Whether BatchNorm uses the batch's statistics, as a client in training mode does, or the running ones.

    Raises
    ------
    NotApplicable
        If the network holds a layer that :func:`trace` does not know.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        updates: Sequence[Update],
        labels: Tensor | None,
        layers: Layers,
        device: torch.device,
        batch_norm: BatchNormMode = "train",
    ) -> None:
        own = {
            name: tensor.detach().float().to(device)
            for name, tensor in weights.items()
            if tensor.is_floating_point()
        }
        self._steps = trace(build_model(model), own, batch_norm)
        assert model.channels is not None
        assert model.image_size is not None
        shape = (model.channels, model.image_size, model.image_size)
        self._folded = fold(self._steps, shape, device)
        self._layout = lay_out(updates, layers, device)
        self.names, self.sent = self._layout.names, self._layout.sent
        self.joint = len(updates) * sum(own[name].numel() for name in self.names) <= _JOINT_UP_TO
        self._labels = None if labels is None else labels.to(device)

    def steps(self, statistics: bool) -> Sequence[Step]:
        """The network; folded layers have no BatchNorm inputs to take statistics of."""
        return self._steps if statistics else self._folded

    def predict(
        self,
        images: Tensor,
        victims: slice,
        *,
        whole: bool = False,
        shares: Tensor | None = None,
        statistics: bool = False,
    ) -> Prediction:
        """See :meth:`~adversaries.reconstruction.gradients.GradientModel.predict`."""
        targets = targets_of(shares, self._labels, victims)
        found = _Gradients.apply(self, statistics, images, targets)
        gradients, moments = found[: len(self.names)], found[len(self.names) :]
        square = None
        if whole:
            square = torch.stack([gradient.square().sum(1) for gradient in gradients]).sum(0)
        pairs = tuple(zip(moments[::2], moments[1::2], strict=True))
        return Prediction(self._layout.select(gradients, victims), square, pairs)
