"""Metrics of the library piq that need no weights (Kastryulin et al., PyTorch Image Quality, 2022).

They were made for photographs of some hundred pixels a side. Smaller images are enlarged first, which is said
wherever the metric is named: a score at 64 pixels and one at 32 do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedattack.errors import ConfigError, DataError
from fedattack.metrics.base import ImageMetric, Pairs
from fedattack.metrics.pixels import by_chunks

_CHUNK_VALUES = 2**18


@dataclass
class PiqMetric(ImageMetric):
    """Base of every metric of piq: the function's name, the smallest images it takes, and what it needs.

    Parameters
    ----------
    side : int
        Images whose shorter side is smaller are enlarged to it (bilinear); 0: none is.
    """

    side: int = 64

    name: ClassVar[str]
    function: ClassVar[str]
    least: ClassVar[int] = 3
    colours_for_grey: ClassVar[bool] = False  # whether grey is repeated in three channels
    chromatic: ClassVar[bool] = False  # whether there is a form for colour images, which is then taken
    alone: ClassVar[bool] = (
        False  # whether it works out something over a batch, and must be given one pair at a time
    )

    @property
    def heading(self) -> str:
        return f"{self.title} (from {self.side} px)" if self.side else self.title

    def ready(self) -> None:
        _refuse_missing(self.name)

    def check(self, size: tuple[int, int, int]) -> None:
        self.ready()
        if self.side < 0:
            raise ConfigError(
                f"setting 'metric.{self.name}.side' is {self.side}: accepted are 0 and numbers of pixels"
            )
        if max(self.side, min(size[1:])) < self.least:
            raise ConfigError(
                f"setting 'metric.{self.name}.side' is {self.side}: this metric needs images of at least "
                f"{self.least} x {self.least} pixels, and these are {size[1]} x {size[2]}; accepted: "
                f"{self.least} or more"
            )
        if size[0] not in (1, 3):
            raise ConfigError(
                f"metric '{self.name}' takes images of 1 or 3 channels, and these have {size[0]}"
            )

    def scores(self, pairs: Pairs) -> Tensor:
        if pairs.truth.ndim == 4:
            try:
                self.check((pairs.truth.shape[1], pairs.truth.shape[2], pairs.truth.shape[3]))
            except ConfigError as error:
                raise DataError(str(error)) from error
        enlarged = max(1, max(self.side, min(pairs.truth.shape[-2:], default=1)) ** 2 * 3)
        chunk = 1 if self.alone else max(1, _CHUNK_VALUES // enlarged) * pairs.truth[:1].numel()
        return by_chunks(self._of_piq, pairs.images, pairs.truth, chunk, torch.float32)

    def record(self) -> dict[str, Any]:
        return {"library": f"piq {metadata.version('piq')}", "function": self.function}

    def _of_piq(self, images: Tensor, truth: Tensor) -> Tensor:
        """piq's function on finite pairs; NaN for others, and where it answers so."""
        import piq

        call = partial(getattr(piq, self.function), data_range=1.0, reduction="none")
        if self.chromatic:
            call = partial(call, chromatic=truth.shape[1] == 3)
        known = (images.isfinite() & truth.isfinite()).all(dim=3).all(dim=2).all(dim=1)
        scores = torch.full((len(truth),), torch.nan, dtype=torch.float64, device=truth.device)
        if known.any():
            scores[known] = call(self._prepared(images[known]), self._prepared(truth[known])).double()
        return scores

    def _prepared(self, images: Tensor) -> Tensor:
        """Enlarged, and with the channels that the function takes."""
        height, width = images.shape[-2:]
        if min(height, width) < self.side:
            factor = self.side / min(height, width)
            size = [round(height * factor), round(width * factor)]
            images = functional.interpolate(images, size, mode="bilinear", align_corners=False)
        return images.expand(-1, 3, -1, -1) if self.colours_for_grey and images.shape[1] == 1 else images


def _refuse_missing(name: str) -> None:
    """ConfigError where piq is not installed."""
    if find_spec("piq") is None:
        raise ConfigError(
            f"metric '{name}' needs the package piq, which is not installed: pip install 'fedattack[piq]'"
        )


