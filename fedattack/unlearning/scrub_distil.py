"""Forgetting by a student that obeys its teacher on the retained samples alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedattack.unlearning.shadows import SampleLoss, label_loss
from fedattack.unlearning.steps import Models, Rate, StepMechanism, Steps, Term

Weight = Annotated[float, Field(ge=0)]


@dataclass
class ScrubDistil(StepMechanism):
    """SCRUB (Kurmanji et al., Towards unbounded machine unlearning, NeurIPS 2023, equation 3 and algorithm 1).

    The trained model is the teacher. In the first epochs the student climbs its divergence from the teacher on the
    forgotten, in all epochs it then descends on the retained by divergence and cross-entropy; plain SGD. Without the
    paper's rewinding, which picks an epoch by the error on held-out samples.

    Parameters
    ----------
    epochs, ascents : int
        Epochs over the retained, and in how many of them, the first ones, the forgotten are climbed.
    alpha, gamma : float
        Weights of divergence and of cross-entropy on the retained, 0 or more.
    temperature : float
        Divides the logits of both, above 0; the divergence is multiplied by its square.
    """

    rate: Rate | None = 0.05
    epochs: Steps = 5
    ascents: Annotated[int, Field(ge=0)] = 3
    alpha: Weight = 0.1
    gamma: Weight = 0.99
    temperature: Annotated[float, Field(gt=0)] = 4.0

    def moved(self, models: Models) -> Tensor:
        """See :meth:`StepMechanism.moved`."""
        teacher = models.stack.logits(models.rows, models.stack.images)
        labels = models.stack.labels.expand(len(teacher), -1)[..., None]
        held = torch.cat([teacher, labels.to(teacher.dtype)], -1)
        climbed = Term(models.forgotten, -1.0, held, distillation(self.temperature, 1.0, 0.0))
        kept = Term(models.retained, 1.0, held, distillation(self.temperature, self.alpha, self.gamma))
        now = models
        for epoch in range(self.epochs):
            for term in (climbed, kept) if epoch < self.ascents else (kept,):
                steps = models.epoch(term.members, self.batch)
                now = replace(now, rows=self.descended(now, [term], steps))
        return now.rows


def distillation(temperature: float, alpha: float, gamma: float) -> SampleLoss:
    """``alpha * KL(teacher, student) + gamma * cross-entropy``, held against the teacher's logits and the label."""

    def loss(logits: Tensor, held: Tensor) -> Tensor:
        teacher = (held[:, :-1] / temperature).log_softmax(-1)
        student = (logits / temperature).log_softmax(-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1) * temperature**2
        return alpha * divergence + gamma * label_loss(logits, held[:, -1].long())

    return loss
