"""Metrics: images, membership, and the intervals around them."""

from __future__ import annotations

from fedattack.metrics.images import (
    INFLATION_DB,
    Match,
    labels_right,
    match,
    mse,
    out_of_range_share,
    paper_scale,
    psnr,
    ssim,
    ssim_window,
)
from fedattack.metrics.labels import constant_hits
from fedattack.metrics.membership import (
    OperatingPoint,
    auc,
    auc_interval,
    auc_power,
    auc_reach,
    balanced_accuracy,
    chance_auc,
    chance_balanced_accuracy,
    roc_points,
    tpr_at_fpr,
)
from fedattack.metrics.statistics import (
    Interval,
    bootstrap_mean,
    clopper_pearson,
    paired_difference,
    share_difference,
    units_needed,
    wilson,
)

__all__ = [
    "INFLATION_DB",
    "Interval",
    "Match",
    "OperatingPoint",
    "auc",
    "auc_interval",
    "auc_power",
    "auc_reach",
    "balanced_accuracy",
    "bootstrap_mean",
    "chance_auc",
    "chance_balanced_accuracy",
    "clopper_pearson",
    "constant_hits",
    "labels_right",
    "match",
    "mse",
    "out_of_range_share",
    "paired_difference",
    "paper_scale",
    "psnr",
    "roc_points",
    "share_difference",
    "ssim",
    "ssim_window",
    "tpr_at_fpr",
    "units_needed",
    "wilson",
]
