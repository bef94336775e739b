"""BASE1 to BASE4: RMIA and LiRA as ends of one ladder of likelihood ratios."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import (
    BlackBox,
    centres,
    known,
    log_confidence,
    log_ratio_of_normals,
    outside_alone,
    scaled_confidence,
    variances,
)
from adversaries.needs import Needs


@dataclass
class ExponentialFamily(BlackBox):
    """BASE1 to BASE4: likelihood ratios of 1 to 4 parameters per candidate (Brännvall, arXiv 2603.11799, 2026).

    With one, BASE (Lassila, Östman, Ngo, arXiv 2505.24089, 2025), which ranks as RMIA does; with four, LiRA, here
    with means. The rungs between are derived here from their numbers of parameters: normal distributions of
    ``log p_y - log(1 - p_y)`` with both means of each candidate, and one variance of all (2) or of its own (3).

    Parameters
    ----------
    parameters : {1, 2, 3, 4}
        Estimated for each candidate.
    mode : {"online", "offline"}
        ``offline`` takes the references that did not train on a candidate: ``log p - a log p_out`` with one
        parameter, else the distance from their mean in standard deviations.
    a : float
        In [0, 1], of one parameter offline: makes up for the missing references.
    """

    parameters: Literal[1, 2, 3, 4] = 1
    mode: Literal["online", "offline"] = "online"
    a: Annotated[float, Field(ge=0, le=1)] = 0.33

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=2)

    def required(self) -> Needs:
        """One reference will do for one parameter, or offline."""
        return replace(self.needs, references=1 if self.parameters == 1 or self.mode == "offline" else 2)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """A log-likelihood ratio, up to what is equal for all candidates."""
        references, labels = known(knowledge), knowledge.candidates.labels
        trained_on, online = references.trained_on, self.mode == "online"
        if self.parameters == 1:
            shadows = log_confidence(references.logits, labels).exp()
            usual = outside_alone(shadows, trained_on, probability=True)
            if online:
                usual = (usual + centres(shadows, trained_on, probability=True)[0]) / 2
            return log_confidence(logits, labels) - (1.0 if online else self.a) * usual.clamp_min(1e-45).log()
        own, shadows = scaled_confidence(logits, labels), scaled_confidence(references.logits, labels)
        var_out, all_out = variances(shadows, ~trained_on)
        if not online:
            spread = all_out if self.parameters == 2 else var_out
            return (own - outside_alone(shadows, trained_on)) / spread.clamp_min(1e-30).sqrt()
        inside, outside = centres(shadows, trained_on)
        var_in = variances(shadows, trained_on)[0]
        if self.parameters < 4:
            residuals = (shadows - inside.where(trained_on, outside)).square()
            enough = trained_on.sum(0).clamp_max((~trained_on).sum(0)) >= 2
            alone = residuals.mean(0).where(enough, residuals.mean())
            var_in = var_out = residuals.mean() if self.parameters == 2 else alone
        return log_ratio_of_normals(own, (inside, var_in), (outside, var_out))
