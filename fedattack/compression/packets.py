"""What a compressor produces and the wire carries: dense, sparse, sign, quantised and quantised sparse updates.

All arrays are flat over the concatenation of all tensors, in the model's order. Client and server turn a packet
into values by the same lines, so a client's error feedback knows exactly what the server will see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class _Packet(ABC):
    """What every packet can say of itself."""

    @abstractmethod
    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """The values of all entries, zeros where nothing was sent, shape (numel,)."""

    def remainder(self, intended: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
        """`intended` with what was sent taken out, shape (numel,)."""
        return intended - self.dense(sizes)


@dataclass(frozen=True)
class Dense(_Packet):
    """Every entry as it is: `values` float32, shape (numel,)."""

    values: NDArray[np.float32]

    @property
    def numel(self) -> int:
        """Entries of the update."""
        return self.values.size

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        return self.values


@dataclass(frozen=True)
class Sparse(_Packet):
    """Some entries: `indices` int64 (k,), strictly increasing in [0, numel); `values` float32 (k,)."""

    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    numel: int

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        flat = np.zeros(self.numel, np.float32)
        flat[self.indices] = self.values
        return flat

    def remainder(self, intended: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
        """`intended` with what was sent taken out, shape (numel,)."""
        left = intended.copy()
        left[self.indices] -= self.values
        return left


@dataclass(frozen=True)
class Signs(_Packet):
    """``scale * (+1 or -1)``: `positive` bool (numel,); `scales` float32 (tensors,), finite and not negative."""

    positive: NDArray[np.bool_]
    scales: NDArray[np.float32]

    @property
    def numel(self) -> int:
        """Entries of the update."""
        return self.positive.size

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        spread = np.repeat(self.scales, sizes)
        return np.where(self.positive, spread, -spread)


@dataclass(frozen=True)
class Quantised(_Packet):
    """``scale * step / levels``: `steps` int8 (numel,), at most `levels` (1 to 127) in size; `scales` as in Signs."""

    steps: NDArray[np.int8]
    scales: NDArray[np.float32]
    levels: int

    @property
    def numel(self) -> int:
        """Entries of the update."""
        return self.steps.size

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        return _values(self.steps, self.scales, self.levels, sizes)


@dataclass(frozen=True)
class QuantisedSparse(_Packet):
    """As :class:`Quantised`, of the entries at `indices`, int64 (k,), strictly increasing in [0, numel)."""

    indices: NDArray[np.int64]
    steps: NDArray[np.int8]
    scales: NDArray[np.float32]
    levels: int
    numel: int

    def sparse(self, sizes: Sequence[int]) -> Sparse:
        """The values of the steps at their positions."""
        counts = counts_inside(self.indices, sizes)
        return Sparse(self.indices, _values(self.steps, self.scales, self.levels, counts), self.numel)

    def dense(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        return self.sparse(sizes).dense(sizes)


def counts_inside(indices: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.int64]:
    """How many of the increasing flat `indices` lie in each tensor."""
    return np.diff(np.searchsorted(indices, np.cumsum([0, *sizes])))


def _values(
    steps: NDArray[np.int8],
    scales: NDArray[np.float32],
    levels: int,
    counts: Sequence[int] | NDArray[np.int64],
) -> NDArray[np.float32]:
    """Steps as float32, the first counts[0] of them in the first tensor's scale, and so on."""
    values = steps.astype(np.float32)
    values /= np.float32(levels)
    values *= np.repeat(scales, counts)
    return values


Packet = Dense | Sparse | Signs | Quantised | QuantisedSparse
