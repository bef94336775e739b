"""Rows that hold sums of images: find the rows that hold one, take it out of the others, look again.

Row i of a linear layer's gradient is ``sum_n r_in x_n`` and its bias' entry ``sum_n r_in``. Where one image alone
moved the row, their ratio is the image. Whether it was alone, and with which label, the model itself tells: the
ratio, put through the model (:data:`Replay`), must give the number that was seen. An image so found is taken out of
all rows it moved, which leaves others alone in theirs, as erasures are decoded in sparse-graph codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Replay = Callable[[Tensor], Tensor]
"""Inputs (N, d) -> what each would add to every row's scalar with each label, (N, C, K), zero where it does not."""

PRECISION = 10.0
"""A row's scalar must exceed its noise this many times: an image's error is noise over scalar."""

_NUMBERS_AT_ONCE = 2**23
_CANCELLED = 0.1
"""Share of the largest scalar that, like a row's own, is replayed up to the tolerance."""

_ALIKE = 0.03
"""Root mean square difference below which two rows show the same image."""

_MOST = 0.02
"""Relative misfit that noise may excuse: more would let mixtures through."""

_SURE = 3.0
"""Times the noise that a misfit may reach."""


@dataclass(frozen=True)
class Rows:
    """What K rows hold, float64."""

    scalars: Tensor  # (K,): sums of r over the images in each row
    vectors: Tensor  # (K, d): sums of r x
    noise: Tensor  # (K,): what rounding, quantisation or a threshold may have changed in each entry
    scale: float  # the largest scalar that any row started with


@dataclass
class Sample:
    """One image that was found."""

    input: Tensor  # float64 (d,)
    label: int
    misfit: float  # relative difference between the row's scalar and its replay
    error: float  # what noise may have changed in a pixel
    sweep: int  # images taken out before this one could be seen; 0: it was alone in its row from the start
    support: int  # rows that showed it alone
    shares: Tensor  # (K,): what it adds to every row's scalar


def peel(
    rows: Rows,
    replay: Replay,
    classes: int,
    limit: int,
    *,
    tolerance: float,
    times: Sequence[float] = (1.0,),
    sweeps: int | None = None,
    progress: Callable[[int], None] = lambda found: None,
) -> tuple[list[Sample], Rows]:
    """Find up to `limit` images, the surest first in every sweep, until a sweep finds none, and what is left.

    Parameters
    ----------
    limit : int
        Images in the batch.
    tolerance : float
        Relative misfit that is accepted beyond what noise explains.
    times : sequence of float
        How often an image may have been counted (several local steps).
    sweeps : int, optional
        1: only images that are alone in a row from the start. None: until one finds nothing.
    progress : callable
        Told the number of images found.
    """
    scalars, vectors = rows.scalars, rows.vectors
    found: list[Sample] = []
    fresh = torch.ones(len(scalars), dtype=torch.bool, device=scalars.device)
    sweep = 0
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, classes * len(scalars)))
    while len(found) < limit and sweep != sweeps:
        left = Rows(scalars, vectors, rows.noise, rows.scale)
        scalars, vectors = scalars.clone(), vectors.clone()
        tried = _single(left, fresh)
        changed = torch.zeros_like(fresh)
        first = len(found)
        for some in tried.split(at_once):
            for row, sample in _accepted(left, some, replay, tolerance, times, sweep):
                if changed[row]:
                    _support(found[first:], sample)
                    continue
                if len(found) == limit:
                    break
                found.append(sample)
                scalars -= sample.shares
                vectors -= torch.outer(sample.shares, sample.input)
                changed |= sample.shares.abs() > rows.noise
            progress(len(found))
        if len(found) == first:
            break
        fresh, sweep = changed, sweep + 1
    return found, Rows(scalars, vectors, rows.noise, rows.scale)


