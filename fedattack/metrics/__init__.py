"""Metrics: images, membership, and the intervals around them."""

from __future__ import annotations

from fedattack.metrics.guarantee import allowed_auc, allowed_tpr
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
    auc_power,
    auc_reach,
    balanced_accuracy,
    chance_auc,
    chance_balanced_accuracy,
    chance_of_hits,
    hits_at_fpr,
    roc_points,
    tpr_at_fpr,
)
from fedattack.metrics.pooled import (
    at_least_score,
    auc_influence,
    clustered_interval,
    pooled_auc,
    unit_counts,
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
    "allowed_auc",
    "allowed_tpr",
    "at_least_score",
    "auc",
    "auc_influence",
    "auc_power",
    "auc_reach",
    "balanced_accuracy",
    "bootstrap_mean",
    "chance_auc",
    "chance_balanced_accuracy",
    "chance_of_hits",
    "clopper_pearson",
    "clustered_interval",
    "constant_hits",
    "hits_at_fpr",
    "labels_right",
    "match",
    "mse",
    "out_of_range_share",
    "paired_difference",
    "paper_scale",
    "pooled_auc",
    "psnr",
    "roc_points",
    "share_difference",
    "ssim",
    "ssim_window",
    "tpr_at_fpr",
    "unit_counts",
    "units_needed",
    "wilson",
]
