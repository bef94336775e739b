"""Floors of membership that need no model: what scores without members, and what pixels alone tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fedattack.audit.membership_pool import Pool, Scored, halves
from fedattack.metrics import Interval, pooled_auc, unit_counts
from fedattack.rng import numpy_rng

FOLDS = 5
FEWEST_UNITS = 10
"""Members, and non-members, below which nothing can be learnt from their pixels."""
_COMPONENTS = 50

Pixels = Callable[[NDArray[np.int64]], Tensor]
"""Sample ids (n,) -> images, (n, ...)."""


class Blind:
    """What pixels alone tell, once for all attacks that are asked the same; see :func:`blind_baseline`."""

    def __init__(self, pixels: Pixels, seed: int) -> None:
        self.pixels, self.seed = pixels, seed
        self._known: dict[tuple[bytes, ...], Interval | None] = {}

    def of(self, scored: Sequence[Scored]) -> Interval | None:
        """Of the candidates, whatever their scores."""
        asked = tuple(part.tobytes() for one in scored for part in (one.samples, one.is_member))
        if asked not in self._known:
            self._known[asked] = blind_baseline(scored, self.pixels, self.seed)
        return self._known[asked]


def null_control(pool: Pool, seed: int) -> dict[str, Interval]:
    """AUC of members against members, and of non-members against non-members, each in random halves of the units.

    In 95 of 100 runs each holds 0.5, if the intervals are as wide as they should be. A kind with fewer than four
    units is left out.
    """
    found = {}
    for name, side in (("members", pool.is_member), ("non-members", ~pool.is_member)):
        part = pool.where(side)
        if len(np.unique(units := pool.units[side])) >= 4:
            rng = numpy_rng(seed, "null control", int(side is pool.is_member))
            found[name] = pooled_auc(part.scores, halves(units, rng), part.clients, units)
    return found


def blind_baseline(scored: Sequence[Scored], pixels: Pixels, seed: int) -> Interval | None:
    """AUC of a classifier that tells members from non-members by their pixels alone, no model asked.

    Logistic regression on principal components, cross-validated by person (or sample). One is trained on the
    candidates of all targets together, and one for each target; the pair's better one counts, each with half the
    error, so that both hold chance in 95 of 100 runs whose candidates do not differ. None: too few candidates.
    (Das, Zhang and Tramer, Blind baselines beat membership inference attacks for foundation models, 2024.)
    """
    pool = Pool.of(scored)
    ids, place = np.unique(pool.samples, return_inverse=True)
    flat = pixels(ids).float().numpy().reshape(len(ids), -1)
    count = min(_COMPONENTS, flat.shape[1], max(1, len(ids) // 4))
    components = make_pipeline(StandardScaler(), PCA(count, whiten=True, random_state=0))
    features = components.fit_transform(flat)[place]
    together = _by_pixels(features, pool.is_member, pool.units, seed)
    readings = [] if together is None else [(together, np.ones(len(place), dtype=bool))]
    targets = np.unique(pool.clients)
    if len(targets) > 1:
        apart, asked = np.zeros(len(place)), np.zeros(len(place), dtype=bool)
        for target in targets:
            rows = pool.clients == target
            read = _by_pixels(features[rows], pool.is_member[rows], pool.units[rows], seed)
            if read is not None:
                apart[rows], asked[rows] = read, True
        readings += [(apart[asked], asked)] if asked.any() else []
    found = [
        _widened(
            pooled_auc(
                read, pool.is_member[asked], pool.clients[asked], pool.units[asked], 1 - 0.05 / len(readings)
            )
        )
        for read, asked in readings
    ]
    return max(found, key=lambda area: area.low, default=None)


def _widened(area: Interval) -> Interval:
    """The interval of a cross-validated AUC, the square root of 2 times as wide.

    Where nothing is to be learnt, what one fold's model says of another is what that one's says of the first: each
    pair of candidates counts twice (Bengio and Grandvalet, No unbiased estimator of the variance of K-fold
    cross-validation, 2004).
    """
    low, high = (area.mean + np.sqrt(2) * (end - area.mean) for end in (area.low, area.high))
    return replace(area, low=max(0.0, float(low)), high=min(1.0, float(high)))


def _by_pixels(
    features: NDArray[np.float64], is_member: NDArray[np.bool_], units: NDArray[np.int64], seed: int
) -> NDArray[np.float64] | None:
    """Out-of-fold scores, (n,), or None where a kind has too few units."""
    if min(unit_counts(is_member, units)) < FEWEST_UNITS:
        return None
    names, place = np.unique(units, return_inverse=True)
    share = np.bincount(place, weights=is_member) / np.bincount(place)  # a person may be of both kinds
    drawn, fold = numpy_rng(seed, "blind baseline").random(len(names)), np.zeros(len(names), dtype=np.int64)
    fold[np.lexsort((drawn, share))] = np.arange(len(names)) % FOLDS  # as many of a kind in each
    split, model = PredefinedSplit(fold[place]), LogisticRegression(C=0.1, solver="newton-cholesky")
    read = cross_val_predict(model, features, is_member, cv=split, method="decision_function")
    return np.asarray(read, dtype=np.float64)
