"""NumPy's file format, read without trusting it: plain numbers, booleans and text; sizes are compared before use.

The header of an npy file is a Python dict, and NumPy's own reader evaluates it. Here it is three keys of a fixed
grammar, in any order, and nothing else (NEP 1, https://numpy.org/neps/nep-0001-npy-format.html).
"""

from __future__ import annotations

import math
import re
import stat
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from fedattack.errors import DataError
from fedattack.reading import ARCHIVE_ERRORS, said

MAX_HEADER = 4096
"""Bytes of the longest header that is read; NumPy writes 128 for nearly all arrays."""

MAX_DIMENSIONS = 32

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_TYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|c(?:8|16)|[US]\d{1,7})")
_ENTRY = re.compile(
    r"\s*(?P<quote>['\"])(?P<key>descr|fortran_order|shape)(?P=quote)\s*:\s*"
    r"(?:(?P<mark>['\"])(?P<type>[^'\"\\]{1,16})(?P=mark)|(?P<bool>True|False)"
    r"|\((?P<shape>\s*|\s*\d{1,19}L?\s*,\s*|\s*\d{1,19}L?(?:\s*,\s*\d{1,19}L?){1,31}\s*(?:,\s*)?)\))\s*"
)
_MOST = 2**63 - 1


@dataclass(frozen=True)
class Header:
    """What an npy file says of its array, and at which byte the array begins."""

    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(start: bytes | memoryview) -> Header:
    """The header at the start of an npy file, of which `start` holds all or the first few thousand bytes.

    Raises ValueError, in one sentence, for anything but an array of numbers, booleans or text of at most
    :data:`MAX_DIMENSIONS` dimensions, with a header of at most :data:`MAX_HEADER` bytes.
    """
    start = bytes(start[: MAX_HEADER + 12])
    if start[:6] != _MAGIC or len(start) < 10:
        raise ValueError(f"it begins with {start[:8]!r}, not with {_MAGIC!r} and a version")
    version = start[6], start[7]
    if version not in _LENGTH_BYTES:
        raise ValueError(f"it has format version {version}; accepted: (1, 0), (2, 0), (3, 0)")
    begin = 8 + _LENGTH_BYTES[version]
    length = int.from_bytes(start[8:begin], "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header declares {length} bytes; at most {MAX_HEADER} are accepted")
    if len(start) < begin + length:
        raise ValueError(f"its header declares {length} bytes and has {len(start) - begin}")
    found = _entries(start[begin : begin + length])
    try:
        kind, fortran, shape = found["descr"], found["fortran_order"], found["shape"]
    except KeyError as error:
        raise ValueError(f"its header lacks {error}") from None
    if math.prod(side or 1 for side in shape) * kind.itemsize > _MOST:
        raise ValueError(f"its header declares shape {shape}, which no memory holds")
    return Header(kind, fortran, shape, begin + length)


def read_array(data: bytes | memoryview) -> NDArray[Any]:
    """The array of a whole npy file in memory, read-only and sharing it; ValueError as :func:`read_header`.

    Also where the bytes after the header are not exactly as many as it declares, or text is none.
    """
    header = read_header(memoryview(data))
    body = memoryview(data)[header.offset :]
    _check_size(header, len(body))
    return _shaped(np.frombuffer(body, header.dtype), header)


def read_npy(path: Path, limit: int, *, mapped: bool = False) -> NDArray[Any]:
    """The array of an npy file of at most `limit` bytes; `mapped`: left on disk and read where it is looked at.

    Raises DataError, with what is wrong but without the path, where it is no regular file or not what
    :func:`read_array` accepts.
    """
    try:
        with path.open("rb") as stream:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise DataError("it is no regular file")
            if about.st_size > limit:
                raise DataError(f"it has {about.st_size:,} bytes; {limit:,} are accepted")
            header = read_header(stream.read(MAX_HEADER + 12))
            _check_size(header, about.st_size - header.offset)
            if mapped and header.nbytes:
                order: Literal["F", "C"] = "F" if header.fortran else "C"
                return np.memmap(
                    path, dtype=header.dtype, mode="r", offset=header.offset, shape=header.shape, order=order
                )
            stream.seek(header.offset)
            return _read_body(stream, header)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DataError(said(error)) from None


