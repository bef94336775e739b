"""What single rows of the head tell about the features of their class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from adversaries.inversion.evidence.one_gradient import as_gradient
from fedattack.config import ModelConfig
from fedattack.errors import DataError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation, Update


@dataclass(frozen=True)
class Head:
    """The last linear layer: names of its tensors in the update and its size."""

    weight: str
    bias: str
    classes: int
    features: int


@dataclass(frozen=True)
class RowSignals:
    """What updates give away of the head's input, one row per image.

    Attributes
    ----------
    values : Tensor
        float32 (N, F): features h_j where they were sent, zero elsewhere.
    sent : Tensor
        bool (N, F): which were sent (and are not zero).
    """

    values: Tensor
    sent: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> RowSignals:
        return RowSignals(self.values[rows], self.sent[rows])


def find_head(module: nn.Module) -> Head:
    """The last linear layer of a classifier.

    Raises
    ------
    NotApplicable
        If it has none, or that has no bias (whose gradient turns a row into features).
    """
    linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise NotApplicable("the model has no linear layer; a generator reads features off the last one")
    name, part = linear[-1]
    if part.bias is None:
        raise NotApplicable(f"the last linear layer {name!r} has no bias; a generator needs its gradient")
    return Head(f"{name}.weight", f"{name}.bias", part.out_features, part.in_features)


def read_rows(update: Update, head: Head, labels: Tensor, batch_size: int, unit: float = 1.0) -> RowSignals:
    """The features that an update gives away for each label.

    Row y of the head's gradient is ``r_y h`` and the bias gradient ``r_y``, so their quotient is h wherever both
    were sent (Geiping et al. 2020, proposition 3.1; Zhao et al. 2020); in a batch with distinct labels, up to what
    the softmax gives the other images there. Where the bias was not sent, ``r_y`` is taken for
    ``-unit / batch_size``, its value when the model gives y no probability.

    Parameters
    ----------
    update : Update
        As it came.
    head : Head
    labels : Tensor
        int64 (B,).
    batch_size : int
        Images the gradient is the mean of.
    unit : float
        What the update is of the gradient: 1, or minus the learning rate for a weight delta.

    Returns
    -------
    RowSignals
        B rows, on the CPU.
    """
    width = head.features
    values = torch.zeros(len(labels), width)
    residual = torch.full((len(labels),), -unit / batch_size)
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


def observed_rows(observation: Observation, labels: Tensor) -> RowSignals:
    """:func:`read_rows` of an observation: the intercepted signal, one row per label.

    Raises
    ------
    DataError
        If a label is outside the head.
    NotApplicable
        If the model has no linear head with a bias.
    """
    head = head_of(observation.scenario.model)
    bad = [label for label in labels.tolist() if not 0 <= label < head.classes]
    if bad:
        raise DataError(f"labels {bad} are outside the head's 0 to {head.classes - 1}")
    training, compression = observation.scenario.training, observation.scenario.compression
    update, unit = observation.update, 1.0
    if update.kind == "delta":
        unit = -training.learning_rate * training.local_steps
        plain = compression.name != "sign" and compression.clip_norm is None and observation.round == 1
        if training.local_steps == 1 and plain:
            update, unit = as_gradient(observation), 1.0
    return read_rows(update, head, labels, observation.num_examples, unit)


@lru_cache(maxsize=8)
def head_of(model: ModelConfig) -> Head:
    """:func:`find_head` of a resolved configuration, without drawing any weights."""
    with torch.device("meta"):
        return find_head(build_model(model))