def agreeing(
    rows: Rows,
    replay: Replay,
    limit: int,
    *,
    times: Sequence[float] = (1.0,),
    progress: Callable[[int], None] = lambda found: None,
) -> tuple[list[Sample], Rows]:
    """Find images in rows that are too uncertain for replaying: those that two rows or more show alike.

    Nothing is taken out, and an image that a single row shows is not believed: of many rows and labels, some
    fit by chance. As :func:`peel`, but what is left are the rows that no image was read from.
    """
    tried = _single(rows, torch.ones(len(rows.scalars), dtype=torch.bool, device=rows.scalars.device))
    scalars = rows.scalars[tried]
    inputs = rows.vectors[tried] / scalars[:, None]
    same = torch.cdist(inputs, inputs) / inputs.shape[1] ** 0.5 < _ALIKE
    free = torch.ones(len(tried), dtype=torch.bool, device=tried.device)
    vectors = rows.vectors.clone()
    found: list[Sample] = []
    for n in same.sum(1).argsort(descending=True, stable=True).tolist():
        if not free[n] or len(found) == limit:
            continue
        alike = torch.nonzero(free & same[n])[:, 0]
        if len(alike) < 2:
            continue
        weights = scalars[alike].square() / scalars[alike].square().sum()
        mean = weights @ inputs[alike]
        row = int(tried[n])
        shares = replay(mean[None])[0]
        # An uncertain image may lie beside its own bin: then another row tells what it would have left.
        seen = row if bool(shares[:, row].any()) else int(shares.abs().amax(0).argmax())
        counted = shares[:, seen, None] * torch.as_tensor(times, dtype=shares.dtype, device=shares.device)
        misfit = ((counted - scalars[n]) / scalars[n]).abs().amin(1)
        label = int(misfit.argmin())
        error = float(rows.noise[row] / scalars[n].abs()) / len(alike) ** 0.5
        free[alike] = False
        vectors[tried[alike]] = 0
        found.append(Sample(mean, label, float(misfit[label]), error, 0, len(alike), shares[label].clone()))
        progress(len(found))
    return found, Rows(rows.scalars, vectors, rows.noise, rows.scale)


def _single(rows: Rows, fresh: Tensor) -> Tensor:
    """Rows whose ratio is an image, the most precise first."""
    error = rows.noise / rows.scalars.abs()
    kept = torch.nonzero(fresh & (error < 1 / PRECISION))[:, 0]
    ratio = rows.vectors[kept] / rows.scalars[kept, None]
    slack = _SURE * error[kept] + 1e-4
    inside = (ratio.amin(1) > -slack) & (ratio.amax(1) < 1 + slack)
    kept = kept[inside]
    return kept[error[kept].argsort(stable=True)]


def _accepted(
    rows: Rows, tried: Tensor, replay: Replay, tolerance: float, times: Sequence[float], sweep: int
) -> list[tuple[int, Sample]]:
    """The candidates among rows `tried` that the model confirms."""
    if not len(tried):
        return []
    scalars, error = rows.scalars[tried], rows.noise[tried] / rows.scalars[tried].abs()
    inputs = rows.vectors[tried] / scalars[:, None]
    shares = replay(inputs)
    own = shares[torch.arange(len(tried)), :, tried]
    counted = own[:, :, None] * torch.as_tensor(times, dtype=own.dtype, device=own.device)
    misfit = ((counted - scalars[:, None, None]) / scalars[:, None, None]).abs().flatten(1)
    best, place = misfit.min(1)
    # Small scalars are small differences of larger numbers.
    allowed = tolerance * (1 + _CANCELLED * rows.scale / scalars.abs()) + (_SURE * error).clamp(max=_MOST)
    good = (best <= allowed).tolist()
    empty = torch.maximum(rows.vectors.abs().amax(1), rows.scalars.abs()) <= _SURE * rows.noise
    accepted = []
    for n, row in enumerate(tried.tolist()):
        if not good[n]:
            continue
        label = int(place[n]) // len(times)
        # The scalar that was seen, not its replay: the row is left empty.
        added = shares[n, label] * (scalars[n] / own[n, label])
        if bool((empty & (added.abs() > PRECISION * rows.noise)).any()):
            continue  # a mixture: it would have moved rows that nothing moved
        sample = Sample(inputs[n], label, float(best[n]), float(error[n]), sweep, 1, added.clone())
        accepted.append((row, sample))
    return accepted


def _support(found: Sequence[Sample], again: Sample) -> None:
    """Count a row that shows an image of this sweep once more."""
    for sample in found:
        near = _SURE * (sample.error + again.error) + 1e-4
        if sample.label == again.label and float((sample.input - again.input).abs().max()) < near:
            sample.support += 1
            return
