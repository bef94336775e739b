"""MNIST and its relatives: idx files, plain or compressed, complete or cut.

Own readers, because torchvision reads only unpacked files of the published names and sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, chosen_part, cut_note, joined
from fedattack.data.facts import DUPLICATE, SERIES, WRITER
from fedattack.data.files import Missing, by_torchvision, data_dir, find_file, with_download
from fedattack.data.pixels import adapt
from fedattack.errors import DataError
from fedattack.reading import ARCHIVE_ERRORS, Unreadable, open_compressed, read_some, said

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LARGEST = 8 * 2**30
_RELATIVES = {"mnist", "fashionmnist", "qmnist", "emnist", "kmnist"}

_PART_WORDS = {"train": "training"}
DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
            "Ankle boot")  # fmt: skip
_UPPER, _LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_BALANCED = tuple("0123456789" + _UPPER + "abdefghnqrt")  # the letters whose two cases look alike are merged


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file (plain, .gz, .xz or .bz2) of so many dimensions, in its type and native byte order.

    Raises DataError if the magic number, the number of dimensions or the length is wrong, or the compression is
    corrupt.
    """
    try:
        with open_compressed(path, _LARGEST) as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES:
                raise DataError(f"{str(path)!r} is not an idx file: it starts with {head.hex() or 'nothing'}")
            if head[3] != dimensions:
                raise DataError(f"{str(path)!r} is an idx file of {head[3]} dimensions; wanted {dimensions}")
            sizes = stream.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise DataError(f"{str(path)!r} is truncated: its header ends early")
            shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
            dtype = np.dtype(_TYPES[head[2]])
            size = dtype.itemsize
            for side in shape:
                size *= side
            if size > _LARGEST:
                raise DataError(
                    f"{str(path)!r} declares shape {shape}, more than 8 GiB: its header is damaged"
                )
            body = read_some(stream, size + 1)
    except Unreadable as error:
        raise DataError(f"cannot read {str(path)!r}: {error.reason}") from None
    except ARCHIVE_ERRORS as error:
        raise DataError(f"cannot read {str(path)!r}: {said(error)}") from None
    if len(body) != size:
        problem = "truncated" if len(body) < size else "longer than its header says"
        raise DataError(f"{str(path)!r} is {problem}: shape {shape} needs {size:,} bytes")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read_images(path: Path) -> np.ndarray:
    """Images uint8 (N, 1, H, W) of an idx file (else DataError)."""
    pixels = read_idx(path, 3)
    if pixels.dtype != np.uint8:
        raise DataError(f"{str(path)!r} holds {pixels.dtype} pixels; wanted uint8")
    return pixels[:, None]


def read_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 1, H, W) and labels (N,) of two idx files that must agree (else DataError)."""
    pixels, targets = read_images(images), read_idx(labels, 1)
    if targets.dtype.kind not in "iu":
        raise DataError(f"{str(labels)!r} holds {targets.dtype} labels; wanted integers")
    _require_as_many(images, pixels, labels, targets)
    return pixels, targets


def _require_as_many(images: Path, pixels: np.ndarray, labels: Path, targets: np.ndarray) -> None:
    if len(pixels) != len(targets):
        raise DataError(
            f"{str(images)!r} holds {len(pixels):,} images, {str(labels)!r} {len(targets):,} labels"
        )


def _folders(root: Path, name: str) -> list[Path]:
    """Where the idx files of the set `name` may lie below `root`: the set's own folder first."""
    named = [root / name / "raw", root / name]
    return named if _is_other_set(root, name) else [*named, root / "raw", root]


def _is_other_set(root: Path, name: str) -> bool:
    """Whether `root` is the folder of a relative, whose files have the same names."""
    folder = root.parent if root.name == "raw" else root
    found = folder.name.lower().replace("-", "").replace("_", "")
    return found in _RELATIVES - {name.lower()}


def _find(folders: list[Path], stems: list[str], config: DataConfig) -> Path:
    path = find_file(folders, stems)
    if path is None:
        wanted = " or ".join(stems)
        raise Missing(
            f"setting 'data.dir' = {config.dir!r}: no file {wanted} (plain or .gz) for {config.name!r}"
        )
    return path


def _stems(prefix: str, part: str, kind: str, code: str) -> list[str]:
    return [f"{prefix}{part}-{kind}-{code}-ubyte", f"{prefix}{part}-{kind}.{code}-ubyte"]


