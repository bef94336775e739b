"""The entropy that knows the label, with a threshold for each class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, known, of_label
from adversaries.needs import Needs
from fedattack.errors import NotApplicable


@dataclass
class ModifiedEntropy(BlackBox):
    """Modified entropy of the posterior (Song, Mittal, equation 8, USENIX Security 2021).

    ``-(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i)``: 0 for who is surely classified rightly, infinite
    for who is surely classified wrongly. The score is the class's threshold less it.

    Parameters
    ----------
    thresholds : {"none", "references", "public"}
        ``none``: 0 for all classes. ``references``: that which best tells members on the reference models, all
        together. ``public``: the median of the public samples. A class that these lack has that of all classes.
    """

    thresholds: Literal["none", "references", "public"] = "none"

    def required(self) -> Needs:
        """A reference, or public samples, as `thresholds` says."""
        if self.thresholds == "public":
            return replace(self.needs, auxiliary=1, labelled=True)
        return replace(self.needs, references=int(self.thresholds == "references"))

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """The class's threshold less the modified entropy."""
        labels, classes = knowledge.candidates.labels, logits.shape[-1]
        score = -modified_entropy(logits, labels)
        if self.thresholds == "public":
            assert knowledge.public is not None
            theirs = knowledge.public.labels
            best = _by_class(-modified_entropy(public, theirs), theirs, None, classes)
        elif self.thresholds == "references":
            references = known(knowledge)
            shadows = -modified_entropy(references.logits, labels)
            best = _by_class(
                shadows.flatten(), labels.repeat(len(references)), references.trained_on.flatten(), classes
            )
        else:
            return score
        return score - best[labels]


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of answers (..., N, C) to samples with labels (N,), float64 (..., N)."""
    logs = logits.double().log_softmax(-1)
    left = -torch.expm1(logs)  # 1 - p, of which next to p = 1 nothing is lost
    others = logs.exp() * left.clamp_min(1e-45).log()
    own = of_label(left * logs, labels)
    return of_label(others, labels) - own - others.sum(-1)


def _by_class(scores: Tensor, labels: Tensor, member: Tensor | None, classes: int) -> Tensor:
    """Threshold of each class, (C,): the median, or that with the best balanced accuracy."""

    def threshold(chosen: Tensor) -> float:
        if member is None:
            return float(scores[chosen].median())
        false, true, at = roc_curve(member[chosen].numpy(), scores[chosen].numpy())
        return float(at[1:][np.argmax((true - false)[1:])])  # the first is infinite

    def tells(chosen: Tensor) -> bool:
        return bool(chosen.any()) and (member is None or len(member[chosen].unique()) == 2)

    everybody = torch.ones_like(labels, dtype=torch.bool)
    if not tells(everybody):
        raise NotApplicable(
            "modified-entropy: references that trained on all candidates, or on none, set no threshold"
        )
    groups = [labels == number for number in range(classes)]
    return torch.tensor(
        [threshold(group if tells(group) else everybody) for group in groups], dtype=torch.float64
    )
