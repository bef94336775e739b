"""What only the auditor knows. No module of `adversaries` may import this one; a test holds that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedattack.observation import observation_name


@dataclass(frozen=True)
class GroundTruth:
    """The private batch behind one observation.

    Parameters
    ----------
    round, client : int
        Which observation it belongs to.
    images : Tensor
        float32, shape (B, C, H, W), in [0, 1].
    labels : Tensor
        int64, shape (B,).
    sample_ids : tuple of int
        Positions in the data set, for the record.
    shown : Tensor or None
        float32, shape (B, C, H, W), in [0, 1]: what the model was shown where a defence transforms the images; None
        where it was shown `images`.
    """

    round: int
    client: int
    images: Tensor
    labels: Tensor
    sample_ids: tuple[int, ...]
    shown: Tensor | None = None

    @property
    def key(self) -> str:
        """The same name as the observation's."""
        return observation_name(self.round, self.client)
