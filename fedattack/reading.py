"""The door that every file from outside comes in by: what it is and how large it may become is settled first.

A reader takes a file through one of these functions, and finds no pipe, device or folder behind its name, no more
bytes than it named, and none of the errors that a damaged file can raise but :class:`Unreadable`. What a file
declares of itself is compared with what it holds before memory is taken for it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import pickletools
import re
import stat
import struct
import tomllib
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedattack.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

MIB = 2**20

LARGEST_SETTINGS = MIB
"""Bytes of a TOML file."""

LARGEST_TEXT = 64 * MIB
"""Bytes of a table of names, of labels or of ratings."""

LARGEST_JSON = 256 * MIB
"""Bytes of a JSON document; a run's record of its rounds is the largest there is."""

LARGEST_PICTURE = 128 * MIB
"""Bytes of a picture's file."""

MOST_PIXELS = 48 * MIB
"""Pixels of a picture: those of a camera of 50 megapixels."""

MOST_ROWS = 10_000_000
"""Rows of a Parquet file."""

MOST_MEMBERS = 2**22
"""Files of an archive or a folder: three times those of ImageNet."""

FREE = 64 * MIB
"""Bytes that a compressed file may always unpack to."""

RATIO = 100
"""Beyond :data:`FREE`, a compressed file may unpack to so many times its own size; pictures unpack to about 1."""

_DEEPEST = 64
_MOST_DOTS = 5_000
_MOST_INSTRUCTIONS = 5_000_000
_HEAVIEST = 10_000_000
_XZ_MEMORY = 256 * MIB
_PICTURES = ("PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF")
_DIRECTORY = 256 * MIB
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    RuntimeError,  # a member is encrypted, or packed by a method that is not known
)
"""What the libraries of compressed files raise for damaged ones."""


class Unreadable(DataError):
    """A file that cannot be read: `reason` without its name, `absent` where there is none."""

    def __init__(self, path: object, reason: str, absent: bool = False) -> None:
        super().__init__(path, reason, absent)
        self.path, self.reason, self.absent = path, reason, absent

    def __str__(self) -> str:
        return f"cannot read {str(self.path)!r}: {self.reason}"