def _published(
    config: DataConfig,
    folder: str,
    class_names: tuple[str, ...],
    full: tuple[int, int],
    fetch: Callable[[Path], object],
    prefix: str = "",
    test: str = "t10k",
    upright: bool = True,
    first_label: int = 0,
) -> Listing:
    """One of two parts, train and test, of so many images; `test` is how the files of the latter begin."""
    parts = ("train", "test")
    part = chosen_part(config, parts)
    stem = test if part == "test" else part

    def read() -> Listing:
        root = data_dir(
            config, f"a folder with {prefix}{stem}-images-idx3-ubyte and its labels (plain or .gz)"
        )
        folders = [place for base in _folders(root, folder) for place in (base, base / "gzip")]
        images, labels = read_pair(
            _find(folders, _stems(prefix, stem, "images", "idx3"), config),
            _find(folders, _stems(prefix, stem, "labels", "idx1"), config),
        )
        pixels = images if upright else images.transpose(0, 1, 3, 2)
        return Listing(
            labels=labels.astype(np.int64) - first_label,
            class_names=class_names,
            read=lambda ids, size: adapt(pixels[ids], None, size),
            note=cut_note(len(labels), full[parts.index(part)], f"{_PART_WORDS.get(part, part)} images"),
            parts=parts,
        )

    return with_download(config, fetch, read)


def mnist(config: DataConfig) -> Listing:
    """Handwritten digits, 60,000 training images, 28x28 grey, 10 classes."""
    return _published(config, "MNIST", DIGITS, (60_000, 10_000), by_torchvision("MNIST"))


def fashion_mnist(config: DataConfig) -> Listing:
    """Garments (Fashion-MNIST), 60,000 training images, 28x28 grey, 10 classes."""
    fetch = by_torchvision("FashionMNIST")
    return _published(config, "FashionMNIST", GARMENTS, (60_000, 10_000), fetch)


def _emnist(
    config: DataConfig,
    split: str,
    class_names: tuple[str, ...],
    full: tuple[int, int],
    first_label: int = 0,
) -> Listing:
    fetch = by_torchvision("EMNIST", split=split)
    # The published pixels lie transposed: the reader turns them upright.
    return _published(
        config, "EMNIST", class_names, full, fetch, f"emnist-{split}-", "test", False, first_label
    )


def emnist(config: DataConfig) -> Listing:
    """Letters and digits (EMNIST balanced), 112,800 training images, 28x28 grey, 47 classes."""
    return _emnist(config, "balanced", _BALANCED, (112_800, 18_800))


def emnist_byclass(config: DataConfig) -> Listing:
    """Letters and digits (EMNIST by class), 697,932 training images, 28x28 grey, 62 classes."""
    return _emnist(config, "byclass", (*DIGITS, *_UPPER, *_LOWER), (697_932, 116_323))


def emnist_bymerge(config: DataConfig) -> Listing:
    """Letters and digits (EMNIST by merge), 697,932 training images, 28x28 grey, 47 classes of unequal size."""
    return _emnist(config, "bymerge", _BALANCED, (697_932, 116_323))


def emnist_letters(config: DataConfig) -> Listing:
    """Letters without case (EMNIST letters), 124,800 training images, 28x28 grey, 26 classes."""
    return _emnist(config, "letters", tuple(_UPPER), (124_800, 20_800), first_label=1)


def emnist_digits(config: DataConfig) -> Listing:
    """Digits (EMNIST digits), 240,000 training images, 28x28 grey, 10 classes."""
    return _emnist(config, "digits", DIGITS, (240_000, 40_000))


def emnist_mnist(config: DataConfig) -> Listing:
    """Digits cut as MNIST's (EMNIST mnist), 60,000 training images, 28x28 grey, 10 classes."""
    return _emnist(config, "mnist", DIGITS, (60_000, 10_000))


@dataclass(frozen=True)
class _Part:
    """Where a part of QMNIST lies, and MNIST's file of the same digits."""

    prefix: str
    published: int
    first: int = 0  # the part is the rows `first` to `first + published` of its files
    stand_in: str | None = None


