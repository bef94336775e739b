"""Which reconstruction belongs to which private image of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedattack.errors import DataError


@dataclass(frozen=True)
class Match:
    """Which reconstruction was scored against which private image.

    `order`: for each private image the position of its reconstruction, or -1 where there are fewer reconstructions.
    `matched_by`: "single" (one of each), "labels" (distinct labels, all right), "labels, then MSE" (repeated labels,
    all right) or "MSE" (best assignment whatever the labels).
    """

    order: tuple[int, ...]
    matched_by: str


def match(
    images: Tensor, truth: Tensor, labels: Tensor | None = None, true_labels: Tensor | None = None
) -> Match:
    """Pair reconstructions (A, C, H, W) with the private batch (B, C, H, W), whose order no attacker can know.

    Minimises the summed MSE over assignments (Hungarian method). Labels, (A,) and (B,), are a hard constraint only
    when the attack has them all right: then an image may only be scored against a private image of its own label.
    Assigning on a metric can only raise that metric, so floors and controls must be matched in the same way.
    """
    if images.shape[1:] != truth.shape[1:]:
        raise DataError(
            f"reconstructions {tuple(images.shape)} and private images {tuple(truth.shape)} do not compare"
        )
    if len(images) == len(truth) == 1:
        return Match((0,), "single")
    a, b = (x.detach().double().cpu().clamp(0, 1).flatten(1) for x in (images, truth))
    cost = torch.cdist(b, a).square() / a.shape[1]
    matched_by = "MSE"
    if labels is not None and true_labels is not None and _same_labels(labels, true_labels):
        distinct = len(set(true_labels.tolist())) == len(true_labels)
        matched_by = "labels" if distinct else "labels, then MSE"
        # Squared errors in [0, 1] are below 1, so a penalty above B can never be worth paying.
        cost = cost + (true_labels.cpu()[:, None] != labels.cpu()[None, :]) * (2.0 * len(truth))
    rows, columns = linear_sum_assignment(cost.numpy())
    order = [-1] * len(truth)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        order[row] = column
    return Match(tuple(order), matched_by)


def labels_right(labels: Tensor, true_labels: Tensor) -> list[bool]:
    """For each of the true labels (B,) whether the attack named it, counting repeats, whatever the order."""
    left = labels.tolist()
    right = []
    for label in true_labels.tolist():
        right.append(label in left)
        if right[-1]:
            left.remove(label)
    return right


def _same_labels(labels: Tensor, true_labels: Tensor) -> bool:
    return sorted(labels.tolist()) == sorted(true_labels.tolist())
