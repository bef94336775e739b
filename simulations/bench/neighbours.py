"""Nearest synthetic images beside scikit-learn's one call: CPU seconds, memory, and how far apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adversaries.membership.synthetic.neighbours import nearest
from simulations.bench.scenes import memory

COUNT = 5

Found = tuple[NDArray[np.float64], NDArray[np.int64]]


def run(quick: bool = False) -> dict[str, Any]:
    """5 nearest of 50,000 images of 28x28 to each of 2,000, a tenth of which are among them, on one thread.

    ``seconds`` and ``sklearn_seconds``, ``ratio`` of the two; ``grown_mb``, the most memory that a call took
    beside the images; ``apart``, the largest difference of distances, ``same``, the share of equal
    places; ``duplicate`` and ``sklearn_duplicate``, the largest distance of an image to itself.
    """
    points, queries = (2_000, 100) if quick else (50_000, 2_000)
    generator = torch.Generator().manual_seed(0)
    made = torch.rand(points, 1, 28, 28, generator=generator)
    asked = torch.rand(queries, 1, 28, 28, generator=generator)
    alike = queries // 10
    asked[:alike] = made[-alike:]
    flat = [some.flatten(1).numpy() for some in (made, asked)]

    def ours() -> Found:
        distances, places = nearest(made, asked, COUNT, torch.device("cpu"))
        return distances.numpy(), places.numpy()

    def theirs() -> Found:
        distances, places = (
            NearestNeighbors(n_neighbors=COUNT, algorithm="brute").fit(flat[0]).kneighbors(flat[1])
        )
        return distances, places

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            found, seconds, grown = _measured(ours)
            wanted, their_seconds, _ = _measured(theirs)
    finally:
        torch.set_num_threads(threads)
    return {
        "seconds": seconds,
        "sklearn_seconds": their_seconds,
        "ratio": their_seconds / seconds,
        "grown_mb": grown,
        "apart": float(np.abs(found[0] - wanted[0]).max()),
        "same": float((found[1] == wanted[1]).mean()),
        "duplicate": float(found[0][:alike, 0].max()),
        "sklearn_duplicate": float(wanted[0][:alike, 0].max()),
    }


def _measured(work: Callable[[], Found]) -> tuple[Found, float, float]:
    """What it gives, CPU seconds of the faster of two goes, and MB that the process grew by at most."""
    seconds = []
    work()  # libraries are loaded, and buffers taken, once
    with memory() as grown:
        for _ in range(2):
            started = time.process_time()
            found = work()
            seconds.append(time.process_time() - started)
    return found, min(seconds), grown[0] / 1e6
