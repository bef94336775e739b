"""Forgetting by learning something else about the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedattack.unlearning.steps import Models, StepMechanism, Term


@dataclass
class RandomLabels(StepMechanism):
    """Train on with the retained samples, and the forgotten under random labels that are not theirs.

    (Graves et al., Amnesiac machine learning, AAAI 2021, "unlearning".) The labels are drawn once.
    """

    def terms(self, models: Models) -> Sequence[Term]:
        """The mean loss of all, the forgotten ones' labels changed."""
        return [Term(models.retained | models.forgotten, targets=relabelled(models))]


def relabelled(models: Models) -> Tensor:
    """Each model's labels, int64 (M, N): other classes, drawn evenly, in place of what it forgets."""
    classes, labels = models.stack.classes, models.stack.labels.numpy()
    shifts = np.stack([draw.integers(1, max(2, classes), len(labels)) for draw in models.draws])
    return torch.from_numpy(np.where(models.forgotten, (labels + shifts) % classes, labels))
