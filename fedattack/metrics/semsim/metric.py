"""SemSim and proxy ratings as metrics of reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fedattack.errors import ConfigError, DataError
from fedattack.metrics.base import ImageMetric, Need, Pairs
from fedattack.metrics.pixels import pair_of
from fedattack.metrics.semsim.labeller import Labeller, load_labeller
from fedattack.metrics.semsim.training import SemSimNet, load_semsim


@dataclass
class SemSim(ImageMetric):
    """Distance of the embeddings of reconstruction and private image, learned from what was recognised.

    0 for identical images; no image is resized: the checkpoint must be of images of the same size and channels.
    (Sun et al., Privacy assessment on reconstructed images: are existing evaluation metrics faithful to human
    perception?, NeurIPS 2023.)

    Parameters
    ----------
    checkpoint
        File written by `fedattack semsim train`.
    """

    title: ClassVar[str] = "SemSim"
    higher: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("weights",)

    checkpoint: str = ""

    @property
    def heading(self) -> str:
        return self._trained().facts.heading if self.checkpoint else self.title

    def ready(self) -> None:
        self._trained()

    def check(self, size: tuple[int, int, int]) -> None:
        self._trained().facts.check_shape(size, f"setting 'metric.semsim.checkpoint' = {self.checkpoint!r}")

    def scores(self, pairs: Pairs) -> Tensor:
        images, truth = pair_of(pairs.images, pairs.truth)
        return self._trained().distances(images.float().cpu(), truth.float().cpu())

    def record(self) -> dict[str, Any]:
        trained = self._trained()
        facts = trained.facts
        told = {
            "sha256": trained.hash,
            "rule": facts.rule,
            "normalised": facts.normalised,
            "label_source": facts.label_source,
            "trained_on_originals": len(facts.originals),
            "split_hash": facts.split_hash,
        }
        return told | ({"proxy": facts.proxy} if facts.label_source == "proxy" else {})

    def _trained(self) -> SemSimNet:
        return _semsim(_given("semsim", self.checkpoint, "semsim train"))


@dataclass
class Recognised(ImageMetric):
    """A classifier's probability that the reconstruction shows the true class: a proxy for a rater, not one.

    Parameters
    ----------
    checkpoint
        File written by `fedattack semsim labeller`, of a classifier that saw neither the private images nor the
        attacked model's training images.
    """

    title: ClassVar[str] = "recognised"
    needs: ClassVar[tuple[Need, ...]] = ("labels", "weights")

    checkpoint: str = ""

    @property
    def heading(self) -> str:
        return f"recognised[{self._trained().facts.name}]" if self.checkpoint else self.title

    def ready(self) -> None:
        self._trained()

    def check(self, size: tuple[int, int, int]) -> None:
        self._trained().facts.check_shape(
            size, f"setting 'metric.recognised.checkpoint' = {self.checkpoint!r}"
        )

    def scores(self, pairs: Pairs) -> Tensor:
        images, _ = pair_of(pairs.images, pairs.truth)
        if pairs.labels is None:
            raise DataError("the classes of the private images are unknown: nothing can be recognised")
        return self._trained().true_class(images.float().cpu(), pairs.labels.cpu())

    def record(self) -> dict[str, Any]:
        trained = self._trained()
        facts = trained.facts
        return {"sha256": trained.hash, "proxy": facts.name, "source": facts.source, "figures": facts.figures}

    def _trained(self) -> Labeller:
        return _labeller(_given("recognised", self.checkpoint, "semsim labeller"))


def _given(metric: str, checkpoint: str, command: str) -> tuple[Path, int, int]:
    """The file, and by what a changed one is told from it; ConfigError where none is named, DataError without one."""
    if not checkpoint:
        raise ConfigError(
            f"setting 'metric.{metric}.checkpoint' is not set: metric {metric!r} needs a file written by "
            f"`fedattack {command}`"
        )
    path = Path(checkpoint).expanduser()
    try:
        status = path.stat()
    except OSError:
        raise DataError(f"setting 'metric.{metric}.checkpoint' = {checkpoint!r}: no such file") from None
    return path, status.st_mtime_ns, status.st_size


@cache
def _semsim(file: tuple[Path, int, int]) -> SemSimNet:
    return load_semsim(file[0])


@cache
def _labeller(file: tuple[Path, int, int]) -> Labeller:
    return load_labeller(file[0])
