"""Whose the samples are, and means over people."""

from __future__ import annotations

import torch
from torch import Tensor

from fedattack.errors import NotApplicable
from fedattack.observation import Candidates


def people_of(candidates: Candidates) -> Tensor:
    """Whose each candidate is, int64 (N,), numbered from 0; NotApplicable where samples are asked about."""
    if candidates.groups is None:
        raise NotApplicable(
            "the candidates are samples, and this attack asks about people; use attack.unit 'group'"
        )
    return candidates.groups


def mean_of_each(values: Tensor, group: Tensor) -> Tensor:
    """Mean of the columns of each group, (K, G), of values (K, N); `group` int64 (N,), numbered from 0."""
    sums = values.new_zeros(len(values), int(group.max()) + 1).index_add(1, group, values)
    return sums / group.bincount()


def standardised(values: Tensor, group: Tensor) -> Tensor:
    """Values (K, N) less their row's mean in each group of columns, over the deviation there (1 where it is 0)."""
    apart = values - mean_of_each(values, group)[:, group]
    spread = mean_of_each(apart.square(), group).sqrt()
    return apart / torch.where(spread > 0, spread, 1.0)[:, group]
