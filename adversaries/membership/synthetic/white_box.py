"""How near the generator can be brought along its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adversaries.inversion.solvers.lbfgs import Lbfgs
from adversaries.inversion.solvers.minimiser import Rules
from adversaries.membership.synthetic.base import LEAST_PUBLIC, SyntheticAttack
from adversaries.membership.synthetic.release import Release
from fedattack.config import Weight


@dataclass
class WhiteBox(SyntheticAttack):
    """GAN-Leaks, white-box: minus the least difference that descent finds (Chen et al., CCS 2020).

    Section 4.3, the mean squared difference without the perceptual term: L-BFGS, with a line search of its own for
    each candidate, from the latent of the nearest synthetic image. Needs the generator.

    Parameters
    ----------
    iterations : int
        Evaluations of the generator for a candidate.
    penalty : float
        Weight of ``(|z|^2 - d)^2``, which holds the latent, of d numbers, at a likely length; no part of the score.
    """

    access: ClassVar = "generator"
    iterations: Annotated[int, Field(ge=1)] = 200
    penalty: Weight = 0.001

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """Minus the mean squared differences, of pixels in [-1, 1]."""
        return torch.cat([self._search(release, some.to(device)) for some in images.split(256)])

    def _search(self, release: Release, images: Tensor) -> Tensor:
        generator, start = release.start(images)

        def differences(latents: Tensor) -> Tensor:
            return 4 * (generator(latents) - images).square().flatten(1).mean(1)

        def evaluate(latents: Tensor) -> tuple[Tensor, Tensor]:
            latents = latents.detach().requires_grad_(True)
            unlikely = (latents.square().sum(1) - latents.shape[1]).square()
            losses = differences(latents) + self.penalty * unlikely
            return losses.detach(), torch.autograd.grad(losses.sum(), latents)[0]

        best = Lbfgs(evaluate, start, Rules()).run(self.iterations).variables
        with torch.no_grad():
            return -differences(best).double().cpu()


@dataclass
class CalibratedWhiteBox(WhiteBox):
    """GAN-Leaks, white-box, less what it finds in a reference generator (Chen et al., CCS 2020)."""

    needs = replace(WhiteBox.needs, auxiliary=LEAST_PUBLIC)
    calibrated: bool = True
