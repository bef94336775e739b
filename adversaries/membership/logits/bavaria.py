"""BaVarIA: LiRA with the variances, and the means, of few references steadied by those of all candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, known, middle, scaled_confidence
from adversaries.needs import Needs
from fedattack.errors import NotApplicable


class StudentT(NamedTuple):
    """Predictive distributions of the candidates: degrees of freedom, location, squared scale, each (N,)."""

    freedom: Tensor
    location: Tensor
    scale: Tensor

    @property
    def variance(self) -> Tensor:
        """Shape (N,)."""
        return self.scale * self.freedom / (self.freedom - 2)


@dataclass
class BaVarIA(BlackBox):
    """BaVarIA: LiRA with Bayesian means and variances (Brännvall, arXiv 2603.11799, 2026).

    Each candidate's ``phi = log p_y - log(1 - p_y)`` over the references that trained on it, and over those that did
    not, is normal with a mean and a variance under a normal-inverse-gamma prior, which steadies few references and
    stands in for none. The paper's constants of the prior were not at hand: here it is fitted to the moments of all
    candidates' references (:func:`predictive`), and the rest is conjugate (Murphy, "Conjugate Bayesian analysis of
    the Gaussian distribution", 2007, section 6).

    Parameters
    ----------
    mode : {"online", "offline"}
        The log-likelihood ratio of inside to outside; or minus the log-probability of more than ``phi`` outside.
    distribution : {"t", "normal"}
        The predictive Student t (BaVarIA-t), or the normal with its mean and variance (BaVarIA-n).
    """

    mode: Literal["online", "offline"] = "online"
    distribution: Literal["t", "normal"] = "t"

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=2)

    def required(self) -> Needs:
        """One reference will do offline."""
        return replace(self.needs, references=2 if self.mode == "online" else 1)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """A log-likelihood ratio, or minus a log-probability."""
        references, labels = known(knowledge), knowledge.candidates.labels
        own, shadows = scaled_confidence(logits, labels), scaled_confidence(references.logits, labels)
        outside = predictive(shadows, ~references.trained_on)
        if self.mode == "offline":
            return -self._law(outside)("logsf", own)
        inside = predictive(shadows, references.trained_on)
        return self._law(inside)("logpdf", own) - self._law(outside)("logpdf", own)

    def _law(self, predicted: StudentT) -> Callable[[str, Tensor], Tensor]:
        """Logarithms of the density, or of the upper tail, by their names in scipy."""
        student = self.distribution == "t"
        scale = (predicted.scale if student else predicted.variance).sqrt()
        freedom = (predicted.freedom.numpy(),) if student else ()
        family = stats.t if student else stats.norm

        def evaluate(what: str, x: Tensor) -> Tensor:
            found = getattr(family, what)(x.numpy(), *freedom, predicted.location.numpy(), scale.numpy())
            return torch.from_numpy(found)

        return evaluate


def predictive(values: Tensor, chosen: Tensor) -> StudentT:
    """Predictive distribution of each column from the chosen of its rows, (R, N), and a prior fitted to all columns.

    The prior ``variance ~ nu s^2 / chi^2_nu, mean ~ N(m, variance / kappa)`` has the moments of the columns: their
    mean, the excess of the spread of their means over that within (kappa), the mean of their variances (s^2) and
    the excess of the spread of these over what so few values have (nu > 4). NotApplicable if nothing is chosen.
    """
    count = chosen.sum(0).double()
    if not chosen.any():
        raise NotApplicable(
            "reference models of which none trained on a candidate, or all did, tell no difference; use mode "
            "'offline' where none did"
        )
    mean = middle(values, chosen).where(count > 0, 0.0)
    squares = ((values - mean).square() * chosen).sum(0)
    freedom = count - 1
    several, there = freedom > 0, count > 0
    if several.any():
        within = squares[several].sum() / freedom[several].sum()
    else:  # one value a column does not tell the two spreads apart: they count half each
        within = values[chosen].var(correction=0) / 2
    within = within.clamp_min(1e-30)
    relative = (squares[several] / freedom[several] / within).square() / (1 + 2 / freedom[several])
    excess = float(relative.mean() - 1) if several.any() else 0.0
    nu = 4 + 2 / max(excess, 1e-3)
    between = mean[there].var(correction=0) - within * (1 / count[there]).mean()
    kappa = within / between.clamp_min(1e-6 * within)
    centre = mean[there].mean()
    after = kappa + count
    location = (kappa * centre + count * mean) / after
    total = within * (nu - 2) + squares + kappa * count * (mean - centre).square() / after
    return StudentT(nu + count, location, total / (nu + count) * (1 + 1 / after))
