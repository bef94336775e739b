"""Images and labels in one .npz file, under the names that such files use."""

from __future__ import annotations

from fedattack.config import DataConfig
from fedattack.data.arrays import listing_of
from fedattack.data.dataset import Listing, chosen_part, joined
from fedattack.data.files import data_dir
from fedattack.data.images import plain_arrays, stored_names
from fedattack.errors import DataError

_PAIRS = (
    ("images", "labels"),
    ("x", "y"),
    ("X", "y"),
    ("data", "labels"),
    ("data", "target"),
    ("arr_0", "arr_1"),
)
"""Names of images and labels, the first that are there."""

_GROUPS = ("groups", "people", "writers", "subjects")
_PARTS = ("train", "test", "val", "validation", "valid")


def npz(config: DataConfig) -> Listing:
    """Any images in an .npz file: images and labels, x and y, x_train and y_train, train_images and train_labels, ...

    (N, S, S), (N, C, S, S) or (N, S, S, C), uint8 or floats in [0, 1]; labels whole numbers; `groups`, where it is
    there, says whose each image is. `data.part` chooses among train, test, val.
    """
    path = data_dir(config, "an .npz file with images and labels")
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if len(found) != 1:
            names = ", ".join(one.name for one in found) or "none"
            raise DataError(f"setting 'data.dir' = {config.dir!r}: give one .npz file; there: {names}")
        path = found[0]
    try:
        held = stored_names(path)
        parts = tuple(part for part in _PARTS if _pair(held, part) is not None)
        part = chosen_part(config, parts) if parts or config.part else None
        pair = _pair(held, part)
        if pair is None:
            pairs = ", ".join(" and ".join(pair) for pair in _PAIRS)
            raise DataError(
                f"it holds {', '.join(held) or 'nothing'}; wanted {pairs}, or those of train and test"
            )
        groups = next((name for name in _GROUPS if name in held and not part), None)
        arrays = plain_arrays(path, *pair, *([groups] if groups else []), needs=pair[0])
        images, labels = (arrays[name] for name in pair)
        listing = listing_of((images, labels), None, arrays.get(groups or ""))
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}") from None
    note = joined(f"read from {' and '.join(pair)} of {path.name}", listing.note)
    return Listing(
        labels=listing.labels,
        class_names=listing.class_names,
        read=listing.read,
        groups=listing.groups,
        group_names=listing.group_names,
        note=note,
        parts=parts,
    )


def _pair(held: tuple[str, ...], part: str | None) -> tuple[str, str] | None:
    """The names of images and labels of a part; None: of the file."""
    for images, labels in _PAIRS:
        if part is None:
            ways = [(images, labels)]
        else:
            ways = [(f"{images}_{part}", f"{labels}_{part}"), (f"{part}_{images}", f"{part}_{labels}")]
        for way in ways:
            if all(name in held for name in way):
                return way
    return None
