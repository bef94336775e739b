"""Anybody's images, as they are: a folder or archive of pictures, or arrays in an .npz or .npy file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedattack.data.files import open_tree
from fedattack.data.folders import by_folder, is_picture, read_pictures
from fedattack.errors import DataError
from fedattack.npy import read_npy, read_npz
from fedattack.reading import Unreadable, open_picture, open_zip, require_regular

_LARGEST = 16 * 2**30


@dataclass(frozen=True, eq=False)
class Images:
    """Images uint8 (N, C, S, S), the name of each, and their labels, int64 (N,), where they have some.

    Labels of class folders are places in `class_names`, those of arrays are as they stand there.
    """

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def read_images(path: Path) -> Images:
    """Read square images of one size, nothing cropped or resized.

    `path` is a folder or archive of pictures, those in sub-folders labelled by them; or an .npz file with `images`
    and optionally integer `labels`, or an .npy file: uint8, or float in [0, 1], (N, S, S) or (N, S, S, C); or a
    folder that holds such a file called images.npz, which is then read alone. Nothing is unpickled. DataError, in one
    sentence, for anything else, and where there is no image.
    """
    if not path.exists():
        raise DataError(f"{str(path)!r}: no such file or folder")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{str(path)!r}: neither a folder nor a regular file")
    try:
        arrays = path / "images.npz" if path.is_dir() else path
        if arrays.is_file() and arrays.suffix.lower() in (".npz", ".npy"):
            return _arrays(arrays)
        tree = open_tree(path, is_picture)
        names, labels, class_names, _ = by_folder(tree)
        for name in names:
            _refuse_oblong(name, tree.read(name))
        pixels = read_pictures(tree, names, None, None)
    except DataError as error:
        raise DataError(f"{str(path)!r}: {str(error).removeprefix(f'{str(path)!r}').strip(': ')}") from None
    single = class_names == ("all",)
    return Images(pixels, tuple(names), None if single else labels, () if single else class_names)


def _refuse_oblong(name: str, data: bytes) -> None:
    """Refuse a picture that would be cropped, or is none."""
    try:
        with open_picture(data, name) as picture:
            width, height = picture.size
    except Unreadable as error:
        raise DataError(f"cannot read picture {name!r}: {error.reason}") from None
    if width != height:
        raise DataError(f"picture {name!r} is {width} x {height}; square ones are accepted")


def _arrays(path: Path) -> Images:
    arrays = plain_arrays(path, "labels")
    pixels, labels = as_uint8(arrays["images"]), arrays.get("labels")
    if pixels.shape[2] != pixels.shape[3]:
        raise DataError(f"images are {pixels.shape[2]} x {pixels.shape[3]}; square ones are accepted")
    if arrays["images"].dtype == np.uint8 and pixels.max() <= 1:
        raise DataError("uint8 'images' run from 0 to 1; accepted: 0 to 255, or floats from 0 to 1")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(pixels),)):
        raise DataError(
            f"'labels' must be integers of shape ({len(pixels)},); got {labels.dtype} {labels.shape}"
        )
    if labels is not None and labels.min() < 0:
        raise DataError(f"'labels' begin at {labels.min()}; 0 or more is accepted")
    names = tuple(f"{path.name}:{number}" for number in range(len(pixels)))
    return Images(pixels, names, None if labels is None else labels.astype(np.int64))


def stored_names(path: Path) -> tuple[str, ...]:
    """Names of the arrays in an .npz file, none of which is read; DataError where it is none."""
    try:
        with open_zip(path, _LARGEST) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except Unreadable as error:
        raise DataError(f"not a readable .npz file of plain arrays ({error.reason})") from None


def plain_arrays(path: Path, *more: str, needs: str = "images") -> dict[str, np.ndarray]:
    """The array `needs` of an .npz file and, where they are there, `more`; or, as `images`, that of an .npy file.

    DataError if the file is not readable without unpickling, unpacks to more than 16 GiB, or has no images.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            require_regular(path)
            return {"images": read_npy(path, _LARGEST)}
        with open_zip(path, _LARGEST):  # refuses what unpacks to too much
            arrays = read_npz(path, (needs, *more), _LARGEST)
    except Unreadable as error:
        raise DataError(f"not a readable {kind} file of plain arrays ({error.reason})") from None
    except DataError as error:
        raise DataError(f"not a readable {kind} file of plain arrays ({error})") from None
    if needs not in arrays:
        raise DataError(f"it has no array {needs!r}")
    return arrays


def as_uint8(images: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) of an (N, H, W) or (N, H, W, C) array of uint8, or of floats in [0, 1]."""
    colour = images.ndim == 4 and images.shape[3] in (1, 3)
    if not (images.ndim == 3 or colour) or not images.size:
        raise DataError(f"'images' must have shape (N, H, W) or (N, H, W, 1 or 3); got {images.shape}")
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            raise DataError("'images' holds NaN or infinite values")
        if images.min() < 0 or images.max() > 1:
            raise DataError(f"float 'images' must lie in [0, 1]; got {images.min():g} to {images.max():g}")
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise DataError(f"'images' must be uint8 or float; got {images.dtype}")
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
