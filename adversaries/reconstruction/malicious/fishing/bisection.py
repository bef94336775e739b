"""Fishing over several rounds on one batch: what two thresholds differ by is what lies between them.

Under fishing's head a sample reaches the body by the one steep row alone, and by how much depends on nothing but its
label and whether its feature lies above the threshold. Between two rounds with the same body, row and batch, what
changes is the gradient of the samples between the two thresholds, each by the same residual. Their number is the
difference of the counts, to the integer: thresholds are chosen until every sample lies between two of them alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.inversion.evidence import one_gradient
from fedattack.observation import Observation, Update

COUNT_ERROR = 0.02
"""How far a count of samples may lie from an integer."""

STEEP = 1e5
"""Logits apart of two samples whose features are one standard deviation apart: as steep as float32 tells them."""

_APART = 1e-3
"""Least distance of a new threshold from those tried, in standard deviations of the feature."""

BEYOND = 50.0
"""Standard deviations of the feature beyond which no sample lies."""

_HALVED = 3
"""Samples in an interval up to which it is halved; of more, one is expected to be cut off at its upper end."""

_RIDGE = 1e-4
"""Added to the covariance of public features, of its mean eigenvalue."""

_PUBLIC = 8
"""Public images in an interval that are enough to cut it by their quantiles."""


@dataclass(frozen=True)
class ThresholdRound:
    """One round: the feature's threshold, infinite at the two ends, and how many samples lie above it.

    Of the ends the upper was sent, the lower is known, without an observation; an observation's update is a
    gradient.
    """

    threshold: float
    above: int
    observation: Observation | None


def comparable_rounds(observations: Sequence[Observation], head: str) -> list[Observation]:
    """Those that saw the same batch size, body and row as the latest; the latest last."""
    latest = observations[-1]
    return [
        one
        for one in observations
        if one.num_examples == latest.num_examples
        and all(
            name == f"{head}.bias" or torch.equal(tensor, latest.weights[name])
            for name, tensor in one.weights.items()
        )
    ]


def threshold_rounds(
    observations: Sequence[Observation], head: str, target: int
) -> tuple[list[ThresholdRound], list[float]]:
    """What a series of :func:`comparable_rounds` tells, by ascending threshold, and all thresholds that were tried.

    Its first has a threshold above everything. Rounds in which a sample lay at the threshold count no integer, and
    are left out. `target` is the only row of `head` that is not zero.
    """
    counts = []
    for one in observations:
        gradient = one_gradient.as_gradient(one)
        count = one.num_examples * float(gradient.dense()[f"{head}.bias"][target])
        seen = dataclasses.replace(one, update=gradient)
        counts.append((threshold(one, head, target), count, seen))
    tried = [place for place, _, _ in counts]
    _, below, first = counts[0]
    found = [ThresholdRound(math.inf, 0, first), ThresholdRound(-math.inf, first.num_examples, None)]
    for place, count, seen in counts[1:]:
        above = count - below
        if abs(above - round(above)) <= COUNT_ERROR:
            found.append(ThresholdRound(place, round(above), seen))
    return sorted(found, key=lambda one: one.threshold), tried


def threshold(observation: Observation, head: str, target: int) -> float:
    """The threshold that was sent, in the unit of the row's direction."""
    row = observation.weights[f"{head}.weight"][target]
    return -float(observation.weights[f"{head}.bias"][target]) / float(row.norm())


def nothing_above(first: Observation, head: str, target: int) -> bool:
    """Whether no sample lies above the threshold: then the other rows of the head's bias count whole samples."""
    counts, _ = _class_counts(first, head, target)
    return bool((counts - counts.round()).abs().max() <= COUNT_ERROR)


def _class_counts(first: Observation, head: str, target: int) -> tuple[Tensor, Tensor]:
    """Samples of each class where nothing lies above the threshold, and sums of their probabilities; float64."""
    bias = one_gradient.as_gradient(first).dense()[f"{head}.bias"].double() * first.num_examples
    expected = torch.full_like(bias, first.num_examples / (len(bias) - 1))
    expected[target] = 0.0
    return expected - bias, expected


