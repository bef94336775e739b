"""LiRA: the likelihood ratio of a candidate's confidence under references that trained on it and that did not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import (
    BlackBox,
    centres,
    known,
    log_ratio_of_normals,
    outside_alone,
    scaled_confidence,
    variances,
)
from adversaries.needs import Needs

ENOUGH = 64
"""References from which on each candidate's own variance is estimated (section VI-D)."""


@dataclass
class LiRA(BlackBox):
    """LiRA: likelihood ratio of a confidence among the references' (Carlini et al., S&P 2022).

    Normal distributions of ``phi = log p_y - log(1 - p_y)`` over the references, with medians as in the authors'
    code.

    Parameters
    ----------
    mode : {"online", "offline"}
        ``online``: ``log N(phi; in) - log N(phi; out)``. ``offline``: how many standard deviations ``phi`` lies
        above the median of those that did not train on the candidate, one-sided as in the paper (equation 4; its
        normal distribution function ranks alike). The authors' code is two-sided there.
    variance : {"auto", "own", "pooled"}
        Of each candidate, or one for all (the published fixed variance); ``auto``: pooled below 64 references.
    """

    mode: Literal["online", "offline"] = "online"
    variance: Literal["auto", "own", "pooled"] = "auto"

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=2)

    def required(self) -> Needs:
        """One reference will do offline."""
        return replace(self.needs, references=2 if self.mode == "online" else 1)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """The log-likelihood ratio, or the distance from those outside in standard deviations."""
        references, labels = known(knowledge), knowledge.candidates.labels
        own, shadows = scaled_confidence(logits, labels), scaled_confidence(references.logits, labels)
        trained_on = references.trained_on
        pooled = self.variance == "pooled" or (self.variance == "auto" and len(references) < ENOUGH)
        var_out, all_out = variances(shadows, ~trained_on)
        if self.mode == "offline":
            spread = all_out if pooled else var_out
            return (own - outside_alone(shadows, trained_on, median=True)) / spread.clamp_min(1e-30).sqrt()
        inside, outside = centres(shadows, trained_on, median=True)
        var_in, all_in = variances(shadows, trained_on)
        if pooled:
            var_in = var_out = all_in
        return log_ratio_of_normals(own, (inside, var_in), (outside, var_out))
