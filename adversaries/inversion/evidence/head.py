"""The linear head in an update: where its rows and biases lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fedattack.errors import NotApplicable
from fedattack.observation import Update


@dataclass(frozen=True)
class Head:
    """What was sent of the last linear layer.

    Attributes
    ----------
    name : str
        Its name in the state dict, without ".weight".
    classes, features : int
    rows, cols : Tensor
        int64 (E,): where the sent weight entries lie.
    values : Tensor
        float32 (E,): the sent weight entries.
    bias_rows : Tensor
        int64 (E',): which bias entries were sent.
    bias_values : Tensor
        float32 (E',).
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
    """Name of the last linear layer: "head" where there is one, else that of the last matrix.

    Raises
    ------
    NotApplicable
        If the model has none.
    """
    if "head.weight" in names:
        return "head"
    matrices = [n for n, s in zip(names, shapes, strict=True) if len(s) == 2 and n.endswith(".weight")]
    if not matrices:
        raise NotApplicable("labels are read from the last linear layer, and this model has none")
    return matrices[-1].removesuffix(".weight")


def head_entries(update: Update) -> Head:
    """What was sent of the last linear layer (tensors on the CPU)."""
    name = head_name(update.names, update.shapes)
    shapes = dict(zip(update.names, update.shapes, strict=True))
    classes, features = shapes[f"{name}.weight"]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for tensor, _, positions, values in update.layers():
        found[tensor] = positions.cpu(), values.float().cpu()
    positions, values = found[f"{name}.weight"]
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    bias_rows, bias_values = found.get(f"{name}.bias", nothing)
    return Head(
        name, classes, features, positions // features, positions % features, values, bias_rows, bias_values
    )


def _beyond(head: Head, size: float) -> Head:
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
