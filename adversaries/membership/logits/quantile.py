"""Quantile regression: how confident the model would be in such a sample if it were no member."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.decomposition import PCA
from sklearn.linear_model import QuantileRegressor
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, scaled_confidence
from adversaries.needs import Needs

LEAST = 20
"""Public samples from which on two quantiles can be told apart."""


@dataclass
class Quantile(BlackBox):
    """Confidence above a quantile of non-members like the candidate (Bertran et al., NeurIPS 2023).

    Median and upper quantile of non-members' ``log p_y - log(1 - p_y)`` given the sample are regressed on the public
    samples' principal components and labels (linear, pinball loss). The score is how far the candidate lies above
    its median, in units of the quantile's distance: above 1, at most `1 - level` of non-members like it lie there.

    Parameters
    ----------
    level : float
        Of the upper quantile, above 0.5 and below 1.
    components : int
        Principal components of the public images; at most a tenth of these are used.
    """

    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    components: Annotated[int, Field(ge=1)] = 16

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", auxiliary=LEAST, labelled=True)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """Height above the median over the distance of the quantile."""
        asked, population = knowledge.candidates, knowledge.public
        assert population is not None
        given, wanted = self._features(population.images, population.labels, asked.images, asked.labels)
        target = scaled_confidence(public, population.labels).numpy()
        middle, upper = (
            QuantileRegressor(quantile=level, alpha=1e-3, solver="highs").fit(given, target).predict(wanted)
            for level in (0.5, self.level)
        )
        # Where the two lines come close or cross, by the least distance among nearly all public samples.
        least = 0.1 * (np.quantile(target, self.level) - np.median(target)) + 1e-12
        own = scaled_confidence(logits, asked.labels)
        return (own - torch.from_numpy(middle)) / torch.from_numpy(np.maximum(upper - middle, least))

    def _features(
        self, public: Tensor, labels: Tensor, images: Tensor, asked: Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Whitened principal components and one column a label, of public samples and of candidates."""
        flat, others = public.flatten(1).double().numpy(), images.flatten(1).double().numpy()
        count = min(self.components, max(1, len(flat) // 10), flat.shape[1])
        pca = PCA(count, whiten=True, svd_solver="full").fit(flat)
        classes = np.arange(int(max(labels.max(), asked.max())) + 1)
        return (
            np.hstack([pca.transform(flat), labels.numpy()[:, None] == classes]),
            np.hstack([pca.transform(others), asked.numpy()[:, None] == classes]),
        )
