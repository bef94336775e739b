"""What a small residual vouches for: how far off an answer could be although it explains the update.

A residual at rounding level says that this answer explains the update, not that no other does. Beside it stand: how
far noise of its size would move each input, how far copies of one input may be apart, how bright a picture without
a trace may be, whether each label leaves a trace that such noise could not hide, whether the sent entries are enough
for each part of the inputs, and whether pixels are pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adversaries.inversion.gradients.activations import homogeneous
from adversaries.inversion.solvers.span import largest
from adversaries.reconstruction.tensor.from_entries import Entries
from adversaries.reconstruction.tensor.head import TwoLayerHead

UNCERTAIN = 1e-3
"""Largest predicted error of a certified input, root mean square over its entries: 60 dB where these are pixels."""

DARK = 5e-2
"""Largest brightness, root mean square over its pixels, that a picture answered as black may have."""

CLEAN = 2e-6
"""Relative residual above which something is left that is no rounding, and may be a dark picture."""

SAFETY = 5.0
"""Standard deviations of the noise that a residual is taken for."""

COUNT = 0.05
"""Largest predicted error of a softmax residual that a label may be read from."""

TRACE = 100.0
"""How many times the head's residual the trace of a label must be."""

_STANDS_OUT = 2.0
"""How many times the largest singular value of what is unexplained a part of rank one must be to be seen."""

ABSORBED = 4.0
"""How much smaller what shows of hardly different samples is once their mean has been fitted to them."""

_MOST_WORK = 2e10
"""Operations that are spent on a tighter bound."""

_STEP = 1e-4
"""Of z, between which s'' is compared for s'''."""

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
    sine = torch.where(inputs.any(1), sine, torch.ones_like(sine))  # black has no norm to be mistaken
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


