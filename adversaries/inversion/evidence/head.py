"""The last linear layer: where it lies in a model and in an update, and what its rows tell of the features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Update


@dataclass(frozen=True)
class HeadEntries:
    """What was sent of the last linear layer, `name` in the state dict (without ".weight").

    E weight entries `values` float32 at `rows`, `cols` int64; E' bias entries `bias_values` at `bias_rows`.
    """

    name: str
    classes: int
    features: int
    rows: Tensor
    cols: Tensor
    values: Tensor
    bias_rows: Tensor
    bias_values: Tensor

    def row(self, label: int) -> tuple[Tensor, Tensor, float | None]:
        """(columns, values, bias entry or None) that were sent of one class."""
        chosen = self.rows == label
        bias = self.bias_values[self.bias_rows == label]
        return self.cols[chosen], self.values[chosen], float(bias[0]) if len(bias) else None


def head_name(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str:
    """The last linear layer's name: "head" where there is one, else that of the last matrix; else NotApplicable."""
    if "head.weight" in names:
        return "head"
    matrices = [n for n, s in zip(names, shapes, strict=True) if len(s) == 2 and n.endswith(".weight")]
    if not matrices:
        raise NotApplicable("labels are read from the last linear layer, and this model has none")
    return matrices[-1].removesuffix(".weight")


def head_entries(update: Update) -> HeadEntries:
    """What was sent of the last linear layer (tensors on the CPU)."""
    name = head_name(update.names, update.shapes)
    shapes = dict(zip(update.names, update.shapes, strict=True))
    classes, features = shapes[f"{name}.weight"]
    found = {tensor: (places.cpu(), sent.float().cpu()) for tensor, _, places, sent in update.layers()}
    positions, values = found[f"{name}.weight"]
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    bias_rows, bias_values = found.get(f"{name}.bias", nothing)
    return HeadEntries(
        name, classes, features, positions // features, positions % features, values, bias_rows, bias_values
    )


def larger_entries(head: HeadEntries, size: float) -> HeadEntries:
    """The head's entries that are larger than `size`."""
    if not size:
        return head
    large, bias = head.values.abs() > size, head.bias_values.abs() > size
    return dataclasses.replace(
        head,
        rows=head.rows[large],
        cols=head.cols[large],
        values=head.values[large],
        bias_rows=head.bias_rows[bias],
        bias_values=head.bias_values[bias],
    )


@dataclass(frozen=True)
class LinearHead:
    """A linear head with a bias: names of its tensors in the update and its size."""

    weight: str
    bias: str
    classes: int
    features: int


@dataclass(frozen=True)
class RowSignals:
    """What updates give away of the head's input, one row per image, (N, F).

    `values` are the features h_j where they were `sent` (bool; sent and not zero), zero elsewhere.
    """

    values: Tensor
    sent: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> RowSignals:
        return RowSignals(self.values[rows], self.sent[rows])


def find_head(module: nn.Module) -> LinearHead:
    """The last linear layer of a classifier.

    NotApplicable if it has none, or that has no bias (whose gradient turns a row into features).
    """
    linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise NotApplicable("the model has no linear layer, and the attack reads features off the last one")
    name, part = linear[-1]
    if part.bias is None:
        raise NotApplicable(f"the last linear layer {name!r} has no bias, whose gradient the attack needs")
    return LinearHead(f"{name}.weight", f"{name}.bias", part.out_features, part.in_features)


def read_rows(update: Update, head: LinearHead, labels: Tensor, batch_size: int) -> RowSignals:
    """The features that a gradient gives away for each label, int64 (B,): B rows, on the CPU.

    Row y of the head's gradient is ``r_y h`` and the bias gradient ``r_y``, so their quotient is h wherever
    both were sent (Geiping et al. 2020, proposition 3.1; Zhao et al. 2020); in a batch with distinct labels,
    up to what the softmax gives the other images there. Where the bias was not sent, ``r_y`` is taken for
    ``-1 / batch_size``, its value when the model gives y no probability.
    """
    width = head.features
    values = torch.zeros(len(labels), width)
    residual = torch.full((len(labels),), -1.0 / batch_size)
    for name, _, positions, sent in update.layers():
        positions, sent = positions.cpu(), sent.float().cpu()
        if name not in (head.weight, head.bias):
            continue
        for i, label in enumerate(labels.tolist()):
            stride = width if name == head.weight else 1
            ends = torch.tensor([label * stride, (label + 1) * stride])
            low, high = torch.searchsorted(positions, ends).tolist()
            if name == head.weight:
                values[i, positions[low:high] - label * width] = sent[low:high]
            elif high > low and sent[low] != 0:
                residual[i] = sent[low]
    return RowSignals(values / residual[:, None], values != 0)


@lru_cache(maxsize=8)
def head_of(model: ModelConfig) -> LinearHead:
    """:func:`find_head` of a resolved configuration, without drawing any weights."""
    with torch.device("meta"):
        return find_head(build_model(model))
