"""How many synthetic images are near."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from sklearn.decomposition import PCA
from torch import Tensor

from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.neighbours import nearest, within
from adversaries.membership.synthetic.release import Release
from adversaries.needs import Needs
from fedattack.errors import NotApplicable
from fedattack.observation import Scenario


@dataclass
class MonteCarlo(SyntheticAttack):
    """Monte Carlo attack: the share of synthetic images within a radius (Hilprecht et al., PoPETs 2019).

    The radius is their median rule, which knows no member: the median over all candidates of the distance to the
    nearest synthetic image. The half with none so near would tie; of equally many the candidate whose nearest is
    nearer comes first. Needs synthetic images alone.

    Parameters
    ----------
    components : int
        Principal components, of the adversary's public images, in which distances are taken (the paper's: 40 on
        handwritten digits); 0: distances of pixels, without public images.
    """

    components: Annotated[int, Field(ge=0)] = 0

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """(number within the radius + 1 / (1 + distance to the nearest)) / number of synthetic images."""
        made, asked = release.images.flatten(1), images.flatten(1)
        if self.components:
            count = 0 if release.public is None else len(release.public)
            if release.public is None or count < self.components:
                raise NotApplicable(
                    f"setting 'components' = {self.components} needs as many public images, and {count} are granted; "
                    "raise setting 'data.auxiliary_size'"
                )
            axes = PCA(min(self.components, made.shape[1]), random_state=seed % 2**32)
            axes.fit(release.public.flatten(1).numpy())
            made, asked = (torch.from_numpy(axes.transform(some.numpy())) for some in (made, asked))
        first = nearest(made, asked, 1, device)[0][:, 0]
        counts = within(made, asked, float(np.median(first.numpy())), device)
        return (counts.double() + 1 / (1 + first)) / len(made)

    def needs_now(self, scenario: Scenario) -> Needs:
        """With public images for the components."""
        needs = super().needs_now(scenario)
        return replace(needs, auxiliary=max(needs.auxiliary, self.components))
