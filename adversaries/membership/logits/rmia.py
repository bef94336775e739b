"""RMIA: the candidate against the reference models, compared with public samples."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import (
    BlackBox,
    centres,
    known,
    log_confidence,
    middle,
    outside_alone,
)
from adversaries.needs import Needs

PUBLISHED_A = 0.3
TRIED = 8
"""References that :func:`fitted_a` puts in the model's place."""


@dataclass
class RMIA(BlackBox):
    """RMIA: the candidate's likelihood ratio among those of public samples (Zarifzadeh et al., ICML 2024).

    The score is the share of public samples z with ``(p(x; model) / p(x)) / (p(z; model) / p(z)) >= gamma``.

    Parameters
    ----------
    mode : {"online", "offline"}
        ``p(x)``: online, the mean of those of references that trained on x and of those that did not; offline,
        ``((1 + a) p_out(x) + 1 - a) / 2`` from those that did not, which stands for ``p(z)`` in both.
    gamma : float
        How many times likelier.
    a : float, optional
        In [0, 1]: 1 if references are as sure of members as of others. None: of 0, 0.1, ..., 1 the one with which
        eight references, each in turn in the model's place, are best seen through by the others (AUC over what each
        trained on, as in the authors' code); 0.3, the paper's, where these are too few to tell.
    break_ties : bool
        Rank equal shares by the ratio of x: it has as many values as there are candidates, the share as public
        samples. All ranks are then the ratio's, as in BASE (attack exponential-family), and gamma scales only.
    """

    mode: Literal["online", "offline"] = "online"
    gamma: Annotated[float, Field(gt=0)] = 2.0
    a: Annotated[float, Field(ge=0, le=1)] | None = None
    break_ties: bool = True

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=1, auxiliary=1, labelled=True)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """The share, in [0, 1]; ties are broken by less than one public sample's worth."""
        references, asked, population = known(knowledge), knowledge.candidates, knowledge.public
        assert population is not None
        shadows = log_confidence(references.logits, asked.labels).exp()
        theirs = log_confidence(references.public_logits, population.labels).exp()
        a = self.a
        if a is None:
            trained_on = torch.cat([references.trained_on, references.public_trained_on], dim=1)
            a = fitted_a(torch.cat([shadows, theirs], dim=1), trained_on)
        if self.mode == "online":
            inside, outside = centres(shadows, references.trained_on, probability=True)
            usual = (inside + outside) / 2
        else:
            usual = _offline(outside_alone(shadows, references.trained_on, probability=True), a)
        usual_public = _offline(outside_alone(theirs, references.public_trained_on, probability=True), a)
        ratio = log_confidence(logits, asked.labels) - usual.clamp_min(1e-45).log()
        ratios = log_confidence(public, population.labels) - usual_public.clamp_min(1e-45).log()
        below = torch.searchsorted(ratios.sort().values, ratio - log(self.gamma), right=True).double()
        if self.break_ties:
            below += ratio.atan() / pi  # strictly rising, and within half a step
        return below / len(ratios)


def _offline(outside: Tensor, a: float) -> Tensor:
    return ((1 + a) * outside + 1 - a) / 2


def fitted_a(probabilities: Tensor, trained_on: Tensor) -> float:
    """Which a tells best what each reference trained on, by those others that did not: (R, N) -> [0, 1]."""
    areas = np.zeros(11)
    for one in range(min(len(probabilities), TRIED)):
        others = torch.arange(len(probabilities)) != one
        outside = middle(probabilities[others], ~trained_on[others])
        asked = ~outside.isnan()
        member, own = trained_on[one, asked].numpy(), probabilities[one, asked]
        if member.all() or not member.any():
            continue
        areas += [roc_auc_score(member, own / _offline(outside[asked], a / 10)) for a in range(11)]
    return float(areas.argmax()) / 10 if areas.any() else PUBLISHED_A
