"""Finding and opening a data set's files: folders, archives, compressed files, downloads.

Nothing is unpacked to disk or unpickled. A folder's links are followed, to regular files and folders only, for a
class may lie on shared storage; an archive's are refused, and so is a name in it that points outside.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import psutil

from fedattack.config import DataConfig
from fedattack.data.tar import Member, Members
from fedattack.errors import DataError
from fedattack.reading import (
    ARCHIVE_ERRORS,
    LARGEST_PICTURE,
    MIB,
    MOST_MEMBERS,
    Unreadable,
    open_compressed,
    open_file,
    open_zip,
    read_bytes,
    require_regular,
    said,
    zip_member,
)

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
# A compressed tar can only be read from its start, so its files are kept in memory; larger ones must be unpacked.
_IN_MEMORY_LIMIT = 4096 * MIB
_LARGEST_ARCHIVE = 2**20 * MIB
_LONGEST_NAME = 1024
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

T = TypeVar("T")


class Missing(DataError):
    """The files of a data set are not where `data.dir` says; a download may help."""


def data_dir(config: DataConfig, holds: str) -> Path:
    """The existing path of `data.dir`; raises Missing if there is none (`holds` says what should be there)."""
    if config.dir is None:
        raise Missing(f"setting 'data.dir' is not set: data set {config.name!r} is read from {holds}")
    path = Path(config.dir).expanduser()
    if not path.exists():
        raise Missing(f"setting 'data.dir' = {config.dir!r} does not exist: wanted {holds}")
    return path


def with_download(config: DataConfig, fetch: Callable[[Path], object] | None, read: Callable[[], T]) -> T:
    """`read()`, after ``fetch(folder)`` where it raises :class:`Missing` and `data.download` allows it.

    `fetch` None: this data set cannot be had that way.
    """
    try:
        return read()
    except Missing as missing:
        if not config.download:
            hint = "; or set 'data.download' = true" if fetch else ""
            raise DataError(f"{missing}{hint}") from None
        if fetch is None:
            raise DataError(f"{missing}; setting 'data.download' = true: it has no free download") from None
        if config.dir is None:
            raise DataError(
                "setting 'data.download' = true needs 'data.dir', the folder to download into"
            ) from None
    folder = Path(config.dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch(folder)
    except Exception as error:  # torchvision raises whatever its transport raises
        raise DataError(f"download of data set {config.name!r} to {str(folder)!r} failed: {error}") from error
    return read()


def by_torchvision(name: str, **options: Any) -> Callable[[Path], object]:
    """A `fetch` of :func:`with_download`, by torchvision's class of that name."""

    def fetch(folder: Path) -> object:
        kind = getattr(importlib.import_module("torchvision.datasets"), name)
        return kind(str(folder), download=True, **options)

    return fetch


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that :func:`open_tree` reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


class Tree:
    """Files below a folder or in an archive, by relative POSIX path; ``read(name) -> bytes``."""

    def __init__(self, path: Path, names: Iterable[str], read: Callable[[str], bytes]) -> None:
        self.path = path
        self.names = sorted(names)
        self.read = read


