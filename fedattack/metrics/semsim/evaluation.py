"""How well a metric says what was recognised: of single images, and of models or other groups of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedattack.errors import DataError
from fedattack.metrics.semsim.rated import AXES, Rated
from fedattack.metrics.statistics import FEWEST
from fedattack.rng import numpy_rng

STATISTICS = ("auc", "spearman", "kendall", "pearson")
REPLICATES = 1000

Floats = NDArray[np.float64]

_FISHER = {"pearson": (1.0, 3), "spearman": (1.06, 3), "kendall": (0.437, 4)}
"""Variance of arctanh(r) times (n - second): Fisher, 1921; Fieller, Hartley and Pearson, 1957."""


@dataclass(frozen=True)
class Figure:
    """A statistic with its interval; `value` NaN, and `why` a sentence, where there is none.

    ``low``, ``high``: 95 % percentile bootstrap, NaN where too little is left to draw from. ``fisher``: of a
    correlation, the interval by its number of points alone. ``count``: images of an AUC, groups of a correlation.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    fisher: tuple[float, float] | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"no score: {self.why}"
        ends = f" [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.3f}{ends}"


def image_auc(leak: ArrayLike, recognised: ArrayLike) -> float:
    """The chance that a recognised image has a higher value than one that was not; ties count half.

    `leak`, (N,): higher means more was leaked. DataError if lengths differ, a value is not a number, or all images
    are of one kind.
    """
    values, kind = np.asarray(leak, dtype=np.float64), np.asarray(recognised, dtype=bool)
    _require_two_kinds(values, kind)
    return float(_weighted_auc(values, kind, np.ones((1, len(values))))[0])


