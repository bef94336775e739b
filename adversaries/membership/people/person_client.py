"""Which client is this person: their other samples beside every client's update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.people.statistics import mean_of_each, people_of, standardised
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class PersonClient(RoundStatistic):
    """Which client is this person: their samples' gradients along each client's update, beside other people's.

    Cosines are standardised within each round, client and label over the samples asked about (a client with many
    sevens pulls along everybody's sevens), averaged over each person's samples, and standardised once more over the
    people. The score is the mean over the rounds that the target answered. After Suri et al., "Subject Membership
    Inference Attacks in Federated Learning", arXiv:2206.03317.
    """

    needs: ClassVar[Needs] = Needs(sums="single", held_out=True, people=True)

    def measure(self, view: RoundView) -> Tensor:
        """Standardised mean cosines, the same for all samples of a person."""
        people, labels = people_of(view.candidates), view.candidates.labels
        alike = standardised(view.cosines, labels)
        means = mean_of_each(alike, people)
        return standardised(means, torch.zeros(means.shape[1], dtype=torch.int64))[:, people]
