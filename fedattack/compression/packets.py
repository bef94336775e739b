"""What a compressor produces and the wire carries: dense, sparse, sign and quantised updates.

All arrays are flat over the concatenation of all tensors, in the model's order. Client and server turn a packet
into values by the same lines, so a client's error feedback knows exactly what the server will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dense:
    """Every entry as it is: `values` float32, shape (numel,)."""

    values: NDArray[np.float32]

    @property
    def numel(self) -> int:
        """Entries of the update."""
        return self.values.size

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """The values themselves, shape (numel,)."""
        return self.values

    def remainder(self, intended: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
        """Nothing is left behind: zeros, shape (numel,)."""
        return np.zeros_like(intended)


@dataclass(frozen=True)
class Sparse:
    """Some entries: `indices` int64 (k,), strictly increasing in [0, numel); `values` float32 (k,)."""

    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    numel: int

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """Values at their positions and zeros elsewhere, shape (numel,)."""
        flat = np.zeros(self.numel, np.float32)
        flat[self.indices] = self.values
        return flat

    def remainder(self, intended: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
        """`intended` with what was sent taken out, shape (numel,)."""
        left = intended.copy()
        left[self.indices] -= self.values
        return left


@dataclass(frozen=True)
class Signs:
    """One bit an entry and one scale a tensor: ``scale * (+1 or -1)``.

    `positive` bool (numel,); `scales` float32 (tensors,), finite and not negative.
    """

    positive: NDArray[np.bool_]
    scales: NDArray[np.float32]

    @property
    def numel(self) -> int:
        """Entries of the update."""
        return self.positive.size

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """Signed scales, shape (numel,)."""
        spread = np.repeat(self.scales, sizes)
        return np.where(self.positive, spread, -spread)

    def remainder(self, intended: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
        """``intended - dense``, shape (numel,)."""
        return intended - self.dense(sizes)


@dataclass(frozen=True)
class Quantised:
    """Signed whole steps of each tensor's scale: ``scale * step / levels``.

    `steps` int8 (numel,), in [-levels, levels]; `scales` float32 (tensors,), finite and not negative; `levels` 1 to
    127.
    """

    steps: NDArray[np.int8]
    scales: NDArray[np.float32]
    levels: int

    @property
    def numel(self) -> int:
        """Entries of the update."""
        return self.steps.size

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """Values of the steps, shape (numel,)."""
        flat = self.steps.astype(np.float32)
        flat /= np.float32(self.levels)
        flat *= np.repeat(self.scales, sizes)
        return flat

    def remainder(self, intended: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
        """``intended - dense``, shape (numel,)."""
        return intended - self.dense(sizes)


Packet = Dense | Sparse | Signs | Quantised
