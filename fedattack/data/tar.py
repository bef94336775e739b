"""Tar archives, member by member: ustar, GNU's long names and POSIX' extended headers, nothing else.

The library's reader takes as many bytes for a header as it declares, its search in them takes the square of their
number, and it ends silently at a damaged one. Single blocks are the library's; what leads from one to the next is
here.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedattack.reading import MIB, MOST_MEMBERS, Unreadable, said

_BLOCK = tarfile.BLOCKSIZE
_LARGEST_HEADER = MIB
_LINKS = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
_SPARSE = "it holds a file with holes, which is not read; pack it without --sparse"
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}


@dataclass(frozen=True)
class Member:
    """`kind`: "" for a regular file, "a folder", or what else it is; `offset`: where its bytes begin."""

    name: str
    kind: str
    size: int
    offset: int


class Members:
    """The members of an unpacked tar stream, forwards; :meth:`read` gives the last one's bytes.

    `size`: of a stream that can be sought, in bytes; what is not read is then passed over.
    """

    def __init__(self, stream: IO[bytes], path: Path, size: int | None = None) -> None:
        self._stream, self._path, self._size, self._place, self._left = stream, path, size, 0, 0

    def __iter__(self) -> Iterator[Member]:
        for _ in range(MOST_MEMBERS):
            member = self._next()
            if member is None:
                return
            self._left = member.size
            yield member
            self._skip(self._left)
            self._skip(-self._place % _BLOCK)
        raise Unreadable(self._path, f"it holds more than {MOST_MEMBERS:,} files")

    def read(self, limit: int) -> bytes:
        """The bytes of the member that was handed out last."""
        if self._left > limit:
            raise Unreadable(
                self._path, f"a file in it has {self._left:,} bytes; at most {limit:,} are accepted"
            )
        data = self._take(self._left)
        self._left = 0
        return data

    def _next(self) -> Member | None:
        name: str | None = None
        size: int | None = None
        for _ in range(8):  # extended headers before a member
            block = self._stream.read(_BLOCK)
            self._place += len(block)
            if not block and name is None and size is None:
                return None
            if len(block) == _BLOCK and not any(block):
                return None
            head = self._head(block)
            if head.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
                told = self._records(self._extended(head))
                if any(key.startswith("GNU.sparse") for key in told):
                    raise Unreadable(self._path, _SPARSE)
                if head.type == tarfile.XGLTYPE and told.keys() & {"path", "size"}:
                    raise Unreadable(self._path, "a header in it names one file for all")
                name, size = told.get("path", name), self._number(told["size"]) if "size" in told else size
            elif head.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = self._text(self._extended(head).partition(b"\0")[0])
                name = text if head.type == tarfile.GNUTYPE_LONGNAME else name
            else:
                return self._member(head, name, size)
        raise Unreadable(self._path, "too many headers follow one another in it")

    def _head(self, block: bytes) -> tarfile.TarInfo:
        try:
            head = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError, IndexError) as error:
            raise Unreadable(self._path, f"a header in it is damaged ({said(error)})") from None
        if head.size < 0:
            raise Unreadable(self._path, f"a header in it is damaged (size {head.size})")
        return head

    def _member(self, head: tarfile.TarInfo, name: str | None, size: int | None) -> Member:
        if head.type == tarfile.GNUTYPE_SPARSE:
            raise Unreadable(self._path, _SPARSE)
        name = head.name if name is None else name.rstrip("/")
        if head.isdir():
            kind = "a folder"
        elif head.type in _REGULAR:
            kind = ""
        else:
            kind = _LINKS.get(head.type, f"a member of type {head.type!r}")
        length = head.size if size is None else size
        return Member(name, kind, 0 if head.type in _LINKS or kind == "a folder" else length, self._place)

    def _extended(self, head: tarfile.TarInfo) -> bytes:
        if head.size > _LARGEST_HEADER:
            raise Unreadable(
                self._path,
                f"a header in it claims {head.size:,} bytes; at most {_LARGEST_HEADER:,} are accepted",
            )
        data = self._take(head.size)
        self._skip(-self._place % _BLOCK)
        return data

    def _records(self, data: bytes) -> dict[str, str]:
        """Records "length key=value" of an extended header."""
        found, place = {}, 0
        while place < len(data) and data[place]:
            digits, _, rest = data[place : place + 8].partition(b" ")
            length = int(digits) if digits.isdigit() and rest else 0
            record = data[place : place + length]
            key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if not equals or record[-1:] != b"\n" or len(record) != length:
                raise Unreadable(self._path, "an extended header in it is damaged")
            wanted = key in (b"path", b"size")
            found[key.decode("latin-1")] = self._text(value) if wanted else ""
            place += length
        return found

    def _number(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise Unreadable(self._path, f"an extended header in it names size {text[:40]!r}")
        return int(text)

    def _text(self, data: bytes) -> str:
        return data.decode("utf-8", "surrogateescape")

    def _take(self, count: int) -> bytes:
        parts, left = [], count
        while left:
            part = self._stream.read(min(left, MIB))
            if not part:
                raise Unreadable(self._path, "it ends within a file")
            parts.append(part)
            left -= len(part)
        self._place += count
        return b"".join(parts)

    def _skip(self, count: int) -> None:
        if self._size is not None and count:
            if self._place + count > self._size:
                raise Unreadable(self._path, "it ends within a file")
            self._stream.seek(count, os.SEEK_CUR)
            self._place += count
            return
        while count:
            part = self._stream.read(min(count, MIB))
            if not part:
                raise Unreadable(self._path, "it ends within a file")
            count -= len(part)
            self._place += len(part)
