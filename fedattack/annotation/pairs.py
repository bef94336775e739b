"""The pairs that are rated: originals and reconstructions of runs, of sweeps, or of folders paired by name."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fedattack.config import Config
from fedattack.data.pixels import SUFFIXES
from fedattack.errors import ConfigError, DataError
from fedattack.observation import observation_name
from fedattack.reading import LARGEST_PICTURE, Unreadable, open_picture, read_bytes, read_frame
from fedattack.storage.observations import safe_name
from fedattack.storage.spreadsheet import restored

_ORIGINAL = "-original.png"
_RECONSTRUCTION = "-reconstruction.png"


@dataclass(frozen=True)
class Picture:
    """An image file that is shown, its SHA-256, and its (width, height)."""

    path: Path
    sha256: str
    size: tuple[int, int]

    @classmethod
    def read(cls, path: Path) -> Picture:
        """Read the file once; DataError where it is no readable picture of one frame and 8 bits a channel."""
        data = _bytes(path)
        return cls(path, hashlib.sha256(data).hexdigest(), decode(data, str(path)).size)

    def pixels(self) -> Image.Image:
        """Its pixels, grey or RGB; DataError where the file changed since it was read."""
        data = _bytes(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataError(f"picture {str(self.path)!r} changed while it was being rated")
        return decode(data, str(self.path))


@dataclass(frozen=True)
class RatedPair:
    """An original beside a reconstruction; `told`: the table's columns that say where they come from."""

    original: Picture
    reconstruction: Picture
    told: dict[str, str] = field(default_factory=dict)


def decode(data: bytes, name: str) -> Image.Image:
    """Pixels of an encoded picture in mode "L" where it is grey and "RGB" otherwise, at its own size (DataError)."""
    try:
        with open_picture(data, name) as picture:
            if (frames := getattr(picture, "n_frames", 1)) > 1:
                raise DataError(f"picture {name!r} has {frames} frames; pictures of one frame are rated")
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"picture {name!r} has mode {picture.mode!r}; 8 bits a channel are read")
            return picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    except Unreadable as error:
        raise DataError(f"cannot read picture {name!r}: {error.reason}") from None


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST_PICTURE)
    except Unreadable as error:
        raise DataError(f"cannot read picture {str(path)!r}: {error.reason}") from None


def png(image: Image.Image) -> bytes:
    """A picture as PNG, without any text of its file."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def read_pairs(sources: Sequence[Path]) -> list[RatedPair]:
    """Pairs of run folders and sweeps, or of picture folders: the originals, then reconstructions of equal names.

    The attack of a pair from picture folders is named after its folder where there are several, the class after the
    sub-folder it lies in. Raises ConfigError for sources that do not go together, DataError for missing, unreadable,
    unpaired or unequal pictures.
    """
    if missing := [source for source in sources if not source.is_dir()]:
        raise DataError(
            f"{str(missing[0])!r}: no such folder; a source is a run, a sweep, or a folder of pictures"
        )
    runs = [found for source in sources for found in _runs(source)]
    others = [source for source in sources if not _runs(source)]
    if runs and others:
        raise ConfigError(
            f"{str(others[0])!r} is no run and no sweep, as other sources are: rate folders of pictures apart"
        )
    if not sources or len(others) == 1:
        what = f"{str(others[0])!r} is one folder of pictures" if others else "there is no source"
        raise ConfigError(
            f"{what}; accepted: runs, sweeps, or a folder of originals and then one of reconstructions"
        )
    found = [pair for run in runs for pair in _of_run(run)] if runs else list(_of_folders(others))
    if not found:
        raise DataError(
            f"{', '.join(str(run) for run in runs[:3])}: no pictures of originals and reconstructions in images/; "
            "did the run finish, and did an attack reconstruct images?"
        )
    for pair in found:
        if pair.original.size != pair.reconstruction.size:
            shown = " and ".join(
                f"{str(one.path)!r} has {one.size[0]}x{one.size[1]} pixels"
                for one in (pair.original, pair.reconstruction)
            )
            raise DataError(f"{shown}; an original and its reconstruction have one size")
    return found


def _runs(source: Path) -> list[Path]:
    """The folder itself where it is a run's, the cells of a sweep, or none."""
    if (source / "config.toml").is_file():
        return [source]
    return sorted(path.parent for path in (source / "cells").glob("*/config.toml"))


def _of_run(run: Path) -> Iterator[RatedPair]:
    """Pairs of a run's images, which are 8 bit, with what its settings and records say of them."""
    config = Config.from_toml(run / "config.toml")
    labels = _labels(run)
    compression = config.compression.rate if config.compression.name != "none" else 1.0
    shared = {
        "dataset": config.data.name,
        "model": config.model.name,
        "defence": ",".join(config.defense.names) or "none",
        "compression": f"{compression:g}",
        "seed": str(config.seed),
    }
    for original in sorted((run / "images").glob(f"*/*{_ORIGINAL}")):
        stem = original.name.removesuffix(_ORIGINAL)
        reconstruction = original.with_name(stem + _RECONSTRUCTION)
        if not reconstruction.is_file():
            continue
        attack, label = labels.get((original.parent.name, stem), (original.parent.name, ""))
        told = shared | {"attack": attack, "class_label": label}
        yield RatedPair(Picture.read(original), Picture.read(reconstruction), told)


def _labels(run: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(folder, stem) of a run's images -> attack and true label, from its records; empty where it has none."""
    path = run / "records.csv"
    if not path.is_file():
        return {}
    try:
        frame = restored(read_frame(path))
    except Unreadable as error:
        raise DataError(f"cannot read {path}: {error.reason}") from None
    if not {"attack", "round", "client", "image", "label"} <= set(frame.columns):
        return {}
    found = {}
    known = frame[["attack", "round", "client", "image", "label"]].dropna()
    for attack, *numbers in known.itertuples(index=False, name=None):
        turn, client, image, label = map(int, numbers)
        found[safe_name(attack), f"{observation_name(turn, client)}-{image}"] = (str(attack), str(label))
    return found


def _of_folders(folders: Sequence[Path]) -> Iterator[RatedPair]:
    originals = _named(folders[0])
    for folder in folders[1:]:
        others = _named(folder)
        for ours, theirs, place in ((originals, others, folder), (others, originals, folders[0])):
            if alone := sorted(set(ours) - set(theirs)):
                raise DataError(
                    f"{str(ours[alone[0]])!r} has no picture of its name in {str(place)!r} "
                    f"({len(originals):,} originals, {len(others):,} reconstructions; {len(alone):,} alone)"
                )
        attack = folder.name if len(folders) > 2 else ""
        for name, path in originals.items():
            told = {"attack": attack, "class_label": name.rpartition("/")[0]}
            yield RatedPair(Picture.read(path), Picture.read(others[name]), told)


def _named(folder: Path) -> dict[str, Path]:
    """Name below the folder, without its suffix -> picture file, in the order of numbers in names."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*"), key=_natural):
        inner = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inner.parts):
            continue
        name = inner.with_suffix("").as_posix()
        if name in found:
            raise DataError(
                f"{str(found[name])!r} and {str(path)!r} have one name, so that neither can be paired"
            )
        found[name] = path
    if not found:
        raise DataError(f"{str(folder)!r} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Orders 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", str(path))]
