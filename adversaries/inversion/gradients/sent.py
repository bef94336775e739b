"""What victims sent, laid out side by side, and the contract of a back-end that predicts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedattack.errors import NotApplicable
from fedattack.observation import Update

Layers = Literal["all", "last"]
BatchNormMode = Literal["train", "eval"]
Statistics = tuple[tuple[Tensor, Tensor], ...]
"""Mean and biased variance (V, channels) of layers' inputs over each victim's batch."""

Moves = Mapping[str, Tensor]
"""Tensor -> what a client's local steps added to it."""

_SPARSE_SHARE = 1 / 8
"""Above this sent share a tensor is handled densely: gathering would cost more than it saves."""


@dataclass(frozen=True)
class Segment:
    """The columns [start, stop) of :attr:`Sent.values` that belong to one tensor; the same for all victims."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Sent:
    """What V victims sent, side by side and padded."""

    values: Tensor  # float32 (V, K), zero where it is padding
    valid: Tensor  # float32 (V, K), 1 where the entry was sent and 0 where it is padding
    segments: tuple[Segment, ...]  # tensor by tensor, covering the K columns
    rows: Tensor  # int64 (V, K): each entry's output row (first index) in its tensor; arbitrary at padding
    complete: bool = False  # every column was sent by every victim: `valid` need not be multiplied by

    def __getitem__(self, victims: slice) -> Sent:
        return Sent(
            self.values[victims], self.valid[victims], self.segments, self.rows[victims], self.complete
        )


@dataclass(frozen=True)
class Prediction:
    """What candidate images would have sent."""

    entries: Tensor  # (V, K), aligned with :attr:`Sent.values`; arbitrary where that is padding
    square: Tensor | None = (
        None  # (V,): squared norm of the whole gradient, unsent entries included, if asked for
    )
    statistics: Statistics = ()  # of each BatchNorm layer's input, first layer first, if asked for


class GradientModel(Protocol):
    """A back-end: what was sent and how to predict it.

    `joint`: whether all victims are best predicted in one call; otherwise one call per victim keeps the
    memory down.
    """

    sent: Sent
    joint: bool

    def predict(
        self,
        images: Tensor,
        victims: slice,
        *,
        whole: bool = False,
        shares: Tensor | None = None,
        statistics: bool = False,
    ) -> Prediction:
        """What images (V', B, C, H, W) of the given victims would have sent, differentiable in them and in `shares`.

        `shares`, float32 (V', B, classes) of rows that sum to 1, are the targets of the cross-entropy in
        place of the labels given at construction. `whole` asks for the whole gradient's squared norm,
        `statistics` for the BatchNorm inputs'.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """Where the sent entries of V victims lie, tensor by tensor in the model's order.

    `flat` holds for each tensor int64 (V, K_l) flat positions inside it, or None where it is handled densely;
    `sent` the values there, side by side.
    """

    names: tuple[str, ...]
    flat: tuple[Tensor | None, ...]
    sent: Sent

    @property
    def dense(self) -> bool:
        """Whether all tensors are handled densely: then the entries are the gradients, side by side."""
        return all(flat is None for flat in self.flat)

    def spread(self, weights: Tensor, sizes: Sequence[int], victims: slice) -> Tensor:
        """Adjoint of :meth:`select`: (V', K) -> (V', sum of the tensors' sizes), zero where nothing was sent."""
        parts = []
        columns = weights.split([segment.stop - segment.start for segment in self.sent.segments], 1)
        for part, flat, size in zip(columns, self.flat, sizes, strict=True):
            if flat is not None:
                part = part.new_zeros(len(part), size).scatter_add_(1, flat[victims], part)
            parts.append(part)
        return torch.cat(parts, 1)

    def select(self, gradients: Sequence[Tensor], victims: slice) -> Tensor:
        """Entries (V', K) of dense gradients (V', size), one per tensor."""
        pieces = [
            gradient if flat is None else gradient.gather(1, flat[victims])
            for gradient, flat in zip(gradients, self.flat, strict=True)
        ]
        return torch.cat(pieces, 1)


def lay_out(updates: Sequence[Update], layers: Layers, device: torch.device) -> Layout:
    """Put what V victims sent side by side, each tensor padded to the longest.

    NotApplicable if `layers` is "last" and the model has no linear layer.
    """
    names = _chosen(updates[0].names, updates[0].shapes, layers)
    by_tensor = {
        pieces[0][0]: pieces for pieces in zip(*(update.layers() for update in updates), strict=True)
    }
    flats: list[Tensor | None] = []
    segments: list[Segment] = []
    values, valid, rows = [], [], []
    for name in names:
        shape = by_tensor[name][0][1]
        numbers, sent, flat = _pad(shape, [piece[2:] for piece in by_tensor[name]])
        start = segments[-1].stop if segments else 0
        segments.append(Segment(name, shape, start, start + numbers.shape[1]))
        places = torch.arange(numbers.shape[1])[None] if flat is None else flat
        rows.append((places // torch.Size(shape[1:]).numel()).to(device))
        flats.append(None if flat is None else flat.to(device))
        values.append(numbers.to(device))
        valid.append(sent.to(device))
    count = len(updates)
    if all(flat is None for flat in flats):
        joined_rows = torch.cat(rows, 1).expand(count, -1)
    else:
        joined_rows = torch.cat([row.expand(count, -1) for row in rows], 1)
    known = torch.cat(valid, 1)
    complete = bool(known.all())
    if complete:
        known = known[:1].clone().expand(count, -1)
    return Layout(
        tuple(names), tuple(flats), Sent(torch.cat(values, 1), known, tuple(segments), joined_rows, complete)
    )


def _pad(
    shape: tuple[int, ...], pieces: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, validity and flat positions (V, K_l) of one tensor from each victim's (positions, values)."""
    size = torch.Size(shape).numel()
    longest = max(int(values.numel()) for _, values in pieces)
    dense = longest > size * _SPARSE_SHARE
    width = size if dense else longest
    numbers, valid = torch.zeros(len(pieces), width), torch.zeros(len(pieces), width)
    flat = torch.zeros(len(pieces), width, dtype=torch.int64)
    for v, (positions, values) in enumerate(pieces):
        columns = positions if dense else torch.arange(values.numel())
        numbers[v, columns] = values.float().cpu()
        valid[v, columns] = 1.0
        if not dense:
            flat[v, columns] = positions
    return numbers, valid, None if dense else flat


def _chosen(names: Sequence[str], shapes: Sequence[tuple[int, ...]], layers: Layers) -> list[str]:
    """Tensors that take part: all, or the weight of the last linear layer."""
    if layers == "all":
        return list(names)
    matrices = [name for name, shape in zip(names, shapes, strict=True) if len(shape) == 2]
    if not matrices:
        raise NotApplicable("layers = 'last' needs a linear layer, which this model does not have; use 'all'")
    return matrices[-1:]


@runtime_checkable
class DirectGradients(GradientModel, Protocol):
    """A back-end that can do without automatic differentiation."""

    def slope(
        self, images: Tensor, victims: slice, distance: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Losses (V',) and their gradient at images (V', B, C, H, W), for the labels given at construction.

        `distance` gives losses (V',) and their gradient at the entries (V', K) from these and the victims.
        """
        ...


def targets_of(shares: Tensor | None, labels: Tensor | None, victims: slice) -> Tensor:
    """Soft targets (V, B, classes) or hard labels int64 (V, B)."""
    if shares is not None:
        return shares
    if labels is None:
        raise ValueError("no labels were given at construction: predict needs `shares`")
    return labels[victims]
