"""Gradients of a chain of convolutions of which few entries were sent; never forms the head's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.gradients import closed_form
from adversaries.inversion.gradients.closed_form import Chain, ForwardPass, Weights
from adversaries.inversion.gradients.sent import Layout, Prediction, targets_of

_TALL_FROM = 16
"""From this many samples on, BLAS is faster with the classes as rows of the product than with the samples."""


class ChainGradients:
    """Closed form for a chain of convolutions (float32); arguments as for :func:`gradient_model`."""

    joint = True

    def __init__(self, chain: Chain, weights: Weights, layout: Layout, labels: Tensor | None) -> None:
        self._chain, device = chain, layout.sent.values.device
        names = (*chain.names, "head.weight", "head.bias")
        self._weights = {name: weights[name].detach().float().to(device) for name in names}
        self._labels = None if labels is None else labels.to(device)
        self._names, self.sent = layout.names, layout.sent
        self._flat = dict(zip(layout.names, layout.flat, strict=True))
        head = self._weights["head.weight"]
        # BLAS multiplies few samples fastest by the transposed layout and many by the plain one.
        few = labels is None or labels.numel() < _TALL_FROM
        self._transposed = head.t().contiguous() if few else head.t()

    def predict(
        self,
        images: Tensor,
        victims: slice,
        *,
        whole: bool = False,
        shares: Tensor | None = None,
        statistics: bool = False,
    ) -> Prediction:
        chain, weights = self._chain, self._weights
        count, batch = images.shape[:2]
        targets = targets_of(shares, self._labels, victims)
        forward = closed_form.run_forward(chain, weights, images.flatten(0, 1))
        top = forward.outputs[-1]
        flat_features = chain.activation.value(top).flatten(1)
        predicted, pulled = self._head(flat_features, targets.flatten(0, 1))
        features, predicted = (x.unflatten(0, (count, batch)) for x in (flat_features, predicted))
        found = self._convolutions(forward, pulled, batch) if len(self._names) > 1 else {}
        entries = []
        for name in self._names:
            everyone = self._flat[name]
            flat = None if everyone is None else everyone[victims]
            if name == "head.weight":
                entries.append(_head_weight(predicted, targets, features, flat))
            elif name == "head.bias":
                residual = (
                    _residual(predicted, targets) if flat is None else _residual_at(predicted, targets, flat)
                )
                entries.append(residual.mean(1))
            else:
                entries.append(found[name] if flat is None else found[name].gather(1, flat))
        square = None
        if whole:
            residual = _residual(predicted, targets)
            overlap = (residual @ residual.transpose(1, 2)) * (features @ features.transpose(1, 2)) / batch**2
            squares = {name: gradient.square().sum(1) for name, gradient in found.items()}
            squares["head.weight"] = overlap.sum((1, 2))
            squares["head.bias"] = residual.mean(1).square().sum(1)
            square = torch.stack([squares[name] for name in self._names]).sum(0)
        return Prediction(torch.cat(entries, 1), square)

    def _head(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted shares p (N, classes) and the loss' gradient at the features, W^T (p - y) (N, F)."""
        weight, bias = self._weights["head.weight"], self._weights["head.bias"]
        if len(features) < _TALL_FROM:
            shares = torch.addmm(bias, features, self._transposed).softmax(1)
            pulled = shares @ self._transposed.t()
        else:
            shares = (weight @ features.t()).t().add(bias).softmax(1)
            pulled = (weight.t() @ shares.t()).t()
        return shares, pulled - (targets @ weight if targets.is_floating_point() else weight[targets])

    def _convolutions(self, forward: ForwardPass, pulled: Tensor, batch: int) -> dict[str, Tensor]:
        """Gradients (V, size) of the convolutions' tensors, means over each batch."""
        chain, top = self._chain, forward.outputs[-1]
        last = pulled.reshape(top.shape) * (chain.activation.slope(top) / batch)
        delta = closed_form.deltas(chain, self._weights, forward, last)
        samples = closed_form.kernel_gradients(chain, forward, delta)
        if batch == 1:
            return {name: each.flatten(1) for name, each in samples.items()}
        return {name: each.flatten(1).unflatten(0, (-1, batch)).sum(1) for name, each in samples.items()}


def _residual(shares: Tensor, targets: Tensor) -> Tensor:
    """p - y, (V, B, classes)."""
    if targets.is_floating_point():
        return shares - targets
    return shares - F.one_hot(targets, shares.shape[2]).to(shares.dtype)


def _residual_at(shares: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """p - y at some classes, (V, B, E), from (V, B, classes), targets and (V, E)."""
    where = rows[:, None].expand(-1, shares.shape[1], -1)
    if targets.is_floating_point():
        return (shares - targets).gather(2, where)
    return shares.gather(2, where) - (rows[:, None] == targets[:, :, None]).to(shares.dtype)


def _head_weight(shares: Tensor, targets: Tensor, features: Tensor, flat: Tensor | None) -> Tensor:
    """Sent entries of the mean of (p - y) h^T over each batch, features (V, B, F)."""
    batch, width = features.shape[1:]
    if flat is None:
        return (_residual(shares, targets).transpose(1, 2) @ (features / batch)).flatten(1)
    rows, cols = flat // width, flat % width
    picked = features.gather(2, cols[:, None].expand(-1, batch, -1))
    return (_residual_at(shares, targets, rows) * picked).mean(1)
