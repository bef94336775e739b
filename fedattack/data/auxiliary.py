"""The adversary's public images: cut from the data set, or read from a file or folder of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedattack.config import DataConfig
from fedattack.data.dataset import ImageDataset, as_float, joined
from fedattack.data.files import open_tree
from fedattack.data.folders import by_folder, is_picture, read_pictures
from fedattack.data.images import as_uint8, plain_arrays
from fedattack.data.pixels import adapt
from fedattack.data.pools import Pools, fingerprints
from fedattack.errors import DataError
from fedattack.observation import Auxiliary
from fedattack.rng import numpy_rng


@dataclass(frozen=True, eq=False)
class _Public:
    """What a file grants; `people`: everybody it names, `per_picture` by single pictures and not by class folders."""

    images: np.ndarray  # uint8 (N, C, S, S)
    labels: np.ndarray | None
    people: set[str] | None
    per_picture: bool = False
    groups: np.ndarray | None = None


def load_auxiliary(config: DataConfig, dataset: ImageDataset, pools: Pools, seed: int) -> Auxiliary | None:
    """The adversary's public images, in the data set's channels and size; None where none are granted.

    `auxiliary` is "split" (the auxiliary pool), an .npz file with `images` (uint8, or float in [0, 1]; (N, H, W) or
    (N, H, W, C)) and optionally `labels` and `names`, or a folder or archive of pictures. `auxiliary_size` limits a
    file by a seeded draw. Raises DataError if the file is missing or malformed, holds fewer images than asked for, or
    overlaps the clients' or non-members' images or people.
    """
    if config.auxiliary == "split":
        if not len(pools.auxiliary):
            return None
        images, labels = dataset.tensors(pools.auxiliary)
        rest = (
            "nobody in it is among the clients" if dataset.groups is not None else "no client has one of them"
        )
        source = f"split: {len(labels):,} images of {dataset.name}, {rest}"
        groups = None if dataset.groups is None else torch.from_numpy(dataset.groups[pools.auxiliary])
        return Auxiliary(images, labels, source, groups)
    if config.auxiliary_size == 0:
        return None
    path = Path(config.auxiliary).expanduser()
    place = f"setting 'data.auxiliary' = {config.auxiliary!r}"
    if not path.exists():
        raise DataError(
            f"{place}: no such file or folder; 'split', an .npz, an archive or a folder is accepted"
        )
    if not path.is_dir() and not path.is_file():
        raise DataError(
            f"{place}: neither a folder nor a regular file; 'split', an .npz, an archive or a folder is accepted"
        )
    natural = config.labels == "natural"
    try:
        if path.suffix.lower() == ".npz":
            public = _read_npz(path, config, dataset, seed)
        else:
            public = _read_pictures(path, config, dataset, seed)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    victims = np.concatenate([pools.clients, pools.withheld, pools.nonmembers])
    checked = _refuse_same_people(place, public, dataset, victims)
    theirs = set(fingerprints(dataset.images[victims]))
    same = sum(digest in theirs for digest in fingerprints(public.images))
    if same:
        raise DataError(f"{place}: the auxiliary set overlaps the victims: {same} identical images")
    # Under random labels the federation's label space means nothing to a public file.
    labelled = None if public.labels is None or not natural else torch.from_numpy(public.labels)
    source = joined(f"{path.name}: {len(public.images):,} images", checked)
    groups = None if public.groups is None else torch.from_numpy(public.groups)
    return Auxiliary(as_float(public.images), labelled, source, groups)


def _drawn(count: int, config: DataConfig, seed: int) -> np.ndarray:
    """Which of a file's images are granted, sorted."""
    if config.auxiliary_size is None:
        return np.arange(count)
    if config.auxiliary_size > count:
        raise DataError(
            f"it holds {count} images, fewer than setting 'data.auxiliary_size' = {config.auxiliary_size}"
        )
    return np.sort(numpy_rng(seed, "data.auxiliary").choice(count, config.auxiliary_size, replace=False))


