"""What the released critic says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.release import Release


@dataclass
class Critic(SyntheticAttack):
    """LOGAN, white-box: the critic's score (Hayes et al., PoPETs 2019). Needs a critic that was sent."""

    needs = replace(SyntheticAttack.needs, critic=True)
    access: ClassVar = "critic"

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """The scores."""
        assert release.critic is not None
        with torch.no_grad():
            return torch.cat([release.critic(x.to(device))[:, 0].double().cpu() for x in images.split(512)])
