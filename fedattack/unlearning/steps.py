"""Mechanisms that take a few steps of gradient descent from the trained model: one loop, for one model or for many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedattack.config import TrainingConfig
from fedattack.errors import RunFailed
from fedattack.unlearning.history import History
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.shadows import SampleLoss, Stack, drawn, label_loss

Steps = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Models:
    """Trained models that are to forget.

    `rows`: their parameters, (M, P), in the order of `stack`; `forgotten`, `retained`: which of the N samples each
    was trained on and forgets, or keeps, (M, N); `draws`: each one's own stream.
    """

    stack: Stack
    rows: Tensor
    forgotten: NDArray[np.bool_]
    retained: NDArray[np.bool_]
    training: TrainingConfig
    draws: Sequence[np.random.Generator]


@dataclass(frozen=True)
class Term:
    """A part of what is minimised: `weight` times the mean loss over batches of `members`, (M, N).

    `targets`, (M, N, ...): what answers are held against; None: the labels.
    """

    members: NDArray[np.bool_]
    weight: float = 1.0
    targets: Tensor | None = None
    loss: SampleLoss = label_loss


@dataclass
class StepMechanism(Mechanism):
    """Base of mechanisms that minimise a sum of terms by plain SGD from the trained models.

    BatchNorm uses the statistics as they were; neither momentum nor weight decay.

    Parameters
    ----------
    steps : int
        Steps, 1 or more.
    rate : float
        Learning rate, above 0; None: the training's.
    batch : int
        Samples of each term in a step; 0: all.
    """

    steps: Steps = 30
    rate: Rate | None = None
    batch: Annotated[int, Field(ge=0)] = 32

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`, by :meth:`moved`; see :meth:`Mechanism.forget`."""
        raise NotImplementedError

    @abstractmethod
    def terms(self, models: Models) -> Sequence[Term]:
        """What the models minimise while they forget."""

    def moved(self, models: Models) -> Tensor:
        """The models after they forgot, (M, P); RunFailed where one diverges."""
        return self.descended(models, self.terms(models), self.steps)

    def descended(
        self, models: Models, terms: Sequence[Term], steps: int, only: Tensor | None = None
    ) -> Tensor:
        """The rows after so many steps on the terms; `only`, (M, P): what may move, 1 or 0."""
        rows, rate = models.rows, self.rate or models.training.learning_rate
        walks = [drawn(term.members, self.batch, steps, models.draws) for term in terms]
        for batches in zip(*walks, strict=True):
            slope = torch.zeros_like(rows)
            for term, batch in zip(terms, batches, strict=True):
                slope += term.weight * models.stack.gradient(rows, batch, term.targets, term.loss)
            rows = rows - rate * (slope if only is None else only * slope)
        if not bool(rows.isfinite().all()):
            raise RunFailed(f"{type(self).__name__}: forgetting diverged; lower its 'rate' or its 'steps'")
        return rows
