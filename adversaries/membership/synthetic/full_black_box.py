"""How near the nearest synthetic image is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.neighbours import nearest
from adversaries.membership.synthetic.release import Release


@dataclass
class FullBlackBox(SyntheticAttack):
    """GAN-Leaks, full black-box: minus the Euclidean distance to the nearest synthetic image.

    Chen, Yu, Zhang and Fritz, "GAN-Leaks", CCS 2020, section 4.2.
    """

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """Minus the distances, of pixels in [-1, 1]."""
        return -2 * nearest(release.images, images, 1, device)[0][:, 0]
