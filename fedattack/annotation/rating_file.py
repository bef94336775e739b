"""The table that a page writes: each answer is on disk before the next question, whoever else writes to it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedattack.annotation.table import COLUMNS, Parsed, csv_lines, moment, parse_table, portable_path
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.files import cannot_write, write_bytes
from fedattack.reading import LARGEST_TEXT, open_file, read_bytes

_HEADER = ",".join(COLUMNS).encode()
_PATHS = ("original_path", "reconstruction_path")


class RatingFile:
    """A CSV table that several threads and processes append to; made where it is absent.

    Every method holds a lock on a hidden file beside it, and reads again what others wrote meanwhile.

    Parameters
    ----------
    path : Path
        The .csv file.
    protocol : str
        The only protocol of its ratings.

    Raises
    ------
    ConfigError, DataError
        Where the file is no CSV table, is malformed, or holds ratings of another protocol.
    RunFailed
        Where it cannot be written.
    """

    def __init__(self, path: Path, protocol: str) -> None:
        if path.suffix.lower() != ".csv":
            raise ConfigError(f"--table {str(path)!r}: ratings are appended to a .csv file, line by line")
        self.path, self.protocol = path, protocol
        self.notes: list[str] = []
        self._known: tuple[int, int, int] | None = None
        self._parsed = Parsed((), ())
        self._mutex = threading.Lock()
        with self._locked():
            if not path.exists() or not path.stat().st_size:
                write_bytes(path, _HEADER + b"\n")
            self._refresh()

    @property
    def rows(self) -> tuple[dict[str, str], ...]:
        """All rows as of now, in the file's order."""
        with self._locked():
            self._refresh()
            return self._parsed.rows

    def append(self, *rows: Mapping[str, str], replace: bool = False) -> int:
        """Add ratings that the table lacks, whole or not at all, and wait until they are on disk; how many it were.

        A rating is there already where its annotator rated its pair (or answered its check). `replace`: such a one is
        added too where it is later than those.
        """
        with self._locked():
            self._refresh()
            latest: dict[tuple[str, ...], datetime.datetime] = {}
            for known in self._parsed.rows:
                key, when = _key(known), moment(known["timestamp"])
                latest[key] = max(latest.get(key, when), when)
            fresh = []
            for row in rows:
                key, when = _key(row), moment(row["timestamp"])
                if key not in latest or (replace and latest[key] < when):
                    latest[key] = when
                    fresh.append(dict(row) | {name: self._portable(row[name]) for name in _PATHS})
            if fresh:
                self._write(fresh)
            return len(fresh)

    def remove(self, row: Mapping[str, str]) -> bool:
        """Take back the last rating of the annotator, pair and kind of `row`; whether there was one."""
        with self._locked():
            self._refresh()
            places = [place for place, one in enumerate(self._parsed.rows) if _key(one) == _key(row)]
            if not places:
                return False
            lines = read_bytes(self.path, LARGEST_TEXT).splitlines(keepends=True)
            begins = [*self._parsed.lines, len(lines) + 1]
            first, behind = begins[places[-1]] - 1, begins[places[-1] + 1] - 1
            if behind >= len(lines):  # needs no room, so that a full disk does not forbid it
                with self.path.open("r+b") as stream:
                    stream.truncate(sum(map(len, lines[:first])))
                    os.fsync(stream.fileno())
            else:
                write_bytes(self.path, b"".join(lines[:first] + lines[behind:]))
            self._refresh()
            return True

    def _portable(self, path: str) -> str:
        return portable_path(self.path.parent, path)

    def _write(self, fresh: Sequence[dict[str, str]]) -> None:
        """Append, or leave the file as it was; a torn last line, which nobody was told was kept, is overwritten."""
        known, data = self._parsed, csv_lines(fresh)
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise cannot_write(self.path, error, len(data)) from error
        try:
            os.ftruncate(descriptor, known.whole)
            if os.pread(descriptor, 1, known.whole - 1) != b"\n":
                data = b"\n" + data
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], known.whole + written)
            os.fsync(descriptor)
            stat = os.fstat(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, known.whole)
                os.fsync(descriptor)
            raise cannot_write(self.path, error, len(data)) from error
        finally:
            os.close(descriptor)
        last = max(known.lines, default=1)
        lines = range(last + 1, last + 1 + len(fresh))
        self._parsed = Parsed((*known.lines, *lines), (*known.rows, *fresh), stat.st_size)
        self._known = _state(stat)

    def _refresh(self) -> None:
        """Read the table again where it is not as it was left."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise RunFailed(f"the table {self.path} was taken away; put it back, or start again") from None
        if _state(stat) == self._known:
            return
        parsed = parse_table(self.path)
        with open_file(self.path) as stream:
            header = stream.readline().removeprefix(b"\xef\xbb\xbf").strip()
        if header != _HEADER:
            raise DataError(f"{self.path} has its columns in another order; to append to it, write them in this one: "
                            f"{_HEADER.decode()}")  # fmt: skip
        if others := sorted({row["protocol"] for row in parsed.rows} - {self.protocol}):
            raise ConfigError(
                f"--table {str(self.path)!r} holds ratings of protocol {', '.join(others)}, which are never pooled "
                f"with those of {self.protocol}: give another --table"
            )
        if parsed.torn:
            self.notes.append(
                f"the last line of {self.path} was torn ({len(parsed.torn)} characters) and is dropped"
            )
        self._parsed, self._known = parsed, _state(stat)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        with self._mutex:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise cannot_write(lock, error, 0) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO):
                    raise cannot_write(self.path, error, 0) from error
                raise
            finally:
                os.close(descriptor)


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    """Changes when a file does."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["annotator_id"], row["pair_id"], row["is_attention_check"]
