"""Mechanisms that take a few steps of gradient descent from the trained model: one loop, for one model or many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor

from fedattack.config import TrainingConfig
from fedattack.errors import RunFailed
from fedattack.unlearning.central import Central
from fedattack.unlearning.history import History
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
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
    draws: Sequence[Generator]

    @classmethod
    def of(cls, central: Central, history: History, deletions: Sequence[Deletion]) -> Models:
        """The one model of a history, whose single holder of data is asked to forget."""
        stack = Stack(central.scenario.model, central.images, central.labels, history.weights)
        forgotten, retained = (np.zeros((1, len(central)), dtype=bool) for _ in range(2))
        forgotten[0, sorted(frozenset().union(*(deletion.positions for deletion in deletions)))] = True
        earlier = frozenset().union(*history.excluded.values())
        retained[0, central.retained(earlier)] = True
        draws = [central.rng("steps", len(earlier))]
        rows, training = stack.rows([history.weights]), central.scenario.training
        return cls(stack, rows, forgotten, retained & ~forgotten, training, draws)

    def epoch(self, members: NDArray[np.bool_], batch: int) -> int:
        """Batches in which every model sees all of its members, (M, N)."""
        most = int(members.sum(1).max())
        return max(1, -(-most // (batch or max(1, most))))


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
    """Base of mechanisms that take plain SGD steps from the trained models, without momentum or weight decay.

    BatchNorm uses the statistics as they were.

    Parameters
    ----------
    rate : float
        Learning rate, above 0; None: the training's.
    batch : int
        Samples of each term in a step; 0: all.
    """

    runs = "central"
    rate: Rate | None = None
    batch: Annotated[int, Field(ge=0)] = 32

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`, by :meth:`moved`; see :meth:`Mechanism.forget`.

        A client that never took part costs nothing: the model cannot know its samples.
        """
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        models = Models.of(trainer.central(), history, deletions)
        with trainer.cost.clocked():
            rows = self.moved(models)
        trainer.central().count(models.stack.passes)
        return Forgotten(models.stack.state(rows[0]), excluded, resumed_after=start)

    @abstractmethod
    def moved(self, models: Models) -> Tensor:
        """The models after they forgot, (M, P); RunFailed where one diverges."""

    def descended(
        self, models: Models, terms: Sequence[Term], steps: int, only: Tensor | None = None
    ) -> Tensor:
        """The rows after so many steps on the sum of the terms; `only`, (M, P): what may move, 1 or 0."""
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


@dataclass
class TermMechanism(StepMechanism):
    """Base of mechanisms that minimise the same terms in every step.

    Parameters
    ----------
    steps : int
        Steps, 1 or more.
    """

    steps: Steps = 30

    @abstractmethod
    def terms(self, models: Models) -> Sequence[Term]:
        """What the models minimise while they forget."""

    def moved(self, models: Models) -> Tensor:
        """See :meth:`StepMechanism.moved`."""
        return self.descended(models, self.terms(models), self.steps)
