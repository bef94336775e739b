"""The two ways to compute what a client with given images would have sent.

A back-end holds what V victims sent (:class:`Sent`) and predicts the same entries from candidate images,
differentiably. :class:`ChainGradients` does it in closed form for a chain of convolutions and never forms the head's
gradient where that is sparse; :class:`AutogradGradients` differentiates any model twice, one victim at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.reconstruction import closed_form
from adversaries.reconstruction.closed_form import Chain, ForwardPass, Weights
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Update

Layers = Literal["all", "last"]

_SPARSE_SHARE = 1 / 8
"""Above this sent share a tensor is handled densely: gathering would cost more than it saves."""

_TALL_FROM = 16
"""From this many samples on, BLAS is faster with the classes as rows of the product than with the samples."""


@dataclass(frozen=True)
class Sent:
    """What V victims sent, side by side and padded.

    Attributes
    ----------
    values : Tensor
        float32 (V, K), zero where `valid` is.
    valid : Tensor
        float32 (V, K), 1 where the entry was sent and 0 where it is padding.
    """

    values: Tensor
    valid: Tensor

    def __getitem__(self, victims: slice) -> Sent:
        return Sent(self.values[victims], self.valid[victims])


@dataclass(frozen=True)
class Prediction:
    """What candidate images would have sent.

    Attributes
    ----------
    entries : Tensor
        (V, K), aligned with :attr:`Sent.values`; arbitrary where that is padding.
    square : Tensor or None
        (V,): squared norm of the whole gradient, unsent entries included, where it was asked for.
    """

    entries: Tensor
    square: Tensor | None = None


class GradientModel(Protocol):
    """A back-end: what was sent and how to predict it.

    Attributes
    ----------
    sent : Sent
    joint : bool
        Whether all victims are best predicted in one call; otherwise one call per victim keeps the memory down.
    """

    sent: Sent
    joint: bool

    def predict(self, images: Tensor, victims: slice, whole: bool = False) -> Prediction:
        """Entries that `images` (V', B, C, H, W) of the given victims would have sent, differentiable in them."""
        ...


@dataclass(frozen=True)
class _Positions:
    """Where the sent entries of one tensor lie: (V, K_l) flat positions, or None when it is handled densely."""

    flat: Tensor | None
    sent: Sent


def _lay_out(updates: Sequence[Update], device: torch.device) -> dict[str, _Positions]:
    """Sent entries of all victims, tensor by tensor, padded to the longest."""
    layers = [list(update.layers()) for update in updates]
    laid: dict[str, _Positions] = {}
    for pieces in zip(*layers, strict=True):
        name, shape = pieces[0][0], pieces[0][1]
        size = torch.Size(shape).numel()
        longest = max(int(values.numel()) for *_, values in pieces)
        dense = longest > size * _SPARSE_SHARE
        width = size if dense else longest
        values, valid = torch.zeros(len(pieces), width), torch.zeros(len(pieces), width)
        flat = torch.zeros(len(pieces), width, dtype=torch.int64)
        for v, (_, _, positions, sent) in enumerate(pieces):
            places = positions if dense else torch.arange(sent.numel())
            values[v, places] = sent.float().cpu()
            valid[v, places] = 1.0
            if not dense:
                flat[v, places] = positions
        laid[name] = _Positions(None if dense else flat.to(device), Sent(values.to(device), valid.to(device)))
    return laid


def _chosen(names: Sequence[str], shapes: Sequence[tuple[int, ...]], layers: Layers) -> list[str]:
    """Tensors that take part: all, or the weight of the last linear layer."""
    if layers == "all":
        return list(names)
    matrices = [name for name, shape in zip(names, shapes, strict=True) if len(shape) == 2]
    if not matrices:
        raise NotApplicable("layers = 'last' needs a linear layer, which this model does not have; use 'all'")
    return matrices[-1:]


def _join(laid: dict[str, _Positions], names: Sequence[str]) -> Sent:
    return Sent(
        torch.cat([laid[name].sent.values for name in names], 1),
        torch.cat([laid[name].sent.valid for name in names], 1),
    )


def _select(dense: Tensor, flat: Tensor | None) -> Tensor:
    """Sent entries (V, K_l) of dense per-victim gradients (V, size)."""
    return dense if flat is None else dense.gather(1, flat)


class ChainGradients:
    """Closed form for a chain of convolutions: all victims in one pass.

    Parameters
    ----------
    chain : Chain
        From :func:`adversaries.reconstruction.closed_form.describe`.
    weights : mapping of str to Tensor
        The weights that were sent out, float32.
    updates : sequence of Update
        One gradient per victim.
    labels : Tensor
        int64 (V, B).
    layers : {"all", "last"}
        Which tensors take part; "last" is the head's weight alone.
    device : torch.device
    """

    joint = True

    def __init__(
        self,
        chain: Chain,
        weights: Weights,
        updates: Sequence[Update],
        labels: Tensor,
        layers: Layers,
        device: torch.device,
    ) -> None:
        self._chain = chain
        self._weights = {name: weights[name].detach().float().to(device) for name in updates[0].names}
        self._labels = labels.to(device)
        self._names = _chosen(updates[0].names, updates[0].shapes, layers)
        laid = _lay_out(updates, device)
        self._flat = {name: laid[name].flat for name in self._names}
        self.sent = _join(laid, self._names)
        head = self._weights["head.weight"]
        # BLAS multiplies few samples fastest by the transposed layout and many by the plain one.
        self._transposed = head.t().contiguous() if labels.numel() < _TALL_FROM else head.t()

    def predict(self, images: Tensor, victims: slice, whole: bool = False) -> Prediction:
        """Entries (V', K) that `images` (V', B, C, H, W) of the given victims would have sent."""
        chain, weights = self._chain, self._weights
        count, batch = images.shape[:2]
        labels = self._labels[victims]
        forward = closed_form.run_forward(chain, weights, images.flatten(0, 1))
        top = forward.outputs[-1]
        flat_features = chain.activation.value(top).flatten(1)
        shares, pulled = self._head(flat_features, labels.flatten())
        features, shares = (x.unflatten(0, (count, batch)) for x in (flat_features, shares))
        found = self._convolutions(forward, pulled, batch) if len(self._names) > 1 else {}
        entries = []
        for name in self._names:
            everyone = self._flat[name]
            flat = None if everyone is None else everyone[victims]
            if name == "head.weight":
                entries.append(_head_weight(shares, labels, features, flat))
            elif name == "head.bias":
                entries.append(_head_bias(shares, labels, flat))
            else:
                entries.append(_select(found[name], flat))
        square = None
        if whole:
            residual = _residual(shares, labels)
            overlap = (residual @ residual.transpose(1, 2)) * (features @ features.transpose(1, 2)) / batch**2
            squares = {name: gradient.square().sum(1) for name, gradient in found.items()}
            squares["head.weight"] = overlap.sum((1, 2))
            squares["head.bias"] = residual.mean(1).square().sum(1)
            square = torch.stack([squares[name] for name in self._names]).sum(0)
        return Prediction(torch.cat(entries, 1), square)

    def _head(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted shares p (N, classes) and the loss' gradient at the features, W^T (p - e_y) (N, F)."""
        weight, bias = self._weights["head.weight"], self._weights["head.bias"]
        if len(features) < _TALL_FROM:
            shares = torch.addmm(bias, features, self._transposed).softmax(1)
            pulled = shares @ self._transposed.t()
        else:
            shares = (weight @ features.t()).t().add(bias).softmax(1)
            pulled = (weight.t() @ shares.t()).t()
        return shares, pulled - weight[labels]

    def _convolutions(self, forward: ForwardPass, pulled: Tensor, batch: int) -> dict[str, Tensor]:
        """Gradients (V, size) of the convolutions' tensors, means over each batch."""
        chain = self._chain
        top = forward.outputs[-1]
        last = pulled.reshape(top.shape) * (chain.activation.slope(top) / batch)
        found: dict[str, Tensor] = {}
        for layer, inputs, delta in zip(
            chain.convolutions,
            forward.inputs,
            closed_form.deltas(chain, self._weights, forward, last),
            strict=True,
        ):
            kernels = closed_form.correlate(layer, delta, closed_form.patches(layer, inputs))
            for name, samples in ((layer.weight, kernels.flatten(1)), (layer.bias, delta.sum((2, 3)))):
                found[name] = samples if batch == 1 else samples.unflatten(0, (-1, batch)).sum(1)
        return found


def _residual(shares: Tensor, labels: Tensor) -> Tensor:
    """p - e_y, (V, B, classes)."""
    return shares - F.one_hot(labels, shares.shape[2]).to(shares.dtype)


def _residual_at(shares: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """p - e_y at some classes, (V, B, E), from (V, B, classes), (V, B) and (V, E)."""
    picked = shares.gather(2, rows[:, None].expand(-1, shares.shape[1], -1))
    return picked - (rows[:, None] == labels[:, :, None]).to(picked.dtype)


def _head_bias(shares: Tensor, labels: Tensor, flat: Tensor | None) -> Tensor:
    """Sent entries of the mean of p - e_y over each batch."""
    residual = _residual(shares, labels) if flat is None else _residual_at(shares, labels, flat)
    return residual.mean(1)


def _head_weight(shares: Tensor, labels: Tensor, features: Tensor, flat: Tensor | None) -> Tensor:
    """Sent entries of the mean of (p - e_y) h^T over each batch, features (V, B, F)."""
    batch, width = features.shape[1:]
    if flat is None:
        return (_residual(shares, labels).transpose(1, 2) @ (features / batch)).flatten(1)
    rows, cols = flat // width, flat % width
    picked = features.gather(2, cols[:, None].expand(-1, batch, -1))
    return (_residual_at(shares, labels, rows) * picked).mean(1)


class AutogradGradients:
    """Any differentiable model, by a backward pass that is itself differentiated.

    The model runs in training mode, as the client's did: BatchNorm uses the batch's statistics and no running
    statistics are written.

    Parameters
    ----------
    model : ModelConfig
        Resolved.
    weights : mapping of str to Tensor
        State dict that was sent out.
    updates, labels, layers, device
        As for :class:`ChainGradients`.
    """

    joint = False

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        updates: Sequence[Update],
        labels: Tensor,
        layers: Layers,
        device: torch.device,
    ) -> None:
        self._module = build_model(model).to(device).train()
        self._module.load_state_dict(dict(weights))
        for part in self._module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.track_running_stats = False
        parameters = dict(self._module.named_parameters())
        self._names = _chosen(updates[0].names, updates[0].shapes, layers)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self._names)
        self._parameters = [parameters[name] for name in self._names]
        self._labels = labels.to(device)
        laid = _lay_out(updates, device)
        self._flat = {name: laid[name].flat for name in self._names}
        self.sent = _join(laid, self._names)

    def predict(self, images: Tensor, victims: slice, whole: bool = False) -> Prediction:
        """Entries (V', K) that `images` (V', B, C, H, W) of the given victims would have sent."""
        labels = self._labels[victims]
        rows, squares = [], []
        for v in range(len(images)):
            loss = F.cross_entropy(self._module(images[v]), labels[v])
            gradients = torch.autograd.grad(loss, self._parameters, create_graph=True)
            pieces = []
            for name, gradient in zip(self._names, gradients, strict=True):
                flat = self._flat[name]
                place = None if flat is None else flat[victims][v : v + 1]
                pieces.append(_select(gradient.reshape(1, -1), place))
            rows.append(torch.cat(pieces, 1))
            if whole:
                squares.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
        return Prediction(torch.cat(rows), torch.stack(squares) if whole else None)


def gradient_model(
    model: ModelConfig,
    weights: Weights,
    updates: Sequence[Update],
    labels: Tensor,
    layers: Layers,
    device: torch.device,
) -> GradientModel:
    """The closed form where the model is a chain of convolutions, else automatic differentiation.

    Parameters
    ----------
    model : ModelConfig
        Resolved.
    weights : mapping of str to Tensor
        State dict that was sent out.
    updates : sequence of Update
        Gradients (not deltas), one per victim.
    labels : Tensor
        int64 (V, B).
    layers : {"all", "last"}
    device : torch.device
    """
    try:
        chain = closed_form.describe(model)
    except NotApplicable:
        return AutogradGradients(model, weights, updates, labels, layers, device)
    return ChainGradients(chain, weights, updates, labels, layers, device)
