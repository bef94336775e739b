"""How far annotators agree beyond chance, on labels without an order; intervals by bootstrap over units."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fedattack.errors import DataError
from fedattack.metrics.statistics import FEWEST, REPLICATES, Interval
from fedattack.rng import numpy_rng

_DEFINED = 0.9
"""Share of bootstrap draws in which a coefficient must be defined for its interval to be given."""


def krippendorff_alpha(ratings: ArrayLike, seed: int = 0, replicates: int = REPLICATES) -> Interval:
    """Krippendorff's alpha for nominal data: 1 - D_o / D_e from the coincidence matrix.

    `ratings`, (raters, units), NaN where a rater did not rate a unit; values are codes, in no order. Units with
    fewer than two ratings are left out; `count` is the number of those left. The mean is NaN where all ratings are
    alike, for then nothing could have disagreed. (K. Krippendorff, "Computing Krippendorff's alpha-reliability",
    2011.)

    Raises DataError where no unit has two ratings.
    """
    counts = category_counts(ratings)
    counts = counts[counts.sum(axis=1) > 1]
    if not len(counts):
        raise DataError("alpha needs units that two annotators or more rated; there is none")
    pairable = counts.sum(axis=1)
    # Of each unit: its values, and those of its pairs (in both orders, over m - 1) that are alike.
    alike = (counts * (counts - 1)).sum(axis=1) / (pairable - 1)

    def alpha(times: NDArray[np.float64]) -> NDArray[np.float64]:
        values, same = times @ counts, times @ alike
        total = values.sum(axis=1)
        observed = total - same
        expected = (total**2 - (values**2).sum(axis=1)) / (total - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(expected > 0, 1 - observed / expected, np.nan)

    return _over_units(alpha, len(counts), seed, replicates)


def fleiss_kappa(counts: ArrayLike, seed: int = 0, replicates: int = REPLICATES) -> Interval:
    """Fleiss' kappa: agreement of the same number of ratings of every unit.

    `counts`, (units, categories): how many chose each category. NaN where all ratings are alike. (J. L. Fleiss,
    "Measuring nominal scale agreement among many raters", Psychological Bulletin 76, 1971.)

    Raises DataError for an unequal number of ratings, or fewer than two.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or not len(table):
        raise DataError(f"kappa needs counts of units x categories; got the shape {table.shape}")
    raters = table.sum(axis=1)
    if raters.min() != raters.max() or raters[0] < 2:
        raise DataError(
            f"kappa needs the same number of ratings, two or more, of every unit; got {raters.min():.0f} to "
            f"{raters.max():.0f}; alpha does without"
        )
    agreeing = (table * (table - 1)).sum(axis=1) / (raters * (raters - 1))

    def kappa(times: NDArray[np.float64]) -> NDArray[np.float64]:
        units = times.sum(axis=1)
        shares = (times @ table) / (units * raters[0])[:, None]
        chance = (shares**2).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(chance < 1 - 1e-12, ((times @ agreeing) / units - chance) / (1 - chance), np.nan)

    return _over_units(kappa, len(table), seed, replicates)


def category_counts(ratings: ArrayLike) -> NDArray[np.float64]:
    """Ratings (raters, units), NaN where there is none -> how many chose each category, (units, categories)."""
    values = np.asarray(ratings, dtype=np.float64)
    if values.ndim != 2:
        raise DataError(f"agreement needs ratings of raters x units; got the shape {values.shape}")
    codes = np.unique(values[~np.isnan(values)])
    return (values[:, :, None] == codes).sum(axis=0).astype(np.float64)


def rating_matrix(frame: pd.DataFrame) -> NDArray[np.float64]:
    """Labels of a table's counting ratings (:func:`fedattack.annotation.table.latest`), (annotators, pairs).

    "Cannot tell" is no rating.
    """
    wide = frame.pivot(index="annotator_id", columns="pair_id", values="label")
    return wide.to_numpy(dtype=np.float64, na_value=np.nan)


def _over_units(
    figure: Callable[[NDArray[np.float64]], NDArray[np.float64]], units: int, seed: int, replicates: int
) -> Interval:
    """A figure of all units, and its percentile bootstrap interval; `figure` is given how often each unit counts."""
    mean = float(figure(np.ones((1, units)))[0])
    unknown = Interval(mean, float("nan"), float("nan"), units)
    if units < FEWEST or np.isnan(mean):
        return unknown
    times = numpy_rng(seed, "agreement").multinomial(units, np.full(units, 1 / units), size=replicates)
    drawn = figure(times.astype(np.float64))
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) < _DEFINED * replicates:
        return unknown
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean, float(low), float(high), units)
