"""How near the nearest synthetic images are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from adversaries.membership.synthetic.base import LEAST_PUBLIC, SyntheticAttack
from adversaries.membership.synthetic.neighbours import nearest
from adversaries.membership.synthetic.release import Release
from adversaries.needs import Facts
from fedattack.errors import NotApplicable
from fedattack.observation import Scenario


@dataclass
class FullBlackBox(SyntheticAttack):
    """GAN-Leaks, full black-box: minus the distance to the nearest synthetic image (Chen et al., CCS 2020).

    Section 4.2; Euclidean. Needs synthetic images alone.

    Parameters
    ----------
    neighbours : int
        Nearest synthetic images, the mean of whose distances counts; the paper's score is of one.
    """

    neighbours: Annotated[int, Field(ge=1)] = 1

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """Minus the distances, of pixels in [-1, 1]."""
        return -2 * nearest(release.images, images, self.neighbours, device)[0].mean(1)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse, before anything is trained, more neighbours than images."""
        if self.neighbours > self.samples:
            raise NotApplicable(
                f"setting 'neighbours' = {self.neighbours}: more than {self.samples} images drawn; raise 'samples'"
            )


@dataclass
class CalibratedFullBlackBox(FullBlackBox):
    """GAN-Leaks, full black-box, less the distance to a reference generator's images (Chen et al., CCS 2020).

    The adversary trains the reference on its public images as the federation trained (section 4.4).
    """

    needs = replace(FullBlackBox.needs, auxiliary=LEAST_PUBLIC)
    calibrated: bool = True
