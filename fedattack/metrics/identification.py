"""Whose image a reconstruction is: the rank of the own private image among others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from fedattack.metrics.base import ImageMetric, Need, Pairs
from fedattack.metrics.registration import correlation_table
from fedattack.metrics.statistics import Interval, clopper_pearson

OVERLAP = 0.25
"""Least common share of a shifted image's pixels: policies that move by 14 of 32 pixels leave 44 % of a side."""

SIDE, COARSE_SIDE = 32, 16
"""Larger images are averaged down to so many pixels a side, where many pairs are compared to the second."""
_MANY = 20_000

_NOTHING = -2.0
"""Stands for the correlation of an image that has none, as a constant one: below every correlation."""


@dataclass(frozen=True)
class Identification:
    """Rank of the own private images among `of` candidates, ties counted against; `score` and the best other's."""

    rank: int
    of: int
    score: float
    other: float

    @property
    def first(self) -> bool:
        """Whether the own images rank first, alone."""
        return self.rank == 1


@dataclass(frozen=True)
class Evidence:
    """How many victims are identified: `share` with its 95 % interval, one-sided `p_value` against chance."""

    share: Interval
    first: int
    count: int
    of: int  # candidates, where they differ the fewest
    p_value: float

    @property
    def chance(self) -> float:
        """Victims expected to rank first by chance."""
        return self.count / self.of


def gallery_size(batch: int) -> int:
    """How many other images to look among: 64 for one image, of larger batches what does not take long."""
    return 64 if batch == 1 else batch * max(8, min(32, _MANY // batch**2))


def apart(others: Sequence[Tensor], own: Tensor, most: int) -> Tensor | None:
    """The first `most` distinct images of `others` that equal none of `own` at 8 bit, (G, C, H, W), if any."""
    seen = {_picture(image) for image in own}
    chosen: list[Tensor] = []
    for image in (image for images in others for image in images):
        if len(chosen) == most:
            break
        if (picture := _picture(image)) not in seen:
            seen.add(picture)
            chosen.append(image.to(own))
    return torch.stack(chosen) if chosen else None


def identify(
    answers: Mapping[str, Tensor], own: Tensor, others: Sequence[Tensor]
) -> dict[str, Identification]:
    """For each of several answers, (A, C, H, W), the rank of the own batch (B, C, H, W) among others of that size.

    By registered correlation, so that an image counts that is shifted, mirrored or re-lit. Of batches, every
    candidate is matched to the answer as freely as the own one (the mean over the best assignment), so that matching
    favours none. Empty without others.
    """
    if not others or not answers:
        return {}
    batch = len(own)
    images, candidates = torch.cat(list(answers.values())), torch.cat([own, *others])
    distinct, place = torch.unique(images, dim=0, return_inverse=True)  # a floor may say the same of everyone
    side = SIDE if len(distinct) * len(candidates) <= _MANY else COARSE_SIDE
    table = correlation_table(_reduced(distinct, side), _reduced(candidates, side), overlap=OVERLAP)
    whole = np.nan_to_num(table[place].numpy(), nan=_NOTHING)
    found, begin = {}, 0
    for name, one in answers.items():
        rows, begin = whole[begin : begin + len(one)], begin + len(one)
        parts = [rows[:, start : start + batch] for start in range(0, len(candidates), batch)]
        scores = [part[linear_sum_assignment(part, maximize=True)].mean() for part in parts]
        first, rest = float(scores[0]), np.array(scores[1:])
        # what differs by less is equal: pixels are float32
        rank = 1 + int((rest >= first - 1e-9).sum())
        found[name] = Identification(rank, len(scores), first, float(rest.max()))
    return found


def evidence(found: Sequence[Identification], confidence: float = 0.95) -> Evidence | None:
    """What the ranks of several victims say against chance; None without any."""
    if not found:
        return None
    first, of = sum(one.first for one in found), min(one.of for one in found)
    p_value = float(stats.binom.sf(first - 1, len(found), 1 / of))
    return Evidence(clopper_pearson(first, len(found), confidence), first, len(found), of, p_value)


def sign_test(found: Sequence[Identification], floor: Sequence[Identification]) -> float:
    """One-sided p-value of identifying the same victims no more often than a floor does."""
    pairs = [(a.first, b.first) for a, b in zip(found, floor, strict=True)]
    more, less = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return float(stats.binom.sf(more - 1, more + less, 0.5)) if more + less else 1.0


def _picture(image: Tensor) -> bytes:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()


def _reduced(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[-2:]
    if max(height, width) <= side:
        return images
    scale = side / max(height, width)
    return functional.adaptive_avg_pool2d(
        images.double(), (max(1, round(height * scale)), max(1, round(width * scale)))
    )


@dataclass
class Identified(ImageMetric):
    """Whether the own private image ranks first among others' by registered correlation: 1 or 0, ties against.

    Of a batch of several, the auditor's matching of reconstructions favours the own one; a verdict rests on whole
    batches instead.
    """

    title: ClassVar[str] = "own image first"
    digits: ClassVar[int] = 2
    needs: ClassVar[tuple[Need, ...]] = ("gallery",)

    def scores(self, pairs: Pairs) -> Tensor:
        if pairs.gallery is None:
            return torch.full((len(pairs.truth),), torch.nan, dtype=torch.float64)
        single = pairs.gallery.split(1)
        found = [
            identify({"": image[None]}, own[None], single)[""]
            for image, own in zip(pairs.images, pairs.truth, strict=True)
        ]
        return torch.tensor([float(one.first) for one in found], dtype=torch.float64)
