"""What a small residual vouches for: how far off an answer could be although it explains the update.

A residual at rounding level says that this answer explains the update, not that no other does. Beside it stand: how
far noise of its size would move each input, whether each label leaves a trace that such noise could not hide,
whether the sent entries are enough for each part of the inputs, and whether pixels are pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adversaries.inversion.gradients.activations import homogeneous
from adversaries.reconstruction.tensor.from_entries import Entries
from adversaries.reconstruction.tensor.head import TwoLayerHead

UNCERTAIN = 1e-3
"""Largest predicted error of a certified input, root mean square over its entries: 60 dB where these are pixels."""

SAFETY = 5.0
"""Standard deviations of the noise that a residual is taken for."""

COUNT = 0.05
"""Largest predicted error of a softmax residual that a label may be read from."""

TRACE = 100.0
"""How many times the head's residual the trace of a label must be."""

_TWINS = 2e-2
"""Relative misfit below which another norm explains a sample's softmax residual as well."""


def input_errors(head: TwoLayerHead, inputs: Tensor, weights: Tensor, left: Tensor) -> Tensor:
    """Predicted error of each input (B,), root mean square over its entries, from the wide layer's gradient.

    Off the samples' span the gradient ``K x`` with ``K_ji = r_i s'(w_j . x_i)`` is linear in the inputs: what is
    `left` (m, d) unexplained moves them by ``K^+ left``, and would by ``sigma sqrt((K'K)^-1)_ii`` an entry if it
    were noise. In the span, a sample's norm and weight (r, (B,)) are told apart by how s'(w.x) bends: where it
    hardly does (a nearly linear activation) the norm's error is larger by one over the sine between the two. For
    homogeneous activations, see :func:`norm_errors`.
    """
    u = head.wide @ inputs.T
    slope = head.activation.slope(u)
    k = slope * weights
    size = k.norm(dim=0).clamp_min(1e-300)
    inverse = _inverse(k / size)
    if inverse is None:
        return torch.full_like(weights, torch.inf)
    noise = SAFETY * float(left.square().mean().sqrt()) * inverse.diagonal().sqrt() / size
    moved = (inverse @ ((k / size).T @ left) / size[:, None]).square().mean(1).sqrt()
    error = moved + noise
    if homogeneous(head.name):
        return error
    along = slope + u * head.activation.bend(u)
    cosine = (along * slope).sum(0) / (along.norm(dim=0) * slope.norm(dim=0)).clamp_min(1e-300)
    sine = (1 - cosine.square()).clamp_min(1e-16).sqrt()
    return (error.square() + (error / sine).square() / inputs.shape[1]).sqrt()


def count_errors(head: TwoLayerHead, inputs: Tensor, left: Tensor, samples: int) -> Tensor:
    """Predicted error (B,) of softmax residuals; `left` (C, m) is the head's gradient minus the model's."""
    hidden = head.activation.value(inputs @ head.wide.T)
    size = hidden.norm(dim=1).clamp_min(1e-300)
    inverse = _inverse((hidden / size[:, None]).T)
    if inverse is None:
        return torch.full_like(size, torch.inf)
    return SAFETY * samples * float(left.square().mean().sqrt()) * inverse.diagonal().sqrt() / size


def norm_errors(head: TwoLayerHead, inputs: Tensor, counts: Tensor, of_residuals: Tensor) -> Tensor:
    """Relative error (B,) of norms read by :func:`~.head.fix_scales`, large near the maximum of ``n delta(n)``."""
    z, copies = head.logits(inputs), counts.sum(1, keepdim=True)
    p = z.softmax(1)
    speed = copies * p - counts + copies * p * (z - (p * z).sum(1, keepdim=True))
    return of_residuals / speed.norm(dim=1).clamp_min(1e-300)


def has_twins(head: TwoLayerHead, inputs: Tensor, counts: Tensor) -> bool:
    """Whether an input could as well be another multiple of itself within the range of pixels.

    With a homogeneous activation, ``n delta(n)`` of the head's class has a maximum, and equal values on either side.
    """
    if not homogeneous(head.name):
        return False
    z, copies = head.logits(inputs), counts.sum(1, keepdim=True)
    seen = copies * z.softmax(1) - counts
    factors = torch.logspace(-5, 5, 16001, dtype=z.dtype, device=z.device)
    for part in factors[factors.log().abs() > 0.05][:, None, None].split(1000):
        misfit = (part * (copies * (part * z).softmax(2) - counts) - seen).norm(dim=2)
        close = misfit < _TWINS * seen.norm(dim=1)
        if bool((close & (part[:, 0] * inputs.amax(1) <= 1 + UNCERTAIN)).any()):
            return True
    return False


def merged_errors(inputs: Tensor, counts: Tensor, residual: float) -> Tensor:
    """By how much samples taken for copies of one input (B, d) may differ; (B,), root mean square over its entries.

    Equally labelled samples at x + v and x - v change the update in second order only: by about (v / x)^2 of their
    share.
    """
    copies = counts.sum(1).to(inputs.dtype)
    split = (residual * copies.sum() / copies).sqrt() / 2 * inputs.square().mean(1).sqrt()
    return torch.where(copies > 1, split, torch.zeros_like(split))


def traces(head: TwoLayerHead, entries: Entries, inputs: Tensor, labels: Tensor) -> Tensor:
    """How much the sent entries of the head change where a sample's label does, over their norm; (B,).

    The least over all other classes: a label whose row, and any other's, has no entries is anyone's guess.
    """
    square = head.activation.value(inputs @ head.wide.T).square()
    rows = torch.zeros(head.classes, len(inputs), dtype=square.dtype, device=square.device)
    rows.index_add_(0, entries.head_rows, square.T[entries.head_columns])
    own = rows[labels, torch.arange(len(labels), device=labels.device)]
    rows[labels, torch.arange(len(labels), device=labels.device)] = torch.inf
    norm = entries.head_values.norm().clamp_min(1e-300)
    return (own + rows.amin(0)).sqrt() / len(inputs) / norm


def _inverse(columns: Tensor) -> Tensor | None:
    """(K'K)^-1 of columns of norm one; None where they are dependent."""
    inverse, failed = torch.linalg.inv_ex(columns.T @ columns)
    return None if int(failed) or not bool((inverse.diagonal() > 0).all()) else inverse
