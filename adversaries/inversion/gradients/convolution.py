"""Convolutions as four plain passes, with a BatchNorm of stored statistics taken in where that saves work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.inversion.gradients.layers import Directions, Geometry, Layer, Maybe, Saved

_backward = torch.ops.aten.convolution_backward

_SMALL, _SINGLE = 20_000, 150_000
"""Up to so many numbers in a sample's receptive fields a convolution is done as a product; of a single sample."""

_FEW, _LARGE = 64, 500_000
"""So is one of a single sample with at most so many positions and at least so many numbers in its kernel, which a
library call would reorder first."""

_NARROW = 32
"""Up to so many output channels two convolutions of planes take longer than one with as many inputs as both."""

_MANY = 4
"""From this many samples on, a library call on all of them at once is faster than products again."""


class Convolution(Layer):
    """A two-dimensional convolution with zero padding; a BatchNorm after it, `fold`, goes into its weights."""

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
        self.inputs = self._flat.shape[1]  # numbers in one receptive field
        self._adjoints = Adjoint(self._weight.shape, self._geometry, self._weight.device)
        self._turned = self._adjoints.matrices(self._weight[None])

    def folded(self, fold: Fold) -> Convolution:
        """This convolution with the BatchNorm after it taken in."""
        return Convolution(*self._source, fold)

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        saved["victims"] = victims
        if self._small(x):
            saved["x"] = x
            saved["columns"] = columns = self._columns(x)
            if _together(len(x)):
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

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        moved = tangents[0]
        kernels, offset = saved["along"] = self._along(directions)
        if "columns" in saved:
            return self._push_columns(saved, moved, kernels, offset)
        if moved is not None and kernels is not None and self._narrow(saved["x"], kernels):
            # x' * W + x * U = [x', x] * [W, U]: one call with a group for each victim instead of two.
            pair = torch.cat([self._weight.expand(len(kernels), -1, -1, -1, -1), kernels], 2)
            return self._each(torch.cat([moved, saved["x"]], 1), pair, offset)
        found = None
        if kernels is not None:
            found = self._each(saved["x"], kernels, offset)
        if moved is not None:
            moved = moved.contiguous(memory_format=_format(saved["x"]))
            through = F.conv2d(moved, saved["weight"], None, *self._geometry, self._groups)
            found = through if found is None else found.add_(through)
        return found

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        kernels = saved["along"][0]
        if "columns" in saved:
            return [self._pull_columns(saved, shift, delta, kernels)]
        if (
            shift is not None
            and delta is not None
            and kernels is not None
            and self._narrow(saved["x"], kernels)
        ):
            pair = torch.cat([self._weight.expand(len(kernels), -1, -1, -1, -1), kernels], 1)
            return [self._each_adjoint(torch.cat([shift, delta], 1), saved["x"], pair)]
        found = None if shift is None else self._adjoint(saved, shift)
        if kernels is not None and delta is not None:
            each = self._each_adjoint(delta, saved["x"], kernels)
            found = each if found is None else found.add_(each)
        return [found]

    def _narrow(self, x: Tensor, kernels: Tensor) -> bool:
        """Whether products with the kernel and with its directions are worth one call."""
        alone = self._groups == 1 and len(x) == len(kernels) > 1
        return alone and x.is_cpu and self._weight.shape[0] <= _NARROW

    def _along(self, directions: Directions) -> tuple[Tensor | None, Tensor | None]:
        """Directions (V, ...) of the kernel and the bias that are convolved with."""
        if self._fold is not None and any(direction is not None for direction in directions):
            return self._fold.directions(self._plain, self._plain_bias, directions)
        return directions[0], directions[1] if len(directions) == 2 else None

    def _adjoint(self, saved: Saved, delta: Tensor) -> Tensor:
        """Gradient of the input."""
        if "columns" in saved:
            if _together(len(delta)):
                return self._backward(delta, saved["x"], self._weight, 1, True)
            size = saved["x"].shape
            saved["fields"] = fields = self._adjoints.fields(delta, size)
            return self._adjoints.images(torch.bmm(self._turned.expand(len(delta), -1, -1), fields), size)
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
        strides, padding, _ = self._geometry
        kernel = self._weight.shape[2:]
        height, width = ((shape[2 + i] + 2 * padding[i] - kernel[i]) // strides[i] + 1 for i in (0, 1))
        return height, width

    def _columns(self, x: Tensor) -> Tensor:
        """Receptive fields (N, C * kh * kw, positions)."""
        tall, wide = self._geometry[1]
        return _patches(x, self._weight.shape[2:], self._geometry[0], [wide, wide, tall, tall])

    def _push_columns(self, saved: Saved, moved: Maybe, kernels: Maybe, offset: Maybe) -> Maybe:
        columns, samples = saved["columns"], len(saved["x"])
        found = None
        if kernels is not None:
            each = _per_sample(kernels.flatten(2), samples)
            if offset is None:
                found = torch.bmm(each, columns)
            else:
                found = torch.baddbmm(_per_sample(offset, samples)[:, :, None], each, columns)
        together = _together(samples)
        if moved is not None and not together:
            flat = self._flat.expand(samples, -1, -1)
            inner = self._columns(moved)
            found = torch.bmm(flat, inner) if found is None else found.baddbmm_(flat, inner)
        whole = None if found is None else found.unflatten(2, self._size(saved["x"].shape))
        if moved is not None and together:
            through = F.conv2d(moved, self._weight, None, *self._geometry)
            whole = through if whole is None else whole.add_(through)
        return whole

    def _pull_columns(self, saved: Saved, shift: Maybe, delta: Maybe, kernels: Maybe) -> Maybe:
        samples, size = len(saved["x"]), saved["x"].shape
        found = None
        if shift is not None:
            fields = self._adjoints.fields(shift, size)
            found = torch.bmm(self._turned.expand(samples, -1, -1), fields)
        if kernels is not None and delta is not None:
            fields = saved["fields"] if "fields" in saved else self._adjoints.fields(delta, size)
            each = _per_sample(self._adjoints.matrices(kernels), samples)
            found = torch.bmm(each, fields) if found is None else found.baddbmm_(each, fields)
        return None if found is None else self._adjoints.images(found, size)


def _together(samples: int) -> bool:
    """Whether small convolutions by shared weights go to the library; a compiler makes more of products."""
    return samples >= _MANY and not torch.compiler.is_compiling()


class Adjoint:
    """The adjoint of a strided convolution (no dilation) as a product with receptive fields, like itself.

    A stride s leaves s * s kinds of input pixels, by their place modulo s. Each kind is reached by every s-th
    row and column of the kernel (O, C, kh, kw), from a window of outputs that all kinds of one place share.
    So all of them come from the same fields, as s * s times as many channels, which are then dealt out over
    the plane.
    """

    def __init__(self, shape: Sequence[int], geometry: Geometry, device: torch.device) -> None:
        self._strides, padding, _ = geometry
        rows, columns = (_reach(shape[2 + i], self._strides[i], padding[i]) for i in (0, 1))
        self._low = (rows[1], columns[1])
        self._window = [len(rows[0][0]), len(columns[0][0])]
        # Where a place does not reach an output there is no weight: one zero is kept behind the kernel's own.
        none = shape[2] * shape[3]
        order = [
            none if u is None or v is None else u * shape[3] + v
            for kind in rows[0]
            for other in columns[0]
            for u in kind
            for v in other
        ]
        self._order = torch.tensor(order, device=device)

    def matrices(self, kernels: Tensor) -> Tensor:
        """Kernels (V, O, C, kh, kw) as matrices (V, C * s * s, O * window)."""
        if self._strides == [1, 1]:
            return kernels.flip(3, 4).transpose(1, 2).flatten(2)
        victims, outputs, inputs = kernels.shape[:3]
        padded = F.pad(kernels.flatten(3), (0, 1))
        places = self._window[0] * self._window[1]
        picked = padded.index_select(3, self._order).view(victims, outputs, inputs, -1, places)
        return picked.permute(0, 2, 3, 1, 4).reshape(victims, -1, outputs * places)

    def fields(self, delta: Tensor, size: torch.Size) -> Tensor:
        """Fields (N, O * window, places) of outputs (N, O, H', W') for inputs of `size` (N, C, H, W)."""
        margins = []
        for i in (1, 0):
            places = -(-size[2 + i] // self._strides[i])
            before = -self._low[i]
            margins += [before, places - 1 + self._window[i] - before - delta.shape[2 + i]]
        return _patches(delta, self._window, [1, 1], margins)

    def images(self, found: Tensor, size: torch.Size) -> Tensor:
        """Inputs (N, C, H, W) of products (N, C * s * s, places)."""
        tall, wide = self._strides
        height, width = (-(-size[2 + i] // self._strides[i]) for i in (0, 1))
        if tall == wide == 1:
            return found.unflatten(2, (height, width))
        dealt = found.view(len(found), size[1], tall, wide, height, width).permute(0, 1, 4, 2, 5, 3)
        whole = dealt.reshape(len(found), size[1], height * tall, width * wide)
        return whole[:, :, : size[2], : size[3]]


def _reach(kernel: int, stride: int, padding: int) -> tuple[list[list[int | None]], int]:
    """For each place modulo the stride the kernel's index at each output of the window, and the window's first.

    Place s i + a of the input meets output i + d by index a + padding - s d.
    """
    last = (stride - 1 + padding) // stride
    first = -((kernel - 1 - padding) // stride)
    window = range(first, last + 1)
    table = [[place + padding - stride * d for d in window] for place in range(stride)]
    return [[u if 0 <= u < kernel else None for u in row] for row in table], first


def _patches(x: Tensor, kernel: Sequence[int], strides: Sequence[int], margins: list[int]) -> Tensor:
    """Receptive fields (N, C * kh * kw, positions): one strided copy, several times faster than F.unfold.

    `margins`: zeros to the left, right, top and bottom; fewer than none cuts off.
    """
    padded = (F.pad(x, margins) if any(margins) else x).contiguous()
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


def _format(x: Tensor) -> torch.memory_format:
    """Of the memory of (N, C, H, W): channels-last, and not planes too; else planes."""
    last = x.is_cpu and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@dataclass(frozen=True)
class Fold:
    """BatchNorm with running statistics as part of the convolution before it.

    y = gamma (W x + b - m) / s + beta is a convolution with kernel (gamma / s) W and bias beta + (b - m)
    gamma / s. Gradients G, g of that kernel and bias give those of the four tensors by the chain rule, which
    touches tensors of the weights' size and no activations.
    """

    names: tuple[str, ...]
    beta: Tensor
    mean: Tensor
    scale: Tensor  # 1 / s
    gain: Tensor  # gamma / s

    def _centre(self, bias: Tensor | None) -> Tensor:
        return -self.mean if bias is None else bias - self.mean

    def weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the folded convolution."""
        return weight * self.gain[:, None, None, None], self.beta + self._centre(bias) * self.gain

    def gradients(
        self, weight: Tensor, bias: Tensor | None, kernels: Tensor, offsets: Tensor, out: Sequence[Tensor]
    ) -> None:
        """Write the gradients (V, ...) of kernel, bias (where there is one), gamma and beta into `out`."""
        along = (kernels.flatten(2) * weight.flatten(1)).sum(2)
        torch.mul(kernels, self.gain[:, None, None, None], out=out[0])
        if bias is not None:
            torch.mul(offsets, self.gain, out=out[1])
        torch.mul(along.addcmul_(self._centre(bias), offsets), self.scale, out=out[-2])
        out[-1].copy_(offsets)

    def directions(
        self, weight: Tensor, bias: Tensor | None, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        """The adjoint of :meth:`gradients`: directions of the folded kernel and bias."""
        assert directions[0] is not None
        gamma, beta = directions[-2:]
        assert gamma is not None
        assert beta is not None
        rate = gamma * self.scale
        kernels = directions[0] * self.gain[:, None, None, None]
        kernels = kernels.addcmul_(rate[:, :, None, None, None], weight)
        offsets = torch.addcmul(beta, rate, self._centre(bias))
        if bias is not None:
            assert directions[1] is not None
            offsets = torch.addcmul(offsets, directions[1], self.gain)
        return kernels, offsets
