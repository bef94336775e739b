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

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.reconstruction.closed_form import ACTIVATIONS, Activation

Directions = Sequence[Tensor | None]
Saved = dict[str, Any]
"""What a layer keeps of one evaluation."""

_backward = torch.ops.aten.convolution_backward


class Layer:
    """One operation of a network.

    Attributes
    ----------
    names : tuple of str
        State-dict names of its weights.
    """

    names: tuple[str, ...] = ()

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        """Output; keeps in `saved` what the other passes need."""
        raise NotImplementedError

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        """dL/d(each input) from dL/d(output)."""
        raise NotImplementedError

    def gradients(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        """Gradient (V, *shape) of each weight, sums over the victim's samples."""
        return ()

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        """Derivative of the output; None stands for zero everywhere."""
        raise NotImplementedError

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        """Derivative of :meth:`backward`: `shift` is that of `delta`."""
        raise NotImplementedError


def _sum(*parts: Tensor | None) -> Tensor | None:
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


class Convolution(Layer):
    """A two-dimensional convolution with zero padding."""

    def __init__(self, name: str, layer: nn.Conv2d, weights: dict[str, Tensor]) -> None:
        self.names = tuple(f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in weights)
        self._weight = weights[self.names[0]]
        self._bias = weights[self.names[1]] if len(self.names) == 2 else None
        self._geometry = (layer.stride, tuple(int(side) for side in layer.padding), layer.dilation)
        self._groups = layer.groups

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["x"], saved["victims"] = inputs[0], victims
        return F.conv2d(inputs[0], self._weight, self._bias, *self._geometry, self._groups)

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [self._adjoint(delta, saved["x"], self._weight, self._groups)]

    def gradients(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        x, victims = saved["x"], saved["victims"]
        if victims > 1 and len(x) == victims:
            kernel = self._weight.new_empty(1).expand(victims * len(self._weight), *self._weight.shape[1:])
            found = self._correlate(_side_by_side(delta), _side_by_side(x), kernel, victims * self._groups)
            weight = found.unflatten(0, (victims, -1))
        else:
            pairs = zip(delta.chunk(victims), x.chunk(victims), strict=True)
            weight = torch.stack([self._correlate(d, a, self._weight, self._groups) for d, a in pairs])
        if len(self.names) == 1:
            return [weight]
        return [weight, delta.sum((2, 3)).unflatten(0, (victims, -1)).sum(1)]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        moved, kernels = tangents[0], directions[0]
        offset = directions[1] if len(self.names) == 2 else None
        found = None
        if moved is not None:
            found = F.conv2d(moved, self._weight, None, *self._geometry, self._groups)
        if kernels is not None:
            found = _sum(found, self._each(saved["x"], kernels))
        if offset is not None:
            shape = (len(saved["x"]), len(self._weight), 1, 1)
            spread = offset.repeat_interleave(len(saved["x"]) // len(offset), 0).reshape(shape)
            found = spread if found is None else found + spread
        return found

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        found = None if shift is None else self._adjoint(shift, saved["x"], self._weight, self._groups)
        if directions[0] is not None and delta is not None:
            found = _sum(found, self._each_adjoint(delta, saved["x"], directions[0]))
        return [found]

    def _correlate(self, delta: Tensor, x: Tensor, like: Tensor, groups: int) -> Tensor:
        """Gradient of the kernel, summed over samples."""
        return _backward(delta, x, like, None, *self._geometry, False, [0, 0], groups, [False, True, False])[1]

    def _adjoint(self, delta: Tensor, like: Tensor, kernel: Tensor, groups: int) -> Tensor:
        """Gradient of the input."""
        return _backward(
            delta, like, kernel, None, *self._geometry, False, [0, 0], groups, [True, False, False]
        )[0]

    def _each(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolve every victim's samples with its own kernel (V, *shape)."""
        victims = len(kernels)
        if victims > 1 and len(x) == victims:
            found = F.conv2d(
                _side_by_side(x), kernels.flatten(0, 1), None, *self._geometry, victims * self._groups
            )
            return found.unflatten(1, (victims, -1))[0]
        pairs = zip(x.chunk(victims), kernels, strict=True)
        return _join([F.conv2d(a, u, None, *self._geometry, self._groups) for a, u in pairs])

    def _each_adjoint(self, delta: Tensor, like: Tensor, kernels: Tensor) -> Tensor:
        victims = len(kernels)
        if victims > 1 and len(delta) == victims:
            found = self._adjoint(
                _side_by_side(delta), _side_by_side(like), kernels.flatten(0, 1), victims * self._groups
            )
            return found.unflatten(1, (victims, -1))[0]
        pieces = zip(delta.chunk(victims), like.chunk(victims), kernels, strict=True)
        return _join([self._adjoint(d, a, u, self._groups) for d, a, u in pieces])


def _side_by_side(x: Tensor) -> Tensor:
    """(V, C, H, W) -> (1, V * C, H, W): one sample whose groups are the victims."""
    return x.flatten(0, 1)[None]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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

    def gradients(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        ours, inputs = (t.unflatten(0, (saved["victims"], -1)) for t in (delta, saved["x"]))
        weight = ours.transpose(1, 2) @ inputs
        return [weight] if len(self.names) == 1 else [weight, ours.sum(1)]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        found = None if tangents[0] is None else F.linear(tangents[0], self._weight)
        victims = saved["victims"]
        if directions[0] is not None:
            each = saved["x"].unflatten(0, (victims, -1)) @ directions[0].transpose(1, 2)
            found = _sum(found, each.flatten(0, 1))
        if len(self.names) == 2 and directions[1] is not None:
            spread = directions[1].repeat_interleave(len(saved["x"]) // victims, 0)
            found = _sum(found, spread)
        return found

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        found = None if shift is None else shift @ self._weight
        if directions[0] is not None and delta is not None:
            each = delta.unflatten(0, (saved["victims"], -1)) @ directions[0]
            found = _sum(found, each.flatten(0, 1))
        return [found]


class Elementwise(Layer):
    """An activation."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self._flat = activation is ACTIVATIONS["relu"]  # no second derivative

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        saved["x"], saved["slope"] = inputs[0], self._activation.slope(inputs[0])
        return self._activation.value(inputs[0])

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [delta * saved["slope"]]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        saved["tangent"] = tangents[0]
        return None if tangents[0] is None else tangents[0] * saved["slope"]

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        found = None if shift is None else shift * saved["slope"]
        if not self._flat and delta is not None and saved["tangent"] is not None:
            bent = delta * self._activation.bend(saved["x"]) * saved["tangent"]
            found = _sum(found, bent)
        return [found]


class Rearrangement(Layer):
    """A linear map without weights, which is its own derivative.

    Parameters
    ----------
    apply : callable
        (inputs) -> output.
    adjoint : callable
        (output-shaped, an input for its shape) -> input-shaped.
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

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        return None if tangents[0] is None else self._apply(tangents[0])

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        return [None if shift is None else self._adjoint(shift, saved["like"])]


class Addition(Layer):
    """The sum of two branches."""

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [delta, delta]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        return _sum(*tangents)

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        return [shift, shift]


class BatchNorm(Layer):
    """Normalisation over a victim's batch and positions, or by the running statistics.

    With n the normalised input, s the deviation and P v = v - mean(v) - n mean(n v) the projection that normalising
    applies to tangents: n' = P x' / s, dL/dx = (gamma / s) P delta, and P' delta = -n' mean(n delta) - n mean(n' delta).
    Running statistics are constants: then P is the identity and s does not move.
    """

    def __init__(self, name: str, layer: nn.Module, weights: dict[str, Tensor], train: bool) -> None:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        self.names = (f"{name}.weight", f"{name}.bias") if layer.affine else ()
        count = layer.num_features
        like = next(iter(weights.values()))
        ones, zeros = torch.ones(count).to(like), torch.zeros(count).to(like)
        self._gamma = weights[self.names[0]] if layer.affine else ones
        self._beta = weights[self.names[1]] if layer.affine else zeros
        self._eps = layer.eps
        self._train = train or layer.running_mean is None
        if not self._train:
            self._mean = weights[f"{name}.running_mean"]
            self._scale = (weights[f"{name}.running_var"] + self._eps).rsqrt()
            self._gain = self._gamma * self._scale
            self._offset = self._beta - self._mean * self._gain

    def moments(self, saved: Saved) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (V, channels) of the input over each victim's batch."""
        if "mean" not in saved:
            blocks = _blocks(saved["x"], saved["victims"])
            saved["mean"] = blocks.mean((1, 3), keepdim=True)
            saved["var"] = (blocks - saved["mean"]).square().mean((1, 3), keepdim=True)
        return saved["mean"][:, 0, :, 0], saved["var"][:, 0, :, 0]

    def moments_adjoint(self, saved: Saved, mean: Tensor | None, variance: Tensor | None) -> Tensor | None:
        """Gradient at the input of a function of :meth:`moments`."""
        blocks = _blocks(saved["x"], saved["victims"])
        count = blocks.shape[1] * blocks.shape[3]
        found = None
        if variance is not None:
            found = (blocks - saved["mean"]) * (2 / count * variance[:, None, :, None])
        if mean is not None:
            found = _sum(found, (mean[:, None, :, None] / count).expand_as(blocks))
        return None if found is None else found.reshape(saved["x"].shape)

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        saved["x"], saved["victims"] = x, victims
        if not self._train:
            return torch.addcmul(_channels(self._offset, x), x, _channels(self._gain, x))
        self.moments(saved)
        scale = (saved["var"] + self._eps).rsqrt()
        normal = (_blocks(x, victims) - saved["mean"]) * scale
        saved["scale"], saved["normal"] = scale, normal
        found = torch.addcmul(self._beta[:, None], normal, self._gamma[:, None])
        return found.reshape(x.shape)

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        if not self._train:
            return [delta * _channels(self._gain, delta)]
        projected = self._project(saved, _blocks(delta, saved["victims"]))
        saved["projected"] = projected
        return [(projected * (self._gamma[:, None] * saved["scale"])).reshape(delta.shape)]

    def gradients(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        if not self.names:
            return ()
        blocks = _blocks(delta, saved["victims"])
        total = blocks.sum((1, 3))
        if self._train:
            return [(blocks * saved["normal"]).sum((1, 3)), total]
        along = (blocks * _blocks(saved["x"], saved["victims"])).sum((1, 3))
        return [(along - self._mean * total) * self._scale, total]

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        moved = tangents[0]
        x, victims = saved["x"], saved["victims"]
        gamma, beta = directions if self.names else (None, None)
        if not self._train:
            found = None if moved is None else moved * _channels(self._gain, moved)
            if gamma is not None and beta is not None:
                gain = gamma * self._scale
                blocks, offset = _blocks(x, victims), beta - gain * self._mean
                along = torch.addcmul(offset[:, None, :, None], blocks, gain[:, None, :, None])
                found = _sum(found, along.reshape(x.shape))
            return found
        saved["tangent"] = None
        found = None
        if moved is not None:
            saved["tangent"] = self._project(saved, _blocks(moved, victims), "rate") * saved["scale"]
            found = saved["tangent"] * self._gamma[:, None]
        if gamma is not None:
            found = _sum(found, saved["normal"] * gamma[:, None, :, None])
        if beta is not None:
            spread = beta[:, None, :, None]
            found = spread.expand_as(saved["normal"]) if found is None else found + spread
        return None if found is None else found.reshape(x.shape)

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        victims, gamma = saved["victims"], directions[0] if self.names else None
        if not self._train:
            found = None if shift is None else shift * _channels(self._gain, shift)
            if gamma is not None and delta is not None:
                gain = (gamma * self._scale)[:, None, :, None]
                found = _sum(found, (_blocks(delta, victims) * gain).reshape(delta.shape))
            return [found]
        shape = saved["x"].shape
        scale, normal = saved["scale"], saved["normal"]
        gain = self._gamma[:, None] * scale
        found = None
        if shift is not None:
            found = self._project(saved, _blocks(shift, victims)) * gain
        if delta is not None:
            blocks, tangent = _blocks(delta, victims), saved["tangent"]
            factor = torch.zeros_like(scale)
            if gamma is not None:
                factor = factor + gamma[:, None, :, None] * scale
            if tangent is not None:
                factor = factor - gain * saved["rate"] * scale
                along = _mean(blocks * normal), _mean(blocks * tangent)
                found = _sum(found, (tangent * along[0] + normal * along[1]) * -gain)
            found = _sum(found, saved["projected"] * factor)
        return [None if found is None else found.reshape(shape)]

    def _project(self, saved: Saved, blocks: Tensor, keep: str | None = None) -> Tensor:
        """P v; the mean of n v is kept under the name `keep`."""
        normal = saved["normal"]
        along = _mean(blocks * normal)
        if keep is not None:
            saved[keep] = along
        return blocks - _mean(blocks) - normal * along


def _mean(blocks: Tensor) -> Tensor:
    """Over a victim's samples and positions."""
    return blocks.mean((1, 3), keepdim=True)


def _blocks(x: Tensor, victims: int) -> Tensor:
    """(V * B, C, ...) -> (V, B, C, positions)."""
    return x.reshape(victims, -1, x.shape[1], math.prod(x.shape[2:]))


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1) or whatever broadcasts over (N, C, ...)."""
    return vector.reshape(-1, *[1] * (like.dim() - 2))
