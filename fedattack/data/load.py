"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.arrays import listing_of
from fedattack.data.dataset import ImageDataset, Listing, chosen_part, joined
from fedattack.data.facts import filtered
from fedattack.data.pixels import remarked
from fedattack.errors import ConfigError, DataError
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
        "npz": "fedattack.data.npz:npz",
    },
    group="fedattack.datasets",
)


LIVE = "live:images"
"""What a data set that only this process knows is called."""


@contextmanager
def held(listing: Listing) -> Iterator[str]:
    """The name by which a data set is known inside the block."""

    def read(config: DataConfig) -> Listing:
        """Images that were given in memory."""
        return listing

    DATASETS.add(LIVE, read)
    try:
        yield LIVE
    finally:
        DATASETS.discard(LIVE)


def _listing(config: DataConfig) -> Listing:
    """What the data set's reader answers; a torch data set or arrays in place of a listing will do."""
    found: Any = DATASETS.get(config.name)
    if callable(found) and not hasattr(found, "__getitem__"):
        contract = (
            f"data set {config.name!r}: a data-set plug-in is a function of a fedattack.config.DataConfig, or of "
            "nothing, that answers a fedattack.data.Listing, (images, labels) or a torch Dataset; or such a Dataset"
        )
        try:
            signature = inspect.signature(found)
        except (TypeError, ValueError) as error:
            raise ConfigError(contract) from error
        given = next((given for given in ((config,), ()) if _takes(signature, given)), None)
        if given is None:
            raise ConfigError(f"{contract}; this one takes {signature}")
        found = found(*given)
        if not isinstance(found, Listing | tuple | list) and not hasattr(found, "__getitem__"):
            raise ConfigError(f"{contract}; this one answers a {type(found).__name__}")
    return found if isinstance(found, Listing) else listing_of(found)


def _takes(signature: inspect.Signature, given: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*given)
    except TypeError:
        return False
    return True


def load_dataset(config: DataConfig, seed: int) -> ImageDataset:
    """The data set of `config.name`; DataError if its files are missing, corrupt or of the wrong format.

    What the source says about its samples filters them (`series`, `writers`, `where`, `duplicates`) and may be their
    groups (`group_by`). `limit` draws a seeded subset of what is left before any picture is decoded; `image_size`
    resizes (antialiased bilinear, non-square pictures centre-cropped). Labels are the natural ones.
    """
    listing = _listing(config)
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
    images = np.ascontiguousarray(listing.read(ids, config.image_size or listing.image_size))
    note = joined(note, remarked(listing.remarks))
    return ImageDataset(
        name=config.name,
        images=images,
        labels=listing.labels[ids],
        class_names=listing.class_names,
        groups=None if groups is None else groups[ids],
        note=note,
        group_names=group_names,
        facts=facts,
    )