def said(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    return shown(str(getattr(error, "strerror", None) or str(error) or type(error).__name__))


def shown(text: str, most: int = 200) -> str:
    """Text of a file for a message: on one line, without control characters, and not too long."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text[: 4 * most].split()))[:most]


# ------------------------------------------------------------------ files


def require_regular(path: Path | str, limit: int | None = None) -> int:
    """Size in bytes of a regular file, which a link may lead to; Unreadable where it is none, or above `limit`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise Unreadable(path, "no such file" if absent else said(error), absent) from None
    _refuse_other(path, status, limit)
    return status.st_size


def _refuse_other(path: Path | str, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((what for holds, what in _KINDS if holds(status.st_mode)), "no file")
        raise Unreadable(path, f"it is {kind}; a regular file is accepted")
    if limit is not None and status.st_size > limit:
        raise Unreadable(path, f"it has {status.st_size:,} bytes; at most {limit:,} are accepted")


def open_file(path: Path | str, limit: int | None = None) -> io.BufferedReader:
    """Binary stream of a regular file of at most `limit` bytes (else Unreadable); a pipe never holds it up."""
    require_regular(path, limit)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unreadable(path, said(error), isinstance(error, FileNotFoundError)) from None
    try:
        _refuse_other(path, os.fstat(descriptor), limit)  # it may have been exchanged since
    except Unreadable:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_bytes(path: Path | str, limit: int) -> bytes:
    """The bytes of a regular file, of which there may be `limit` (else Unreadable)."""
    with open_file(path, limit) as stream:
        try:
            return read_all(stream, limit, path)
        except OSError as error:
            raise Unreadable(path, said(error)) from None


def read_all(stream: IO[bytes], limit: int, path: Path | str) -> bytes:
    """What is left in a stream, of which there may be `limit` bytes (else Unreadable, of `path`)."""
    data = read_some(stream, limit + 1)
    if len(data) > limit:
        raise Unreadable(path, f"it holds more than the {limit:,} bytes that are accepted")
    return data


def read_some(stream: IO[bytes], count: int) -> bytes:
    """The next `count` bytes of a stream, or all that are left; memory is taken as they come."""
    held = io.BytesIO()
    while count and (part := stream.read(min(MIB, count))):
        count -= held.write(part)
    return held.getvalue()


# ------------------------------------------------------------------- text


def read_text(path: Path | str, limit: int = LARGEST_TEXT) -> str:
    """UTF-8 text, or UTF-16 with a byte order mark, which is left out; Unreadable, with the line, for other bytes."""
    data = read_bytes(path, limit)
    try:
        return decoded(data)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Unreadable(path, f"line {line} is not UTF-8; save it as UTF-8") from None


def decoded(data: bytes) -> str:
    """Bytes as text by their byte order mark, UTF-8 where there is none (UnicodeDecodeError)."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def read_json(path: Path | str, limit: int = LARGEST_JSON) -> Any:
    """A JSON document; Unreadable where it is none, or lists lie more than 64 deep in one another."""
    text = read_text(path, limit)
    try:
        return parsed_json(text)
    except ValueError as error:
        raise Unreadable(path, f"it is no JSON ({said(error)})") from None


def parsed_json(text: str | bytes) -> Any:
    """As :func:`json.loads`; ValueError also for text that is none, and for lists more than 64 deep."""
    try:
        document = json.loads(text)
    except (RecursionError, MemoryError):
        raise ValueError(f"its lists lie more than {_DEEPEST} deep") from None
    if _deeper(document, _DEEPEST):
        raise ValueError(f"its lists lie more than {_DEEPEST} deep")
    surrogate = rb"\\u[dD][89a-fA-F]" if isinstance(text, bytes) else r"\\u[dD][89a-fA-F]"
    if re.search(surrogate, text):  # type: ignore[arg-type]
        json.dumps(document, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return document


def read_toml(path: Path | str) -> dict[str, Any]:
    """A TOML document of at most 1 MiB; Unreadable where it is none."""
    text = read_text(path, LARGEST_SETTINGS)
    # The parser takes the square of a key's parts.
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise Unreadable(path, f"a line has more than {_MOST_DOTS:,} dots")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        what = "its tables lie too deep" if isinstance(error, RecursionError) else said(error)
        raise Unreadable(path, f"it is no TOML ({what})") from None
    if _deeper(document, _DEEPEST):
        raise Unreadable(path, f"its tables lie more than {_DEEPEST} deep")
    return document


def _deeper(document: Any, depth: int) -> bool:
    """Whether containers lie more than `depth` deep in one another; without recursion."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(depth):
        inner = (
            value
            for one in level
            for value in (one.values() if isinstance(one, dict) else one)
            if isinstance(value, dict | list)
        )
        level = list(inner)
        if not level:
            return False
    return True


def read_frame(path: Path | str, limit: int = 2**30) -> pd.DataFrame:
    """A table, .csv or .parquet by its name; Unreadable where it is damaged, or has more than 10,000,000 rows."""
    import pandas as pd

    data = read_bytes(path, limit)
    try:
        if Path(path).suffix.lower() == ".csv":
            return pd.read_csv(io.StringIO(decoded(data)))
    except Exception as error:  # of whatever kind pandas raises for a damaged file
        raise Unreadable(path, f"it is no table of commas ({said(error)})") from None
    return parquet_frame(data, path)


def parquet_frame(data: bytes, path: Path | str) -> pd.DataFrame:
    """A Parquet file's table of at most 10,000,000 rows (else Unreadable, of `path`)."""
    import pandas as pd
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(io.BytesIO(data))
        declared = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        if about.num_rows > MOST_ROWS or declared > max(FREE, RATIO * len(data)):
            what = f"it declares {about.num_rows:,} rows of {declared:,} bytes"
            raise Unreadable(
                path, f"{what}; at most {MOST_ROWS:,} rows, and 100 times its size, are accepted"
            )
        pq.read_table(io.BytesIO(data)).validate(
            full=True
        )  # or text that is none is met by whoever looks at it
        return pd.read_parquet(io.BytesIO(data))
    except Unreadable:
        raise
    except Exception as error:  # of whatever kind pyarrow raises for a damaged file
        raise Unreadable(path, f"it is damaged ({said(error)})") from None


# --------------------------------------------------------- compressed files


class _Bounded(io.RawIOBase):
    """A stream that refuses to go on past `most` bytes."""

    def __init__(self, stream: IO[bytes], path: Path, most: int, below: IO[bytes]) -> None:
        self._stream, self._path, self._most, self._below, self._read = stream, path, most, below, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), MIB))
        self._read += len(data)
        if self._read > self._most:
            what = (
                f"it unpacks to more than {self._most:,} bytes, of {os.fstat(self._below.fileno()).st_size:,}"
            )
            raise Unreadable(self._path, f"{what}; unpack it if that is right")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._below.close()
        super().close()