def _read_npz(path: Path, config: DataConfig, dataset: ImageDataset, seed: int) -> _Public:
    arrays = plain_arrays(path, "labels", "names")
    images = as_uint8(arrays["images"])
    labels, names = arrays.get("labels"), arrays.get("names")
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            raise DataError(
                f"'labels' must be integers of shape ({len(images)},); got {labels.dtype} {labels.shape}"
            )
        if labels.min() < 0 or labels.max() >= dataset.classes:
            raise DataError(
                f"'labels' run from {labels.min()} to {labels.max()}; the data set has {dataset.classes} classes"
            )
        labels = labels.astype(np.int64)
    if names is not None and (names.dtype.kind != "U" or names.shape != (len(images),)):
        raise DataError(f"'names' must be text of shape ({len(images)},); got {names.dtype} {names.shape}")
    ids = _drawn(len(images), config, seed)
    return _Public(
        adapt(images[ids], dataset.channels, dataset.image_size),
        None if labels is None else labels[ids],
        None if names is None else set().union(*(_people_of(name) for name in names)),
        per_picture=names is not None,
        groups=None if names is None else _numbered(names[ids]),
    )


def _numbered(names: np.ndarray) -> np.ndarray:
    """int64 number of each picture's person: "Ann_Lee_0001.jpg" and "Ann_Lee_0002.jpg" are the same one's."""
    people = [_person(re.sub(r"(_\d+)?(\.\w{3,4})?$", "", str(name))) for name in names]
    return np.unique(people, return_inverse=True)[1].astype(np.int64)


def _read_pictures(path: Path, config: DataConfig, dataset: ImageDataset, seed: int) -> _Public:
    tree = open_tree(path, is_picture)
    names, labels, class_names, _ = by_folder(tree)
    ids = _drawn(len(names), config, seed)
    images = read_pictures(tree, [names[i] for i in ids], dataset.image_size, dataset.channels)
    number = {name: i for i, name in enumerate(dataset.class_names)}
    # Only folders that are called like the data set's classes say anything about its labels.
    known = all(name in number for name in class_names)
    mapped = np.array([number[class_names[labels[i]]] for i in ids], np.int64) if known else None
    people = None if class_names == ("all",) else {_person(name) for name in class_names}
    return _Public(images, mapped, people)


def _person(name: object) -> str:
    """One spelling of a name: "Ann_Lee" and "ann lee" are the same person."""
    return str(name).replace("_", " ").strip().casefold()


def _people_of(picture: object) -> set[str]:
    """Whom a picture's name may name: "Ann_Lee_0001.jpg" Ann Lee, "Person_3" Person 3 (or picture 3 of Person)."""
    stem = re.sub(r"\.\w{3,4}$", "", str(picture))
    return {_person(stem), _person(re.sub(r"_\d+$", "", stem))}


def _refuse_same_people(place: str, public: _Public, dataset: ImageDataset, victims: np.ndarray) -> str:
    """Raise if somebody is among the victims and in the auxiliary set; else what is known about it, in words."""
    certain = dataset.groups is not None and dataset.group_names is not None
    theirs: set[str] = set()
    if dataset.groups is not None and dataset.group_names is not None:
        theirs = {_person(dataset.group_names[i]) for i in np.unique(dataset.groups[victims])}
    # Classes may be people too, but public class folders of the same name are no overlap.
    elif public.per_picture:
        theirs = {_person(dataset.class_names[i]) for i in np.unique(dataset.labels[victims])}
    both = sorted(theirs & (public.people or set()))
    if both:
        shown = ", ".join(both[:5]) + (", ..." if len(both) > 5 else "")
        raise DataError(
            f"{place}: the auxiliary set overlaps the victims: {len(both)} of the same people ({shown})"
        )
    if public.people is None or not certain:
        missing = "the auxiliary set" if public.people is None else f"data set {dataset.name!r}"
        return f"people in common could not be looked for: {missing} names nobody"
    return "no person in common with the victims"
