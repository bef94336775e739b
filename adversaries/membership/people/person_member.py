"""Did this person take part: the global model's loss on their other samples, beside reference models'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn.linear_model import BayesianRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from adversaries.membership.base import Figures, MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.people.statistics import mean_of_each, people_of
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from adversaries.seats import CuriousServer
from fedattack.config import Strength
from fedattack.errors import NotApplicable
from fedattack.observation import MembershipScores


@dataclass
class PersonMember(CuriousServer, MembershipAttack):
    """Did this person take part: how far the last global model's loss lies below what reference models' foretell.

    Of each person the mean root of the reference models' losses, minus that of the global model's; less what a
    Bayesian ridge regression over the people asked about foretells of it from the references' mean loss, root and
    logarithm: who is hard to read differs more from model to model. Losses are cross-entropies of samples that nobody
    trained on, clamped; a reference counts for the people that it was not trained on. After Suri et al., "Subject
    Membership Inference Attacks in Federated Learning", arXiv:2206.03317, and Watson et al., ICLR 2022.

    Parameters
    ----------
    clamp : float
        Largest loss that counts.
    """

    clamp: Strength = 8.0

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=2, people=True)

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``losses``, float64 (N,), of the global model after the round."""
        return {"losses": view.losses("after")}

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """The same for all samples of a person; NotApplicable where every reference was trained on one."""
        references, people = knowledge.references, people_of(knowledge.candidates)
        if references is None or not rounds:
            raise NotApplicable("person-member: no reference model, or no global model, to compare")
        unseen = ~references.trained_on
        if not unseen.any(0).all():
            raise NotApplicable(
                "person-member: some candidates were trained on by every reference model; raise 'attack.references'"
            )
        last, count = max(rounds), len(references)
        labels = knowledge.candidates.labels.repeat(count)
        losses = cross_entropy(references.logits.flatten(0, 1).double(), labels, reduction="none")
        beside = losses.reshape(count, -1).clamp(max=self.clamp)
        shapes = torch.stack([beside, beside.sqrt(), (beside + 0.1).log()]) * unseen
        foretold = mean_of_each(shapes.sum(1) / unseen.sum(0), people)
        own = mean_of_each(rounds[last]["losses"].clamp(max=self.clamp).sqrt()[None], people)
        lower = less_what_is_foretold(foretold[1] - own[0], foretold.T)
        return MembershipScores(lower[people], "person-member", {"rounds": [last], "references": count})


def less_what_is_foretold(values: Tensor, features: Tensor) -> Tensor:
    """What is left of values (n,) of a regression on features (n, f); of few the regression shrinks to their mean."""
    x, y = features.numpy(), values.numpy()
    return values - torch.from_numpy(make_pipeline(StandardScaler(), BayesianRidge()).fit(x, y).predict(x))
