"""Layers as four plain passes: forward, backward, and the directional derivative of each along the weights.

With f the layer, x its input, theta its weights, delta = dL/df and U a direction in the space of the weights:

=========  ==========================================================================
forward    y = f(x; theta)
backward   dL/dx = (df/dx)^T delta, and the weights' gradient (df/dtheta)^T delta
push       y' = (df/dx) x' + (df/dtheta) U, the derivative of the forward pass along U
pull       (dL/dx)' = (df/dx)^T delta' + [(df/dx)^T]' delta, that of the backward pass
=========  ==========================================================================

What reaches the image in the last pass is d/dx <gradient, U>: the second derivative that gradient matching needs, in
four convolutions per layer where automatic differentiation of the first two passes takes five, without a graph, and
for V victims at once although each has its own U.

Activations are (V * B, ...): victim by victim. Directions and weight gradients are (V, *shape of the weight).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.gradients.closed_form import ACTIVATIONS, Activation

Maybe = Tensor | None
"""None stands for zero everywhere."""

Directions = Sequence[Maybe]
Saved = dict[str, Any]
"""What a layer keeps of one evaluation."""

Geometry = tuple[list[int], list[int], list[int]]
"""Stride, padding, dilation of a convolution, (height, width) each."""

_masked = torch.ops.aten.threshold_backward


class Layer(ABC):
    """One operation of a network; `names` are the state-dict names of its weights."""

    names: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        """Output; keeps in `saved` what the other passes need."""

    @abstractmethod
    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        """dL/d(each input) from dL/d(output)."""

    def gradients(self, saved: Saved, delta: Tensor, out: Sequence[Tensor]) -> None:
        """Write the gradient (V, *shape) of each weight, summed over the victim's samples, into `out`."""
        del saved, delta, out  # most have no weights

    @abstractmethod
    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        """Derivative of the output."""

    @abstractmethod
    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        """Derivative of :meth:`backward`: `shift` is that of `delta`."""


def add(*parts: Maybe) -> Maybe:
    """Their sum."""
    total: Maybe = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


class Linear(Layer):
    """A matrix, on inputs (V * B, features)."""

    def __init__(self, name: str, weights: dict[str, Tensor]) -> None:
        self.names = tuple(f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in weights)
        self._weight = weights[self.names[0]]
        self._bias = weights[self.names[1]] if len(self.names) == 2 else None

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["x"], saved["victims"] = inputs[0], victims
        return F.linear(inputs[0], self._weight, self._bias)

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [delta @ self._weight]

    def gradients(self, saved: Saved, delta: Tensor, out: Sequence[Tensor]) -> None:
        ours, inputs = (t.unflatten(0, (saved["victims"], -1)) for t in (delta, saved["x"]))
        torch.bmm(ours.transpose(1, 2), inputs, out=out[0])
        if len(out) == 2:
            torch.sum(ours, 1, out=out[1])

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        found = None if tangents[0] is None else F.linear(tangents[0], self._weight)
        victims = saved["victims"]
        if directions[0] is not None:
            each = saved["x"].unflatten(0, (victims, -1)) @ directions[0].transpose(1, 2)
            found = add(found, each.flatten(0, 1))
        if len(self.names) == 2 and directions[1] is not None:
            spread = directions[1].repeat_interleave(len(saved["x"]) // victims, 0)
            found = add(found, spread)
        return found

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        found = None if shift is None else shift @ self._weight
        if directions[0] is not None and delta is not None:
            each = delta.unflatten(0, (saved["victims"], -1)) @ directions[0]
            found = add(found, each.flatten(0, 1))
        return [found]


class Elementwise(Layer):
    """An activation with its slope and its second derivative."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["x"], saved["slope"] = inputs[0], self._activation.slope(inputs[0])
        return self._activation.value(inputs[0])

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [delta * saved["slope"]]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        saved["tangent"] = tangents[0]
        return None if tangents[0] is None else tangents[0] * saved["slope"]

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        found = None if shift is None else shift * saved["slope"]
        if delta is not None and saved["tangent"] is not None:
            bent = delta * saved["tangent"]
            bend = self._bend(saved)
            found = bent.mul_(bend) if found is None else found.addcmul_(bent, bend)
        return [found]

    def _bend(self, saved: Saved) -> Tensor:
        return self._activation.bend(saved["x"])


class Sigmoid(Elementwise):
    """Its derivatives are polynomials of its value a: a (1 - a) and a (1 - a) (1 - 2 a)."""

    def __init__(self) -> None:
        super().__init__(ACTIVATIONS["sigmoid"])

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["value"] = value = torch.sigmoid(inputs[0])
        saved["slope"] = torch.addcmul(value, value, value, value=-1)
        return value

    def _bend(self, saved: Saved) -> Tensor:
        return torch.addcmul(saved["slope"], saved["slope"], saved["value"], value=-2)


class Relu(Layer):
    """max(0, x): its slope is a mask and its second derivative nothing, as automatic differentiation has it too."""

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["y"] = inputs[0].relu()
        return saved["y"]

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [_masked(delta, saved["y"], 0)]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        return None if tangents[0] is None else _masked(tangents[0], saved["y"], 0)

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        return [None if shift is None else _masked(shift, saved["y"], 0)]


class Rearrangement(Layer):
    """A linear map without weights, which is its own derivative.

    `adjoint` takes what is shaped like an output, and an input for its shape.
    """

    def __init__(
        self, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._apply, self._adjoint = apply, adjoint

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["like"] = inputs[0]
        return self._apply(inputs[0])

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [self._adjoint(delta, saved["like"])]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        return None if tangents[0] is None else self._apply(tangents[0])

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        return [None if shift is None else self._adjoint(shift, saved["like"])]


class MaxPool(Layer):
    """The largest of each window: linear where the choice stands, as automatic differentiation has it too.

    `how`: kernel, stride, padding, dilation (height, width each) and whether sizes are rounded up.
    """

    def __init__(self, how: tuple[Any, ...]) -> None:
        self._how = how

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["x"] = inputs[0]
        value, saved["chosen"] = torch.ops.aten.max_pool2d_with_indices(inputs[0], *self._how)
        return value

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [
            torch.ops.aten.max_pool2d_with_indices_backward(delta, saved["x"], *self._how, saved["chosen"])
        ]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        if tangents[0] is None:
            return None
        chosen = saved["chosen"]
        return tangents[0].flatten(2).gather(2, chosen.flatten(2)).view_as(chosen)

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        return [None if shift is None else self.backward(saved, shift)[0]]


class Scaling(Layer):
    """(x - offset) / scale, channel by channel: what normalises a network's images."""

    def __init__(self, offset: Sequence[float], scale: Sequence[float]) -> None:
        self._offset, self._scale = tuple(offset), tuple(scale)

    def _column(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["scale"] = self._column(self._scale, inputs[0])
        return (inputs[0] - self._column(self._offset, inputs[0])) / saved["scale"]

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [delta / saved["scale"]]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        return None if tangents[0] is None else tangents[0] / saved["scale"]

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        return [None if shift is None else shift / saved["scale"]]


class Addition(Layer):
    """The sum of two branches."""

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [delta, delta]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        return add(*tangents)

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        return [shift, shift]
