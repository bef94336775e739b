"""Which client is this person: their other samples beside every client's update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import RoundStatistic
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
        people, labels = view.candidates.groups, view.candidates.labels
        assert people is not None, "needs say that people are asked about"
        alike = standardised(view.cosines, labels)
        means = mean_of_each(alike, people)
        return standardised(means, torch.zeros(means.shape[1], dtype=torch.int64))[:, people]


def mean_of_each(values: Tensor, group: Tensor) -> Tensor:
    """Mean of the columns of each group, (K, G), of values (K, N); `group` int64 (N,), numbered from 0."""
    sums = values.new_zeros(len(values), int(group.max()) + 1).index_add(1, group, values)
    return sums / group.bincount()


def standardised(values: Tensor, group: Tensor) -> Tensor:
    """Values (K, N) less their row's mean in each group of columns, over the deviation there (1 where it is 0)."""
    apart = values - mean_of_each(values, group)[:, group]
    spread = mean_of_each(apart.square(), group).sqrt()
    return apart / torch.where(spread > 0, spread, 1.0)[:, group]
