"""The base of all compressors: flattening, error feedback and the client's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.compression.packets import Packet
from fedattack.compression.selection import Quota
from fedattack.config import CompressionConfig
from fedattack.errors import RunFailed


@dataclass(frozen=True)
class Memory:
    """What a client keeps from round to round and never sends.

    Flat float32 tensors (numel,) by role ("residual", "momentum"); empty at first and for stateless compressors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)


class Compressor(ABC):
    """Turns a client's update, of the model's `names` and `shapes` in their order, into a packet.

    A subclass names its wire `codec` and says in :meth:`pack` what of a flat vector is sent; error feedback is added
    here: ``C(e + g)`` is sent and ``e <- e + g - C(e + g)`` kept (Stich et al. 2018; Karimireddy et al. 2019), so
    what was sent so far plus the residual is the sum of all updates. One instance serves all clients: whatever
    belongs to a client is in its :class:`Memory`.
    """

    codec: ClassVar[str]
    """Wire form of the packets: "dense", "sparse", "signs", "quantised" or "quantised-sparse"."""

    draws: ClassVar[bool] = True
    """Whether :meth:`pack` draws from its generator; where it does not, callers need not seed one."""

    def __init__(
        self, config: CompressionConfig, names: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> None:
        self.config = config
        self.names = tuple(names)
        self.shapes = tuple(tuple(int(side) for side in shape) for shape in shapes)
        self.sizes = [int(torch.Size(shape).numel()) for shape in self.shapes]
        self.numel = sum(self.sizes)

    @property
    def stateful(self) -> bool:
        """Whether a client's memory must be carried from round to round."""
        return self.config.error_feedback

    @abstractmethod
    def pack(self, flat: NDArray[np.float32], round: int, generator: torch.Generator) -> Packet:
        """What is sent of `flat` (float32, shape (numel,), finite, not to be modified) in this 1-based round."""

    def quotas(self, round: int) -> list[Quota] | None:
        """How many entries a sparse packet must hold and where (the server checks every reply); None: any number."""
        return None

    def compress(
        self, update: Mapping[str, Tensor], memory: Memory, round: int, generator: torch.Generator
    ) -> tuple[Packet, Memory]:
        """One client's packet of a 1-based round, and the memory it is to keep.

        `memory` (``Memory()`` at first) is not modified, so that a client whose reply was lost can be run again;
        `generator` is the client's own CPU stream of this round. Raises RunFailed if the update or the memory does
        not fit the model, or holds NaN or infinite values.
        """
        flat = self.flatten(update)
        if not self.stateful:
            return self.pack(flat, round, generator), Memory()
        flat = self.recall(memory, "residual") + flat
        packet = self.pack(flat, round, generator)
        return packet, Memory({"residual": torch.from_numpy(packet.remainder(flat, self.sizes))})

    def flatten(self, update: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """The update as one finite float32 vector of shape (numel,), in the model's order."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in update or tuple(update[name].shape) != shape:
                found = tuple(update[name].shape) if name in update else "nothing"
                raise RunFailed(f"update does not fit the model: {name!r} should be {shape}, got {found}")
        if len(update) != len(self.names):
            raise RunFailed(
                f"update holds tensors the model has not: {sorted(update.keys() - set(self.names))}"
            )
        flat = torch.cat([update[name].detach().reshape(-1) for name in self.names]).float().cpu().numpy()
        if not np.isfinite(flat).all():
            bad = [name for name in self.names if not torch.isfinite(update[name]).all()]
            raise RunFailed(
                f"update holds NaN or infinite values in {', '.join(bad)}; lower the learning rate?"
            )
        return flat

    def recall(self, memory: Memory, role: str) -> NDArray[np.float32]:
        """The flat tensor a client remembers as `role`; zeros before its first round."""
        tensor = memory.tensors.get(role)
        if tensor is None:
            return np.zeros(self.numel, np.float32)
        if tensor.shape != (self.numel,) or tensor.dtype != torch.float32:
            raise RunFailed(
                f"client memory {role!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"the model needs float32 of shape ({self.numel},)"
            )
        return tensor.numpy()
