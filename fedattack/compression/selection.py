"""Which entries of an update are sent: how many, and the exact largest or random ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedattack.config import CompressionConfig

WARMUP_START = 0.25
"""Share kept in the first warm-up round of DGC (Lin et al. 2018, section 3.3: sparsity 75 %)."""


class Quota(NamedTuple):
    """`kept` entries are sent of the flat positions in [start, stop)."""

    start: int
    stop: int
    kept: int


def kept_share(config: CompressionConfig, round: int) -> float:
    """Share of all entries that is sent in a 1-based `round`; in rounds before it as in round 1.

    DGC falls exponentially from 25 % in round 1 to `rate` in round ``warmup_rounds + 1``: with 4 warm-up rounds and
    rate 0.1 % it is 25, 6.3, 1.6, 0.4, 0.1 % (Lin et al. 2018, section 3.3). All others send `rate` throughout.
    """
    round = max(round, 1)
    if config.name != "dgc" or round > config.warmup_rounds or config.rate >= WARMUP_START:
        return config.rate
    return WARMUP_START * (config.rate / WARMUP_START) ** ((round - 1) / config.warmup_rounds)


def quotas(config: CompressionConfig, sizes: Sequence[int], round: int) -> list[Quota]:
    """How many entries are sent from where: ``max(1, round(n * share))`` of all entries, or of each tensor.

    `scope` "global" gives one quota over everything, "layer" one for each tensor; `round`, 1-based, is for DGC's
    warm-up.
    """
    share = kept_share(config, round)
    spans = [sum(sizes)] if config.scope == "global" else sizes
    result, start = [], 0
    for size in spans:
        if size:
            result.append(Quota(start, start + size, max(1, int(np.rint(size * share)))))
        start += size
    return result


def largest(magnitudes: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Positions, strictly increasing int64, of the `count` (1 to n) largest entries, exact; of equal ones the lowest.

    `magnitudes` (n,) is non-negative and free of NaN. The answer is a function of the values alone: no thread count,
    library or sampling can change it.
    """
    if count >= magnitudes.size:
        return np.arange(magnitudes.size)
    candidates = _candidates(magnitudes, count)
    pool = magnitudes if candidates is None else magnitudes[candidates]
    threshold = np.partition(pool, pool.size - count)[pool.size - count]
    chosen = pool > threshold
    missing = count - np.count_nonzero(chosen)
    chosen[np.flatnonzero(pool == threshold)[:missing]] = True
    positions = np.flatnonzero(chosen)
    return positions if candidates is None else candidates[positions]


def _candidates(magnitudes: NDArray[np.float32], count: int) -> NDArray[np.int64] | None:
    """Few positions that surely hold the `count` largest, or None where guessing does not pay or failed."""
    stride = min(magnitudes.size // 65_536, count // 256) | 1
    if stride == 1 or count * 8 > magnitudes.size:
        return None
    sample = magnitudes[::stride]
    rank = int(1.2 * count / stride + 4 * (count / stride) ** 0.5)
    bar = np.partition(sample, sample.size - rank)[sample.size - rank]
    candidates = np.flatnonzero(magnitudes >= bar)
    return candidates if candidates.size >= count else None


def uniform(total: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` distinct positions below `total`, uniformly drawn, strictly increasing (int64)."""
    return np.sort(rng.choice(total, count, replace=False, shuffle=False))
