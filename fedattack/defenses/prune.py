"""Gradient pruning: the smallest entries are set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from fedattack.compression.selection import largest
from fedattack.defenses.base import Defense


@dataclass
class Prune(Defense):
    """Set the smallest entries of the update to zero, in each tensor or over all of it.

    Parameters
    ----------
    share : float
        Share of entries that is set to zero; ``round(n * (1 - share))`` are kept, and at least one.
    scope : {"layer", "global"}

    References
    ----------
    Zhu, Liu and Han, Deep Leakage from Gradients, 2019, section 5.2 (against DLG more than 20 % were enough);
    the SemSim benchmark's ``prune_70``, per tensor.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.7
    scope: Literal["layer", "global"] = "layer"

    def update(self, update: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """`update` with its smallest entries at zero; of equal ones those at the lowest positions are kept."""
        if self.scope == "layer":
            return {name: self._pruned(tensor) for name, tensor in update.items()}
        flat = self._pruned(torch.cat([tensor.reshape(-1) for tensor in update.values()]))
        parts = flat.split([tensor.numel() for tensor in update.values()])
        return {n: part.reshape(t.shape) for (n, t), part in zip(update.items(), parts, strict=True)}

    def _pruned(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1)
        kept = max(1, round(flat.numel() * (1 - self.share)))
        chosen = torch.from_numpy(largest(flat.abs().cpu().numpy(), kept)).to(flat.device)
        result = torch.zeros_like(flat)
        result[chosen] = flat[chosen]
        return result.reshape(tensor.shape)
