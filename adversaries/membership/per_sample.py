"""Per-sample losses of a classifier, and inner products of per-sample gradients with updates.

The gradients themselves are never all in memory, and of :class:`ConvChain` and :class:`ResNet` the linear head's,
which may hold millions of entries, is not formed at all: it is the outer product of the residual ``r`` (softmax
minus one-hot) and the features ``h``, so that ``<g, U> = r^T U h`` and ``||g|| = ||r|| ||h||``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedattack.errors import PayloadError
from fedattack.models.classifiers.lenet import ConvChain
from fedattack.models.classifiers.resnet import ResNet
from fedattack.observation import Update
from fedattack.task import trained_parameters

State = dict[str, Tensor]

MEMORY = 64 * 2**20
"""Floats that one chunk of per-sample gradients may take (256 MiB)."""

_GATHERING = 90
"""About what picking one entry costs on a CPU core, in multiply-adds of a dense product."""


@dataclass(frozen=True)
class _Part:
    """The entries of an update that fall into one group of tensors: flat positions (None: all) and values."""

    positions: Tensor | None
    values: Tensor

    def dot(self, rows: Tensor) -> Tensor:
        """Inner products with dense rows (B, size), shape (B,)."""
        return (rows if self.positions is None else rows[:, self.positions]) @ self.values

    def outer_dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products with the outer products of left (B, m) and right (B, n), shape (B,)."""
        width = right.shape[1]
        size = left.shape[1] * width
        if self.positions is None or _GATHERING * len(self.positions) > size:
            matrix = self.values
            if self.positions is not None:
                matrix = self.values.new_zeros(size).index_put((self.positions,), self.values)
            return ((left @ matrix.reshape(-1, width)) * right).sum(1)
        total = left.new_zeros(len(left))
        step = max(1, MEMORY // (2 * len(left)))
        for places, values in zip(self.positions.split(step), self.values.split(step), strict=True):
            total += (left[:, places // width] * right[:, places % width]) @ values
        return total


def _part(update: Update, names: set[str], device: torch.device) -> _Part:
    """The part of `update` inside the tensors `names`, addressed by their own concatenation."""
    positions, values, start = [], [], 0
    for name, shape, places, entries in update.layers():
        if name in names:
            positions.append(places + start)
            values.append(entries)
            start += torch.Size(shape).numel()
    if not values:
        return _Part(None, torch.zeros(0, device=device))
    dense = update.indices is None
    return _Part(None if dense else torch.cat(positions).to(device), torch.cat(values).to(device))


class _Body(nn.Module):
    """A model up to its head, under the model's own parameter names."""

    def __init__(self, model: ConvChain | ResNet) -> None:
        super().__init__()
        self.body = model.body

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, head.in_features)."""
        return self.body(images).flatten(1)


def _whole_gradients(model: nn.Module, state: State, names: list[str], x: Tensor, y: Tensor) -> Tensor:
    """Per-sample gradients of the cross-entropy over the tensors `names`, shape (B, size)."""
    fixed = {name: tensor for name, tensor in state.items() if name not in names}

    def loss(moving: State, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**fixed, **moving}, (image[None],))
        return functional.cross_entropy(logits, label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))({name: state[name] for name in names}, x, y)
    return torch.cat([gradients[name].flatten(1) for name in names], dim=1)


def _split_gradients(
    model: ConvChain | ResNet, state: State, names: list[str], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients over the body's tensors `names` (B, size); the head's as residual and features."""
    body = _Body(model)
    below = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    fixed = {name: tensor for name, tensor in below.items() if name not in names}
    with torch.no_grad():
        features = functional_call(body, below, (x,))
        logits = functional.linear(features, state["head.weight"], state.get("head.bias"))
        residual = logits.softmax(1) - functional.one_hot(y, logits.shape[1])
        pull = residual @ state["head.weight"]  # gradient of the loss in the features

    def scalar(moving: State, image: Tensor, direction: Tensor) -> Tensor:
        return functional_call(body, {**fixed, **moving}, (image[None],))[0] @ direction

    gradients = vmap(grad(scalar), in_dims=(None, 0, 0))({name: state[name] for name in names}, x, pull)
    return torch.cat([gradients[name].flatten(1) for name in names], dim=1), residual, features


def gradient_products(
    model: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor, updates: Sequence[Update]
) -> tuple[Tensor, Tensor]:
    """Inner product of every sample's gradient with every update, and the gradients' norms.

    Returns float64 (K, N) and (N,), on the CPU; norms are over all parameters, sent or not. PayloadError if
    an update is not over the model's parameters.

    Parameters
    ----------
    model : nn.Module
        In eval mode, on the device to compute on. Only its architecture is used.
    weights : dict of str to Tensor
        Parameters and buffers to differentiate at.
    updates : sequence of Update
        Each over all of the model's parameters, in the model's order; sparse ones count as zero where nothing
        was sent.
    """
    device = next(model.parameters()).device
    state = {name: tensor.to(device) for name, tensor in weights.items()}
    order = list(trained_parameters(model))
    for update in updates:
        if list(update.names) != order:
            raise PayloadError(f"update over tensors {list(update.names)}; the model's are {order}")
    splits = isinstance(model, ConvChain | ResNet)
    head = {name for name in order if splits and name.startswith("head.")}
    rest = [name for name in order if name not in head]
    rest_parts = [_part(update, set(rest), device) for update in updates]
    weight_parts = [_part(update, head - {"head.bias"}, device) for update in updates]
    bias_parts = [_part(update, head - {"head.weight"}, device) for update in updates]

    gathered = max((part.values.numel() for part in rest_parts), default=0)
    per_sample = 2 * sum(state[name].numel() for name in rest) + gathered
    chunk = max(1, min(512, MEMORY // max(1, per_sample)))
    products = torch.empty(len(updates), len(images), dtype=torch.float64)
    norms = torch.empty(len(images), dtype=torch.float64)
    for start in range(0, len(images), chunk):
        here = slice(start, start + chunk)
        x, y = images[here].to(device), labels[here].to(device)
        if isinstance(model, ConvChain | ResNet):
            rows, r, h = _split_gradients(model, state, rest, x, y)
            squares = rows.square().sum(1) + r.square().sum(1) * (h.square().sum(1) + ("head.bias" in head))
            for k, (weight, bias) in enumerate(zip(weight_parts, bias_parts, strict=True)):
                products[k, here] = (weight.outer_dot(r, h) + bias.dot(r)).double().cpu()
        else:
            rows = _whole_gradients(model, state, rest, x, y)
            squares = rows.square().sum(1)
            products[:, here] = 0
        for k, part in enumerate(rest_parts):
            products[k, here] += part.dot(rows).double().cpu()
        norms[here] = squares.sqrt().double().cpu()
    return products, norms
