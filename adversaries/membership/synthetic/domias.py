"""How much denser synthetic images lie than real ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.decomposition import PCA
from sklearn.neighbors import KernelDensity
from torch import Tensor

from adversaries.membership.synthetic.base import LEAST_PUBLIC, SyntheticAttack
from adversaries.membership.synthetic.neighbours import nearest
from adversaries.membership.synthetic.release import Release
from fedattack.errors import NotApplicable


@dataclass
class Domias(SyntheticAttack):
    """DOMIAS: the log ratio of densities of synthetic and of public images (Breugel et al., AISTATS 2023).

    Equation 2. Densities are of whitened principal components of synthetic and public images together. Needs
    synthetic images, and public ones.

    Parameters
    ----------
    density : {"kde", "knn"}
        Gaussian kernels of Scott's bandwidth, as one of the paper's; or by the distance to the nearest neighbour.
    components : int
        At most so many principal components, of those that have variance.
    """

    needs = replace(SyntheticAttack.needs, auxiliary=LEAST_PUBLIC)
    density: Literal["kde", "knn"] = "kde"
    components: Annotated[int, Field(ge=1)] = 40

    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """log p(synthetic) - log p(public)."""
        if release.public is None or len(release.public) < LEAST_PUBLIC:
            raise NotApplicable("no public images are granted; raise setting 'data.auxiliary_size'")
        sets = [some.flatten(1).numpy() for some in (release.images, release.public, images)]
        known = np.concatenate(sets[:2])
        axes = PCA(min(self.components, *known.shape), random_state=seed % 2**32).fit(known)
        spread = np.sqrt(axes.explained_variance_)
        kept = spread > 1e-3 * spread[0]
        if not kept.any():
            raise NotApplicable("synthetic and public images are all the same one: they have no density")
        made, real, asked = (axes.transform(some)[:, kept] / spread[kept] for some in sets)
        return torch.from_numpy(self._log(made, asked, device) - self._log(real, asked, device))

    def _log(self, points: NDArray[Any], asked: NDArray[Any], device: torch.device) -> NDArray[Any]:
        """Log density of `points` at those asked about, up to a constant."""
        if self.density == "kde":
            return KernelDensity(bandwidth="scott").fit(points).score_samples(asked)
        near = nearest(torch.from_numpy(points), torch.from_numpy(asked), 1, device)[0][:, 0].numpy()
        return -np.log(len(points)) - points.shape[1] * np.log(np.maximum(near, 1e-6))