def merged_errors(
    head: TwoLayerHead, inputs: Tensor, counts: Tensor, left: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """By how much samples taken for copies of one input (B, d) may differ; (B,), root mean square over its entries.

    Samples at x + v and x - v, each of weight r, change the wide layer's gradient in second order only, by ``2 r
    (s''(W x) * W v) v'``, which is of rank one: above the largest singular value of what is `left` (m, d) it would
    show, but for what a change of x makes good: three quarters, where v is a multiple of x. Of small batches, the
    second order is fitted to what is left instead, beside the first, and taken `SAFETY` deviations larger. Where
    s'' vanishes, by the residual's `share` of the gradient: about (v / x)^2 of theirs.
    """
    copies = counts.sum(1).to(inputs.dtype)
    merged = torch.nonzero(copies > 1).flatten()
    errors = torch.zeros_like(copies)
    if not len(merged):
        return errors
    if homogeneous(head.name):
        split = (share * copies.sum() / copies).sqrt() / 2 * inputs.square().mean(1).sqrt()
        errors[merged] = split[merged]
        return errors
    apart = head.logits(inputs).softmax(1) @ head.row  # of a sample of each class: apart - row[class]
    weights = (apart[:, None] - head.row).abs().masked_fill(counts == 0, torch.inf).amin(1)
    bend = head.activation.bend(head.wide @ inputs.T).square()
    bent = (bend.T @ head.wide.square()).sum(1).sqrt()  # times the deviation of v's entries
    seen = (2 * weights * bent * inputs.shape[1] ** 0.5).clamp_min(1e-300)  # of a v of mean square one
    basis = torch.linalg.qr(inputs.T).Q
    size, width = len(inputs), len(left)
    unknowns = size * size + len(merged) * size * (size + 1) // 2
    if size * width * unknowns**2 > _MOST_WORK:
        errors[merged] = (ABSORBED * _STANDS_OUT * largest(left, generator) / seen).sqrt()[merged]
        return errors
    inside = left @ basis
    off = largest(left - inside @ basis.T, generator)
    square = _second_order(head, inputs, counts, merged, basis, inside) / inputs.shape[1]
    errors[merged] = (square + _STANDS_OUT * off / seen[merged]).sqrt()
    return errors


def _second_order(
    head: TwoLayerHead, inputs: Tensor, counts: Tensor, merged: Tensor, basis: Tensor, left: Tensor
) -> Tensor:
    """Upper bounds of ``sum_k |v_k|^2`` of the copies of each merged input, in the span, where (m, B) is `left`."""
    u, points = head.wide @ basis, inputs @ basis
    size = len(points)
    rows, columns = torch.triu_indices(size, size, device=u.device)
    first = [
        _derivatives(head, u, x, n)[0].reshape(left.numel(), -1) for x, n in zip(points, counts, strict=True)
    ]
    second = []
    for place in merged.tolist():
        bent = _derivatives(head, u, points[place], counts[place] / counts[place].sum())[1]
        bent = bent.reshape(left.numel(), size, size)[:, rows, columns]
        second.append(bent * torch.where(rows == columns, 0.5, 1.0))
    design = torch.cat([*first, *second], 1)
    scale = design.norm(dim=0).clamp_min(1e-300)
    q, r = torch.linalg.qr(design / scale)
    trace = torch.zeros(design.shape[1], len(merged), dtype=design.dtype, device=design.device)
    start = size * size + torch.arange(len(merged), device=u.device) * len(rows)
    for number, begin in enumerate(start.tolist()):
        trace[begin : begin + len(rows), number] = (rows == columns).to(design.dtype)
    if not bool(r.diagonal().abs().min() > 1e-12):
        return torch.full_like(points[merged, 0], torch.inf)
    reach = torch.linalg.solve_triangular(r.T, trace / scale[:, None], upper=False)
    found = reach.T @ (q.T @ left.flatten())
    return found.clamp_min(0) + SAFETY * float(left.square().mean().sqrt()) * reach.norm(dim=0)


def _derivatives(head: TwoLayerHead, u: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Of a sample's part ``r(x) s'(u x) x'`` (m, k) by x: first (m, k, k) and second (m, k, k, k).

    `u` (m, k) are the neurons and x (k,) the sample in the same coordinates, `count` (C,) how many of each class.
    """
    act, z = head.activation, u @ x
    slope, bend = act.slope(z), act.bend(z)
    twist = (act.bend(z + _STEP) - act.bend(z - _STEP)) / (2 * _STEP)
    p = (head.head @ act.value(z)).softmax(0)
    weight = (count.sum() * p - count) @ head.row
    # r by the logits, and the logits by x
    q = p * (head.row - p @ head.row)
    curved = torch.diag(q) - torch.outer(q, p) - torch.outer(p, q)
    steep = (head.head * slope) @ u
    follow = count.sum() * (q @ steep)
    again = count.sum() * ((u * ((q @ head.head) * bend)[:, None]).T @ u + steep.T @ curved @ steep)
    eye = torch.eye(len(x)).to(x)
    # k, the pattern of a neuron, with its derivatives by x
    k = weight * slope
    k_a = slope[:, None] * follow + (weight * bend)[:, None] * u
    mixed = (bend[:, None] * u)[:, :, None] * follow
    k_ab = slope[:, None, None] * again + mixed + mixed.transpose(1, 2)
    k_ab = k_ab + (weight * twist)[:, None, None] * u[:, :, None] * u[:, None]
    first = k_a[:, None] * x[:, None] + k[:, None, None] * eye
    second = (
        k_ab[:, None] * x[:, None, None]
        + k_a[:, None, :, None] * eye[:, None]
        + k_a[:, None, None] * eye[:, :, None]
    )
    return first, second


def hidden_brightness(head: TwoLayerHead, inputs: Tensor, left: float) -> float:
    """How bright a sample that leaves no trace may be, root mean square over its entries.

    A sample has a part of rank one in the wide layer's gradient, ``r s'(W x) x'``, which shows where it is above
    `left`, the largest singular value of what is unexplained. Inputs (B, d) lend their directions; a black picture
    has any label.
    """
    size = inputs.norm(dim=1)
    if head.activation.value(inputs.new_zeros(1)) != 0:
        return torch.inf
    p = head.logits(torch.zeros_like(inputs[:1])).softmax(1)
    weight = ((p - torch.eye(head.classes).to(p)) @ head.row).abs().min()
    u, most = head.wide @ inputs.T, 0.0
    for factor in torch.logspace(0, -8, 81).tolist():
        seen = weight * head.activation.slope(factor * u).norm(dim=0) * factor * size
        if bool((seen < _STANDS_OUT * left).any()):
            most = factor
            break
    return most * float(inputs.square().mean(1).sqrt().max())


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
