"""Attacks with faults, named as ``faulty_attacks:Fussy``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.observation import Observation, Reconstruction

FAULTS = {
    1: "ValueError: no such thing (faulty_attacks.py:",
    2: "answered images with 256 values that are NaN or infinite",
    3: "answered images of shape (1, 1, 8, 8); (B, 1, 16, 16) was asked for",
    4: "answered labels of shape (3,) for 1 images",
    5: "answered a NoneType, which is no Reconstruction",
}
"""Client -> what becomes of its answer; the others are answered grey."""


@dataclass
class Fussy(ReconstructionAttack):
    """Fails on some clients, each in its own way, and on two at once for want of memory."""

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        if len(observations) > 1:
            raise MemoryError
        (observation,) = observations
        client, size = observation.client, 16
        if client == 1:
            raise ValueError("no such thing\nat all")
        if client == 5:
            return [None]  # type: ignore[list-item]
        images: Tensor = torch.full((1, 1, 8, 8) if client == 3 else (1, 1, size, size), 0.5)
        labels = torch.zeros(3 if client == 4 else 1, dtype=torch.int64)
        return [Reconstruction(images * torch.nan if client == 2 else images, labels, 0.0)]


@dataclass
class Hopeless(Fussy):
    """Fails on everybody."""

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        raise RuntimeError("out of luck")
