"""Forgetting by random labels, where the forgotten samples' gradient is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedattack.unlearning.random_labels import RandomLabels
from fedattack.unlearning.shadows import drawn
from fedattack.unlearning.steps import Models


@dataclass
class SalUn(RandomLabels):
    """Saliency unlearning (Fan et al., SalUn, ICLR 2024, equations 4 to 6): random labels move salient weights only.

    Parameters
    ----------
    share : float
        Share of the weights that may move, in (0, 1]: those of the largest gradient of the forgotten samples' mean
        loss in the trained model.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def moved(self, models: Models) -> Tensor:
        """See :meth:`StepMechanism.moved`."""
        return self.descended(models, self.terms(models), self.steps, only=self.salient(models))

    def salient(self, models: Models) -> Tensor:
        """Which weights may move, 1 or 0, (M, P)."""
        batch = next(drawn(models.forgotten, 0, 1, models.draws))
        slope = models.stack.gradient(models.rows, batch).abs()
        least = slope.sort(1, descending=True).values[:, max(1, round(self.share * slope.shape[1])) - 1]
        return (slope >= least[:, None]).to(slope.dtype)