def next_threshold(known: Sequence[ThresholdRound], tried: Sequence[float], scores: Tensor) -> float | None:
    """The threshold to send next, off those `tried`, by public `scores`; None: each sample lies alone between two."""
    deviation = float(scores.std().clamp_min(1e-12))
    crowded = [
        (low.above - high.above, -low.threshold, low, high)
        for low, high in itertools.pairwise(known)
        if low.above - high.above > (low.observation is not None)
        and high.threshold - low.threshold > 2 * _APART * deviation
    ]
    # The lowest sample has no threshold below it: that comes last.
    if not crowded:
        return None
    crowded = [one for one in crowded if one[0] > 1] or crowded
    count, _, low, high = min(crowded, key=lambda one: one[:2])
    if count == 1:
        return float(scores.mean()) - BEYOND * deviation
    wanted = 0.5 if count <= _HALVED else 1 - 1 / count
    best, room = 0.0, -1.0
    for share in (wanted, 0.5, 0.25, 0.75, 0.1, 0.9):
        place = _inside(low.threshold, high.threshold, share, scores, deviation)
        free = min((abs(place - one) / deviation for one in tried), default=math.inf)
        if free > _APART:
            return place
        if free > room:
            best, room = place, free
    return best


def _inside(low: float, high: float, share: float, scores: Tensor, deviation: float) -> float:
    """A place with about `share` of an interval's samples below it."""
    between = scores[(scores > low) & (scores < high)]
    if len(between) >= _PUBLIC:
        return float(torch.quantile(between, share))
    centre = float(scores.mean())
    if math.isinf(low):
        low = min(centre - 3 * deviation, high - deviation)
    if math.isinf(high):
        high = max(centre + 3 * deviation, low + deviation)
    return low + share * (high - low)


def alone(known: Sequence[ThresholdRound]) -> list[Observation]:
    """For every sample alone between two thresholds, the topmost first, an observation of its gradient alone."""
    found = []
    for low, high in itertools.pairwise(known):
        if low.above - high.above != 1 or low.observation is None or high.observation is None:
            continue
        under, over = low.observation.update, high.observation.update
        update = Update(under.names, under.shapes, None, under.values - over.values, "gradient")
        found.append(dataclasses.replace(low.observation, update=update))
    return found[::-1]


@dataclass(frozen=True)
class Classes:
    """What the threshold above everything tells of the classes in a batch.

    `counts`, int64 (classes,), of samples are exact; `sums`, float64 (classes, F), are of their features, where the
    batch has the public mean.
    """

    counts: Tensor
    sums: Tensor

    @classmethod
    def of(cls, first: Observation, head: str, target: int, mean: Tensor) -> Classes:
        """Read the head's gradient, with nothing above the threshold; `mean`, float64 (F,), is of public features.

        There the row's own class has probability 0 and all others 1 / (classes - 1), for every sample.
        """
        weight = one_gradient.as_gradient(first).dense()[f"{head}.weight"].double() * first.num_examples
        counts, expected = _class_counts(first, head, target)
        counts = counts.round().clamp(min=0).long()
        return cls(counts, expected[:, None] * mean - weight)

    def assign(self, features: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of single samples (n, F): whose class' sum holds their features.

        What a sample adds to its class' sum is told from what others do by whitening with the covariance of public
        features (N, F), the surest sample first, and no class more often than it was counted. Beside each label
        stands whether its class is at least twice as likely a holder as any other, by that measure.
        """
        public, features = public.double(), features.double()
        mean = public.mean(0)
        covariance = (public - mean).T @ (public - mean) / len(public)
        covariance.diagonal().add_(_RIDGE * float(covariance.trace()) / len(mean) + 1e-30)
        centred = self.sums - self.counts[:, None] * mean
        scores = (features - mean) @ torch.linalg.solve(covariance, centred.T)
        left, best = self.counts.clone(), scores.topk(2, 1).values
        labels = torch.zeros(len(features), dtype=torch.int64)
        for row in (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True).tolist():
            open_to = scores[row].masked_fill(left <= 0, -math.inf)
            labels[row] = int(open_to.argmax())
            left[labels[row]] -= 1
        return labels, best[:, 0] > 2 * best[:, 1].clamp(min=0)
