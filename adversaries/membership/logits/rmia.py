"""RMIA: the candidate against the reference models, compared with public samples."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, centres, known, log_confidence, outside_alone
from adversaries.needs import Needs


@dataclass
class RMIA(BlackBox):
    """Robust membership inference (Zarifzadeh, Liu, Shokri, ICML 2024), on the label's probability.

    The score is the share of public samples z with ``(p(x; model) / p(x)) / (p(z; model) / p(z)) >= gamma``.

    Parameters
    ----------
    mode : {"online", "offline"}
        ``p(x)``: online, the mean of those of references that trained on x and of those that did not; offline,
        ``((1 + a) p_out(x) + 1 - a) / 2`` from those that did not, which stands for ``p(z)`` in both.
    gamma : float
        How many times likelier.
    a : float
        In [0, 1]: how well the model does on who is outside, 1 as well as on members.
    break_ties : bool
        Rank equal shares by the ratio of x: it has as many values as there are candidates, the share as public
        samples. All ranks are then the ratio's, as in BASE (attack exponential-family), and gamma scales only.
    """

    mode: Literal["online", "offline"] = "online"
    gamma: Annotated[float, Field(gt=0)] = 2.0
    a: Annotated[float, Field(ge=0, le=1)] = 0.3
    break_ties: bool = True

    needs: ClassVar[Needs] = Needs(
        held_out=True, about="anybody", references=1, auxiliary=1, labelled=True
    )

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """The share, in [0, 1]; ties are broken by less than one public sample's worth."""
        references, asked, population = known(knowledge), knowledge.candidates, knowledge.public
        assert population is not None
        shadows = log_confidence(references.logits, asked.labels).exp()
        if self.mode == "online" and len(references) > 1:
            usual = sum(centres(shadows, references.trained_on)) / 2
        else:
            usual = self._offline(outside_alone(shadows, references.trained_on))
        theirs = log_confidence(references.public_logits, population.labels).exp()
        usual_public = self._offline(outside_alone(theirs, references.public_trained_on))
        ratio = log_confidence(logits, asked.labels) - usual.clamp_min(1e-45).log()
        ratios = log_confidence(public, population.labels) - usual_public.clamp_min(1e-45).log()
        below = torch.searchsorted(ratios.sort().values, ratio - torch.tensor(self.gamma).log(), right=True).double()
        if self.break_ties:
            below += ratio.atan() / pi  # strictly rising, and within half a step
        return below / len(ratios)

    def _offline(self, outside: Tensor) -> Tensor:
        return ((1 + self.a) * outside + 1 - self.a) / 2
