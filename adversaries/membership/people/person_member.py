"""Did this person take part: the global model's loss on their other samples, beside reference models'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import cross_entropy

from adversaries.membership.base import Figures, MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from adversaries.seats import CuriousServer
from fedattack.config import Strength
from fedattack.errors import NotApplicable
from fedattack.observation import MembershipScores


@dataclass
class PersonMember(CuriousServer, MembershipAttack):
    """Did this person take part: mean loss of reference models, minus that of the last global model.

    Losses are cross-entropies of samples that nobody trained on, clamped, else a few that no model reads decide. A
    reference counts for the samples that it was not trained on. After Suri et al., "Subject Membership Inference
    Attacks in Federated Learning", arXiv:2206.03317, calibrated as in Watson et al., ICLR 2022.

    Parameters
    ----------
    clamp : float
        Largest loss that counts.
    """

    clamp: Strength = 8.0

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=1, people=True)

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``losses``, float64 (N,), of the global model after the round."""
        return {"losses": view.losses("after")}

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """NotApplicable where every reference was trained on a sample."""
        references = knowledge.references
        if references is None or not rounds:
            raise NotApplicable("person-member: no reference model, or no global model, to compare")
        count, labels = len(references), knowledge.candidates.labels
        logits = references.logits.flatten(0, 1)
        losses = cross_entropy(logits, labels.repeat(count), reduction="none").double()
        unseen = ~references.trained_on
        if not unseen.any(0).all():
            raise NotApplicable(
                "person-member: some candidates were trained on by every reference model; raise 'attack.references'"
            )
        beside = (losses.reshape(count, -1).clamp(max=self.clamp) * unseen).sum(0) / unseen.sum(0)
        last = max(rounds)
        scores = beside - rounds[last]["losses"].clamp(max=self.clamp)
        return MembershipScores(scores, "person-member", {"rounds": [last], "references": count})
