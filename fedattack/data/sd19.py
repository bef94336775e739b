"""NIST Special Database 19: handwriting by series and writer, as extracted, or as packed arrays of digits.

The arrays are those that the script linkNist.py of "PrivacyInternship" writes. Its pickles are never opened: a file
from the net must not be unpickled.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, chosen_part, joined
from fedattack.data.facts import DUPLICATE, SERIES, WRITER, spans, within
from fedattack.data.files import Missing, Tree, data_dir, with_download
from fedattack.data.folders import first_tree
from fedattack.data.pixels import decode
from fedattack.data.pools import fingerprints
from fedattack.errors import DataError
from fedattack.npy import read_npy
from fedattack.reading import Unreadable, read_text, require_regular

_LARGEST = 16 * 2**30
_SIDE = 128
_PACKED = _SIDE * _SIDE // 8
_UPPER, _LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class _Kind:
    """One kind of characters: its classes, the letter of its folders in by_write, its folder in by_field."""

    classes: str
    letter: str
    field: str

    def label(self, code: str) -> int | None:
        """Class of a folder named by the hexadecimal code of its character; None: another kind's."""
        character = chr(int(code, 16))
        return self.classes.index(character) if character in self.classes else None


_KINDS = {
    "digits": _Kind("0123456789", "d", "digit"),
    "uppers": _Kind(_UPPER, "u", "upper"),
    "lowers": _Kind(_LOWER, "l", "lower"),
}


@dataclass(frozen=True, eq=False)
class _Series:
    """The characters of one kind in one series, row by row."""

    packed: np.ndarray  # uint8 (N, 2048): bits of 128x128, 1 is paper
    labels: np.ndarray  # int64 (N,)
    writers: list[str] | None  # names as f2100_45, or numbers; None: the folder does not tell them
    index: np.ndarray | None = None  # int64 (N,): number of the character among the writer's
    note: str = ""


def sd19(config: DataConfig) -> Listing:
    """Handwritten digits or letters by series and writer (NIST SD19), 402,953 digits, 128x128 shown at 28x28 grey.

    `data.part` is digits (10 classes), uppers or lowers (26 each); `data.series` chooses among hsf_0 to hsf_8. Read
    from the folders or archives by_write and by_field (or by_class) as published: the former knows the writers, the
    latter the classes, and equal pictures are the same character. Or, digits only, from HSF_<k>_images.npy (uint8
    (N, 2048), packed bits, 1 is paper) and HSF_<k>_labels.npy, with HSF_<k>_writers.npy or .csv (one a row) where
    somebody wrote the writers down; without them nobody's group is known. Blank pictures are left out with their
    labels, characters without a class too, and copies of a picture are duplicates. :func:`prepared` says how pixels
    are made.

    References
    ----------
    .. [1] P. Grother, K. Hanaoka, "NIST Special Database 19, Handprinted Forms and Characters Database", 2nd edition,
       2016.
    """
    kind = _KINDS[chosen_part(config, tuple(_KINDS))]

    def read() -> Listing:
        root = data_dir(config, "a folder with by_write and by_field of SD19, or with HSF_<k>_images.npy")
        places = [root, root / "SD19", root / "sd19", root / "NIST", root / "nist"]
        by_write = first_tree(places, ("by_write",), lambda name: _written(str(name), kind) is not None)
        by_class = first_tree(
            places, ("by_field", "by_class"), lambda name: _classed(str(name), kind) is not None
        )
        if by_write is not None and by_class is not None:
            found = _extracted(config, by_write, by_class, kind)
        else:
            found = _arrays(config, places, kind, by_write, by_class)
        return _listing(config, kind, found)

    return with_download(config, None, read)


def _asked(config: DataConfig, there: Iterable[int], what: str) -> list[int]:
    """The series of those that are there which `config` asks for; DataError where one is not there."""
    known = np.array(sorted(set(there)), np.int64)
    chosen = np.ones(len(known), dtype=bool)
    if config.series:
        chosen = within(known, config.series, "data.series", f"{config.name}: {what}")
        if config.nonmember_series:
            chosen |= within(
                known, config.nonmember_series, "data.nonmember_series", f"{config.name}: {what}"
            )
    return known[chosen].tolist()


def _written(name: str, kind: _Kind) -> tuple[int, str, int] | None:
    """Series, writer and number of a picture below by_write; None: not a character of this kind."""
    found = re.search(rf"(?:^|/)hsf_(\d)/(f\d{{4}}_\d\d)/{kind.letter}\d{{4}}_\d\d/[^/]*?(\d+)\.png$", name)
    return None if found is None else (int(found[1]), found[2], int(found[3]))


def _classed(name: str, kind: _Kind) -> tuple[int, int] | None:
    """Series and class of a picture below by_field or by_class; None: not a character of this kind."""
    field = re.search(rf"(?:^|/)hsf_(\d)/{kind.field}/([0-9a-f]{{2}})/[^/]+\.png$", name)
    found = field or re.search(r"(?:^|/)([0-9a-f]{2})/hsf_(\d)/[^/]+\.png$", name)
    if found is None:
        return None
    series, code = (found[1], found[2]) if field else (found[2], found[1])
    label = kind.label(code)
    return None if label is None else (int(series), label)


