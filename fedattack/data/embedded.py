"""Data sets that come with the installed packages (no network), and USPS."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, cut_note
from fedattack.data.files import Missing, by_torchvision, data_dir, find_file, open_compressed, with_download
from fedattack.data.pixels import adapt
from fedattack.errors import DataError

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
    """Handwritten digits of the US post (USPS), 7,291 training images, 16x16 grey, 10 classes.

    Read from usps(.bz2) as LIBSVM has it, or zip.train(.gz) of The Elements of Statistical Learning.
    """

    def read() -> Listing:
        root = data_dir(config, "a folder with usps.bz2 or zip.train.gz")
        places = [root / "USPS", root / "usps", root]
        path = find_file(places, ["usps", "zip.train"])
        if path is None:
            raise Missing(f"setting 'data.dir' = {config.dir!r}: no file usps.bz2 or zip.train.gz")
        try:
            values, targets = _usps_rows(path)
        except (ValueError, OSError, EOFError, IndexError) as error:
            raise DataError(f"cannot read {str(path)!r}: {error}") from None
        pixels = values.reshape(-1, 1, 16, 16)
        if not len(pixels) or not np.isfinite(pixels).all() or np.abs(pixels).max() > 1:
            raise DataError(f"{str(path)!r}: USPS pixels must be numbers from -1 to 1")
        images = np.rint((pixels + 1) * 127.5).astype(np.uint8)
        return Listing(
            labels=targets,
            class_names=tuple("0123456789"),
            read=lambda ids, size: adapt(images[ids], None, size),
            note=cut_note(len(targets), 7_291),
        )

    return with_download(config, by_torchvision("USPS"), read)


def _usps_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (N, 256) and digits int64 (N,) of either published form."""
    from sklearn.datasets import load_svmlight_file

    if path.name.startswith("zip."):  # a row: the digit, then its pixels
        with open_compressed(path) as stream:
            rows = np.loadtxt(io.TextIOWrapper(stream, encoding="ascii"), ndmin=2)
        if rows.shape[1] != 257 or not np.isin(rows[:, 0], np.arange(10)).all():
            raise ValueError("expected rows of a digit and 256 pixels")
        return rows[:, 1:], rows[:, 0].astype(np.int64)
    values, targets = load_svmlight_file(str(path), n_features=256)
    return values.toarray(), targets.astype(np.int64) - 1  # the file counts the digits from 1
