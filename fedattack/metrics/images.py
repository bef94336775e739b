"""Scores of reconstructed images: batched, per image, on one scale.

Everything takes float tensors of shape (B, C, H, W) with pixels meant for [0, 1] and clamps them first, with
a data range of 1. Per-image vectors are primary; means are left to the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from fedattack.errors import DataError

INFLATION_DB = 20 * math.log10(255)
"""48.13 dB: what ``10 log10(255^2 / mse)`` adds when the MSE is that of images in [0, 1]."""

SSIM_WINDOW = 7
"""Side of scikit-image's default uniform window."""


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each pair, after clamping, float64 (B,); DataError if they are not both (B, C, H, W)."""
    a, b = _pair(images, truth)
    return (a - b).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, data range 1; infinite for identical images. As :func:`mse`."""
    return -10 * torch.log10(mse(images, truth))


def ssim(images: Tensor, truth: Tensor, data_range: float = 1.0, window: int = SSIM_WINDOW) -> Tensor:
    """Structural similarity of each pair, float64 (B,), as scikit-image's ``structural_similarity`` by default.

    Uniform window, sample covariance, averaged over the positions where the window fits and over channels (Wang et
    al., Image quality assessment: from error visibility to structural similarity, 2004). Other libraries average over
    a padded border or use the population covariance, and differ in the second digit. Raises DataError as :func:`mse`,
    or if `window`, its odd side, is larger than the image.
    """
    a, b = _pair(images, truth)
    if window % 2 == 0 or window < 3 or window > min(a.shape[-2:]):
        raise DataError(
            f"SSIM window {window}: must be odd, at least 3 and fit into {tuple(a.shape[-2:])} pixels"
        )
    sample = window**2 / (window**2 - 1)
    mean_a, mean_b = (functional.avg_pool2d(x, window, stride=1) for x in (a, b))
    var_a = sample * (functional.avg_pool2d(a * a, window, stride=1) - mean_a * mean_a)
    var_b = sample * (functional.avg_pool2d(b * b, window, stride=1) - mean_b * mean_b)
    covariance = sample * (functional.avg_pool2d(a * b, window, stride=1) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def ssim_window(height: int, width: int) -> int:
    """scikit-image's window of 7, or the largest odd one that fits a smaller image; DataError below 3 pixels."""
    fitting = min(SSIM_WINDOW, height, width)
    fitting -= 1 - fitting % 2
    if fitting < 3:
        raise DataError(f"images of {height} x {width} pixels are too small for SSIM: at least 3 x 3")
    return fitting


def out_of_range_share(images: Tensor) -> Tensor:
    """Share of each image's pixels outside [0, 1] (or not a number), before any clamping; float64, shape (B,)."""
    return (~((images >= 0) & (images <= 1))).double().mean(dim=(1, 2, 3))


def paper_scale(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM, float64 (B,), as HCGLA's code prints them: only for comparison with published tables.

    That code divides 255^2 by the MSE of images in [0, 1], which adds 48.13 dB, and takes SSIM with a data range of 2
    (the range scikit-image assumes for float images), which raises it (Yang, Ge, Xiang and Li, Using Highly
    Compressed Gradients in Federated Learning for Data Reconstruction Attacks, IEEE TIFS 2023).
    """
    window = ssim_window(*images.shape[-2:])
    return psnr(images, truth) + INFLATION_DB, ssim(images, truth, data_range=2.0, window=window)


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


def _pair(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != truth.shape or images.ndim != 4:
        raise DataError(
            f"images of shape {tuple(images.shape)} cannot be scored against {tuple(truth.shape)}: both must be "
            "(B, C, H, W)"
        )
    # float64: at 60 dB the window's variances are differences of nearly equal numbers.
    a, b = (x.detach().to(dtype=torch.float64).clamp(0, 1) for x in (images, truth))
    return a, b.to(a.device)
