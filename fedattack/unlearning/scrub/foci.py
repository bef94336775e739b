"""FOCI: the variables of which a response is a function, chosen one after the other by CODEC."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedattack.unlearning.scrub.codec import Floats, Places, Ranks, columns

NOISE = 0.01
"""Deviation of what L-FOCI adds to every variable, so that no two points are tied."""

_KEPT_OF_FIRST, _KEPT_OF_MORE = 3.0, 1.25
"""Neighbours kept for the pruned search, in square roots of the number of points; measured to be quick, no more."""


def foci(x: ArrayLike, y: ArrayLike, stop: bool = True) -> tuple[list[int], list[float]]:
    """Columns of `x` in the order in which they tell most of `y`, with the CODEC of each given those before it.

    The first is the column of the largest T(Y, X_j), whatever its sign; each further one that of the largest T(Y, X_j
    | X_S). With `stop` the search ends where that is not positive; without, all columns are put in order. Of equal
    values the first column wins. Ties among points are as in :func:`~fedattack.unlearning.scrub.codec.codec`, and the
    values are those that it gives for the columns in this order.

    Exact, and quicker than a neighbour search for every candidate: squared distances in the chosen columns are kept,
    and a candidate adds one column to them. Each point's nearest in the chosen columns are looked at first; as no
    distance shrinks by an added column, the best of them is the nearest of all if it is nearer than the farthest of
    them was before. Otherwise that point is searched in full. The first column needs sorted values only.

    Parameters
    ----------
    x : array_like
        (n, p), finite. Memory is 8 n^2 bytes, whatever p.
    y : array_like
        (n,), finite, n >= 2.

    Raises
    ------
    DataError
        If the shapes do not fit, or a number is not finite.

    References
    ----------
    Azadkia and Chatterjee, "A simple measure of conditional dependence", Annals of Statistics 49(6), 2021, section 5.
    """
    ranks = Ranks(y)
    points = columns(x, ranks.count)
    candidates = np.ascontiguousarray(points.T)
    found = list(_each_on_a_line(candidates))
    best = int(np.argmax([ranks.marginal(neighbours) for neighbours in found]))
    near = found[best]
    order, values = [best], [ranks.marginal(near)]
    left = [place for place in range(len(candidates)) if place != best]
    chosen = _Chosen(ranks.count)
    while left:
        chosen.add(candidates[order[-1]])
        found = [chosen.nearest(candidates[place]) for place in left]
        told = [ranks.conditional(neighbours, near) for neighbours in found]
        best = int(np.argmax(told))
        if stop and told[best] <= 0:
            break
        order.append(left.pop(best))
        values.append(told[best])
        near = found[best]
    return order, values


def lfoci(
    x: ArrayLike, y: ArrayLike, generator: np.random.Generator, noise: float = NOISE, stop: bool = True
) -> tuple[list[int], list[float]]:
    """L-FOCI: :func:`foci` after N(0, `noise`^2) was added to `x` and `y`, so that discrete values are not tied.

    Mehta, Pal, Singh and Ravi, "Deep unlearning via randomized conditionally independent Hessians", CVPR 2022,
    section 3.
    """
    points, response = columns(x), columns(y)
    shaken = [array + noise * generator.standard_normal(array.shape) for array in (points, response)]
    return foci(shaken[0], shaken[1], stop)


class _Chosen:
    """Squared distances in the chosen columns, and who is nearest when one more column counts."""

    def __init__(self, count: int) -> None:
        self._distances = np.zeros((count, count))
        np.fill_diagonal(self._distances, np.inf)  # no point is its own neighbour
        self._columns = 0

    def add(self, column: Floats) -> None:
        """One column more is chosen."""
        self._distances += np.square(column[:, None] - column[None])
        self._columns += 1
        # one more column separates points the less, the more there are
        roots = _KEPT_OF_FIRST if self._columns == 1 else _KEPT_OF_MORE
        size = min(int(roots * np.sqrt(len(column))) + 1, len(column) - 1)
        if self._columns == 1:
            places, self._bounds = self._around(column, size)
        else:
            places = np.argpartition(self._distances, size, axis=1)[:, :size]
            self._bounds = np.take_along_axis(self._distances, places, axis=1).max(1)
        self._places = np.sort(places, axis=1)  # by index, so that the first of equals is the lowest
        self._near = np.take_along_axis(self._distances, self._places, axis=1)
        self._sums = np.empty_like(self._near)

    def _around(self, column: Floats, size: int) -> tuple[Places, Floats]:
        """`size` points around each in the sorted column, and the distance of the nearest that is left out."""
        order, rows = np.argsort(column), np.arange(len(column))
        start = np.clip(rows - size // 2, 0, len(column) - size)
        places, bounds = np.empty((len(column), size), dtype=np.int64), np.empty(len(column))
        places[order] = order[start[:, None] + np.arange(size)]
        ends = np.stack([start - 1, start + size])
        outside = (ends < 0) | (ends >= len(column))
        distances = self._distances[order, order[np.where(outside, 0, ends)]]
        bounds[order] = np.where(outside, np.inf, distances).min(0)
        return places, bounds

    def nearest(self, column: Floats) -> Places:
        """Each point's nearest other point in the chosen columns and this one."""
        sums, rows = self._sums, np.arange(len(column))
        np.take(column, self._places, out=sums, mode="clip")
        sums -= column[:, None]
        np.square(sums, out=sums)
        sums += self._near
        best = sums.argmin(1)
        found: Places = self._places[rows, best]
        # not strictly below: a point that was left out, at the bound, may be as near and of a lower index
        unsure = np.flatnonzero(sums[rows, best] >= self._bounds)
        if len(unsure):
            whole = np.square(column[unsure, None] - column[None])
            whole += self._distances[unsure]
            found[unsure] = whole.argmin(1)
        return found


