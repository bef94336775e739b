"""An update, read as measurements: which entry says what about a batch with known, distinct labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adversaries.inversion.evidence import defences
from adversaries.inversion.gradients.closed_form import Chain
from fedattack.observation import Observation, Update

BOUNDING = ("topk", "topk-qsgd", "dgc")
"""Compressors under which no unsent entry is larger than the smallest sent one."""

ROUNDING = ("qsgd", "topk-qsgd")
"""Compressors that round stochastically to whole steps of a tensor's scale."""


@dataclass(frozen=True)
class Reading:
    """What an update has to do with the gradient it is read as: ``sent = scale * gradient + offset + noise``.

    `scale` is not 1 where local steps shrink or (momentum) stretch the mean gradient, or clipping shrinks it.
    `offset`, float64 (numel,), is what earlier rounds held back and local steps add. `rounding` and `noise` are
    standard deviations: of rounding errors that do not depend on the entry's size (those of a weight delta), and
    of the Gaussian noise that the client added to every entry.
    """

    scale: float = 1.0
    offset: Tensor | None = None
    rounding: float = 0.0
    noise: float = 0.0


PLAIN = Reading()


@dataclass(frozen=True)
class Measurements:
    """The kept entries of an update, by what they measure.

    The head's values are multiplied by B, so that they are sums over the batch. Bounds are inf where nothing
    is known.

    Attributes
    ----------
    conv_positions, conv_values, conv_scales, conv_rounding : Tensor
        (m,): places of kept entries in the concatenation of the chain's kernels and biases, their values, the
        scale of their errors at s = 1, and what rounding adds to it.
    row_values, row_known : Tensor
        (B, F): gradient of each label's row of the head, and which of it were sent.
    bias_rows, bias_values : Tensor
        (e,): kept entries of the head's bias gradient.
    head_rows, head_cols, head_values : Tensor
        Kept off-label entries of the head's weight gradient, largest first; none for a single image, whose
        rows are all multiples of one.
    bias_scale, head_scale : float
        Scale of the errors of `bias_values` and `head_values` at s = 1.
    bias_bound, row_bound : Tensor
        (classes,) and (B, F): no unsent entry of the head's bias gradient, or of the label rows, is larger.
    precision : float
        Relative rounding error of the values as they were sent.
    row_noise, bias_noise : float
        Standard deviation of what quantisation and the client's noise add to `row_values` (and `head_values`)
        and `bias_values`.
    """

    labels: Tensor
    conv_positions: Tensor
    conv_values: Tensor
    conv_scales: Tensor
    conv_rounding: Tensor
    row_values: Tensor
    row_known: Tensor
    bias_rows: Tensor
    bias_values: Tensor
    head_rows: Tensor
    head_cols: Tensor
    head_values: Tensor
    bias_scale: float
    head_scale: float
    bias_bound: Tensor
    row_bound: Tensor
    precision: float
    row_noise: float
    bias_noise: float

    @property
    def count(self) -> int:
        """How many numbers of the update are used."""
        return self.measuring + len(self.bias_values)

    @property
    def measuring(self) -> int:
        """How many of them measure the images: the head's bias gradient tells little more than the labels."""
        return len(self.conv_values) + len(self.head_values) + int(self.row_known.sum())

    def to(self, device: torch.device) -> Measurements:
        """The same measurements with their tensors on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Measurements(**moved)


def read_update(
    chain: Chain,
    observation: Observation,
    labels: Tensor,
    weight_floor: float,
    head_entries: int,
    reading: Reading = PLAIN,
) -> Measurements:
    """Sort the kept entries of an update by what they measure; `labels` are distinct.

    `weight_floor` is the smallest scale of an error at s = 1, as a share of the root mean square of the kept
    entries of its kind; `head_entries` bounds the off-label entries of the head that are used.
    """
    received, batch, compression = observation.update, len(labels), observation.scenario.compression
    bounding = received.indices is not None and compression.name in BOUNDING
    sent = {name: values for name, _, _, values in received.layers()}
    update = corrected(received, reading)
    tensors = {name: (positions, values.double()) for name, _, positions, values in update.layers()}

    def bound(name: str) -> float:
        values = sent[name] if compression.scope == "layer" else received.values
        if not (bounding and values.numel()):
            return math.inf
        return (float(values.abs().min()) + 2 * reading.noise) / reading.scale  # noise may have made it small

    def noise(name: str) -> float:
        if compression.name not in ROUNDING or not sent[name].numel():
            return reading.noise / reading.scale
        # Rounding up with chance f costs a variance of f (1 - f) steps squared: a sixth for f drawn evenly.
        step = float(sent[name].abs().max()) / compression.levels
        return math.hypot(step / math.sqrt(6), reading.noise) / reading.scale

    doubtful = defences.doubtful_below(reading.noise, received.numel) if bounding else 0.0

    def scales(values: Tensor, bounds: Tensor) -> Tensor:
        # Where unsent entries are bounded by tau, sent ones are of its order: tau is the natural unit of an error.
        floor = weight_floor * root_mean_square(values)
        return torch.where(bounds.isfinite(), bounds, 0.0).clamp(min=floor)

    positions, values, bounds, noises, start = [], [], [], [], 0
    for name in chain.names:
        sure = sent[name].abs() >= doubtful
        at, kept = (part[sure] for part in tensors[name])
        positions.append(at + start)
        values.append(kept)
        bounds.append(torch.full_like(kept, bound(name)))
        noises.append(torch.full_like(kept, noise(name) + reading.rounding / reading.scale))
        start += math.prod(update.shapes[update.names.index(name)])
    conv_values = torch.cat(values)
    precision = value_precision(received.values)

    at, kept = tensors["head.weight"]
    kept = batch * kept
    rows, cols = at // chain.feature_count, at % chain.feature_count
    bias_rows, bias_values = tensors["head.bias"][0], batch * tensors["head.bias"][1]
    sure = (sent["head.bias"].abs() >= doubtful) | torch.isin(bias_rows, labels)
    bias_rows, bias_values = bias_rows[sure], bias_values[sure]
    row_noise, bias_noise = batch * noise("head.weight"), batch * noise("head.bias")
    row_values, row_known = _label_rows(chain, labels, rows, cols, kept)
    if batch == 1 and not bias_noise:
        # Under a reading with an offset, entries may be left that would never have been sent for their own sake.
        least = [
            value if math.isfinite(value) else 0.0 for value in (bound("head.weight"), bound("head.bias"))
        ]
        _fill_row(labels, rows, cols, kept, bias_rows, bias_values, least, row_values, row_known)
    off_label = (~torch.isin(rows, labels) & (sent["head.weight"].abs() >= doubtful)).nonzero()[:, 0]
    largest = off_label[sent["head.weight"][off_label].abs().argsort(descending=True, stable=True)]
    largest = largest[: head_entries if batch > 1 else 0]
    row_bound, bias_bound = batch * bound("head.weight"), batch * bound("head.bias")
    bias_offsets, row_offsets = _head_offsets(chain, received, labels, reading)
    return Measurements(
        labels=labels,
        conv_positions=torch.cat(positions),
        conv_values=conv_values,
        conv_scales=scales(conv_values, torch.cat(bounds)),
        conv_rounding=precision * (conv_values.abs() + root_mean_square(conv_values)) + torch.cat(noises),
        row_values=row_values,
        row_known=row_known,
        bias_rows=bias_rows,
        bias_values=bias_values,
        head_rows=rows[largest],
        head_cols=cols[largest],
        head_values=kept[largest],
        bias_scale=float(scales(bias_values, torch.tensor(bias_bound, dtype=torch.float64))),
        head_scale=float(scales(kept[largest], torch.tensor(row_bound, dtype=torch.float64))),
        # An unsent entry lies within [-tau, tau]: p + offset from above, -|r| h + offset of a label's row from below.
        bias_bound=(bias_bound - batch * bias_offsets).clamp(min=0),
        row_bound=(row_bound + batch * row_offsets).clamp(min=0),
        precision=precision,
        row_noise=row_noise,
        bias_noise=bias_noise,
    )


def corrected(update: Update, reading: Reading) -> Update:
    """The update's entries as entries of the gradient."""
    if reading.offset is None and reading.scale == 1.0:
        return update
    values = update.values.double()
    if reading.offset is not None:
        values = values - (reading.offset if update.indices is None else reading.offset[update.indices])
    return dataclasses.replace(update, values=(values / reading.scale).float())