def _packed(tree: Tree, name: str) -> np.ndarray:
    pixels = np.asarray(decode(tree.read(name), name, None).convert("L"))
    if pixels.shape != (_SIDE, _SIDE):
        raise DataError(
            f"picture {name!r} has {pixels.shape[1]}x{pixels.shape[0]} pixels; SD19's have 128x128"
        )
    return np.packbits(pixels > 127)


def _extracted(config: DataConfig, by_write: Tree, by_class: Tree, kind: _Kind) -> dict[int, _Series]:
    """The series as published: each picture of by_write has the class of the equal one in the other tree."""
    written = [(*place, name) for name in by_write.names if (place := _written(name, kind)) is not None]
    classed: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for name in by_class.names:
        if (where := _classed(name, kind)) is not None:
            classed[where[0]].append((where[1], name))
    what = f"{config.part or 'digits'} in {by_write.path.name}"
    found = {}
    for series in _asked(config, (one[0] for one in written), what):
        classes: dict[bytes, int | None] = {}
        for label, name in classed[series]:
            (digest,) = fingerprints(_packed(by_class, name)[None])
            # A picture under two classes has none.
            classes[digest] = label if classes.get(digest, label) == label else None
        ours = sorted((writer, index, name) for one, writer, index, name in written if one == series)
        packed = np.stack([_packed(by_write, name) for _, _, name in ours])
        labels = [classes.get(digest) for digest in fingerprints(packed)]
        known = np.array([label is not None for label in labels])
        if not known.any():
            raise DataError(
                f"setting 'data.dir' = {config.dir!r}: no picture of hsf_{series} in {str(by_write.path)!r} is also "
                f"in {str(by_class.path)!r}, which tells the classes"
            )
        lost = int((~known).sum())
        kept = np.flatnonzero(known)
        found[series] = _Series(
            packed[kept],
            np.array([labels[i] for i in kept], np.int64),
            [ours[i][0] for i in kept],
            np.array([ours[i][1] for i in kept], np.int64),
            f"{lost:,} of hsf_{series} left out: {by_class.path.name} tells no class" if lost else "",
        )
    return found


def _arrays(
    config: DataConfig, places: list[Path], kind: _Kind, by_write: Tree | None, by_class: Tree | None
) -> dict[int, _Series]:
    """The series from packed arrays; raises if there are none, or they are not of the kind that is asked for."""
    folder, there = None, list[int]()
    for place in places:
        there = [k for k in range(9) if (place / f"HSF_{k}_images.npy").is_file()]
        if there:
            folder = place
            break
    if folder is None:
        part, setting = config.part or "digits", f"setting 'data.dir' = {config.dir!r}"
        if by_write is not None:
            raise Missing(
                f"{setting}: by_write tells no classes of its {part}; put by_field or by_class beside it"
            )
        if by_class is not None:
            raise Missing(
                f"{setting}: {by_class.path.name} tells no writers of its {part}; put by_write beside it"
            )
        raise Missing(
            f"{setting}: no {part} of SD19 there, neither by_write with by_field nor HSF_<k>_images.npy"
        )
    if kind.field != "digit":
        raise DataError(
            f"setting 'data.part' = {config.part!r}: the arrays in {str(folder)!r} hold digits only; letters are "
            "read from by_write and by_field"
        )
    return {k: _array(folder, k) for k in _asked(config, there, "HSF_<k>_images.npy")}


def _array(folder: Path, series: int) -> _Series:
    images = _load(folder / f"HSF_{series}_images.npy", "u1", (_PACKED,))
    labels = _load(folder / f"HSF_{series}_labels.npy", "u1", ())
    if len(images) != len(labels):
        raise DataError(
            f"{str(folder)!r}: HSF_{series} has {len(images):,} images and {len(labels):,} labels"
        )
    if len(labels) and labels.max() > 9:
        raise DataError(f"{str(folder)!r}: HSF_{series}_labels.npy runs to {labels.max()}; digits are 0 to 9")
    return _Series(images, labels.astype(np.int64), _writers(folder, series, len(labels)))


def _load(path: Path, kinds: str, tail: tuple[int, ...]) -> np.ndarray:
    """A plain .npy array of shape (N, *tail) and one of the types `kinds`; DataError if it is another."""
    try:
        require_regular(path)
        array = read_npy(path, _LARGEST, mapped=True)
    except Unreadable as error:
        what = "is missing" if error.absent else f"cannot be read: {error.reason}"
        raise DataError(f"{str(path)!r} {what}") from None
    except DataError as error:
        raise DataError(f"cannot read {str(path)!r} as a plain array: {error}") from None
    fits = array.dtype.str[1:] in kinds.split() or array.dtype.kind in kinds.split()
    if not fits or array.ndim != 1 + len(tail) or array.shape[1:] != tail:
        wanted = ", ".join(["N", *map(str, tail)])
        raise DataError(f"{str(path)!r} holds {array.dtype} {array.shape}; wanted ({wanted}) of {kinds}")
    return array


