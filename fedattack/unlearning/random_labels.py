"""Forgetting by learning something else about the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedattack.unlearning.steps import Models, Term, TermMechanism


@dataclass
class RandomLabels(TermMechanism):
    """Train on with the retained samples, and the forgotten under random labels that are not theirs.

    (Graves et al., Amnesiac machine learning, AAAI 2021, "unlearning".) The labels are drawn once.
    """

    def terms(self, models: Models) -> Sequence[Term]:
        """The mean loss of all, the forgotten ones' labels changed."""
        return [Term(models.retained | models.forgotten, targets=relabelled(models))]


def relabelled(models: Models) -> Tensor:
    """Each model's labels, int64 (M, N): other classes, drawn evenly, in place of what it forgets."""
    classes, labels = models.stack.classes, models.stack.labels
    shifts = [torch.randint(1, max(2, classes), labels.shape, generator=draw) for draw in models.draws]
    others = (labels + torch.stack(shifts)) % classes
    return torch.where(torch.from_numpy(models.forgotten), others, labels)
