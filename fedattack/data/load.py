"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import ImageDataset, Listing, chosen_part, joined
from fedattack.data.facts import filtered
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
        "emnist-bymerge": "fedattack.data.idx:emnist_bymerge",
        "emnist-letters": "fedattack.data.idx:emnist_letters",
        "emnist-digits": "fedattack.data.idx:emnist_digits",
        "emnist-mnist": "fedattack.data.idx:emnist_mnist",
        "sd19": "fedattack.data.sd19:sd19",
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

    What the source says about its samples filters them (`series`, `writers`, `where`, `duplicates`) and may be their
    groups (`group_by`). `limit` draws a seeded subset of what is left before any picture is decoded; `image_size`
    resizes (antialiased bilinear, non-square pictures centre-cropped). Labels are the natural ones.
    """
    listing = DATASETS.get(config.name)(config)
    if config.part is not None:
        chosen_part(config, listing.parts)
    if len(listing.labels) == 0:
        raise DataError(f"data set {config.name!r} (setting 'data.dir' = {config.dir!r}) holds no images")
    ids, filters = filtered(listing, config)
    note, count = joined(listing.note, filters), len(ids)
    if config.limit is not None and config.limit < count:
        ids = ids[np.sort(numpy_rng(seed, "data.limit").choice(count, config.limit, replace=False))]
        note = joined(note, f"limit: {config.limit:,} of {count:,} images, a seeded draw")
    facts = {name: values[ids] for name, values in listing.facts.items()}
    groups, group_names = listing.groups, listing.group_names
    if config.group_by is not None:
        groups, group_names = listing.facts[config.group_by], None
    return ImageDataset(
        name=config.name,
        images=np.ascontiguousarray(listing.read(ids, config.image_size or listing.image_size)),
        labels=listing.labels[ids],
        class_names=listing.class_names,
        groups=None if groups is None else groups[ids],
        note=note,
        group_names=group_names,
        facts=facts,
    )