def _each_on_a_line(candidates: Floats) -> Places:
    """Each point's nearest other point in each column alone, given as rows: (p, n)."""
    order = np.argsort(candidates, axis=1)
    values = np.take_along_axis(candidates, order, axis=1)
    gap = np.square(np.diff(values, axis=1))
    end = np.full((len(candidates), 1), np.inf)
    below, above = np.hstack([end, gap]), np.hstack([gap, end])
    before, after = np.roll(order, 1, axis=1), np.roll(order, -1, axis=1)
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.where(below < above, before, after), axis=1)
    # another point is as near only if the one on the other side is, or the next on the same side
    farther = np.square(values[:, 2:] - values[:, :-2])
    tied = below == above
    tied[:, 2:] |= farther == gap[:, 1:]
    tied[:, :-2] |= farther == gap[:, :-1]
    for place in np.flatnonzero(tied.any(1)):
        found[place] = _nearest_on_a_line(candidates[place])
    return found


def _nearest_on_a_line(column: Floats) -> Places:
    """Each point's nearest other point in one column, of the lowest index among all that are as near."""
    values, group, sizes = np.unique(column, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes
    first = order[starts]  # lowest index of each value
    second = order[np.minimum(starts + 1, len(column) - 1)]
    several = sizes > 1
    gap = np.square(np.diff(values))
    ends = np.array([np.inf])
    best = np.where(several, 0.0, np.minimum(np.append(ends, gap), np.append(gap, ends)))
    low = np.full(len(values), len(column))
    for direction in (-1, 1):
        reached = np.arange(len(values))
        active = reached
        while len(active):  # more than one step only where distances are equal in float64
            reached = reached + direction
            inside = (reached >= 0) & (reached < len(values))
            active, reached = active[inside], reached[inside]
            tied = np.square(values[active] - values[reached]) == best[active]
            active, reached = active[tied], reached[tied]
            low[active] = np.minimum(low[active], first[reached])
    # of a value that several points have: its own first, and of the first the second
    own = np.where(np.arange(len(column)) == first[group], second[group], first[group])
    return np.where(several[group], np.minimum(low[group], own), low[group])