def group_correlations(leak: ArrayLike, share: ArrayLike) -> dict[str, float]:
    """Spearman, Kendall (tau-b) and Pearson of each group's mean value, (G,), with its share recognised, (G,).

    DataError with fewer than 3 groups, or where one of the two is the same in all.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (leak, share))
    _require_spread(x, y)
    found = _correlations(x[None], y[None])
    return {name: float(values[0]) for name, values in found.items()}


def fisher_interval(name: str, value: float, count: int) -> tuple[float, float] | None:
    """95 % interval of a correlation ("pearson", "spearman", "kendall") of so many points; None where too few."""
    scale, less = _FISHER[name]
    if count <= less or not -1 < value < 1:
        return None
    reach = float(stats.norm.ppf(0.975)) * math.sqrt(scale / (count - less))
    return math.tanh(math.atanh(value) - reach), math.tanh(math.atanh(value) + reach)


class Evaluation:
    """What several metrics say of the same rated images, with intervals from the same bootstrap draws.

    Parameters
    ----------
    rated : Rated
    scores : mapping of str to array (N,)
        Name -> value an image, turned so that higher means more was leaked. NaN: no score; such images count for no
        metric of a difference, and not for that metric.
    by : tuple of str
        Facts whose combinations are the groups ("model", "defence"): one point of a correlation each.
    over_groups : bool
        Resample groups besides originals; False: the groups are these and no sample of others.
    """

    def __init__(
        self,
        rated: Rated,
        scores: Mapping[str, ArrayLike],
        by: tuple[str, ...],
        seed: int = 0,
        replicates: int = REPLICATES,
        over_groups: bool = True,
    ) -> None:
        self._rated = rated
        self._scores = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
        for name, values in self._scores.items():
            if values.shape != (len(rated),):
                raise DataError(
                    f"{len(rated)} ratings need as many values of {name!r}; got shape {values.shape}"
                )
        self.groups, self._group = np.unique(rated.groups(by), return_inverse=True)
        many, groups = len(rated.originals), len(self.groups)
        draws = numpy_rng(seed, "semsim bootstrap")
        self._originals = draws.multinomial(many, np.full(many, 1 / many), size=replicates).astype(np.float64)
        if over_groups:
            self._drawn = draws.integers(groups, size=(replicates, groups))
        else:
            self._drawn = np.tile(np.arange(groups), (replicates, 1))

    def figures(self, name: str) -> dict[str, Figure]:
        """Statistic of :data:`STATISTICS` -> its figure, for one metric."""
        values = self._scores[name]
        found, replicates = self._both(values, ~np.isnan(values))
        return {one: self._figure(one, found[one], replicates.get(one)) for one in STATISTICS}

    def difference(self, first: str, second: str) -> dict[str, Figure]:
        """Statistic -> `first` minus `second`, both of the images that both score, with the paired interval."""
        one, other = self._scores[first], self._scores[second]
        kept = ~np.isnan(one) & ~np.isnan(other)
        (found, mine), (others, theirs) = self._both(one, kept), self._both(other, kept)
        told = {}
        for name in STATISTICS:
            a, b = found[name], others[name]
            if a.why or b.why:
                told[name] = Figure(math.nan, count=a.count, why=a.why or b.why)
                continue
            low, high = _ends(mine[name] - theirs[name])
            told[name] = Figure(a.value - b.value, low, high, a.count)
        return told

    def points(self, name: str) -> tuple[Floats, Floats]:
        """Mean value and share recognised of each of :attr:`groups`, (G,); NaN where a group has no value."""
        finite = np.isfinite(self._scores[name])
        means, shares = self._means(self._scores[name], finite, np.ones((1, len(self._rated.originals))))
        return means[0], shares[0]

    def _both(self, values: Floats, kept: NDArray[np.bool_]) -> tuple[dict[str, Figure], dict[str, Floats]]:
        """The statistics of the images `kept`, and what they are in each replicate."""
        told: dict[str, Figure] = {}
        replicates: dict[str, Floats] = {}
        kind = self._rated.recognised
        try:
            _require_two_kinds(values[kept], kind[kept])
        except DataError as error:
            told["auc"] = Figure(math.nan, count=int(kept.sum()), why=str(error))
        else:
            area = image_auc(values[kept], kind[kept])
            times = np.stack([np.bincount(row, minlength=len(self.groups)) for row in self._drawn])
            weights = self._originals[:, self._rated.owner[kept]] * times[:, self._group[kept]]
            told["auc"] = Figure(area, count=int(kept.sum()))
            replicates["auc"] = _weighted_auc(values[kept], kind[kept], weights)
        finite = kept & np.isfinite(values)  # identical images have an infinite PSNR, and no mean
        means, shares = self._means(values, finite, np.ones((1, len(self._rated.originals))))
        there = np.isfinite(means[0])
        try:
            exact = group_correlations(means[0][there], shares[0][there])
        except DataError as error:
            why = Figure(math.nan, count=int(there.sum()), why=str(error))
            return told | dict.fromkeys(_FISHER, why), replicates
        means, shares = self._means(values, finite, self._originals)
        x, y = (np.take_along_axis(part, self._drawn, axis=1) for part in (means, shares))
        replicates |= _correlations(x, y)
        count = int(there.sum())
        for name, value in exact.items():
            told[name] = Figure(value, count=count, fisher=fisher_interval(name, value, count))
        return told, replicates

    def _means(self, values: Floats, kept: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
        """Mean value and share recognised of each group, (R, G), with originals weighted (R, M)."""
        shape = weights.shape[1], len(self.groups)
        place = self._rated.owner[kept] * shape[1] + self._group[kept]

        def sums(of: Floats) -> Floats:
            table = np.bincount(place, weights=of, minlength=shape[0] * shape[1]).reshape(shape)
            return np.asarray(weights @ table, dtype=np.float64)

        counts = sums(np.ones(int(kept.sum())))
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums(values[kept]) / counts, sums(self._rated.recognised[kept].astype(np.float64)) / counts

    def _figure(self, name: str, found: Figure, replicates: Floats | None) -> Figure:
        """With the ends of its interval."""
        if found.why or replicates is None or len(self._rated.originals) < FEWEST:
            return found
        low, high = _ends(replicates)
        return Figure(found.value, low, high, found.count, found.fisher)


def seen_and_unseen(rated: Rated, seen: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.bool_]]:
    """Masks, bool (N,): "all", and for each axis of which there are both, "<axis> seen" and "<axis> unseen".

    `seen`: axis -> what was in the training.
    """
    parts = {"all": np.ones(len(rated), dtype=bool)}
    for axis in AXES:
        if axis in rated.facts and axis in seen:
            known = np.isin(rated.facts[axis], list(seen[axis]))
            if known.any() and not known.all():
                parts |= {f"{axis} seen": known, f"{axis} unseen": ~known}
            elif not known.any():
                parts[f"{axis} unseen"] = ~known
    return parts


def _ends(replicates: Floats) -> tuple[float, float]:
    """Of the finite ones, where they are half of all or more."""
    finite = replicates[np.isfinite(replicates)]
    if 2 * len(finite) < len(replicates):
        return math.nan, math.nan
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def _require_two_kinds(values: Floats, kind: NDArray[np.bool_]) -> None:
    if values.shape != kind.shape or values.ndim != 1:
        raise DataError(
            f"an AUC needs a value and a label an image; got shapes {values.shape} and {kind.shape}"
        )
    if np.isnan(values).any():
        raise DataError("an AUC needs numbers; some images have no value")
    if not kind.any() or kind.all():
        which = "recognised" if kind.any() else "unrecognised"
        raise DataError(f"all {len(kind)} images are {which}; an AUC needs images of both kinds")


def _require_spread(x: Floats, y: Floats) -> None:
    if len(x) < 3 or len(x) != len(y):
        raise DataError(f"a correlation needs at least 3 models or other groups; got {len(x)}")
    for values, what in ((x, "mean values"), (y, "shares recognised")):
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            raise DataError(f"a correlation needs {what} that differ; all {len(values)} are {values[0]:.3g}")


def _weighted_auc(values: Floats, kind: NDArray[np.bool_], weights: Floats) -> Floats:
    """AUC with each image counted so many times, (R, N) -> (R,); NaN where a kind is not drawn."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    yes, no = (
        np.add.reduceat(np.where(side[order], weights[:, order], 0.0), starts, axis=1)
        for side in (kind, ~kind)
    )
    below = np.cumsum(no, axis=1) - no / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((yes * below).sum(1) / (yes.sum(1) * no.sum(1)), dtype=np.float64)


def _correlations(x: Floats, y: Floats) -> dict[str, Floats]:
    """Of each row, (R, G) -> (R,) each; NaN where a row holds NaN, fewer than three points, or no spread."""
    ranks = (stats.rankdata(part, axis=1) for part in (x, y))
    a, b = (np.sign(part[:, :, None] - part[:, None, :]) for part in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (a * b).sum((1, 2)) / np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    few = np.array([len(np.unique(row)) < 3 for row in x + 1j * y])
    found = {"spearman": _pearson(*ranks), "kendall": tau, "pearson": _pearson(x, y)}
    bad = few | ~np.isfinite(x + y).all(axis=1) | (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)
    return {name: np.where(bad, np.nan, values) for name, values in found.items()}


def _pearson(x: Floats, y: Floats) -> Floats:
    a, b = (part - part.mean(axis=1, keepdims=True) for part in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)), dtype=np.float64)
