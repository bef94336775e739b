"""Feed-forward networks as lists of layers: tracing, folding BatchNorm, where weights lie in a flat gradient."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adversaries.inversion.gradients.batch_norm import BatchNorm
from adversaries.inversion.gradients.closed_form import ACTIVATIONS
from adversaries.inversion.gradients.convolution import Convolution
from adversaries.inversion.gradients.layers import (
    Addition,
    Elementwise,
    Layer,
    Linear,
    MaxPool,
    Rearrangement,
    Relu,
    Scaling,
    Sigmoid,
)
from adversaries.inversion.gradients.sent import BatchNormMode
from fedattack.errors import NotApplicable
from fedattack.models.normalise import Normaliser

_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
}


@dataclass(frozen=True)
class Step:
    """A layer and which values (0 is the images, i the output of step i) go into it."""

    layer: Layer
    inputs: tuple[int, ...]


def trace(
    module: nn.Module,
    weights: dict[str, Tensor],
    batch_norm: BatchNormMode,
    normaliser: Normaliser | None = None,
) -> list[Step]:
    """The network as a list of layers, each after its inputs; `normaliser`: what is done to its images before.

    NotApplicable if it holds anything but convolutions, linear layers, BatchNorm, the common activations,
    average and maximum pooling, flattening and sums of two branches.
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
            if normaliser is not None and not steps:
                steps.append(Step(Scaling(normaliser.mean, normaliser.std), (0,)))
            place[node] = len(steps)
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
        if isinstance(part, nn.MaxPool2d) and kind is nn.MaxPool2d and not part.return_indices:
            return _max_pool(part)
        raise NotApplicable(f"layer {name!r} is a {kind.__name__}, which has no explicit second derivative")
    if node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add):
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
    if isinstance(part, nn.Sigmoid):
        return Sigmoid()
    return Elementwise(ACTIVATIONS[_ACTIVATION_MODULES[type(part)]])


def _flatten() -> Layer:
    return Rearrangement(lambda x: x.flatten(1), lambda delta, like: delta.reshape(like.shape))


def _spread(delta: Tensor, like: Tensor) -> Tensor:
    return (delta / (like.shape[2] * like.shape[3])).expand_as(like)


def _sides(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _max_pool(part: nn.MaxPool2d) -> Layer:
    sides = (_sides(value) for value in (part.kernel_size, part.stride, part.padding, part.dilation))
    return MaxPool((*sides, part.ceil_mode))


def _average_pool(part: nn.AvgPool2d) -> Layer:
    how: tuple[Any, ...] = (
        _sides(part.kernel_size),
        _sides(part.stride),
        _sides(part.padding),
        part.ceil_mode,
        part.count_include_pad,
        part.divisor_override,
    )
    return Rearrangement(
        lambda x: torch.ops.aten.avg_pool2d(x, *how),
        lambda delta, like: torch.ops.aten.avg_pool2d_backward(delta, like, *how),
    )


class Network:
    """A traced network and where each wanted tensor's gradient lies in the flat one, in the order of `shapes`."""

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
        return self.grouped(
            [piece.view(len(flat), *shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        )

    def pieces(self, like: Tensor, victims: int) -> list[Tensor]:
        """Room (V, *shape) for each wanted tensor."""
        return [like.new_empty(victims, *shape) for shape in self._shapes]

    def grouped(self, pieces: Sequence[Tensor]) -> list[list[Tensor]]:
        """One tensor for each wanted one, by steps."""
        return [[pieces[number] for number in ours] for ours in self._places]
