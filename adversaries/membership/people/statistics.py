"""Means over people."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_each(values: Tensor, group: Tensor) -> Tensor:
    """Mean of the columns of each group, (K, G), of values (K, N); `group` int64 (N,), numbered from 0."""
    sums = values.new_zeros(len(values), int(group.max()) + 1).index_add(1, group, values)
    return sums / group.bincount()


def standardised(values: Tensor, group: Tensor) -> Tensor:
    """Values (K, N) less their row's mean in each group of columns, over the deviation there (1 where it is 0)."""
    apart = values - mean_of_each(values, group)[:, group]
    spread = mean_of_each(apart.square(), group).sqrt()
    return apart / torch.where(spread > 0, spread, 1.0)[:, group]