def _head_offsets(chain: Chain, update: Update, labels: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """The reading's offset, as a gradient, in the head's bias (classes,) and in the labels' rows (B, F); float64."""
    if reading.offset is None:
        none = torch.zeros(chain.classes + len(labels) * chain.feature_count, dtype=torch.float64)
        return none[: chain.classes], none[chain.classes :].reshape(len(labels), -1)
    parts = dict(zip(update.names, (reading.offset / reading.scale).split(update.sizes), strict=True))
    rows = parts["head.weight"].reshape(chain.classes, chain.feature_count)
    return parts["head.bias"], rows[labels]


def root_mean_square(values: Tensor) -> float:
    """Of a tensor that may be empty."""
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def value_precision(values: Tensor) -> float:
    """Relative rounding error of the number format that `values` (float32) fit into."""
    if torch.equal(values, values.bfloat16().float()):
        return 2.0**-9
    if torch.equal(values, values.half().float()):
        return 2.0**-11
    return 2.0**-22  # float32, and a few roundings on the way to a gradient


def _label_rows(
    chain: Chain, labels: Tensor, rows: Tensor, cols: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """The head's rows of the labels, dense, and which entries are known."""
    values = torch.zeros(len(labels), chain.feature_count, dtype=torch.float64)
    known = torch.zeros_like(values, dtype=torch.bool)
    for sample, label in enumerate(labels.tolist()):
        mine = rows == label
        values[sample, cols[mine]] = kept[mine]
        known[sample, cols[mine]] = True
    return values, known


def _fill_row(
    labels: Tensor,
    rows: Tensor,
    cols: Tensor,
    kept: Tensor,
    bias_rows: Tensor,
    bias_values: Tensor,
    least: Sequence[float],
    values: Tensor,
    known: Tensor,
) -> None:
    """Fill in the label's row (`values` and `known`, (1, F)) of a single image from the other rows.

    All rows are multiples of the same features: an entry missing from the label's is taken from the row with
    the largest bias gradient that has it. Entries and bias gradients smaller than `least` are passed over.
    """
    own_bias = bias_values[bias_rows == labels[0]]
    if not own_bias.numel() or bool(known.all()):
        return
    for position in bias_values.abs().argsort(descending=True, stable=True).tolist():
        if float(bias_values[position].abs()) < least[1]:
            return
        there = (rows == bias_rows[position]) & ~known[0, cols] & (kept.abs() >= least[0])
        values[0, cols[there]] = kept[there] / bias_values[position] * own_bias
        known[0, cols[there]] = True