def _writers(folder: Path, series: int, count: int) -> list[str] | None:
    """Whose each row is, from a plain file beside the arrays; None where there is none."""
    stem = folder / f"HSF_{series}_writers"
    if stem.with_suffix(".npy").is_file():
        names = [str(name) for name in _load(stem.with_suffix(".npy"), "i u U", ())]
    elif stem.with_suffix(".csv").is_file():
        names = read_text(stem.with_suffix(".csv")).split()
    else:
        return None
    if len(names) != count:
        raise DataError(
            f"{str(stem)!r} names {len(names):,} writers for {count:,} images: one a row is wanted"
        )
    strange = next((name for name in names if _number(name) is None), None)
    if strange is not None:
        raise DataError(f"{str(stem)!r} names a writer {strange[:40]!r}; wanted a number or f2100_45")
    return names


def _number(writer: str) -> int | None:
    """SD19's number of a writer, 0 to 4169, of a name f2100_45 or a number."""
    found = re.fullmatch(r"f?([0-9]{1,9})(?:_[0-9]{1,9})?", writer)
    return None if found is None else int(found[1])


def _listing(config: DataConfig, kind: _Kind, found: dict[int, _Series]) -> Listing:
    """All series as one listing, without blank pictures."""
    every = list(found.values())
    series = np.concatenate([np.full(len(one.labels), k, np.int64) for k, one in found.items()])
    packed = np.concatenate([one.packed for one in every])
    # Rows that the source never filled are all zeros; a picture without ink is all ones.
    kept = np.flatnonzero((packed != 0xFF).any(axis=1) & packed.any(axis=1))
    blank = len(packed) - len(kept)
    series, packed = series[kept], packed[kept]
    labels = np.concatenate([one.labels for one in every])[kept]
    first: dict[bytes, int] = {}
    copies = [first.setdefault(digest, i) != i for i, digest in enumerate(fingerprints(packed))]
    facts = {"class": labels, SERIES: series, DUPLICATE: np.array(copies, np.int64)}
    groups, group_names, unknown = None, None, ""
    nameless = [k for k, one in found.items() if one.writers is None]
    if nameless:
        unknown = f"writers unknown: no HSF_{nameless[0]}_writers.npy or .csv, and pickles are not opened"
    else:
        numbers = [_number(name) for one in every for name in one.writers or []]
        facts[WRITER] = np.array(numbers, np.int64)[kept]
        # Told apart with the series: a file of writers may count each series' from 0.
        people, groups = np.unique(np.stack([series, facts[WRITER]]), axis=1, return_inverse=True)
        group_names = tuple(f"hsf_{k} writer {number}" for k, number in people.T)
    index = [one.index for one in every if one.index is not None]
    if len(index) == len(every):
        facts["index"] = np.concatenate(index)[kept]
    return Listing(
        labels=labels,
        class_names=tuple(kind.classes),
        read=lambda ids, size: prepared(packed[ids], size or 28),
        groups=None if groups is None else groups.astype(np.int64),
        group_names=group_names,
        note=joined(
            f"series {spans(series)}",
            f"blank pictures left out with their labels: {blank:,}" if blank else "",
            *(one.note for one in every),
            unknown,
        ),
        image_size=28,
        facts=facts,
        parts=tuple(_KINDS),
    )


def prepared(packed: np.ndarray, side: int) -> np.ndarray:
    """Grey pictures uint8 (n, 1, side, side), ink bright, of packed ones uint8 (n, 2048), none of them blank.

    As the source project: the connected ink with the largest box is cropped to (a narrow box, under .6 of its height,
    is widened), smoothed by a 5x5 Gaussian of sigma 3, divided by its maximum and resized by Lanczos' kernel. Unlike
    there, a box at the edge is widened to both sides, and shrinking is antialiased. Otsu's threshold changes nothing
    in a picture of two values.
    """
    return (
        np.stack([_prepared(row, side) for row in packed])[:, None]
        if len(packed)
        else np.empty((0, 1, side, side), np.uint8)
    )


def _prepared(row: np.ndarray, side: int) -> np.ndarray:
    ink = np.unpackbits(row).reshape(_SIDE, _SIDE) == 0
    pieces, _ = ndimage.label(ink, structure=np.ones((3, 3)))
    rows, columns = max(
        ndimage.find_objects(pieces),
        key=lambda box: (box[0].stop - box[0].start) * (box[1].stop - box[1].start),
    )
    height, width = rows.stop - rows.start, columns.stop - columns.start
    more = int(height / width) + int(width / height * 15) if width / height < 0.6 else 0
    wide = np.pad(ink, ((0, 0), (more, more)))[rows, columns.start : columns.stop + 2 * more]
    smooth = ndimage.gaussian_filter(wide.astype(np.float32), sigma=3, radius=2, mode="mirror")
    picture = Image.fromarray(smooth / smooth.max()).resize((side, side), Image.Resampling.LANCZOS)
    return np.rint(np.asarray(picture).clip(0, 1) * 255).astype(np.uint8)
