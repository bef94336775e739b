"""CODEC: how far one variable is a function of others, from ranks and nearest neighbours alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from fedattack.errors import DataError

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

LARGEST = 1e140
"""Of which squared distances are still finite."""

_BLOCK = 60_000  # distances worked out at once: what fits a core's cache


def codec(y: ArrayLike, z: ArrayLike, given: ArrayLike | None = None) -> float:
    """Dependence of `y` on `z`, or what `z` adds to `given`: 0 if it tells nothing, 1 if it tells all, in the limit.

    Estimates may be below 0. Where nothing is left to be told (`y` is constant, or no point's neighbour in `given`
    ranks below it) the answer is 0.

    Ties: equal `y` share a rank, as in the source: R_i = #{j: y_j <= y_i}, L_i = #{j: y_j >= y_i}. Of several
    nearest neighbours, equally far in float64, the one of the lowest index counts. No point is its own neighbour,
    whatever duplicates it has.

    Parameters
    ----------
    y : array_like
        (n,) or (n, 1), n >= 2, finite; worked out in float64, as everything here.
    z, given : array_like
        (n,) or (n, d): the points among which neighbours are sought are the rows of (given, z), with squared
        Euclidean distances summed column after column.

    Raises
    ------
    DataError
        If the shapes do not fit, or a number is not finite.

    References
    ----------
    Azadkia and Chatterjee, "A simple measure of conditional dependence", Annals of Statistics 49(6), 2021, eqs.
    (2.3) and (2.4), (11.1) with ties.
    """
    ranks = Ranks(y)
    points = columns(z, ranks.count)
    if given is None:
        return ranks.marginal(nearest(points))
    known = columns(given, ranks.count)
    return ranks.conditional(nearest(np.hstack([known, points])), nearest(known))


class Ranks:
    """The ranks of a response, and the two statistics as functions of everybody's nearest neighbour."""

    def __init__(self, y: ArrayLike) -> None:
        values = columns(y)
        if values.shape[1] != 1:
            raise DataError(f"the response has shape {values.shape}; accepted: (n,) or (n, 1)")
        self.count = len(values)
        self.rank: Places = rankdata(values[:, 0], method="max").astype(np.int64)
        above: Places = self.count + 1 - rankdata(values[:, 0], method="min").astype(np.int64)
        self._expected = int((above * above).sum())
        self._spread = int((above * (self.count - above)).sum())

    def agreement(self, neighbours: Places) -> int:
        """Sum of the smaller rank of each point's and its neighbour's."""
        return int(np.minimum(self.rank, self.rank[neighbours]).sum())

    def marginal(self, neighbours: Places) -> float:
        """T(Y, Z) of the nearest neighbours in Z."""
        return _ratio(self.count * self.agreement(neighbours) - self._expected, self._spread)

    def conditional(self, together: Places, known: Places) -> float:
        """T(Y, Z | X) of the nearest neighbours in (X, Z) and in X."""
        before = self.agreement(known)
        return _ratio(self.agreement(together) - before, int(self.rank.sum()) - before)


def columns(values: ArrayLike, count: int | None = None) -> Floats:
    """As float64 (n, d), d and n at least 1 and 2; DataError where it is not of `count` finite rows."""
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] < 2 or array.shape[1] < 1:
        raise DataError(
            f"an array of shape {np.shape(values)}; accepted: (n,) or (n, d), n at least 2, d at least 1"
        )
    if count is not None and len(array) != count:
        raise DataError(f"an array of {len(array)} rows beside a response of {count}; accepted: as many")
    if not (np.abs(array) <= LARGEST).all():  # NaN fails too
        raise DataError(f"a variable is NaN, infinite or beyond {LARGEST:g}; accepted: finite numbers")
    return array


def nearest(points: Floats) -> Places:
    """Each row's nearest other row, of the lowest index among equals; (n,)."""
    found = np.empty(len(points), dtype=np.int64)
    rows = max(1, _BLOCK // len(points))
    for start in range(0, len(points), rows):
        some = np.arange(start, min(len(points), start + rows))
        distances = np.zeros((len(some), len(points)))
        for column in points.T:
            distances += np.square(column[some, None] - column[None])
        distances[np.arange(len(some)), some] = np.inf
        found[some] = distances.argmin(1)
    return found


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0