class _Xz(io.RawIOBase):
    """The content of an .xz file; Python's own reader takes as much memory as the file says."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._decoder, self._begun = stream, self._fresh(), False

    @staticmethod
    def _fresh() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder.eof:
                rest = (self._decoder.unused_data or self._stream.read(MIB)).lstrip(b"\0")  # padding
                if not rest:
                    if self._stream.peek(1):  # type: ignore[attr-defined]
                        continue
                    return 0
                self._decoder = self._fresh()
            else:
                rest = self._stream.read(2**16) if self._decoder.needs_input else b""
                if not rest and self._decoder.needs_input:
                    raise EOFError("it ends before its compressed data does")
            data = self._decoder.decompress(rest, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


def open_compressed(path: Path, limit: int) -> IO[bytes]:
    """Binary stream of a plain, .gz, .xz or .bz2 file, of at most `limit` bytes when unpacked.

    What unpacks to more than 64 MiB and 100 times its size is refused where it gets there (Unreadable).
    """
    suffix = path.suffix.lower()
    below = open_file(path, limit)
    if suffix not in (".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2"):
        return below
    most = min(limit, max(FREE, RATIO * os.fstat(below.fileno()).st_size))
    stream: IO[bytes]
    if suffix in (".gz", ".tgz"):
        stream = gzip.GzipFile(fileobj=below)  # type: ignore[assignment]
    elif suffix in (".bz2", ".tbz2"):
        stream = bz2.BZ2File(below)
    else:
        stream = _Xz(below)  # type: ignore[assignment]
    return io.BufferedReader(_Bounded(stream, path, most, below), MIB)


# ------------------------------------------------------------ zip archives


@contextlib.contextmanager
def open_zip(path: Path, limit: int) -> Iterator[zipfile.ZipFile]:
    """A zip archive that unpacks to at most `limit` bytes, and to no more than 100 times its size beyond 64 MiB.

    Raises Unreadable for whatever is wrong with it, also within the block; the archive is closed after it.
    """
    size = require_regular(path)
    try:
        _refuse_directory(path, size)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_MEMBERS:
                raise Unreadable(
                    path, f"it holds {len(entries):,} files; at most {MOST_MEMBERS:,} are accepted"
                )
            most = min(limit, max(FREE, RATIO * size))
            declared = sum(entry.file_size for entry in entries)
            if declared > most:
                raise Unreadable(
                    path, f"it unpacks to {declared:,} bytes, of {size:,}; at most {most:,} are accepted"
                )
            yield archive
    except DataError:
        raise
    except ARCHIVE_ERRORS as error:
        raise Unreadable(path, said(error)) from None


def _refuse_directory(path: Path, size: int) -> None:
    """Refuse an archive whose list of files alone is too large, before the library holds it in memory."""
    with open_file(path) as stream:
        stream.seek(max(0, size - 2**16 - 22))
        tail = stream.read(2**16 + 22)
        place = tail.rfind(b"PK\x05\x06")
        if place < 0 or len(tail) < place + 22:
            return  # the library says what it is
        (length,) = struct.unpack_from("<L", tail, place + 12)
        if length == 0xFFFFFFFF and (wide := tail.rfind(b"PK\x06\x06")) >= 0 and len(tail) >= wide + 56:
            (length,) = struct.unpack_from("<Q", tail, wide + 40)
        if length > min(_DIRECTORY, size):
            raise Unreadable(path, f"its list of files claims {length:,} bytes")


def zip_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes, which it declares right; Unreadable for whatever is wrong with it."""
    name = entry.filename
    if entry.file_size > limit:
        raise Unreadable(name, f"it has {entry.file_size:,} bytes; at most {limit:,} are accepted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        raise Unreadable(
            name, f"it is packed by method {entry.compress_type}; stored, deflated or bzip2 is read"
        )
    try:
        with archive.open(entry) as stream:
            data = read_all(
                stream, limit, name
            )  # in pieces: the library unpacks what it is asked for at once
    except DataError:
        raise
    except ARCHIVE_ERRORS as error:
        raise Unreadable(name, said(error)) from None
    if len(data) != entry.file_size:
        raise Unreadable(name, f"it has {len(data):,} bytes, and declares {entry.file_size:,}")
    return data


def require_plain_pickle(data: bytes) -> None:
    """ValueError for a pickle in which a tuple, written out, holds more than 10,000,000 values, or a damaged one.

    To find its place in a dict, such a tuple is gone through value by value.
    """
    weights: list[int | None] = []  # of the values on the stack; None: a mark
    memo: dict[int, int] = {}
    for count, (code, argument, _) in enumerate(pickletools.genops(data)):
        if count > _MOST_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = weights[-1] or 0
            continue
        weight = 1
        if code.name in ("GET", "BINGET", "LONG_BINGET"):
            weight = memo[int(argument or 0)]
        before = [kind.name for kind in code.stack_before]
        if "mark" in before:
            while (top := weights.pop()) is not None:
                weight += top
            before = before[: before.index("mark")]
        for _ in before:
            weight += weights.pop() or 0
        if weight > _HEAVIEST:
            raise ValueError(f"a value in its pickle holds more than {_HEAVIEST:,} others")
        weights += [None if kind.name == "mark" else weight for kind in code.stack_after]


# ----------------------------------------------------------------- pictures


@contextlib.contextmanager
def open_picture(data: bytes, name: str, most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """An encoded picture of at most so many pixels, not yet decoded; Unreadable for whatever is wrong with it.

    Also within the block, where it is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            # A palette's transparency is said by whoever reads it, and dropped; damaged metadata is not read.
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(io.BytesIO(data), formats=_PICTURES) as picture:
                width, height = picture.size
                if not 1 <= width * height <= most_pixels:
                    what = f"it has {width:,} x {height:,} pixels"
                    raise Unreadable(name, f"{what}; from 1 to {most_pixels:,} in all are accepted")
                yield picture
    except DataError:
        raise
    except Exception as error:  # a damaged picture raises nearly anything
        unknown = isinstance(error, UnidentifiedImageError)
        raise Unreadable(name, "it is no picture of a known format" if unknown else said(error)) from None
