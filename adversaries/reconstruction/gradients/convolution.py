"""Convolutions as four plain passes, with a BatchNorm of stored statistics taken in where that saves work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.reconstruction.gradients.layers import Directions, Geometry, Layer, Saved

_backward = torch.ops.aten.convolution_backward

_SMALL, _SINGLE = 20_000, 150_000
"""Up to so many numbers in a sample's receptive fields a convolution is done as a product; of a single sample."""

_FEW, _LARGE = 64, 500_000
"""So is one of a single sample with at most so many positions and at least so many numbers in its kernel, which a
library call would reorder first."""

_MANY = 4
"""From this many samples on, a library call on all of them at once is faster than products again."""


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

    Attributes
    ----------
    inputs : int
        Numbers in one receptive field.
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
        self.inputs = self._flat.shape[1]
        self._turned = _turned(self._weight[None])
        self._turnable = self._groups == 1 and self._geometry[0] == [1, 1] and self._geometry[2] == [1, 1]
        self._sizes: dict[torch.Size, tuple[int, int]] = {}

    def folded(self, fold: Fold) -> Convolution:
        """This convolution with the BatchNorm after it taken in."""
        return Convolution(*self._source, fold)

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
        bias = out[1] if self._fold is None else delta.new_empty(victims, delta.shape[1])
        torch.sum(delta.unflatten(0, (victims, -1)), (1, 3, 4), out=bias)
        if self._fold is not None:
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