@dataclass
class HaarPSI(PiqMetric):
    """Similarity of Haar wavelet coefficients (Reisenhofer et al., 2018), in [0, 1]."""

    title: ClassVar[str] = "HaarPSI"
    name: ClassVar[str] = "piq-haarpsi"
    function: ClassVar[str] = "haarpsi"
    least: ClassVar[int] = 16


@dataclass
class GradientMagnitudeDeviation(PiqMetric):
    """Deviation of the similarity of gradients (Xue et al., 2014); 0 for equal images."""

    title: ClassVar[str] = "GMSD"
    higher: ClassVar[bool] = False
    name: ClassVar[str] = "piq-gmsd"
    function: ClassVar[str] = "gmsd"


@dataclass
class MultiScaleGradientMagnitudeDeviation(PiqMetric):
    """Deviation of the similarity of gradients over four scales (Zhang et al., 2017); 0 for equal images."""

    title: ClassVar[str] = "MS-GMSD"
    higher: ClassVar[bool] = False
    name: ClassVar[str] = "piq-ms-gmsd"
    function: ClassVar[str] = "multi_scale_gmsd"
    least: ClassVar[int] = 17


@dataclass
class FeatureSimilarity(PiqMetric):
    """Similarity of phase congruency and gradients (Zhang et al., 2011), in [0, 1]; of colour images, FSIMc."""

    title: ClassVar[str] = "FSIM"
    name: ClassVar[str] = "piq-fsim"
    function: ClassVar[str] = "fsim"
    chromatic: ClassVar[bool] = True


@dataclass
class VisualInformationFidelity(PiqMetric):
    """Share of the image's information that is left, in the pixel domain (Sheikh and Bovik, 2006); 1 if equal."""

    title: ClassVar[str] = "VIF"
    name: ClassVar[str] = "piq-vif"
    function: ClassVar[str] = "vif_p"
    least: ClassVar[int] = 41


@dataclass
class MeanDeviationSimilarity(PiqMetric):
    """Deviation of the similarity of gradients and colours (Nafchi et al., 2016); 0 for equal images."""

    title: ClassVar[str] = "MDSI"
    higher: ClassVar[bool] = False
    name: ClassVar[str] = "piq-mdsi"
    function: ClassVar[str] = "mdsi"
    colours_for_grey: ClassVar[bool] = True


@dataclass
class VisualSaliencyIndex(PiqMetric):
    """Similarity of saliency, gradients and colours (Zhang et al., 2014), in [0, 1]."""

    title: ClassVar[str] = "VSI"
    name: ClassVar[str] = "piq-vsi"
    function: ClassVar[str] = "vsi"
    colours_for_grey: ClassVar[bool] = True


@dataclass
class SpectralResidualSimilarity(PiqMetric):
    """Similarity of spectral saliency and gradients (Zhang and Li, 2012), in [0, 1].

    piq scales its saliency over the whole batch, so that a score would depend on the other images: pairs are given to
    it one at a time.
    """

    title: ClassVar[str] = "SR-SIM"
    name: ClassVar[str] = "piq-srsim"
    function: ClassVar[str] = "srsim"
    least: ClassVar[int] = 41
    alone: ClassVar[bool] = True


@dataclass
class SubbandSimilarity(PiqMetric):
    """Similarity of DCT subbands (Balanov et al., 2015), in [0, 1]."""

    title: ClassVar[str] = "DSS"
    name: ClassVar[str] = "piq-dss"
    function: ClassVar[str] = "dss"
    least: ClassVar[int] = 32


@dataclass
class InformationWeightedSSIM(PiqMetric):
    """SSIM over five scales, weighted by information (Wang and Li, 2011), for images from 161 x 161 pixels.

    Parameters
    ----------
    side : int
        Images whose shorter side is smaller are enlarged to it (bilinear); 0: none is.
    """

    side: int = 0

    title: ClassVar[str] = "IW-SSIM"
    name: ClassVar[str] = "piq-iw-ssim"
    function: ClassVar[str] = "information_weighted_ssim"
    least: ClassVar[int] = 161
