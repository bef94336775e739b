"""CIFAR-10 and CIFAR-100 in the published "python" format, complete or cut, as a folder or an archive.

The format is pickles, and a file from the net must not be unpickled: :mod:`~fedattack.data.plain_pickle` reads them.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, cut_note
from fedattack.data.files import Missing, Tree, data_dir, is_archive, open_tree, with_download
from fedattack.data.pixels import adapt
from fedattack.data.plain_pickle import read_plain
from fedattack.errors import DataError
from fedattack.reading import MIB, said

_LARGEST = 256 * MIB


def load_batch(data: bytes, name: str) -> dict[str, Any]:
    """Read one pickled batch of numbers, text and lists with text for keys; arrays are read-only.

    Raises DataError if the pickle names anything but plain numeric arrays, or is corrupt.
    """
    try:
        batch = read_plain(data)
    except Exception as error:  # a damaged pickle raises nearly anything; none of it ran foreign code
        raise DataError(f"refused {name!r}: not a batch of plain arrays ({said(error)})") from None
    if not isinstance(batch, dict):
        raise DataError(f"refused {name!r}: holds a {type(batch).__name__}, not a batch")
    return {_text(key): value for key, value in batch.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _images_and_labels(
    batch: dict[str, Any], key: str, name: str, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = batch.get("data"), batch.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise DataError(f"batch {name!r}: 'data' must be a uint8 array (n, 3072)")
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < classes for label in labels
    ):
        raise DataError(f"batch {name!r}: {key!r} must be a list of integers from 0 to {classes - 1}")
    if len(labels) != len(pixels):
        raise DataError(f"batch {name!r} holds {len(pixels)} images, but {len(labels)} labels")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _locate(config: DataConfig, folders: tuple[str, ...], inner: str, files: set[str], archive: str) -> Tree:
    """The batch files below `data.dir`: unpacked, or in an archive whose name starts with `archive`."""
    root = data_dir(config, f"a folder or archive with {inner}/{min(files)}")

    def wanted(name: PurePosixPath) -> bool:
        return name.name in files and (len(name.parts) == 1 or name.parent.name == inner)

    if root.is_file():
        tree = open_tree(root, wanted, _LARGEST)
        if tree.names:
            return tree
        raise Missing(f"setting 'data.dir' = {config.dir!r}: the archive holds no {inner}/{min(files)}")
    places = [root, *(root / folder for folder in folders)]
    for place in places:
        for folder in (place / inner, place):
            if folder.is_dir() and any((folder / file).is_file() for file in files):
                return open_tree(folder, lambda name: len(name.parts) == 1 and name.name in files, _LARGEST)
    for place in places:
        archives = [p for p in sorted(place.glob(f"{archive}*")) if p.is_file() and is_archive(p)]
        for path in archives:
            tree = open_tree(path, wanted, _LARGEST)
            if tree.names:
                return tree
    raise Missing(f"setting 'data.dir' = {config.dir!r}: no {inner}/{min(files)}, nor an archive {archive}*")


def read_batches(tree: Tree, files: list[str], label_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of those of the `files` that are there, in order."""
    by_name = {PurePosixPath(name).name: name for name in tree.names}
    parts = [
        _images_and_labels(load_batch(tree.read(by_name[file]), file), label_key, file, classes)
        for file in files
        if file in by_name
    ]
    if not parts:
        raise Missing(f"{str(tree.path)!r} holds none of {', '.join(files)}")
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _class_names(tree: Tree, meta: str, key: str, classes: int) -> tuple[str, ...]:
    found = [name for name in tree.names if PurePosixPath(name).name == meta]
    names = load_batch(tree.read(found[0]), meta).get(key) if found else None
    if isinstance(names, list) and len(names) == classes:
        return tuple(_text(name) for name in names)
    return tuple(str(i) for i in range(classes))


def _listing(
    config: DataConfig,
    places: tuple[str, ...],
    inner: str,
    archive: str,
    files: list[str],
    keys: tuple[str, str, str],
    classes: int,
) -> Listing:
    label_key, meta, names_key = keys

    def fetch(folder: Path) -> object:
        from torchvision import datasets

        kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
        return datasets.utils.download_url(kind.url, str(folder), kind.filename, kind.tgz_md5)

    def read() -> Listing:
        tree = _locate(config, places, inner, {*files, meta}, archive)
        images, labels = read_batches(tree, files, label_key, classes)
        return Listing(
            labels=labels,
            class_names=_class_names(tree, meta, names_key, classes),
            read=lambda ids, size: adapt(images[ids], None, size),
            note=cut_note(len(labels), 50_000),
        )

    return with_download(config, fetch, read)


def cifar10(config: DataConfig) -> Listing:
    """Small colour photographs (CIFAR-10), 50,000 training images, 32x32, 10 classes."""
    files = [f"data_batch_{i}" for i in range(1, 6)]
    keys = ("labels", "batches.meta", "label_names")
    places = ("CIFAR10", "cifar10", "cifar-10")
    return _listing(config, places, "cifar-10-batches-py", "cifar-10", files, keys, 10)


def cifar100(config: DataConfig) -> Listing:
    """Small colour photographs (CIFAR-100), 50,000 training images, 32x32, 100 classes."""
    keys = ("fine_labels", "meta", "fine_label_names")
    places = ("CIFAR100", "cifar100", "cifar-100")
    return _listing(config, places, "cifar-100-python", "cifar-100", ["train"], keys, 100)
