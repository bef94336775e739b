"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import ImageDataset, Listing, joined
from fedattack.errors import DataError
from fedattack.registry import Registry
from fedattack.rng import numpy_rng

DATASETS: Registry[Callable[[DataConfig], Listing]] = Registry(
    "data set",
    {
        "digits": "fedattack.data.embedded:digits",
        "faces": "fedattack.data.embedded:faces",
        "usps": "fedattack.data.embedded:usps",
        "mnist": "fedattack.data.idx:mnist",
        "fashion-mnist": "fedattack.data.idx:fashion_mnist",
        "qmnist": "fedattack.data.idx:qmnist",
        "emnist": "fedattack.data.idx:emnist",
        "emnist-byclass": "fedattack.data.idx:emnist_byclass",
        "emnist-letters": "fedattack.data.idx:emnist_letters",
        "cifar10": "fedattack.data.cifar:cifar10",
        "cifar100": "fedattack.data.cifar:cifar100",
        "celeba": "fedattack.data.folders:celeba",
        "lfw": "fedattack.data.folders:lfw",
        "imagenet": "fedattack.data.folders:imagenet",
        "caltech101": "fedattack.data.folders:caltech101",
        "image-folder": "fedattack.data.folders:image_folder",
    },
    group="fedattack.datasets",
)


def load_dataset(config: DataConfig, seed: int) -> ImageDataset:
    """The data set of `config.name`; DataError if its files are missing, corrupt or of the wrong format.

    `limit` draws a seeded subset before any picture is decoded; `image_size` resizes (antialiased bilinear,
    non-square pictures centre-cropped). Labels are the natural ones.
    """
    listing = DATASETS.get(config.name)(config)
    count = len(listing.labels)
    if count == 0:
        raise DataError(f"data set {config.name!r} (setting 'data.dir' = {config.dir!r}) holds no images")
    ids = np.arange(count)
    note = listing.note
    if config.limit is not None and config.limit < count:
        ids = np.sort(numpy_rng(seed, "data.limit").choice(count, config.limit, replace=False))
        note = joined(note, f"limit: {config.limit:,} of {count:,} images, a seeded draw")
    return ImageDataset(
        name=config.name,
        images=np.ascontiguousarray(listing.read(ids, config.image_size or listing.image_size)),
        labels=listing.labels[ids],
        class_names=listing.class_names,
        groups=None if listing.groups is None else listing.groups[ids],
        note=note,
        group_names=listing.group_names,
    )
