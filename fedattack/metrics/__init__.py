"""Metrics: images, membership, and the intervals around them."""

from __future__ import annotations

from fedattack.metrics.base import METRICS, ImageMetric, Pairs, build_metrics, ready_metrics, score
from fedattack.metrics.guarantee import allowed_auc, allowed_tpr
from fedattack.metrics.labels import constant_hits
from fedattack.metrics.matching import Match, labels_right, match
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
from fedattack.metrics.pixels import mse, out_of_range_share, psnr
from fedattack.metrics.pooled import (
    at_least_score,
    auc_influence,
    clustered_interval,
    pooled_auc,
    unit_counts,
)
from fedattack.metrics.registration import correlation_table, registered_correlation, registered_psnr
from fedattack.metrics.statistics import (
    Interval,
    bootstrap_mean,
    clopper_pearson,
    paired_difference,
    share_difference,
    units_needed,
    wilson,
)
from fedattack.metrics.structural import (
    INFLATION_DB,
    multi_scale_ssim,
    paper_scale,
    ssim,
    ssim_gaussian,
    ssim_window,
)

__all__ = [
    "INFLATION_DB",
    "METRICS",
    "ImageMetric",
    "Interval",
    "Match",
    "OperatingPoint",
    "Pairs",
    "allowed_auc",
    "allowed_tpr",
    "at_least_score",
    "auc",
    "auc_influence",
    "auc_power",
    "auc_reach",
    "balanced_accuracy",
    "bootstrap_mean",
    "build_metrics",
    "chance_auc",
    "chance_balanced_accuracy",
    "chance_of_hits",
    "clopper_pearson",
    "clustered_interval",
    "constant_hits",
    "correlation_table",
    "hits_at_fpr",
    "labels_right",
    "match",
    "mse",
    "multi_scale_ssim",
    "out_of_range_share",
    "paired_difference",
    "paper_scale",
    "pooled_auc",
    "psnr",
    "ready_metrics",
    "registered_correlation",
    "registered_psnr",
    "roc_points",
    "score",
    "share_difference",
    "ssim",
    "ssim_gaussian",
    "ssim_window",
    "tpr_at_fpr",
    "unit_counts",
    "units_needed",
    "wilson",
]
