"""Per-sample gradients of one layer's tensors, from its inputs and the gradients at its outputs.

A function a kind of layer, registered by :func:`rule`; parameters of other layers are differentiated per sample. Of
a linear layer the gradient ``d a^T`` (`a` its input, `d` the gradient at its output) is never formed:
``<g_i, g_j> = (d_i . d_j)(a_i . a_j)``, and ``<g_i, U> = d_i^T U a_i``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

MEMORY = 64 * 2**20
"""Numbers that a temporary may hold (256 MiB of float32)."""

_GATHERING = 90
"""About what picking one entry costs on a CPU core, in multiply-adds of a dense product."""


@dataclass(frozen=True)
class Part:
    """The entries of an update inside one tensor: flat positions (None: all of them) and values."""

    positions: Tensor | None
    values: Tensor

    def dense(self, size: int) -> Tensor:
        """All entries, (size,), zeros where nothing was sent."""
        if self.positions is None:
            return self.values
        return self.values.new_zeros(size).index_put((self.positions,), self.values)


@dataclass(frozen=True)
class Rows:
    """Gradients of one tensor for B samples, as they are, (B, size)."""

    rows: Tensor

    @property
    def floats(self) -> int:
        """Numbers held for each sample."""
        return self.rows.shape[1]

    def squares(self) -> Tensor:
        """Squared norms, (B,)."""
        return self.rows.square().sum(1)

    def dot(self, parts: Sequence[Part]) -> Tensor:
        """Inner products with K updates, (K, B)."""
        if all(part.positions is None for part in parts):
            return torch.stack([part.values for part in parts]) @ self.rows.T
        return torch.stack([self.columns(part.positions) @ part.values for part in parts])

    def gram(self, other: Rows) -> Tensor:
        """Inner products with the gradients of other samples, (B, B')."""
        return self.rows @ other.rows.T

    def columns(self, positions: Tensor | None) -> Tensor:
        """The entries at these positions, (B, n)."""
        return self.rows if positions is None else self.rows[:, positions]


@dataclass(frozen=True)
class Outer:
    """Gradients of one matrix for B samples, as outer products of left (B, m) and right (B, n)."""

    left: Tensor
    right: Tensor

    @property
    def floats(self) -> int:
        """Numbers held for each sample."""
        return self.left.shape[1] + self.right.shape[1]

    def squares(self) -> Tensor:
        """Squared norms, (B,)."""
        return self.left.square().sum(1) * self.right.square().sum(1)

    def dot(self, parts: Sequence[Part]) -> Tensor:
        """Inner products with K updates, (K, B)."""
        return torch.stack([self._dot(part) for part in parts])

    def _dot(self, part: Part) -> Tensor:
        height, width = self.left.shape[1], self.right.shape[1]
        if part.positions is None or _GATHERING * len(part.positions) > height * width:
            matrix = part.dense(height * width).reshape(height, width)
            if height < width:  # the shorter side is what is left over
                return ((self.right @ matrix.T) * self.left).sum(1)
            return ((self.left @ matrix) * self.right).sum(1)
        total = self.left.new_zeros(len(self.left))
        step = max(1, MEMORY // (2 * len(total)))
        for places, values in zip(part.positions.split(step), part.values.split(step), strict=True):
            total += self.columns(places) @ values
        return total

    def gram(self, other: Outer) -> Tensor:
        """Inner products with the gradients of other samples, (B, B')."""
        return (self.left @ other.left.T).mul_(self.right @ other.right.T)

    def columns(self, positions: Tensor) -> Tensor:
        """The entries at these positions, (B, n)."""
        width = self.right.shape[1]
        return self.left[:, positions // width].mul_(self.right[:, positions % width])


Piece = Rows | Outer

Rule = Callable[[Any, Tensor, Tensor], dict[str, Piece] | None]
"""(layer, its input, gradients at its output) -> own parameter -> piece; None: this layer is set up unusually."""

RULES: dict[type[nn.Module], Rule] = {}
"""Kind of layer, not of its subclasses, which may compute something else -> its rule."""


def rule(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register the rule of some kinds of layers."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


@rule(nn.Linear)
def linear(layer: nn.Linear, inputs: Tensor, slopes: Tensor) -> dict[str, Piece] | None:
    """Outer products; None for inputs of several rows a sample, whose sum is none."""
    return {"weight": Outer(slopes, inputs), "bias": Rows(slopes)} if inputs.dim() == 2 else None


@rule(nn.Conv2d)
def convolution(layer: nn.Conv2d, inputs: Tensor, slopes: Tensor) -> dict[str, Piece] | None:
    """All samples as groups of one convolution, several times as fast on a CPU as products with unfolded inputs."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    count, (outputs, *kernel) = len(inputs), layer.weight.shape
    weight = conv2d_weight(
        inputs.flatten(0, 1)[None],
        (count * outputs, *kernel),
        slopes.flatten(0, 1)[None],
        layer.stride,
        layer.padding,
        layer.dilation,
        count * layer.groups,
    )
    return {"weight": Rows(weight.reshape(count, -1)), "bias": Rows(slopes.flatten(2).sum(2))}


@rule(nn.BatchNorm1d, nn.BatchNorm2d)
def batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, slopes: Tensor) -> dict[str, Piece] | None:
    """In eval mode, where it is an affine map of each channel; None without running statistics."""
    if layer.running_mean is None or layer.running_var is None:
        return None
    shape = (*slopes.shape[:2], -1)
    bias = slopes.reshape(shape).sum(2)
    along = torch.einsum("bcl,bcl->bc", slopes.reshape(shape), inputs.reshape(shape))
    weight = (along - layer.running_mean * bias) * (layer.running_var + layer.eps).rsqrt()
    return {"weight": Rows(weight), "bias": Rows(bias)}
