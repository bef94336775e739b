"""What a metric of reconstructed images is, and those that have a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fedattack.errors import ConfigError, DataError
from fedattack.metrics.scale import refuse_unlike
from fedattack.registry import Registry, build_plugins

if TYPE_CHECKING:
    from fedattack.config import MetricConfig

Need = Literal["labels", "gallery", "weights"]


@dataclass(frozen=True)
class Pairs:
    """N reconstructions beside the private images that they are scored against, each against its own.

    Parameters
    ----------
    images, truth : Tensor, float (N, C, H, W), finite, in [0, 1]
    labels : Tensor, int64 (N,)
        True labels; None where they are unknown.
    label_right : sequence of bool (N,)
        Whether the attack named the label; None where it was not asked, as floors are not.
    gallery : Tensor, float (G, C, H, W), in [0, 1]
        Images of others, private and public, none of them a copy of one of `truth`; None where there are none.
    """

    images: Tensor
    truth: Tensor
    labels: Tensor | None = None
    label_right: tuple[bool, ...] | None = None
    gallery: Tensor | None = None


@dataclass
class ImageMetric(ABC):
    """Base of every metric: parameters are dataclass fields, what it is is said by class attributes.

    ``higher``: whether a higher value means that more leaked. ``needs``: "labels", "gallery" or "weights" (files,
    which :meth:`ready` looks for). ``pooled``: the value is one of the whole set, and no image has one.
    """

    title: ClassVar[str]
    unit: ClassVar[str] = ""
    digits: ClassVar[int] = 3
    higher: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ()
    pooled: ClassVar[bool] = False

    @property
    def heading(self) -> str:
        """Its name in tables; says which model, where it depends on one."""
        return self.title

    def ready(self) -> None:
        """Find what it needs besides images: ConfigError where a file or a package is missing."""
        return None

    def check(self, size: tuple[int, int, int]) -> None:
        """Refuse images of that (C, H, W), or missing files, before any work: ConfigError or DataError."""
        return None

    @abstractmethod
    def scores(self, pairs: Pairs) -> Tensor:
        """A value a pair, float64 (N,), NaN where there is none; of a ``pooled`` metric one value, ().

        Raises DataError where the pairs cannot be scored.
        """

    def record(self) -> dict[str, Any]:
        """What must be known to repeat it, JSON-able: names and SHA-256 of weights, ...; beside its parameters."""
        return {}


METRICS: Registry[type[ImageMetric]] = Registry(
    "metric",
    {
        "dists": "fedattack.metrics.perceptual:StructureTexture",
        "feature-distance": "fedattack.metrics.features:FeatureDistance",
        "frechet": "fedattack.metrics.features:FrechetDistance",
        "lite-features": "fedattack.metrics.perceptual:LiteDistance",
        "lpips": "fedattack.metrics.perceptual:LearnedPerceptual",
        "mse": "fedattack.metrics.pixels:MeanSquaredError",
        "identified": "fedattack.metrics.identification:Identified",
        "psnr": "fedattack.metrics.pixels:PeakSignalToNoise",
        "ssim": "fedattack.metrics.structural:StructuralSimilarity",
        "semsim": "fedattack.metrics.semsim.metric:SemSim",
        "recognised": "fedattack.metrics.semsim.metric:Recognised",
        "ssim-gaussian": "fedattack.metrics.structural:GaussianStructuralSimilarity",
        "ms-ssim": "fedattack.metrics.structural:MultiScaleSSIM",
        "ms-ssim-short": "fedattack.metrics.structural:ShortMultiScaleSSIM",
        "regcorr": "fedattack.metrics.registration:RegisteredCorrelation",
        "registered-psnr": "fedattack.metrics.registration:RegisteredPSNR",
        "tv": "fedattack.metrics.pixels:TotalVariation",
        "labels": "fedattack.metrics.labels:LabelAccuracy",
        "piq-haarpsi": "fedattack.metrics.piq_metrics:HaarPSI",
        "piq-gmsd": "fedattack.metrics.piq_metrics:GradientMagnitudeDeviation",
        "piq-ms-gmsd": "fedattack.metrics.piq_metrics:MultiScaleGradientMagnitudeDeviation",
        "piq-fsim": "fedattack.metrics.piq_metrics:FeatureSimilarity",
        "piq-vif": "fedattack.metrics.piq_metrics:VisualInformationFidelity",
        "piq-mdsi": "fedattack.metrics.piq_metrics:MeanDeviationSimilarity",
        "piq-vsi": "fedattack.metrics.piq_metrics:VisualSaliencyIndex",
        "piq-srsim": "fedattack.metrics.piq_metrics:SpectralResidualSimilarity",
        "piq-dss": "fedattack.metrics.piq_metrics:SubbandSimilarity",
        "piq-iw-ssim": "fedattack.metrics.piq_metrics:InformationWeightedSSIM",
    },
    group="fedattack.metrics",
    base="fedattack.metrics.base:ImageMetric",
)
"""Metrics of reconstructed images by name."""


def build_metrics(chosen: MetricConfig) -> dict[str, ImageMetric]:
    """The metrics that a section names, with their parameters; ConfigError as :func:`build_plugins`."""
    if not chosen.names:
        raise ConfigError(f"setting 'metric.names' is empty; accepted: some of {', '.join(METRICS)}")
    return build_plugins(METRICS, chosen.names, chosen.options, chosen.shared_options, "metric")


def ready_metrics(chosen: MetricConfig) -> dict[str, ImageMetric]:
    """The same, with what they need besides images at hand, or ConfigError: before anything is read or trained."""
    found = build_metrics(chosen)
    for metric in found.values():
        metric.ready()
    return found


def score(metrics: Mapping[str, ImageMetric], pairs: Pairs) -> dict[str, list[float]]:
    """Name -> a value a pair; of a pooled metric one value. NaN where a metric cannot score these pairs.

    DataError where they are no pairs, or no floats in [0, 1] (:func:`fedattack.metrics.scale.refuse_unlike`).
    """
    refuse_unlike(pairs.images, pairs.truth)
    found = {}
    for name, metric in metrics.items():
        try:
            values = metric.scores(pairs)
        except DataError:
            values = torch.full((1 if metric.pooled else len(pairs.truth),), torch.nan)
        found[name] = values.double().reshape(-1).tolist()
    return found
