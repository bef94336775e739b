"""Labels that an attack named, and what the best answer that ignores the update would score on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from fedattack.metrics.base import ImageMetric, Need, Pairs


def constant_hits(shares: ArrayLike, labels: Sequence[int]) -> float:
    """Labels of a batch, in [0, C), that the best fixed multiset of as many names, counting repeats.

    Best for batches drawn from `shares`, shape (C,), which sum to 1: it names a label for the j-th time where at
    least j of them are likeliest. Where equally likely labels compete for its last places, the mean over all
    choices among them is given: one label of ten that are equally common scores a tenth.
    """
    size = len(labels)
    times = np.arange(1, size + 1)
    chances = stats.binom.sf(times - 1, size, np.asarray(shares, dtype=np.float64)[:, None])
    last = np.sort(chances, axis=None)[-size]
    tied = np.isclose(chances, last, rtol=1e-9, atol=0)
    sure = (chances > last) & ~tied
    named = sure + tied * (size - sure.sum()) / tied.sum()
    found = np.bincount(np.asarray(labels), minlength=len(chances))[:, None] >= times
    return float((named * found).sum())


@dataclass
class LabelAccuracy(ImageMetric):
    """Whether the attack named the image's label: 1 or 0, and no score where it was not asked, as of floors."""

    title: ClassVar[str] = "label accuracy"
    needs: ClassVar[tuple[Need, ...]] = ("labels",)

    def scores(self, pairs: Pairs) -> Tensor:
        if pairs.label_right is None:
            return torch.full((len(pairs.truth),), torch.nan, dtype=torch.float64)
        return torch.tensor(pairs.label_right, dtype=torch.float64)
