"""BaVarIA: LiRA with the variances, and the means, of few references steadied by those of all candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, known, middle, scaled_confidence
from adversaries.needs import Needs
from fedattack.errors import NotApplicable

LEAST = 1e-4
"""Least spread between candidates that is believed, in variances of one reference."""


@dataclass
class BaVarIA(BlackBox):
    """BaVarIA: LiRA with Bayesian means and variances (Brännvall, arXiv 2603.11799, 2026).

    Each candidate's ``phi = log p_y - log(1 - p_y)`` is normal over the references that trained on it, and over those
    that did not. Its mean, the difference that training makes and its variance have a normal-inverse-gamma prior,
    which steadies few references and stands in for none. The paper's constants of the prior were not at hand: here
    it is fitted to the moments of all candidates' references, with one variance inside and outside, so that few
    references need not tell each candidate's difference; the rest is conjugate.

    Parameters
    ----------
    mode : {"online", "offline"}
        The log-likelihood ratio of inside to outside; or minus the log-probability of more than ``phi`` outside,
        by the references that did not train on the candidate alone.
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
        if self.mode == "offline":
            return -self._logarithm("logsf", own, predicted(shadows, ~references.trained_on))
        inside, outside = predicted_pair(shadows, references.trained_on)
        return self._logarithm("logpdf", own, inside) - self._logarithm("logpdf", own, outside)

    def _logarithm(self, what: str, x: Tensor, of: StudentT) -> Tensor:
        """Of the density, or of the upper tail, by their names in scipy."""
        freedom, location, squared = (part.numpy() for part in of)
        if self.distribution == "t":
            found = getattr(stats.t, what)(x.numpy(), freedom, location, squared**0.5)
        else:
            found = getattr(stats.norm, what)(x.numpy(), location, (squared * freedom / (freedom - 2)) ** 0.5)
        return torch.from_numpy(found)


class StudentT(NamedTuple):
    """Predictive distributions of the candidates: degrees of freedom, location, squared scale, each (N,)."""

    freedom: Tensor
    location: Tensor
    squared_scale: Tensor


class Prior(NamedTuple):
    """Of p coefficients and the variance of a candidate, before its references are seen.

    ``variance ~ within (nu - 2) / chi^2_nu``, whose mean is `within`; coefficients are independent normals about
    `centre`, (p,), with variances ``variance / kappa``, (p,).
    """

    centre: Tensor
    kappa: Tensor
    within: Tensor
    nu: float


def predicted(values: Tensor, chosen: Tensor) -> StudentT:
    """A fresh value of each column, from the chosen of its rows (R, N) and a prior fitted to all columns.

    The prior of the mean is that of the columns' means, less what so few values spread by. NotApplicable if nothing
    is chosen.
    """
    if not chosen.any():
        raise NotApplicable(
            "reference models that all trained on every candidate tell nothing of who is outside"
        )
    count, mean = chosen.sum(0).double(), middle(values, chosen)
    there = count > 0
    squares = ((values - mean).square() * chosen).nansum(0)
    # Of one value a column, nothing tells the spread within from that between: they count half each.
    within, nu = _fit_variance(squares, (count - 1).clamp_min(0), values[chosen].var(correction=0) / 2)
    between = mean[there].var(correction=0) - within * (1 / count[there]).mean()
    kappa = within / between.clamp_min(LEAST * within)
    design = torch.ones(*values.shape, 1, dtype=values.dtype)
    prior = Prior(mean[there].mean()[None], kappa[None], within, nu)
    return _posterior(prior, values, chosen, design, design.new_ones(1, 1))[0]


def predicted_pair(values: Tensor, trained_on: Tensor) -> tuple[StudentT, StudentT]:
    """A fresh value of each column inside, and outside, from its rows (R, N) and a prior fitted to all columns.

    The coefficients are the middle of the two means, and inside less outside. NotApplicable if no reference trained
    on any candidate, or all did.
    """
    inside, outside = trained_on.sum(0).double(), (~trained_on).sum(0).double()
    means = middle(values, trained_on), middle(values, ~trained_on)
    both = (inside > 0) & (outside > 0)
    difference, centre = (means[0] - means[1])[both], ((means[0] + means[1]) / 2)[both]
    if not both.any():
        raise NotApplicable(
            "reference models of which no candidate has one that trained on it and one that did not tell no "
            "difference; raise --references, or use mode 'offline'"
        )
    noise = (1 / inside + 1 / outside)[both].mean()
    squares = (values - means[0].where(trained_on, means[1])).square().sum(0)
    freedom = inside + outside - (inside > 0).double() - (outside > 0).double()
    # Of one value inside and one outside, all that differences spread by counts as spread within.
    within, nu = _fit_variance(squares, freedom, difference.var(correction=0) / noise)
    between = torch.stack(
        [centre.var(correction=0) - within * noise / 4, difference.var(correction=0) - within * noise]
    )
    kappa = within / between.clamp_min(LEAST * within)
    design = torch.stack([torch.ones_like(values), trained_on.double() - 0.5], dim=-1)
    prior = Prior(torch.stack([centre.mean(), difference.mean()]), kappa, within, nu)
    asked = values.new_tensor([[1.0, 0.5], [1.0, -0.5]])
    found = _posterior(prior, values, torch.ones_like(trained_on), design, asked)
    return found[0], found[1]


def _fit_variance(squares: Tensor, freedom: Tensor, instead: Tensor) -> tuple[Tensor, float]:
    """Mean of the columns' variances, and nu from how much more these spread than so few values make them.

    By ``E[s^4] = E[variance]^2 (1 + 2 / freedom) (nu - 2) / (nu - 4)``; `squares` are sums of squared residuals.
    """
    several = freedom > 0
    if not several.any():
        return instead.clamp_min(1e-30), 4 + 2 / 1e-3
    within = (squares[several].sum() / freedom[several].sum()).clamp_min(1e-30)
    relative = (squares[several] / freedom[several] / within).square() / (1 + 2 / freedom[several])
    return within, 4 + 2 / max(float(relative.mean()) - 1, 1e-3)


def _posterior(prior: Prior, values: Tensor, chosen: Tensor, design: Tensor, asked: Tensor) -> list[StudentT]:
    """Conjugate regression of each column's chosen values, (R, N), on its rows of the design, (R, N, p).

    Predictive distributions at each of the points `asked`, (q, p).
    """
    seen = design * chosen[..., None]
    precision = torch.einsum("rnp,rnq->npq", seen, design) + prior.kappa.diag()
    moment = torch.einsum("rnp,rn->np", seen, values) + prior.kappa * prior.centre
    covariance = torch.linalg.inv(precision)
    coefficients = torch.einsum("npq,nq->np", covariance, moment)
    squares = (values.square() * chosen).sum(0) + (prior.kappa * prior.centre.square()).sum()
    total = prior.within * (prior.nu - 2) + (squares - (coefficients * moment).sum(-1)).clamp_min(0)
    freedom = prior.nu + chosen.sum(0)
    return [
        StudentT(
            freedom,
            coefficients @ point,
            total / freedom * (1 + torch.einsum("p,npq,q->n", point, covariance, point)),
        )
        for point in asked
    ]
