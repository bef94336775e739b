"""How near the generator can be brought without its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor

from adversaries.membership.synthetic.base import LEAST_PUBLIC, SyntheticAttack
from adversaries.membership.synthetic.release import Release


@dataclass
class PartialBlackBox(SyntheticAttack):
    """GAN-Leaks, partial black-box: minus the least difference that a search finds (Chen et al., CCS 2020).

    Section 4.2: the mean squared difference of the images that Powell's method comes to from the latent of the
    nearest synthetic image. Needs synthetic images, their latents, and to have the generator make images of latents
    of the adversary's choice.

    Parameters
    ----------
    iterations : int
        Of Powell's method, each a line search along every axis of the latent.
    evaluations : int
        Most images that the generator makes for a candidate; the paper's search has no such bound, and its ten
        iterations come to about 4,000 with 32 latents.
    """

    access: ClassVar = "latents"
    iterations: Annotated[int, Field(ge=1)] = 10
    evaluations: Annotated[int, Field(ge=1)] = 1000

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """Minus the mean squared differences, of pixels in [-1, 1]."""
        generator, starts = release.start(images.to(device))
        options = {"maxiter": self.iterations, "maxfev": self.evaluations}

        def search(image: Tensor, start: Tensor) -> float:
            def loss(latent: NDArray[np.float64]) -> float:
                made = generator(torch.from_numpy(latent[None]).to(device, torch.float32))
                return float(4 * (made[0] - image).square().mean())

            return float(minimize(loss, start.numpy(), method="Powell", options=options).fun)

        with torch.inference_mode():
            pairs = zip(images.to(device), starts.cpu(), strict=True)
            return torch.tensor([-search(*pair) for pair in pairs], dtype=torch.float64)


@dataclass
class CalibratedPartialBlackBox(PartialBlackBox):
    """GAN-Leaks, partial black-box, less what it finds in a reference generator (Chen et al., CCS 2020)."""

    needs = replace(PartialBlackBox.needs, auxiliary=LEAST_PUBLIC)
    calibrated: bool = True
