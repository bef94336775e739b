"""Data sets that come with the installed packages (no network), and USPS."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, chosen_part, cut_note
from fedattack.data.files import Missing, by_torchvision, data_dir, find_file, with_download
from fedattack.data.pixels import adapt
from fedattack.errors import DataError
from fedattack.reading import (
    ARCHIVE_ERRORS,
    LARGEST_TEXT,
    Unreadable,
    open_compressed,
    read_all,
    require_regular,
    said,
)

_FACES = 100


def digits(config: DataConfig) -> Listing:
    """Handwritten digits of scikit-learn, 1,797 images, 8x8 grey, 10 classes; no download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    return Listing(
        labels=bunch.target.astype(np.int64),
        class_names=tuple("0123456789"),
        read=lambda ids, size: adapt(images[ids], None, size),
    )


def faces(config: DataConfig) -> Listing:
    """Faces of scikit-image (LFW), 100 images, 25x25 grey shown at 32x32, each its own class; no download.

    The package ships 100 faces and 100 patches of background without names; the patches are left out.
    """
    from skimage.data import lfw_subset

    images = np.rint(lfw_subset()[:_FACES] * 255.0).astype(np.uint8)[:, None]
    return Listing(
        labels=np.arange(_FACES, dtype=np.int64),
        class_names=tuple(f"face {i:03d}" for i in range(_FACES)),
        read=lambda ids, size: adapt(images[ids], None, size),
        note="each picture is its own identity: the source names nobody, two may show the same person",
        image_size=32,
    )


def usps(config: DataConfig) -> Listing:
    """Handwritten digits of the US post (USPS), 7,291 training images and 2,007 test images, 16x16 grey, 10 classes.

    Read from usps(.bz2) and usps.t(.bz2) as LIBSVM has them, zip.train(.gz) and zip.test(.gz) of The Elements of
    Statistical Learning, or usps.h5 (with the package h5py); `data.part` is train or test. `data.dir` may name the
    file itself.
    """

    def read() -> Listing:
        root = data_dir(config, "a folder with usps.bz2, zip.train.gz or usps.h5")
        part = chosen_part(config, tuple(_USPS))
        stems, published = _USPS[part]
        places = [root.parent] if root.is_file() else [root / "USPS", root / "usps", root]
        path = root if root.is_file() else find_file(places, [*stems, "usps.h5"])
        if path is None:
            wanted = f"{stems[0]}.bz2, {stems[1]}.gz or usps.h5"
            raise Missing(f"setting 'data.dir' = {config.dir!r}: no file {wanted} ({part})")
        try:
            values, targets = _usps_rows(path, part)
        except Unreadable as error:
            raise DataError(f"cannot read {str(path)!r}: {error.reason}") from None
        except (*ARCHIVE_ERRORS, KeyError) as error:
            raise DataError(f"cannot read {str(path)!r}: {said(error)}") from None
        pixels = values.reshape(-1, 1, 16, 16)
        if not len(pixels) or not np.isfinite(pixels).all() or np.abs(pixels).max() > 1:
            raise DataError(f"{str(path)!r}: USPS pixels must be numbers from -1 to 1")
        images = np.rint((pixels + 1) * 127.5).astype(np.uint8)
        return Listing(
            labels=targets,
            class_names=tuple("0123456789"),
            read=lambda ids, size: adapt(images[ids], None, size),
            note=cut_note(len(targets), published, "training images" if part == "train" else "test images"),
            parts=tuple(_USPS),
        )

    return with_download(config, by_torchvision("USPS"), read)


_USPS: dict[str, tuple[list[str], int]] = {
    "train": (["usps", "zip.train"], 7_291),
    "test": (["usps.t", "zip.test"], 2_007),
}
"""Part -> the names of its files, without .gz or .bz2, and its published size."""


def _usps_h5(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of usps.h5: groups train and test, each with data from 0 to 1 and target."""
    try:
        import h5py
    except ImportError:
        raise DataError(
            f"{str(path)!r} is read by the package h5py, which is not installed; install it, or give usps.bz2 or "
            "zip.train.gz"
        ) from None
    require_regular(path, LARGEST_TEXT)
    with h5py.File(path, "r") as file:
        values, targets = (np.asarray(file[part][name]) for name in ("data", "target"))
    if values.ndim != 2 or values.shape[1] != 256 or targets.shape != (len(values),):
        raise ValueError(f"expected {part}/data (N, 256) and {part}/target (N,)")
    return values.astype(np.float64) * 2 - 1, targets.astype(np.int64)


def _usps_rows(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Values (N, 256) from -1 to 1 and digits int64 (N,) of any published form."""
    from sklearn.datasets import load_svmlight_file

    if path.suffix == ".h5":
        return _usps_h5(path, part)
    with open_compressed(path, LARGEST_TEXT) as stream:
        text = read_all(stream, LARGEST_TEXT, path)
    if path.name.startswith("zip."):  # a row: the digit, then its pixels
        rows = np.loadtxt(io.BytesIO(text), ndmin=2, encoding="ascii")
        if rows.shape[1] != 257 or not np.isin(rows[:, 0], np.arange(10)).all():
            raise ValueError("expected rows of a digit and 256 pixels")
        return rows[:, 1:], rows[:, 0].astype(np.int64)
    values, targets = load_svmlight_file(io.BytesIO(text), n_features=256)
    return values.toarray(), targets.astype(np.int64) - 1  # the file counts the digits from 1
