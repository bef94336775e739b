"""Shadow models: a classifier for each class tells members of the references by their answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, known
from adversaries.needs import Needs
from fedattack.errors import NotApplicable

LEAST = 40
"""Answers to members, and to others, of a class that get a classifier of their own."""


@dataclass
class ShadowModels(BlackBox):
    """A classifier learns from shadow models how members are answered (Shokri et al., S&P 2017).

    For each class a classifier (here boosted trees) learns from the references' log-posteriors of candidates and
    public samples of that class which of them trained on the sample, and is asked about the model. A class with few
    samples is judged by a classifier on all.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=1)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """Log-odds of membership."""
        references, asked = known(knowledge), knowledge.candidates
        labels = [asked.labels]
        answers, member = [references.logits], [references.trained_on]
        if knowledge.public is not None and references.public_logits.shape[1]:
            labels.append(knowledge.public.labels)
            answers.append(references.public_logits)
            member.append(references.public_trained_on)
        x = torch.cat(answers, dim=1).double().log_softmax(-1).flatten(0, 1).numpy()
        y = torch.cat(member, dim=1).flatten().numpy()
        of = torch.cat(labels).repeat(len(references)).numpy()
        if y.all() or not y.any():
            raise NotApplicable(
                "shadow-models: reference models that trained on all samples, or on none, teach nothing"
            )
        wanted, queries = asked.labels.numpy(), logits.log_softmax(-1).numpy()
        found = np.full(len(wanted), np.nan)
        for label in np.unique(wanted):
            chosen = of == label
            if min(y[chosen].sum(), (~y[chosen]).sum()) < LEAST:
                continue
            found[wanted == label] = _log_odds(x[chosen], y[chosen], queries[wanted == label])
        if (left := np.isnan(found)).any():
            found[left] = _log_odds(x, y, queries[left])
        return torch.from_numpy(found)


def _log_odds(
    x: NDArray[np.float64], y: NDArray[np.bool_], asked: NDArray[np.float64]
) -> NDArray[np.float64]:
    trees = HistGradientBoostingClassifier(
        max_iter=50, max_leaf_nodes=15, early_stopping=False, random_state=0
    )
    found: NDArray[np.float64] = trees.fit(x, y).decision_function(asked)
    return found
