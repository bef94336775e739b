"""Gradients of any feed-forward network of common layers, with the second derivative written out.

The network is traced once (``torch.fx``) into :mod:`~adversaries.reconstruction.gradients.layers`; an evaluation is
four passes over that list. To autograd the whole of it is one operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
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
    if node.op == "call_function" and node.target in (operator.add, torch.add):
        if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            raise NotApplicable("a sum with anything but two branches has no explicit second derivative")
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


class Network:
    """A traced network and where each wanted tensor's gradient lies in the flat one.

    Parameters
    ----------
    steps : sequence of Step
    shapes : dict of str to tuple of int
        The wanted tensors, in order.
    """

    def __init__(self, steps: Sequence[Step], shapes: dict[str, tuple[int, ...]]) -> None:
        self.steps = tuple(steps)
        order = {name: number for number, name in enumerate(shapes)}
        self._shapes = list(shapes.values())
        self.sizes = [torch.Size(shape).numel() for shape in self._shapes]
        self.size = sum(self.sizes)
        self._places: list[list[int]] = []
        for step in steps:
            ours = [order[name] for name in step.layer.names if name in order]
            self._places.append(ours)
            if ours and len(ours) < len(step.layer.names) and not isinstance(step.layer, Linear):
                raise NotApplicable(
                    "only a linear layer's weight can be matched without the rest of its layer"
                )
        # A value's gradient matters where a wanted tensor lies before it.
        self.reached = [False]
        for step, ours in zip(steps, self._places, strict=True):
            self.reached.append(bool(ours) or any(self.reached[i] for i in step.inputs))

    def parts(self, flat: Tensor) -> list[list[Tensor]]:
        """Views (V, *shape) of a flat (V, size), for the tensors of each step."""
        pieces = flat.split(self.sizes, 1)
        views = [piece.view(len(flat), *shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        return [[views[number] for number in ours] for ours in self._places]


class Passes:
    """The first two passes at some images, and the other two on request.

    Parameters
    ----------
    network : Network
    images : Tensor
        (V, B, C, H, W).
    targets : Tensor
        (V, B, classes).

    Attributes
    ----------
    gradients : Tensor
        (V, network.size): of the mean cross-entropy, the wanted tensors side by side.
    """

    def __init__(self, network: Network, images: Tensor, targets: Tensor) -> None:
        self._network, self._shape = network, images.shape
        steps, reached = network.steps, network.reached
        victims, batch = images.shape[:2]
        self._saved: list[Saved] = [{} for _ in steps]
        values = [images.flatten(0, 1)]
        for step, saved in zip(steps, self._saved, strict=True):
            values.append(step.layer.forward(saved, victims, *[values[i] for i in step.inputs]))
        self._shares = values[-1].softmax(1)
        self._deltas: list[Tensor | None] = [None] * len(values)
        self._deltas[-1] = (self._shares - targets.flatten(0, 1)) / batch
        self.gradients = images.new_empty(victims, network.size)
        parts = network.parts(self.gradients)
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
                        held = self._deltas[i]
                        self._deltas[i] = below if held is None else held + below

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance (V, channels) of every BatchNorm layer's input."""
        pairs = zip(self._network.steps, self._saved, strict=True)
        return [step.layer.moments(saved) for step, saved in pairs if isinstance(step.layer, BatchNorm)]

    def pull(
        self, directions: Tensor | None, moments: Sequence[tuple[Tensor | None, Tensor | None]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Gradient of <gradients, directions> + <moments, their weights> at the images and at the targets."""
        steps = self._network.steps
        victims, batch = self._shape[:2]
        tangents: list[Tensor | None] = [None] * (len(steps) + 1)
        along: Sequence[Sequence[Tensor | None]] = [[None] * len(step.layer.names) for step in steps]
        if directions is not None:
            given = self._network.parts(directions)
            along = [[*ours, *none[len(ours) :]] for ours, none in zip(given, along, strict=True)]
            for position, step in enumerate(steps):
                below = [tangents[i] for i in step.inputs]
                tangents[position + 1] = step.layer.push(self._saved[position], below, along[position])
        top = tangents[-1]
        shifts: list[Tensor | None] = [None] * len(tangents)
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
                for part in (below_shift, extra):
                    if part is not None:
                        before = shifts[i]
                        shifts[i] = part if before is None else before + part
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
        steps = trace(build_model(model), own, batch_norm)
        self._layout = lay_out(updates, layers, device)
        self.sent = self._layout.sent
        shapes = {segment.name: segment.shape for segment in self.sent.segments}
        assert model.channels is not None
        assert model.image_size is not None
        image_shape = (model.channels, model.image_size, model.image_size)
        self._folded = Network(fold(steps, image_shape, device), shapes)
        # Folded layers have no BatchNorm inputs to take statistics of.
        self._whole = Network(steps, shapes)
        self.joint = len(updates) * self._whole.size <= _JOINT_UP_TO
        self._targets: Tensor | None = None
        if labels is not None:
            assert model.classes is not None
            self._targets = F.one_hot(labels.to(device), model.classes).float()

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
        """See :meth:`~adversaries.reconstruction.gradients.DirectGradients.slope`."""
        passes = Passes(self._folded, images, targets_of(None, self._targets, victims))
        losses, weights = distance(self._entries(passes.gradients, victims), victims)
        if not self._layout.dense:
            # Padding repeats a position that was not sent; whatever the distance says about it counts for nothing.
            weights = weights * self.sent.valid[victims]
            weights = self._layout.spread(weights, self._folded.sizes, victims)
        return losses, passes.pull(weights)[0]

    def _entries(self, gradients: Tensor, victims: slice) -> Tensor:
        """What was sent of the flat gradients (V', size)."""
        if self._layout.dense:
            return gradients
        return self._layout.select(gradients.split(self._folded.sizes, 1), victims)