def open_tree(path: Path, wanted: Callable[[PurePosixPath], bool], largest: int = LARGEST_PICTURE) -> Tree:
    """List the `wanted` files of a folder or an archive (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip) but hidden ones.

    Raises DataError if `path` is neither, cannot be read, or is an archive with a wanted member that points outside
    it, comes twice or is no regular file. A file of more than `largest` bytes is refused where it is read.
    """
    if path.is_dir():
        names = list(_walk(path, wanted))
        return Tree(path, names, lambda name: read_bytes(path / name, largest))
    if not path.exists():
        raise Missing(f"{str(path)!r} is neither a folder nor a file")
    if not is_archive(path):
        raise DataError(f"{str(path)!r} is not a folder or an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    try:
        if path.suffix.lower() == ".zip":
            return _open_zip(path, wanted, largest)
        return _open_tar(path, wanted, largest)
    except Unreadable as error:
        raise DataError(f"cannot read archive {str(path)!r}: {error.reason}") from None
    except ARCHIVE_ERRORS as error:
        raise DataError(f"cannot read archive {str(path)!r}: {said(error)}") from None


def _visible(name: PurePosixPath) -> bool:
    # ".." is not hidden: it must come as far as the check that refuses it.
    return not any(part != ".." and part.startswith((".", "__MACOSX")) for part in name.parts)


def _walk(root: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[str]:
    """Regular files, through links too (shared storage); a folder that is met again is not entered twice."""
    entered = {root.resolve()}
    count = 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        found = sorted(name for name in subfolders if not name.startswith("."))
        subfolders.clear()
        for name in found:
            real = (Path(folder) / name).resolve()
            if real not in entered:
                entered.add(real)
                subfolders.append(name)
        for file in files:
            path = Path(folder) / file
            inner = PurePosixPath(path.relative_to(root).as_posix())
            if _visible(inner) and wanted(inner) and path.is_file():
                _refuse_name(f"folder {str(root)!r}", str(inner))
                count += 1
                if count > MOST_MEMBERS:
                    raise DataError(f"folder {str(root)!r} holds more than {MOST_MEMBERS:,} files")
                yield str(inner)


def _refuse_name(place: str, name: str) -> None:
    """Refuse a name that no table or page could show."""
    if len(name) > _LONGEST_NAME:
        raise DataError(
            f"{place} holds a name of {len(name):,} characters; at most {_LONGEST_NAME:,} are accepted"
        )
    if _UNSHOWN.search(name):
        raise DataError(f"{place} holds the name {name!a:.200}; UTF-8 without control characters is accepted")


def _refuse_member(path: Path, name: str, kind: str, known: Container[str]) -> None:
    """Refuse an archive's member that is no regular file, points outside, has no fit name or has come before."""
    place = f"archive {str(path)!r}"
    _refuse_name(place, name)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{place} holds {name!r}, which points outside it")
    if kind:
        raise DataError(f"{place} holds {name!r}, which is {kind}; regular files are accepted")
    if name in known:
        raise DataError(f"{place} holds {name!r} twice")


def _open_zip(path: Path, wanted: Callable[[PurePosixPath], bool], largest: int) -> Tree:
    members: dict[str, zipfile.ZipInfo] = {}
    with open_zip(path, _LARGEST_ARCHIVE) as listed:
        for entry in listed.infolist():
            name = entry.filename.replace("\\", "/")  # as some of Windows' tools write them
            if entry.is_dir() or name.endswith("/") or not _visible(PurePosixPath(name)):
                continue
            if wanted(PurePosixPath(name)):
                linked = stat.S_ISLNK(entry.external_attr >> 16)
                _refuse_member(path, name, "a link" if linked else "", members)
                members[name] = entry
    archive = zipfile.ZipFile(path)  # stays open, with what was checked

    def read(name: str) -> bytes:
        try:
            return zip_member(archive, members[name], largest)
        except Unreadable as error:
            raise DataError(f"cannot read {name!r} of archive {str(path)!r}: {error.reason}") from None

    return Tree(path, members, read)


def _open_tar(path: Path, wanted: Callable[[PurePosixPath], bool], largest: int) -> Tree:
    if path.suffix.lower() == ".tar":
        return _open_plain_tar(path, wanted, largest)
    free = psutil.virtual_memory().available
    held: dict[str, bytes] = {}
    total = 0
    with open_compressed(path, _LARGEST_ARCHIVE) as stream:
        members = Members(stream, path)
        for member in members:
            if (name := _wanted(path, member, wanted, held)) is None:
                continue
            total += member.size
            if total > min(_IN_MEMORY_LIMIT, free):
                most = "4 GiB" if free > _IN_MEMORY_LIMIT else f"the {free / 2**30:.1f} GiB that are free"
                raise DataError(
                    f"archive {str(path)!r} holds more than {most}: unpack it and point 'data.dir' there"
                )
            held[name] = members.read(largest)
    return Tree(path, held, held.__getitem__)


def _open_plain_tar(path: Path, wanted: Callable[[PurePosixPath], bool], largest: int) -> Tree:
    places: dict[str, tuple[int, int]] = {}
    with open_file(path) as stream:
        for member in Members(stream, path, require_regular(path)):
            if (name := _wanted(path, member, wanted, places)) is not None:
                places[name] = member.offset, member.size

    def read(name: str) -> bytes:
        offset, size = places[name]
        if size > largest:
            raise DataError(
                f"cannot read {name!r} of archive {str(path)!r}: it has {size:,} bytes; at most {largest:,} are "
                "accepted"
            )
        with open_file(path) as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) != size:
            raise DataError(f"cannot read {name!r} of archive {str(path)!r}: the archive has changed")
        return data

    return Tree(path, places, read)


def _wanted(
    path: Path, member: Member, wanted: Callable[[PurePosixPath], bool], known: Container[str]
) -> str | None:
    """The name of a tar member that is wanted, or None; refused as in :func:`_refuse_member`."""
    name = PurePosixPath(member.name)
    if member.kind == "a folder" or not _visible(name) or not wanted(name):
        return None
    _refuse_member(path, str(name), member.kind, known)
    return str(name)


def find_file(folders: Iterable[Path], stems: Iterable[str]) -> Path | None:
    """First existing file of a name among `stems`, plain or .gz/.xz/.bz2, in the folders' order."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in ("", ".gz", ".xz", ".bz2")]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
