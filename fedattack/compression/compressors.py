"""The built-in compressors, each a few lines over :class:`~fedattack.compression.base.Compressor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.compression.base import Compressor, Memory
from fedattack.compression.packets import (
    Dense,
    Packet,
    Quantised,
    QuantisedSparse,
    Signs,
    Sparse,
    counts_inside,
)
from fedattack.compression.selection import Quota, largest, quotas, uniform
from fedattack.config import CompressionConfig


class Identity(Compressor):
    """No compression: every entry as float32."""

    codec: ClassVar[str] = "dense"
    draws: ClassVar[bool] = False

    @property
    def stateful(self) -> bool:
        """False: nothing is ever left behind."""
        return False

    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """All of it."""
        return Dense(flat)


class Sparsifier(Compressor):
    """Base of those that send ``max(1, round(n * share))`` entries as they are, of all or of each tensor."""

    codec: ClassVar[str] = "sparse"

    def quotas(self, round: int) -> list[Quota] | None:
        """By `rate` and `scope`, and under DGC by the warm-up's share."""
        return self._quotas(round)

    def _quotas(self, round: int) -> list[Quota]:
        return quotas(self.config, self.sizes, round)


class TopK(Sparsifier):
    """Exact top-k by magnitude; of equal entries those with the lowest positions (Aji and Heafield 2017).

    With error feedback this is the sparsified SGD with memory of Stich et al. (2018).
    """

    draws: ClassVar[bool] = False

    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """The largest entries of each quota."""
        magnitudes = np.abs(flat)
        chosen = [start + largest(magnitudes[start:stop], k) for start, stop, k in self._quotas(round)]
        indices = np.concatenate(chosen)
        return Sparse(indices, flat[indices], self.numel)


class RandomK(Sparsifier):
    """Random-k: uniformly drawn entries, drawn anew by each client in each round.

    Values are sent as they are, not scaled by ``1 / rate``: the packet is a biased (shrunken) estimate of the update,
    which is what error feedback expects (Stich et al. 2018) and what an observer can read as gradient entries.
    """

    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """Drawn entries of each quota."""
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
        chosen = [start + uniform(stop - start, k, rng) for start, stop, k in self._quotas(round)]
        indices = np.concatenate(chosen)
        return Sparse(indices, flat[indices], self.numel)


class Sign(Compressor):
    """Scaled sign: one bit an entry times the tensor's mean magnitude (Karimireddy et al. 2019).

    signSGD (Bernstein et al. 2018) is the same without the scale. Zero counts as positive: there is no third symbol.
    """

    codec: ClassVar[str] = "signs"
    draws: ClassVar[bool] = False

    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """Signs and mean magnitudes."""
        return Signs(
            flat >= 0, _per_tensor(flat, self.sizes, lambda part: np.abs(part).mean(dtype=np.float64))
        )


class QSGD(Compressor):
    """QSGD: stochastic rounding to `levels` steps a sign of each tensor's scale (Alistarh et al. 2017, section 3.1).

    The scale is the tensor's largest magnitude (`norm` "max", as in the paper's experiments) or its L2 norm ("l2", as
    in its theory). The rounding is unbiased: the expected packet is the update.
    """

    codec: ClassVar[str] = "quantised"

    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """Rounded steps and scales."""
        return Quantised(*_rounded(flat, self.sizes, self.config, generator), self.config.levels)


class QuantisedTopK(TopK):
    """Exact top-k whose values are rounded as by QSGD: one scale a tensor, and 8 bits a value at 127 levels.

    The scale is that of the entries sent; with `norm` "max" it is the tensor's own. Sparsification followed by
    quantisation, with error feedback, is Qsparse-local-SGD (Basu et al. 2019).
    """

    codec: ClassVar[str] = "quantised-sparse"
    draws: ClassVar[bool] = True

    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """The largest entries of each quota, as rounded steps and scales."""
        packet = super().pack(flat, round, generator)
        assert isinstance(packet, Sparse)
        counts = counts_inside(packet.indices, self.sizes)
        steps, scales = _rounded(packet.values, counts.tolist(), self.config, generator)
        return QuantisedSparse(packet.indices, steps, scales, self.config.levels, self.numel)


class DGC(TopK):
    """Deep gradient compression (Lin et al. 2018, arXiv 1712.01887, algorithm 4).

    Local clipping to `clip_norm` (the paper's: ``N**-0.5`` of the global one for N clients), momentum correction
    ``u <- m u + g``, accumulation ``v <- v + u``; the exact largest entries of v are sent, and u and v are zeroed
    where they were (momentum factor masking). The kept share falls from 25 % to `rate` over `warmup_rounds`. Its
    residual is its error feedback, whatever the setting `error_feedback` says. The momentum is the client's: a server
    should not add its own.
    """

    @property
    def stateful(self) -> bool:
        """True: momentum and residual stay with the client."""
        return True

    def compress(
        self, update: Mapping[str, Tensor], memory: Memory, round: int, generator: torch.Generator
    ) -> tuple[Packet, Memory]:
        """One client's packet and its new momentum and residual; see :meth:`Compressor.compress`."""
        gradient = self.flatten(update)
        if self.config.clip_norm is not None:
            norm = float(_norm(gradient))
            if norm > self.config.clip_norm:
                gradient = gradient * np.float32(self.config.clip_norm / norm)
        momentum = self.recall(memory, "momentum") * np.float32(self.config.momentum)
        momentum += gradient
        residual = self.recall(memory, "residual") + momentum
        packet = self.pack(residual, round, generator)
        assert isinstance(packet, Sparse)
        residual[packet.indices] = 0
        momentum[packet.indices] = 0
        kept = {"momentum": torch.from_numpy(momentum), "residual": torch.from_numpy(residual)}
        return packet, Memory(kept)


# NumPy reductions run on one thread in a fixed order, torch's and BLAS' do not: same bits for any thread count.
def _norm(part: NDArray[np.float32]) -> np.float64:
    return np.sqrt(np.square(part, dtype=np.float64).sum())


_NORMS: dict[str, Callable[[NDArray[np.float32]], np.floating]] = {
    "max": lambda part: np.abs(part).max(),
    "l2": _norm,
}


def _rounded(
    flat: NDArray[np.float32], counts: Sequence[int], config: CompressionConfig, generator: torch.Generator
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Stochastic steps int8 (k,) and scales of values (k,), of which `counts` lie in each tensor."""
    scales = _per_tensor(flat, counts, _NORMS[config.norm])
    # No rounding can push a magnitude above its scale, nor a step above `levels`: each operation is monotone.
    magnitudes = np.abs(flat)
    magnitudes /= np.repeat(np.where(scales > 0, scales, np.float32(1)), counts)
    magnitudes *= np.float32(config.levels)
    steps = np.floor(magnitudes)
    draws = torch.rand(flat.size, generator=generator).numpy()
    steps += draws < magnitudes - steps
    return np.copysign(steps, flat).astype(np.int8), scales


def _per_tensor(
    flat: NDArray[np.float32], sizes: Sequence[int], scale: Callable[[NDArray[np.float32]], np.floating]
) -> NDArray[np.float32]:
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return np.array([scale(part) if part.size else 0.0 for part in parts], np.float32)
