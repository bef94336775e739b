"""Finding and opening a data set's files: folders, archives, compressed files, downloads.

Nothing is unpacked to disk or unpickled. Archive members pass tarfile's "data" filter: a hostile name is refused.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from fedattack.config import DataConfig
from fedattack.errors import DataError

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
# A compressed tar can only be read from its start, so its pictures are kept in memory; larger ones must be unpacked.
_IN_MEMORY_LIMIT = 4 * 2**30
_UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    OSError,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    RuntimeError,
)

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


def open_tree(path: Path, wanted: Callable[[PurePosixPath], bool]) -> Tree:
    """List the `wanted` files of a folder or an archive (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip) but hidden ones.

    Raises DataError if `path` is neither, cannot be read, or is an archive with a member that points outside it.
    """
    if path.is_dir():
        names = _walk(path, wanted)
        return Tree(path, names, lambda name: _read_file(path / name))
    if not path.is_file():
        raise Missing(f"{str(path)!r} is neither a folder nor a file")
    if not is_archive(path):
        raise DataError(f"{str(path)!r} is not a folder or an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    try:
        return _open_zip(path, wanted) if path.suffix.lower() == ".zip" else _open_tar(path, wanted)
    except _UNREADABLE as error:
        raise DataError(f"cannot read archive {str(path)!r}: {error}") from None


def _visible(name: PurePosixPath) -> bool:
    # ".." is not hidden: it must come as far as the filter that refuses it.
    return not any(part != ".." and part.startswith((".", "__MACOSX")) for part in name.parts)


def _walk(root: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[str]:
    """Regular files, through links too (shared storage); a folder that is met again is not entered twice."""
    entered = {root.resolve()}
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
                yield str(inner)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None


def _open_zip(path: Path, wanted: Callable[[PurePosixPath], bool]) -> Tree:
    archive = zipfile.ZipFile(path)
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/")  # as some of Windows' tools write them
        if entry.is_dir() or name.endswith("/") or not _visible(PurePosixPath(name)):
            continue
        if not wanted(PurePosixPath(name)):
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"archive {str(path)!r} holds {name!r}, which points outside it")
        if name in members:
            raise DataError(f"archive {str(path)!r} holds {name!r} twice")
        members[name] = entry

    def read(name: str) -> bytes:
        try:
            return archive.read(members[name])
        except _UNREADABLE as error:
            raise DataError(f"cannot read {name!r} of archive {str(path)!r}: {error}") from None

    return Tree(path, members, read)


def _open_tar(path: Path, wanted: Callable[[PurePosixPath], bool]) -> Tree:
    held: dict[str, bytes] = {}
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or not _visible(name) or not wanted(name):
                continue
            tarfile.data_filter(member, str(path.parent))
            total += member.size
            if total > _IN_MEMORY_LIMIT:
                raise DataError(
                    f"archive {str(path)!r} holds more than 4 GiB: unpack it and point 'data.dir' there"
                )
            stream = archive.extractfile(member)
            assert stream is not None
            held[str(name)] = stream.read()
    return Tree(path, held, held.__getitem__)


def find_file(folders: Iterable[Path], stems: Iterable[str]) -> Path | None:
    """First existing file of a name among `stems`, plain or .gz/.xz/.bz2, in the folders' order."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in ("", ".gz", ".xz", ".bz2")]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def open_compressed(path: Path) -> IO[bytes]:
    """Binary stream of a plain, .gz, .xz or .bz2 file."""
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    opener = openers.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")
