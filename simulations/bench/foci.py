"""FOCI beside one scikit-learn neighbour search for every candidate: CPU seconds, and whether both choose alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedattack.unlearning.scrub.codec import Ranks
from fedattack.unlearning.scrub.foci import foci

Answer = tuple[list[int], list[float]]


def run(quick: bool = False) -> dict[str, Any]:
    """Of 110 normal variables 4 make up the response, linearly; 500 and 1,000 points, one thread.

    For each number of points n ``seconds_n`` and ``sklearn_seconds_n``, ``ratio_n`` of the two; ``chosen_n``
    variables; ``same_n``, whether both chose the same in the same order with values equal to 1e-12.
    """
    figures: dict[str, Any] = {}
    for points in (60,) if quick else (500, 1000):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((points, 8 if quick else 110))
        y = x[:, :4] @ [1.0, 1.0, 0.5, 0.5]
        with threadpool_limits(1):
            (order, values), seconds = _quickest(lambda x=x, y=y: foci(x, y))  # type: ignore[misc]
            (wanted, theirs), their_seconds = _quickest(lambda x=x, y=y: by_searches(x, y))  # type: ignore[misc]
        figures |= {
            f"seconds_{points}": seconds,
            f"sklearn_seconds_{points}": their_seconds,
            f"ratio_{points}": their_seconds / seconds,
            f"chosen_{points}": len(order),
            f"same_{points}": order == wanted and bool(np.allclose(values, theirs, rtol=0, atol=1e-12)),
        }
    return figures


def by_searches(x: NDArray[np.float64], y: NDArray[np.float64]) -> Answer:
    """FOCI as it is written down: a neighbour search in all chosen columns and each candidate. No ties."""
    ranks, order, values = Ranks(y), list[int](), list[float]()
    near = np.zeros(len(y), dtype=np.int64)

    def neighbours(places: list[int]) -> NDArray[np.int64]:
        points = x[:, places]
        found = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points, return_distance=False)
        second: NDArray[np.int64] = found[:, 1]
        return second

    while len(order) < x.shape[1]:
        left = [place for place in range(x.shape[1]) if place not in order]
        found = [neighbours([*order, place]) for place in left]
        told = [ranks.conditional(one, near) if order else ranks.marginal(one) for one in found]
        best = int(np.argmax(told))
        if order and told[best] <= 0:
            break
        order.append(left[best])
        values.append(told[best])
        near = found[best]
    return order, values


def _quickest(work: Callable[[], Answer]) -> tuple[Answer, float]:
    """What it gives, and CPU seconds of the quickest of three goes."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        found = work()
        seconds.append(time.process_time() - started)
    return found, min(seconds)
