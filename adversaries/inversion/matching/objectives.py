"""How far a predicted update is from the one that was sent: the objectives of gradient matching.

An objective is built once for what V victims sent, so that all that does not depend on the candidate images
is computed once, and then measures predictions. "Layer" means one tensor of the model throughout, numbered 1
to L from the input on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adversaries.inversion.gradients import Prediction, Sent
from fedattack.errors import unknown_name
from fedattack.registry import Registry

LayerWeights = Literal["equal", "falling", "exponential"]

Distance = Callable[[Prediction, slice], Tensor]
"""(Prediction of victims [a, b), slice(a, b)) -> objective of each, (V',), differentiable."""

Slope = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(Predicted entries (V', K) of victims [a, b), slice(a, b)) -> objective (V',) and its gradient (V', K).

The gradient may lie in memory that the next call writes to.
"""

_TINY = 1e-30


def layer_weights(kind: LayerWeights, sent: Sent) -> Tensor:
    """Weight of each layer, float32 (L,): 1, (L + 1 - l) / L for "falling", or e^((1 - l) / 2) for "exponential".

    The last is a factor e from one weight and bias to the next.
    """
    count = len(sent.segments)
    rank = torch.arange(1.0, count + 1, device=sent.values.device)
    if kind == "equal":
        return torch.ones_like(rank)
    if kind == "falling":
        return (count + 1 - rank) / count
    if kind == "exponential":
        return ((1 - rank) / 2).exp()
    raise unknown_name("layer_weights", kind, LAYER_WEIGHTS)


LAYER_WEIGHTS: tuple[LayerWeights, ...] = ("equal", "falling", "exponential")


class Layout:
    """What the objectives need to know of the sent entries, computed once; `kind` is that of
    :func:`layer_weights`, and `l1_share` of the absolute differences in "l2-l1".
    """

    def __init__(self, sent: Sent, kind: LayerWeights = "equal", l1_share: float = 0.1) -> None:
        self.sent, self.l1_share = sent, l1_share
        self.values, self.valid = sent.values, sent.valid
        self.equal = kind == "equal"
        self.sizes = [segment.stop - segment.start for segment in sent.segments]
        self.weights = layer_weights(kind, sent)
        self.padded = not bool((sent.valid == 1).all())

    def masked(self, entries: Tensor, victims: slice) -> Tensor:
        """Entries (V', K) with zeros at padding."""
        return entries * self.valid[victims] if self.padded else entries

    def difference(self, prediction: Prediction, victims: slice) -> Tensor:
        """Prediction minus what was sent, (V', K), zero at padding."""
        return self.masked(prediction.entries - self.values[victims], victims)

    def by_layer(self, entries: Tensor) -> Tensor:
        """Sums over each layer's entries: (V', K) -> (V', L)."""
        return torch.stack([part.sum(1) for part in entries.split(self.sizes, 1)], 1)

    def total(self, entries: Tensor) -> Tensor:
        """Weighted sum over all entries: (V', K) -> (V',)."""
        return entries.sum(1) if self.equal else self.by_layer(entries) @ self.weights

    def mean(self, per_layer: Tensor, present: Tensor) -> Tensor:
        """Weighted mean over the layers that are `present` (V', L): (V', L) -> (V',)."""
        share = present * self.weights
        return (per_layer * share).sum(1) / share.sum(1).clamp(min=_TINY)


def masked_l2(layout: Layout) -> Distance:
    """Sum of squared differences over the entries that were sent (DLG; masked: HCGLA)."""

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        return layout.total(layout.difference(prediction, victims).square())

    return distance


def masked_l2_slope(layout: Layout) -> Slope:
    """:func:`masked_l2` and its gradient, written out."""
    columns = None
    if not layout.equal:
        columns = layout.weights.repeat_interleave(torch.tensor(layout.sizes, device=layout.weights.device))

    def slope(entries: Tensor, victims: slice) -> tuple[Tensor, Tensor]:
        difference = layout.masked(entries - layout.values[victims], victims)
        pull = difference if columns is None else difference * columns
        return torch.linalg.vecdot(pull, difference), 2 * pull

    return slope


def full_l2(layout: Layout) -> Distance:
    """Sum of squared differences to the update with zeros where nothing was sent."""

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        assert prediction.square is not None
        kept = layout.masked(prediction.entries, victims).square().sum(1)
        return layout.difference(prediction, victims).square().sum(1) + (prediction.square - kept)

    return distance


def l1(layout: Layout) -> Distance:
    """Sum of absolute differences over the entries that were sent."""

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        return layout.total(layout.difference(prediction, victims).abs())

    return distance


def l2_l1(layout: Layout) -> Distance:
    """Squared differences plus `l1_share` times layer-weighted absolute ones (TAG, Deng et al. 2021)."""

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        difference = layout.difference(prediction, victims)
        return difference.square().sum(1) + layout.l1_share * layout.total(difference.abs())

    return distance


_CHUNK = 1 << 17
"""Products are summed in pieces of this many, which stay in the cache."""


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (V, 1).

    Products are written out and summed pairwise: ``torch.linalg.vector_norm`` and BLAS add one after another on a
    CPU, and over ten million float32 numbers lose three digits and more.
    """
    if a.shape[1] <= _CHUNK:
        return (a * b).sum(1, keepdim=True)
    pieces = zip(a.split(_CHUNK, 1), b.split(_CHUNK, 1), strict=True)
    return torch.stack([(ours * theirs).sum(1) for ours, theirs in pieces], 1).sum(1, keepdim=True)


def _length(a: Tensor) -> Tensor:
    """Norms of rows, (V, 1), kept from zero."""
    return _inner(a, a).clamp(min=_TINY).sqrt()


def cosine(layout: Layout) -> Distance:
    """One minus the cosine between the sent entries and their prediction (Geiping et al. 2020, eq. 4)."""
    direction = layout.values / _length(layout.values)

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        entries = layout.masked(prediction.entries, victims)
        return 1 - _inner(entries, direction[victims])[:, 0] / _length(entries)[:, 0]

    return distance


def cosine_slope(layout: Layout) -> Slope:
    """:func:`cosine` and its gradient, written out."""
    away = -layout.values / _length(layout.values)
    # A fresh tensor of tens of megabytes costs more in page faults than in arithmetic.
    room = torch.empty_like(away)

    def slope(entries: Tensor, victims: slice) -> tuple[Tensor, Tensor]:
        entries, aim = layout.masked(entries, victims), away[victims]
        closer = _length(entries).reciprocal()
        share = _inner(entries, aim) * closer
        pull = torch.mul(aim, closer, out=None if torch.compiler.is_compiling() else room[victims])
        return 1 + share[:, 0], pull.addcmul_(entries, -share * closer.square())

    return slope


def layer_cosine(layout: Layout) -> Distance:
    """Weighted mean over layers of one minus the cosine; layers of which only zeros were sent do not count."""
    squares = layout.by_layer(layout.values.square())
    present = (squares > 0).float()
    norms = squares.clamp(min=_TINY).sqrt()

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        entries = layout.masked(prediction.entries, victims)
        length = layout.by_layer(entries.square()).clamp(min=_TINY).sqrt()
        cosines = layout.by_layer(entries * layout.values[victims]) / norms[victims] / length
        return layout.mean(1 - cosines, present[victims])

    return distance


def row_cosine(layout: Layout) -> Distance:
    """Mean over all output rows of one minus the row's cosine ("inversed-sim-out" of the SemSim benchmark).

    A row is what one output unit or channel receives, the tensor's first index. A bias is one row: the cosine of a
    single number is a sign, which has no slope. Rows of which only zeros were sent do not count.
    """
    sums, row_weights = _row_sums(layout)
    squares = sums(layout.values.square(), slice(None))
    share = (squares > 0) * row_weights
    share = share / share.sum(1, keepdim=True).clamp(min=_TINY)
    norms = squares.clamp(min=_TINY).sqrt()

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        entries = layout.masked(prediction.entries, victims)
        length = sums(entries.square(), victims).clamp(min=_TINY).sqrt()
        cosines = sums(entries * layout.values[victims], victims) / norms[victims] / length
        return ((1 - cosines) * share[victims]).sum(1)

    return distance


def _row_sums(layout: Layout) -> tuple[Callable[[Tensor, slice], Tensor], Tensor]:
    """A function that sums (V', K) over the rows of each layer to (V', rows), and the rows' weights (rows,)."""
    segments = layout.sent.segments
    rows = [segment.shape[0] if len(segment.shape) > 1 else 1 for segment in segments]
    # A layer that was sent sparsely lists its entries in no particular shape; a dense one is rows by columns.
    dense = [segment.stop - segment.start == torch.Size(segment.shape).numel() for segment in segments]
    weights = torch.repeat_interleave(layout.weights, torch.tensor(rows, device=layout.weights.device))

    def sums(entries: Tensor, victims: slice) -> Tensor:
        where = layout.sent.rows[victims]
        pieces = []
        for segment, count, whole in zip(segments, rows, dense, strict=True):
            piece = entries[:, segment.start : segment.stop]
            if count == 1:
                pieces.append(piece.sum(1, keepdim=True))
            elif whole:
                pieces.append(piece.unflatten(1, (count, -1)).sum(2))
            else:
                into = piece.new_zeros(len(piece), count)
                pieces.append(into.scatter_add(1, where[:, segment.start : segment.stop], piece))
        return torch.cat(pieces, 1)

    return sums, weights


def gaussian_kernel(layout: Layout) -> Distance:
    """Sum over layers of 1 - exp(-|difference|^2 / sigma_l), sigma_l = entries sent times their variance (SAPAG).

    The variance is that of the layer's sent entries around zero: then sigma_l is the squared norm of what was sent,
    the exponent is the relative squared error, and it neither vanishes nor saturates with the layer's size. Layers of
    which only zeros were sent do not count.
    """
    squares = layout.by_layer(layout.values.square())
    present = (squares > 0).float()
    sigma = squares.clamp(min=_TINY)

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        relative = layout.by_layer(layout.difference(prediction, victims).square()) / sigma[victims]
        return (-torch.expm1(-relative) * present[victims]) @ layout.weights

    return distance


def sign(layout: Layout) -> Distance:
    """Mean hinge of predicted entries whose sign is not the one that was sent, in units of their layer's RMS.

    For updates that hold signs, scaled or not: an entry costs its predicted magnitude where its sign is wrong and
    nothing where it is right. Dividing by the predicted RMS keeps a vanishing gradient from being an answer.
    """
    signs = layout.values.sign()
    counts = layout.by_layer(signs.abs())
    total = (counts @ layout.weights).clamp(min=_TINY)

    def distance(prediction: Prediction, victims: slice) -> Tensor:
        known = signs[victims]
        entries = prediction.entries * known
        mean_square = layout.by_layer(entries.square()) / counts[victims].clamp(min=1)
        wrong = layout.by_layer((-entries).relu()) / mean_square.clamp(min=_TINY).sqrt()
        return wrong @ layout.weights / total[victims]

    return distance


@dataclass(frozen=True)
class Objective:
    """An entry of :data:`OBJECTIVES`."""

    build: Callable[[Layout], Distance]
    whole: bool = False  # the predicted gradient's whole norm is needed
    unit: bool = (
        False  # regularisers are measured in units of 1, not of the objective at a prediction of zeros
    )
    weighted: bool = True  # layers may be given weights: it is not over all of them at once
    # Where the gradient is worth writing out: differentiating a dozen small operations takes as long as a small
    # network's whole gradient.
    slope: Callable[[Layout], Slope] | None = None


OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "masked-l2": Objective(masked_l2, slope=masked_l2_slope),
        "l2": Objective(full_l2, whole=True, weighted=False),
        "l1": Objective(l1),
        "l2-l1": Objective(l2_l1),
        "cosine": Objective(cosine, unit=True, weighted=False, slope=cosine_slope),
        "layer-cosine": Objective(layer_cosine, unit=True),
        "row-cosine": Objective(row_cosine, unit=True),
        "gaussian-kernel": Objective(gaussian_kernel, unit=True),
        "sign": Objective(sign, unit=True),
    },
    group="fedattack.objectives",
    base="adversaries.inversion.matching.objectives:Objective",
)
"""Name -> objective."""


def scale(objective: Objective, distance: Distance, sent: Sent) -> Tensor:
    """What a regulariser's weight is multiplied with, (V,): 1, or the objective of predicting zeros."""
    count = len(sent.values)
    if objective.unit:
        return sent.values.new_ones(count)
    zeros = Prediction(torch.zeros_like(sent.values), sent.values.new_zeros(count))
    return distance(zeros, slice(0, count))