def read_npz(path: Path, names: Collection[str], limit: int) -> dict[str, NDArray[Any]]:
    """Those of the arrays `names` that an npz file holds, which together may take `limit` bytes.

    What a member declares is compared with the limit before any of it is unpacked. Raises DataError, with what is
    wrong but without the path, where the file is no zip archive, or an array is not what :func:`read_array` accepts.
    """
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            wanted = {name: [m for m in members if m.filename in (name, f"{name}.npy")] for name in names}
            if twice := [name for name, held in wanted.items() if len(held) > 1]:
                raise DataError(f"it holds {twice[0]!r} {len(wanted[twice[0]])} times")
            total = sum(member.file_size for held in wanted.values() for member in held)
            if total > limit:
                raise DataError(f"it unpacks to {total:,} bytes; {limit:,} are accepted")
            for name, held in wanted.items():
                for member in held:
                    found[name] = _read_member(archive, member, name)
    except ARCHIVE_ERRORS as error:
        raise DataError(said(error)) from None
    return found


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> NDArray[Any]:
    with archive.open(member) as stream:
        start = stream.read(MAX_HEADER + 12)
        try:
            header = read_header(start)
            _check_size(header, member.file_size - header.offset)
            return _read_body(stream, header, start[header.offset :])  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"array {name!r}: {error}") from None


def _read_body(stream: BinaryIO, header: Header, begun: bytes = b"") -> NDArray[Any]:
    """The array behind a header, of which `begun` was read already."""
    body = bytearray(header.nbytes)
    body[: len(begun)] = begun
    filled = len(begun)
    with memoryview(body) as view:
        while filled < len(body) and (count := stream.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += count
    if filled < header.nbytes:
        raise EOFError(f"it ends after {filled} of {header.nbytes} bytes of its array")
    if stream.read(1):
        raise ValueError("bytes follow its array")
    return _shaped(np.frombuffer(body, header.dtype), header)


def _entries(header: bytes) -> dict[str, Any]:
    """The three keys of a header's dict; ValueError for anything else in it."""
    try:
        text = header.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ValueError("its header is not ASCII") from None
    if text[:1] != "{" or text[-1:] != "}":
        raise ValueError(f"its header is no dict: {_shown(text)}")
    found: dict[str, Any] = {}
    at, last = 1, len(text) - 1
    while at < last:
        entry = _ENTRY.match(text, at, last)
        if entry is None:
            if not text[at:last].strip():
                break
            raise ValueError(f"its header holds {_shown(text[at:last])}")
        key = entry["key"]
        if key in found:
            raise ValueError(f"its header holds {key!r} twice")
        found[key] = _value(key, entry)
        at = entry.end()
        if at < last:
            if text[at] != ",":
                raise ValueError(f"its header holds {_shown(text[at:last])}")
            at += 1
    return found


def _value(key: str, entry: re.Match[str]) -> Any:
    if key == "descr" and entry["type"] is not None:
        if not _TYPE.fullmatch(entry["type"]):
            raise ValueError(f"it holds type {entry['type']!r}; accepted: numbers, booleans and text")
        kind = np.dtype(entry["type"])
        if kind.itemsize == 0:
            raise ValueError("it holds text of no length")
        return kind
    if key == "fortran_order" and entry["bool"] is not None:
        return entry["bool"] == "True"
    if key == "shape" and entry["shape"] is not None:
        return tuple(int(side.strip(" L")) for side in entry["shape"].split(",") if side.strip())
    raise ValueError(f"its header holds {_shown(entry[0].strip())}")


def _shaped(flat: NDArray[Any], header: Header) -> NDArray[Any]:
    if header.dtype.kind == "U" and flat.size:
        points = flat.view(np.dtype(np.uint32).newbyteorder(header.dtype.byteorder))
        if bool(((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any()):
            raise ValueError("it holds text that is none")
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _check_size(header: Header, size: int) -> None:
    if header.nbytes != size:
        raise ValueError(f"its header declares {header.nbytes} bytes and {size} follow")


def _shown(text: str) -> str:
    return repr(text[:80])