_QMNIST = {
    "train": _Part("qmnist-train", 60_000, stand_in="train"),
    "test": _Part("qmnist-test", 60_000),
    "test10k": _Part("qmnist-test", 10_000, stand_in="t10k"),
    "test50k": _Part("qmnist-test", 50_000, first=10_000),
    "nist": _Part("xnist", 402_953),
}
# The columns of the labels, as the publishers describe them; "code" is NIST's name of the class, 30 to 39.
_COLUMNS = ("class", SERIES, WRITER, "index", "code", "global_index", DUPLICATE, "unused")


def qmnist(config: DataConfig) -> Listing:
    """MNIST with its writers (QMNIST), 60,000 training images by 539 writers, 28x28 grey, 10 classes.

    `data.part` is train, test (60,000 images), test10k and test50k (MNIST's test images, and those that MNIST lost)
    or nist (all 402,953). The eight columns of the published labels are facts about the samples: class, series (of
    SD19: 0 to 8), writer, index (of a writer's digits), code, global_index, duplicate, unused; a writer is a group.
    Where QMNIST's own image file is absent, MNIST's images stand in for train and test10k (the same digits in the
    same order), and the note says so.

    A hundred writers held out whole, as the series are mixed, the others dealt out whole:
    ``--set data.nonmember_unit=group --set data.nonmembers=100 --partition natural``.

    References
    ----------
    .. [1] C. Yadav, L. Bottou, "Cold Case: the Lost MNIST Digits", NeurIPS 2019.
    """
    name = chosen_part(config, tuple(_QMNIST))
    part = _QMNIST[name]
    rows = slice(part.first, part.first + part.published)

    def read() -> Listing:
        root = data_dir(config, f"a folder with {part.prefix}-labels-idx2-int and its images (plain or .gz)")
        folders = _folders(root, "QMNIST")
        label_file = _find(folders, [f"{part.prefix}-labels-idx2-int"], config)
        columns = read_idx(label_file, 2)[rows].astype(np.int64)
        if columns.shape[1] != len(_COLUMNS):
            raise DataError(f"{str(label_file)!r} has {columns.shape[1]} columns; QMNIST labels have 8")
        image_file = find_file([label_file.parent, *folders], [f"{part.prefix}-images-idx3-ubyte"])
        stand_in = ""
        if image_file is not None:
            images = read_images(image_file)[rows]
        else:
            image_file = _stand_in(config, name, label_file)
            images = read_images(image_file)
            _require_same_digits(image_file, part.stand_in or "", columns[:, 0])
            stand_in = f"images: MNIST's {'training' if name == 'train' else 'test'} file (the same digits)"
        _require_as_many(image_file, images, label_file, columns)
        facts = {column: columns[:, i].copy() for i, column in enumerate(_COLUMNS)}
        return Listing(
            labels=facts["class"],
            class_names=DIGITS,
            groups=facts[WRITER],  # the source numbers writers over all series
            read=lambda ids, size: adapt(images[ids], None, size),
            note=joined(
                cut_note(len(columns), part.published, f"{_PART_WORDS.get(name, name)} images"), stand_in
            ),
            facts=facts,
            parts=tuple(_QMNIST),
        )

    return with_download(config, by_torchvision("QMNIST", what=name), read)


def _stand_in(config: DataConfig, name: str, label_file: Path) -> Path:
    """MNIST's file of the same digits, beside QMNIST's labels or in a folder MNIST beside theirs."""
    stand_in, root = _QMNIST[name].stand_in, Path(config.dir or "").expanduser()
    if stand_in is None:
        raise Missing(
            f"setting 'data.dir' = {config.dir!r}: no file {_QMNIST[name].prefix}-images-idx3-ubyte for 'qmnist'; "
            f"MNIST's images can stand in for the parts train and test10k, not for {name}"
        )
    beside = [root.parent / "MNIST" / "raw", root.parent.parent / "MNIST" / "raw"]
    places = [label_file.parent, *_folders(root, "MNIST"), *beside]
    return _find(places, _stems("", stand_in, "images", "idx3"), config)


def _require_same_digits(image_file: Path, part: str, digits: np.ndarray) -> None:
    """Raise DataError unless the stand-in's own labels, where they lie beside it, are QMNIST's."""
    label_file = find_file([image_file.parent], _stems("", part, "labels", "idx1"))
    if label_file is not None and not np.array_equal(read_idx(label_file, 1), digits):
        raise DataError(f"{str(image_file)!r} cannot stand in for QMNIST's images: its labels are others")
