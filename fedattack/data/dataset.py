"""The two shapes a data set has: a listing whose pixels are still unread, and images in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedattack.config import DataConfig
from fedattack.errors import ConfigError, DataError
from fedattack.rng import numpy_rng


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Square images in memory, with their labels and, where known, whom they belong to.

    Raises DataError if the arrays do not fit the description of the fields or each other.
    """

    name: str
    images: np.ndarray  # uint8 (N, C, S, S), C 1 or 3
    labels: np.ndarray  # int64 (N,), in range(len(class_names))
    class_names: tuple[str, ...]
    groups: np.ndarray | None  # int64 (N,): the person, writer, ... of each; None: unknown
    note: str  # what to know before reading a figure ("cut: 2,500 of 50,000 images")
    group_names: tuple[str, ...] | None = None  # what `groups` indexes, where the source names its people
    # What the source says about each sample: name -> int64 (N,); "series", "writer", "duplicate", ...
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, count = self.images.shape, len(self.images)
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
            raise DataError(
                f"data set {self.name!r}: images must be uint8 (N, 1 or 3, S, S); got {self.images.dtype} {shape}"
            )
        if count == 0:
            raise DataError(f"data set {self.name!r} holds no images")
        if self.labels.dtype != np.int64 or self.labels.shape != (count,):
            raise DataError(
                f"data set {self.name!r}: {count} images need int64 labels of shape ({count},); "
                f"got {self.labels.dtype} {self.labels.shape}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"data set {self.name!r}: labels run from {low} to {high}, but there are "
                f"{len(self.class_names)} classes"
            )
        if self.groups is not None and (self.groups.dtype != np.int64 or self.groups.shape != (count,)):
            raise DataError(f"data set {self.name!r}: groups must be int64 of shape ({count},)")
        for fact, values in self.facts.items():
            if values.dtype != np.int64 or values.shape != (count,):
                raise DataError(f"data set {self.name!r}: fact {fact!r} must be int64 of shape ({count},)")

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.images.shape[1])

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return int(self.images.shape[2])

    @property
    def classes(self) -> int:
        """Width of the label space, which a cut set may not fill."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images float32 (n, C, S, S) in [0, 1] and labels int64 (n,) of the samples `ids`."""
        wanted = np.asarray(ids, dtype=np.int64)
        return as_float(self.images[wanted]), torch.from_numpy(self.labels[wanted])


def as_float(images: np.ndarray) -> Tensor:
    """uint8 images of any shape as float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255.0)


def require_groups(groups: np.ndarray | None, setting: str) -> np.ndarray:
    """The groups that a setting needs; DataError, which begins with the setting, where there are none."""
    if groups is None:
        raise DataError(
            f"{setting}: this data set does not say whose a sample is; 'qmnist', 'sd19', 'lfw' and 'celeba' do"
        )
    return groups


def random_labels(dataset: ImageDataset, classes: int, seed: int) -> ImageDataset:
    """The same images with labels drawn from ``range(classes)``; all are used once before one is used twice."""
    rng = numpy_rng(seed, "data.labels")
    rounds = -(-len(dataset) // classes)
    labels = np.concatenate([rng.permutation(classes) for _ in range(rounds)])[: len(dataset)]
    return replace(
        dataset,
        labels=labels.astype(np.int64),
        class_names=tuple(str(i) for i in range(classes)),
        note=joined(
            dataset.note, f"labels: a seeded random draw from {classes:,} classes, not the natural ones"
        ),
    )


@dataclass(frozen=True, eq=False)
class Listing:
    """A data set whose pixels are read only for the samples that are used; otherwise as :class:`ImageDataset`.

    What a data-set plug-in returns: a function of a :class:`~fedattack.config.DataConfig` answers a listing, and
    :func:`~fedattack.data.load_dataset` applies `data.limit` and `data.image_size`.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    # (ids, side or None: as stored) -> uint8 (n, C, S, S)
    read: Callable[[np.ndarray, int | None], np.ndarray]
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] | None = None
    note: str = ""
    image_size: int | None = None  # side where the configuration leaves it open; None: as stored
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)  # as those of ImageDataset
    remarks: Counter[str] = field(
        default_factory=Counter
    )  # what `read` found in pictures and left out, and how often
    parts: tuple[str, ...] = ()  # what `data.part` may name, the first where it names none; (): nothing


def chosen_part(config: DataConfig, parts: tuple[str, ...]) -> str:
    """The part that `data.part` names, the first where it names none; ConfigError if it is not among `parts`."""
    if config.part is not None and config.part not in parts:
        known = f"has {', '.join(parts)}" if parts else "is not in parts; leave it open"
        raise ConfigError(f"setting 'data.part' = {config.part!r}: data set {config.name!r} {known}")
    return config.part or parts[0]


def joined(*notes: str) -> str:
    """Notes as one text, empty ones left out."""
    return "; ".join(note for note in notes if note)


def cut_note(found: int, published: int, what: str = "training images") -> str:
    """Note for a set that is smaller than the published one; empty when it is complete."""
    return f"cut: {found:,} of {published:,} {what}" if found < published else ""
