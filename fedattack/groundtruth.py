"""What only the auditor knows. No module of `adversaries` may import this one; a test holds that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedattack.observation import observation_name


@dataclass(frozen=True)
class GroundTruth:
    """The private batch behind one observation."""

    round: int
    client: int
    images: Tensor  # float32 (B, C, H, W), in [0, 1]
    labels: Tensor  # int64 (B,)
    sample_ids: tuple[int, ...]  # positions in the data set, for the record
    shown: Tensor | None = None  # as `images`: what the model was shown where a defence transforms them

    @property
    def key(self) -> str:
        """The same name as the observation's."""
        return observation_name(self.round, self.client)
