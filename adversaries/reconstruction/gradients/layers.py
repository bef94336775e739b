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

Geometry = tuple[list[int], list[int], list[int]]
"""Stride, padding, dilation of a convolution, (height, width) each."""

_backward = torch.ops.aten.convolution_backward
_masked = torch.ops.aten.threshold_backward

_SMALL, _SINGLE = 20_000, 150_000
"""Up to so many numbers in a sample's receptive fields a convolution is done as a product; of a single sample."""

_FEW, _LARGE = 64, 500_000
"""So is one of a single sample with at most so many positions and at least so many numbers in its kernel, which a
library call would reorder first."""

_MANY = 4
"""From this many samples on, a library call on all of them at once is faster than products again."""


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

    def gradients(self, saved: Saved, delta: Tensor, out: Sequence[Tensor]) -> None:
        """Write the gradient (V, *shape) of each weight, summed over the victim's samples, into `out`."""

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
    """A two-dimensional convolution with zero padding.

    Parameters
    ----------
    name : str
    layer : nn.Conv2d
    weights : dict of str to Tensor
        State dict.
    fold : Fold, optional
        A BatchNorm with running statistics that follows and is taken into the kernel and bias.
    """

    def __init__(
        self, name: str, layer: nn.Conv2d, weights: dict[str, Tensor], fold: Fold | None = None
    ) -> None:
        self.names = tuple(f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in weights)
        self._weight: Tensor = weights[self.names[0]]
        self._bias = weights[self.names[1]] if len(self.names) == 2 else None
        self._geometry: Geometry = (
            list(layer.stride),
            [int(side) for side in layer.padding],
            list(layer.dilation),
        )
        self._groups = layer.groups
        self._source, self._fold = (name, layer, weights), fold
        if fold is not None:
            self.names = (*self.names, *fold.names)
            self._plain, self._plain_bias = self._weight, self._bias
            self._weight, self._bias = fold.weights(self._weight, self._bias)
        self._last = self._weight.contiguous(memory_format=torch.channels_last)
        self._flat = self._weight.flatten(1)
        self._turned = _turned(self._weight[None])
        self._turnable = self._groups == 1 and self._geometry[0] == [1, 1] and self._geometry[2] == [1, 1]
        self._sizes: dict[torch.Size, tuple[int, int]] = {}

    def folded(self, fold: Fold) -> Convolution:
        """This convolution with the BatchNorm after it taken in."""
        return Convolution(*self._source, fold)

    @property
    def inputs(self) -> int:
        """Numbers in one receptive field."""
        return self._weight[0].numel()

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        saved["victims"] = victims
        if self._small(x):
            saved["x"] = x
            saved["columns"] = columns = self._columns(x)
            if len(x) >= _MANY:
                return F.conv2d(x, self._weight, self._bias, *self._geometry)
            flat = self._flat.expand(len(x), -1, -1)
            if self._bias is None:
                found = torch.bmm(flat, columns)
            else:
                found = torch.baddbmm(self._bias[:, None], flat, columns)
            return found.unflatten(2, self._size(x.shape))
        # oneDNN needs no reordering of channels-last memory; groups, one for each victim, need planes.
        dense = x.is_cpu and (victims == 1 or len(x) > victims)
        saved["weight"] = self._last if dense else self._weight
        saved["x"] = x = x.contiguous(memory_format=torch.channels_last) if dense else x.contiguous()
        return F.conv2d(x, saved["weight"], self._bias, *self._geometry, self._groups)

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        return [self._adjoint(saved, delta)]

    def gradients(self, saved: Saved, delta: Tensor, out: Sequence[Tensor]) -> None:
        victims, samples = saved["victims"], len(delta)
        weight = out[0] if self._fold is None else torch.empty_like(out[0])
        if "columns" in saved:
            columns = saved["columns"].transpose(1, 2)
            if samples == victims:
                torch.bmm(delta.flatten(2), columns, out=weight.flatten(2))
            else:
                torch.sum((delta.flatten(2) @ columns).unflatten(0, (victims, -1)), 1, out=weight.flatten(2))
        else:
            weight.copy_(self._correlate(saved["x"], delta, victims))
        if len(self.names) == 1:
            return
        bias = delta.sum((2, 3))
        if samples > victims:
            bias = bias.unflatten(0, (victims, -1)).sum(1)
        if self._fold is None:
            out[1].copy_(bias)
        else:
            self._fold.gradients(self._plain, self._plain_bias, weight, bias, out)

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        moved = tangents[0]
        kernels, offset = saved["along"] = self._along(directions)
        if "columns" in saved:
            return self._push_columns(saved, moved, kernels, offset)
        found = None
        if kernels is not None:
            found = self._each(saved["x"], kernels, offset)
        if moved is not None:
            moved = moved.contiguous(memory_format=_format(saved["x"]))
            through = F.conv2d(moved, saved["weight"], None, *self._geometry, self._groups)
            found = through if found is None else found.add_(through)
        return found

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        kernels = saved["along"][0]
        if "columns" in saved:
            return [self._pull_columns(saved, shift, delta, kernels)]
        found = None if shift is None else self._adjoint(saved, shift)
        if kernels is not None and delta is not None:
            each = self._each_adjoint(delta, saved["x"], kernels)
            found = each if found is None else found.add_(each)
        return [found]

    def _along(self, directions: Directions) -> tuple[Tensor | None, Tensor | None]:
        """Directions (V, ...) of the kernel and the bias that are convolved with."""
        if self._fold is not None and any(direction is not None for direction in directions):
            return self._fold.directions(self._plain, self._plain_bias, directions)
        return directions[0], directions[1] if len(directions) == 2 else None

    def _adjoint(self, saved: Saved, delta: Tensor) -> Tensor:
        """Gradient of the input."""
        if "columns" in saved:
            if len(delta) >= _MANY:
                return self._backward(delta, saved["x"], self._weight, 1, True)
            if self._turnable:
                saved["turned"] = self._turned_columns(delta)
                found = torch.bmm(self._turned.expand(len(delta), -1, -1), saved["turned"])
                return found.unflatten(2, saved["x"].shape[2:])
            flat = self._flat.t().expand(len(delta), -1, -1)
            return self._fold_back(torch.bmm(flat, delta.flatten(2)), saved["x"].shape)
        delta = delta.contiguous(memory_format=_format(saved["x"]))
        return self._backward(delta, saved["x"], saved["weight"], self._groups, True)

    def _backward(self, delta: Tensor, x: Tensor, kernel: Tensor, groups: int, inputs: bool) -> Tensor:
        """Gradient of the input, or of the kernel summed over samples."""
        mask = [inputs, not inputs, False]
        found = _backward(delta, x, kernel, None, *self._geometry, False, [0, 0], groups, mask)
        return found[0] if inputs else found[1]

    def _correlate(self, x: Tensor, delta: Tensor, victims: int) -> Tensor:
        """Gradient (V, *shape) of each victim's kernel."""
        if victims == 1:
            delta = delta.contiguous(memory_format=_format(x))
            return self._backward(delta, x, self._weight, self._groups, False)[None]
        if len(x) == victims:
            like = self._weight.expand(victims, *self._weight.shape).flatten(0, 1)
            found = self._backward(_aside(delta), _aside(x), like, victims * self._groups, False)
            return found.unflatten(0, (victims, -1))
        pairs = zip(delta.chunk(victims), x.chunk(victims), strict=True)
        return torch.stack([self._backward(d, a, self._weight, self._groups, False) for d, a in pairs])

    def _each(self, x: Tensor, kernels: Tensor, offset: Tensor | None) -> Tensor:
        """Convolve every victim's samples with its own kernel (V, *shape) and bias (V, channels)."""
        victims = len(kernels)
        if victims > 1 and len(x) == victims:
            side, biases = kernels.flatten(0, 1), None if offset is None else offset.flatten()
            found = F.conv2d(_aside(x), side, biases, *self._geometry, victims * self._groups)
            return found.unflatten(1, (victims, -1))[0]
        pieces = [
            F.conv2d(part, kernels[v], None if offset is None else offset[v], *self._geometry, self._groups)
            for v, part in enumerate(x.chunk(victims))
        ]
        return _join(pieces)

    def _each_adjoint(self, delta: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        victims = len(kernels)
        delta = delta.contiguous(memory_format=_format(x))
        if victims > 1 and len(delta) == victims:
            side = kernels.flatten(0, 1)
            found = self._backward(_aside(delta), _aside(x), side, victims * self._groups, True)
            return found.unflatten(1, (victims, -1))[0]
        pieces = zip(delta.chunk(victims), x.chunk(victims), kernels, strict=True)
        return _join([self._backward(d, a, u, self._groups, True) for d, a, u in pieces])

    # Small convolutions, for which a library call costs more than its arithmetic, as products with patches.

    def _small(self, x: Tensor) -> bool:
        if self._groups != 1 or self._geometry[2] != [1, 1] or not x.is_cpu:
            return False
        height, width = self._size(x.shape)
        positions = height * width
        if len(x) > 1:
            return self.inputs * positions <= _SMALL
        large = positions <= _FEW and self._weight.numel() >= _LARGE
        return large or self.inputs * positions <= _SINGLE

    def _size(self, shape: torch.Size) -> tuple[int, int]:
        """Height and width of the output for inputs (N, C, H, W)."""
        if shape not in self._sizes:
            strides, padding, _ = self._geometry
            kernel = self._weight.shape[2:]
            height, width = ((shape[2 + i] + 2 * padding[i] - kernel[i]) // strides[i] + 1 for i in (0, 1))
            self._sizes[shape] = height, width
        return self._sizes[shape]

    def _columns(self, x: Tensor) -> Tensor:
        """Receptive fields (N, C * kh * kw, positions)."""
        return _patches(x, self._weight.shape[2:], self._geometry[0], self._geometry[1])

    def _turned_columns(self, delta: Tensor) -> Tensor:
        """Receptive fields of the adjoint, which with stride 1 is a convolution too."""
        kernel, padding = self._weight.shape[2:], self._geometry[1]
        return _patches(delta, kernel, [1, 1], [kernel[i] - 1 - padding[i] for i in (0, 1)])

    def _fold_back(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """Adjoint of :meth:`_columns`."""
        strides, padding, dilation = self._geometry
        kernel = list(self._weight.shape[2:])
        return torch.ops.aten.col2im(columns, list(shape[2:]), kernel, dilation, padding, strides)

    def _push_columns(
        self, saved: Saved, moved: Tensor | None, kernels: Tensor | None, offset: Tensor | None
    ) -> Tensor | None:
        columns, samples = saved["columns"], len(saved["x"])
        found = None
        if kernels is not None:
            each = _per_sample(kernels.flatten(2), samples)
            if offset is None:
                found = torch.bmm(each, columns)
            else:
                found = torch.baddbmm(_per_sample(offset, samples)[:, :, None], each, columns)
        if moved is not None and samples < _MANY:
            flat = self._flat.expand(samples, -1, -1)
            inner = self._columns(moved)
            found = torch.bmm(flat, inner) if found is None else found.baddbmm_(flat, inner)
        whole = None if found is None else found.unflatten(2, self._size(saved["x"].shape))
        if moved is not None and samples >= _MANY:
            through = F.conv2d(moved, self._weight, None, *self._geometry)
            whole = through if whole is None else whole.add_(through)
        return whole

    def _pull_columns(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, kernels: Tensor | None
    ) -> Tensor | None:
        x = saved["x"]
        samples = len(x)
        found = None
        if self._turnable and samples < _MANY:
            if shift is not None:
                found = torch.bmm(self._turned.expand(samples, -1, -1), self._turned_columns(shift))
            if kernels is not None and delta is not None:
                inner = saved["turned"] if "turned" in saved else self._turned_columns(delta)
                each = _per_sample(_turned(kernels), samples)
                found = torch.bmm(each, inner) if found is None else found.baddbmm_(each, inner)
            return None if found is None else found.unflatten(2, x.shape[2:])
        if shift is not None:
            found = torch.bmm(self._flat.t().expand(samples, -1, -1), shift.flatten(2))
        if kernels is not None and delta is not None:
            each = _per_sample(kernels.flatten(2).transpose(1, 2), samples)
            inner = delta.flatten(2)
            found = torch.bmm(each, inner) if found is None else found.baddbmm_(each, inner)
        return None if found is None else self._fold_back(found, x.shape)


def _patches(x: Tensor, kernel: Sequence[int], strides: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Receptive fields (N, C * kh * kw, positions): one strided copy, several times faster than F.unfold."""
    tall, wide = padding
    padded = (F.pad(x, (wide, wide, tall, tall)) if tall or wide else x).contiguous()
    count, channels, height, width = padded.shape
    plane = height * width
    size = [(height - kernel[0]) // strides[0] + 1, (width - kernel[1]) // strides[1] + 1]
    steps = (channels * plane, plane, width, 1, strides[0] * width, strides[1])
    fields = padded.as_strided((count, channels, *kernel, *size), steps)
    return fields.reshape(count, channels * kernel[0] * kernel[1], -1)


def _per_sample(each: Tensor, samples: int) -> Tensor:
    """(V, ...) -> (V * B, ...)."""
    return each if len(each) == samples else each.repeat_interleave(samples // len(each), 0)


def _aside(x: Tensor) -> Tensor:
    """(V, C, H, W) -> (1, V * C, H, W): one sample whose groups are the victims."""
    return x.contiguous().flatten(0, 1)[None]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _turned(kernels: Tensor) -> Tensor:
    """Kernels (V, O, C, kh, kw) of the adjoint, rotated by half a turn, as matrices (V, C, O * kh * kw)."""
    return kernels.flip(3, 4).transpose(1, 2).flatten(2)


def _last(x: Tensor) -> bool:
    """Whether the memory of (N, C, H, W) is channels-last, and not planes too."""
    return x.is_cpu and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _last(x) else torch.contiguous_format


class Fold:
    """BatchNorm with running statistics as part of the convolution before it.

    y = gamma (W x + b - m) / s + beta is a convolution with kernel (gamma / s) W and bias beta + (b - m) gamma / s.
    Gradients G, g of that kernel and bias give those of the four tensors by the chain rule, which touches tensors of
    the weights' size and no activations.

    Parameters
    ----------
    name : str
        Of the BatchNorm.
    layer : nn.Module
    weights : dict of str to Tensor
    """

    def __init__(self, name: str, layer: nn.Module, weights: dict[str, Tensor]) -> None:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        self.names = (f"{name}.weight", f"{name}.bias")
        self._gamma, self._beta = (weights[part] for part in self.names)
        self._mean = weights[f"{name}.running_mean"]
        self._scale = (weights[f"{name}.running_var"] + layer.eps).rsqrt()
        self._gain = self._gamma * self._scale

    def _centre(self, bias: Tensor | None) -> Tensor:
        return -self._mean if bias is None else bias - self._mean

    def weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the folded convolution."""
        return weight * self._gain[:, None, None, None], self._beta + self._centre(bias) * self._gain

    def gradients(
        self, weight: Tensor, bias: Tensor | None, kernels: Tensor, offsets: Tensor, out: Sequence[Tensor]
    ) -> None:
        """Write the gradients (V, ...) of kernel, bias (where there is one), gamma and beta into `out`."""
        along = (kernels.flatten(2) * weight.flatten(1)).sum(2)
        torch.mul(kernels, self._gain[:, None, None, None], out=out[0])
        if bias is not None:
            torch.mul(offsets, self._gain, out=out[1])
        torch.mul(along.addcmul_(self._centre(bias), offsets), self._scale, out=out[-2])
        out[-1].copy_(offsets)

    def directions(
        self, weight: Tensor, bias: Tensor | None, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        """The adjoint of :meth:`gradients`: directions of the folded kernel and bias."""
        assert directions[0] is not None
        gamma, beta = directions[-2:]
        assert gamma is not None
        assert beta is not None
        rate = gamma * self._scale
        kernels = directions[0] * self._gain[:, None, None, None]
        kernels = kernels.addcmul_(rate[:, :, None, None, None], weight)
        offsets = torch.addcmul(beta, rate, self._centre(bias))
        if bias is not None:
            assert directions[1] is not None
            offsets = torch.addcmul(offsets, directions[1], self._gain)
        return kernels, offsets


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
    """An activation with its slope and its second derivative."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

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

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Tensor | None:
        return None if tangents[0] is None else _masked(tangents[0], saved["y"], 0)

    def pull(
        self, saved: Saved, shift: Tensor | None, delta: Tensor | None, directions: Directions
    ) -> Sequence[Tensor | None]:
        return [None if shift is None else _masked(shift, saved["y"], 0)]


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
    applies to tangents::

        n' = P x' / s        dL/dx = (gamma / s) P delta        P' delta = -n' mean(n delta) - n mean(n' delta)

    Running statistics are constants: then P is the identity and s does not move.
    """

    def __init__(self, name: str, layer: nn.Module, weights: dict[str, Tensor], train: bool) -> None:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        gamma, beta = f"{name}.weight", f"{name}.bias"
        self.names = (gamma, beta) if layer.affine else ()
        like = next(iter(weights.values())).new_empty(layer.num_features)
        self._gamma = weights[gamma] if layer.affine else torch.ones_like(like)
        self._beta = weights[beta] if layer.affine else torch.zeros_like(like)
        self._eps = layer.eps
        self._train = train or layer.running_mean is None
        self._source = (name, layer, weights)
        if not self._train:
            self._mean = weights[f"{name}.running_mean"]
            self._scale = (weights[f"{name}.running_var"] + self._eps).rsqrt()
            self._gain = self._gamma * self._scale
            self._offset = self._beta - self._mean * self._gain

    def fold(self) -> Fold | None:
        """What a convolution needs to take this layer in; None where it cannot."""
        return Fold(*self._source) if not self._train and self.names else None

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

    def gradients(self, saved: Saved, delta: Tensor, out: Sequence[Tensor]) -> None:
        blocks = _blocks(delta, saved["victims"])
        total = blocks.sum((1, 3))
        if self._train:
            torch.sum(blocks * saved["normal"], (1, 3), out=out[0])
        else:
            along = (blocks * _blocks(saved["x"], saved["victims"])).sum((1, 3))
            torch.mul(along - self._mean * total, self._scale, out=out[0])
        out[1].copy_(total)

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
