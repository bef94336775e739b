"""The table of ratings: CSV or Parquet, one row a judgement, checked when read; and the votes it holds."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedattack.errors import ConfigError, DataError
from fedattack.files import write_bytes
from fedattack.reading import LARGEST_PICTURE, LARGEST_TEXT, Unreadable, parquet_frame, read_bytes, shown
from fedattack.storage.spreadsheet import csv_bytes, escaped, unescaped

SCHEMA_VERSION = "1"
CANNOT_TELL = "cannot tell"
"""The `choice` of an answer without a label."""

HUMAN, PROXY = "human", "proxy"
PER_PAIR = (
    "original_path", "original_sha256", "reconstruction_path", "reconstruction_sha256",
    "dataset", "class_label", "attack", "model", "defence", "compression", "seed",
)  # fmt: skip
"""Columns that say which two images were judged, and where they come from."""

COLUMNS = (
    "schema_version", "pair_id", *PER_PAIR, "protocol", "label", "choice", "confidence", "annotator_id",
    "annotator_type", "proxy_name", "shown_px", "timestamp", "is_attention_check",
)  # fmt: skip
"""Columns of a table, in its order."""

PROTOCOLS = re.compile(r"recognise|match|identify_([2-9]|[1-9][0-9]+)")
"""recognise: the reconstruction alone was shown; match: beside the original; identify_k: beside k candidates."""

_TYPES = dict.fromkeys(COLUMNS, "string") | {
    "compression": "Float64", "seed": "Int64", "label": "Int64", "confidence": "Float64", "shown_px": "Int64",
    "is_attention_check": "boolean",
}  # fmt: skip
_PATHS = ("original_path", "reconstruction_path")


def _number(text: str, low: float, high: float) -> bool:
    try:
        return low <= float(text) <= high
    except ValueError:
        return False


def moment(text: str) -> datetime.datetime:
    """A time of ISO 8601; without a zone, UTC."""
    found = datetime.datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def _is_moment(text: str) -> bool:
    try:
        moment(text)
    except ValueError:
        return False
    return True


_HASH = (lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None, "64 lower-case hexadecimal digits")
_GIVEN = (lambda text: bool(text.strip()) and text.isprintable(), "a text, not empty")
_ACCEPTED: dict[str, tuple[Callable[[str], bool], str]] = {
    "schema_version": (lambda text: text == SCHEMA_VERSION, SCHEMA_VERSION),
    "pair_id": _GIVEN,
    "original_path": _GIVEN,
    "original_sha256": _HASH,
    "reconstruction_path": _GIVEN,
    "reconstruction_sha256": _HASH,
    "compression": (lambda text: not text or _number(text, 0, 1), "a kept share in [0, 1], or empty"),
    "seed": (lambda text: re.fullmatch(r"(-?\d{1,18})?", text) is not None, "a whole number, or empty"),
    "protocol": (lambda text: PROTOCOLS.fullmatch(text) is not None, "recognise, match, identify_<k>"),
    "label": (lambda text: text in ("", "0", "1"), f"0, 1, or empty with the choice {CANNOT_TELL!r}"),
    "confidence": (lambda text: not text or _number(text, 0, 1), "a number in [0, 1], or empty"),
    "annotator_id": _GIVEN,
    "annotator_type": (lambda text: text in (HUMAN, PROXY), f"{HUMAN}, {PROXY}"),
    "shown_px": (
        lambda text: re.fullmatch(r"([1-9]\d{0,4})?", text) is not None,
        "pixels of a side, or empty",
    ),
    "timestamp": (_is_moment, "a time of ISO 8601"),
    "is_attention_check": (lambda text: text in ("0", "1"), "0, 1"),
}


@dataclass(frozen=True)
class Parsed:
    """A table file's good rows, as texts, with the line (of Parquet: the row) each begins at.

    `whole`: bytes up to the end of the last whole line; `torn`: what lies behind it, empty where nothing does.
    """

    lines: tuple[int, ...]
    rows: tuple[dict[str, str], ...]
    whole: int = 0
    torn: str = ""


def read_table(path: Path | str, protocol: str | None = None) -> pd.DataFrame:
    """Read and check a table: :data:`COLUMNS`, indexed by line; relative paths are resolved against its folder.

    `label` is missing where the answer was "cannot tell". ``frame.attrs["notes"]`` says what was left out: a torn
    last line of a CSV file. `protocol` keeps the rows of one.

    Raises
    ------
    DataError
        With file and line, where the table is malformed, contradicts itself, or holds several protocols and
        `protocol` does not choose among them.
    """
    path = Path(path)
    parsed = parse_table(path)
    frame = to_frame(parsed.rows, parsed.lines)
    for column in _PATHS:
        frame[column] = [os.path.normpath(path.parent / text) for text in frame[column]]
        frame[column] = frame[column].astype("string")
    frame.attrs["notes"] = [_torn_note(path, parsed)] if parsed.torn else []
    held = sorted(set(frame["protocol"]))
    if protocol is not None:
        if protocol not in held:
            raise DataError(
                f"{path} holds no rating of protocol {protocol!r}; it holds {', '.join(held) or 'none'}"
            )
        return frame[frame["protocol"] == protocol]
    if len(held) > 1:
        raise DataError(
            f"{path} holds ratings of several protocols ({', '.join(held)}), which answer different questions and "
            "are never pooled: choose one with --protocol"
        )
    return frame


def _torn_note(path: Path, parsed: Parsed) -> str:
    line = parsed.lines[-1] + 1 if parsed.lines else 2
    return f"{path} line {line} is torn ({len(parsed.torn)} characters, no end of line) and is left out"


def parse_table(path: Path) -> Parsed:
    """The rows of a table file, checked one by one and against each other; see :func:`read_table`."""
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: a table of ratings is a .csv or a .parquet file")
    try:
        data = read_bytes(path, LARGEST_TEXT)
    except Unreadable as error:
        raise DataError(f"cannot read the table {path}: {error.reason}") from None
    parsed = _parse_parquet(path, data) if path.suffix.lower() == ".parquet" else _parse_csv(path, data)
    faults = [
        (line, fault)
        for line, row in zip(parsed.lines, parsed.rows, strict=True)
        if (fault := row_fault(row)) is not None
    ] or _contradictions(parsed)
    if faults:
        where = "row" if path.suffix.lower() == ".parquet" else "line"
        more = (
            f" (faulty too: {where} {_listed([line for line, _ in faults[1:]])})" if len(faults) > 1 else ""
        )
        raise DataError(f"{path} {where} {faults[0][0]}: {faults[0][1]}{more}")
    return parsed


def _listed(lines: Sequence[int], most: int = 5) -> str:
    shown = ", ".join(map(str, lines[:most]))
    return f"{shown} and {len(lines) - most:,} more" if len(lines) > most else shown


def _parse_csv(path: Path, data: bytes) -> Parsed:
    bom = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    whole = max(data.rfind(b"\n") + 1, bom)
    try:
        text = data[bom:whole].decode()
    except UnicodeDecodeError as error:
        line = data[: bom + error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line}: is not UTF-8; save the table as UTF-8") from None
    lines, rows = [], []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None and whole == len(data):
            raise DataError(f"{path} is empty; a table begins with the line: {','.join(COLUMNS)}")
        if header is not None:
            _check_header(path, header)
        last = reader.line_num
        for cells in reader:
            begins, last = last + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(header or ()):
                raise DataError(
                    f"{path} line {begins}: has {len(cells)} fields; the header has {len(header or ())}"
                )
            lines.append(begins)
            rows.append(dict(zip(header or (), map(unescaped, cells), strict=True)))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: is not CSV: {error}") from None
    tail = data[whole:].decode(errors="replace")
    if not tail.strip():
        return Parsed(tuple(lines), tuple(rows), len(data) if not tail else whole, tail)
    if header is None:
        raise DataError(f"{path} line 1: is not a table's header: {','.join(COLUMNS)}")
    row = _complete(tail, header)
    if row is None:
        return Parsed(tuple(lines), tuple(rows), whole, tail)
    return Parsed((*lines, last + 1), (*rows, row), len(data))


def _complete(tail: str, header: Sequence[str]) -> dict[str, str] | None:
    """The row of a last line that merely lacks its end, or None where it is torn."""
    try:
        cells = next(csv.reader([tail], strict=True))
    except (csv.Error, StopIteration):
        return None
    row = dict(zip(header, map(unescaped, cells), strict=False))
    return row if len(cells) == len(header) and row_fault(row) is None else None


def _check_header(path: Path, header: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    twice = sorted({name for name in header if header.count(name) > 1})
    if missing or unknown or twice:
        kinds = {"lacks": missing, "has the unknown": unknown, "has twice": twice}
        what = "; ".join(f"{verb} {shown(', '.join(names))}" for verb, names in kinds.items() if names)
        raise DataError(f"{path} line 1: the header {what}; a table has the columns {','.join(COLUMNS)}")


def _parse_parquet(path: Path, data: bytes) -> Parsed:
    try:
        frame = parquet_frame(data, path)
    except Unreadable as error:
        raise DataError(f"{path} is not readable Parquet: {error.reason}") from None
    header = [str(name) for name in frame.columns]
    _check_header(path, header)
    columns = {name: [_cell(name, value) for value in frame[name]] for name in COLUMNS}
    rows = tuple(dict(zip(COLUMNS, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
    return Parsed(tuple(range(1, len(rows) + 1)), rows, len(data))


def _cell(name: str, value: Any) -> str:
    """A value of a frame as a CSV file spells it."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return ""
    if _TYPES[name] == "boolean" and isinstance(value, bool | int | float) and value in (0, 1):
        return str(int(value))
    if _TYPES[name] == "Int64" and isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat() if isinstance(value, datetime.datetime) else str(value)


def row_fault(row: Mapping[str, str]) -> str | None:
    """What is wrong with a row, in one sentence, or None."""
    for name, (accepts, accepted) in _ACCEPTED.items():
        if not accepts(row[name]):
            return f"{name} = {row[name][:80]!r}; accepted: {accepted}"
    unsure = row["choice"] == CANNOT_TELL
    if unsure == bool(row["label"]):
        return (
            f"label = {row['label']!r} with choice = {row['choice'][:80]!r}; a label is empty exactly where the "
            + (f"choice is {CANNOT_TELL!r}")
        )
    if (row["annotator_type"] == PROXY) != bool(row["proxy_name"]):
        return (
            f"proxy_name = {row['proxy_name'][:80]!r} of annotator_type = {row['annotator_type']!r}; a proxy, and "
            "nobody else, has a name"
        )
    return None


def _contradictions(parsed: Parsed) -> list[tuple[int, str]]:
    """Lines that give a pair other images, or an annotator another type, than an earlier line does."""
    kinds = (
        ("pair_id", ("original_sha256", "reconstruction_sha256")),
        ("annotator_id", ("annotator_type", "proxy_name")),
    )
    found = []
    seen: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}
    for line, row in zip(parsed.lines, parsed.rows, strict=True):
        for key, names in kinds:
            told = tuple(row[name] for name in names)
            first, earlier = seen.setdefault((key, row[key]), (line, told))
            if told != earlier:
                what = " or ".join(names)
                found.append((line, f"{key} = {row[key][:80]!r} has another {what} than on line {first}"))
    return found


def to_frame(rows: Iterable[Mapping[str, str]], lines: Sequence[int] | None = None) -> pd.DataFrame:
    """Rows of texts as a frame of a table's column types."""
    frame = pd.DataFrame(
        list(rows), columns=list(COLUMNS), dtype="string", index=None if lines is None else pd.Index(lines)
    )
    for name, kind in _TYPES.items():
        if kind == "boolean":
            frame[name] = (frame[name] == "1").astype("boolean")
        elif kind != "string":
            frame[name] = pd.to_numeric(frame[name].replace("", None)).astype(kind)  # type: ignore[call-overload]
    frame.index.name = "line"
    return frame


def to_rows(frame: pd.DataFrame) -> list[dict[str, str]]:
    """A frame's rows as a CSV file spells them; ConfigError where a column is missing or a row is malformed."""
    if missing := [name for name in COLUMNS if name not in frame.columns]:
        raise ConfigError(f"a table of ratings needs the columns {', '.join(missing)}")
    columns = [[_cell(name, value) for value in frame[name]] for name in COLUMNS]
    rows = [dict(zip(COLUMNS, cells, strict=True)) for cells in zip(*columns, strict=True)]
    for place, row in enumerate(rows):
        if (fault := row_fault(row)) is not None:
            raise ConfigError(f"row {place} of a table of ratings: {fault}")
    return rows


def csv_lines(rows: Iterable[Mapping[str, str]], header: bool = False) -> bytes:
    """Rows as lines of a CSV file, UTF-8; texts are escaped as in :mod:`fedattack.storage.spreadsheet`."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({name: escaped(cell) for name, cell in row.items()} for row in rows)
    return stream.getvalue().encode()


def write_table(path: Path | str, frame: pd.DataFrame) -> None:
    """Write a frame of :data:`COLUMNS` as .csv or .parquet, whole or not at all; paths relative to its folder.

    Raises ConfigError for malformed rows, RunFailed where it cannot be written.
    """
    path = Path(path)
    rows = to_rows(frame)
    for row in rows:
        row |= {name: portable_path(path.parent, row[name]) for name in _PATHS}
    _write(path, to_frame(rows), csv_lines(rows, header=True))


def write_votes(path: Path | str, counted: pd.DataFrame) -> None:
    """Write what :func:`votes` found as .csv or .parquet; otherwise as :func:`write_table`."""
    path = Path(path)
    told = counted.copy()
    for name in _PATHS:
        told[name] = [portable_path(path.parent, text) for text in told[name]]
    _write(path, told, csv_bytes(told))


def _write(path: Path, frame: pd.DataFrame, text: bytes) -> None:
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: a table is written as a .csv or a .parquet file")
    if path.suffix.lower() == ".parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        text = buffer.getvalue()
    write_bytes(path, text)


def portable_path(folder: Path, path: Path | str) -> str:
    """A path as a table in `folder` holds it: relative where it lies below that folder, absolute elsewhere."""
    whole, root = os.path.abspath(path), os.path.abspath(folder)
    inside = os.path.commonpath([whole, root]) == root
    return Path(os.path.relpath(whole, root) if inside else whole).as_posix()


def pair_name(row: Mapping[str, str]) -> str:
    """Name of a pair: a digest of the two images' hashes and of where they come from, 16 hexadecimal digits."""
    told = [row[name] for name in PER_PAIR if name not in _PATHS]
    return hashlib.sha256("\x1f".join(told).encode()).hexdigest()[:16]


def latest(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The ratings that count, and how many do not because the same person rated the same pair again later.

    Attention checks (repeats among them) are no ratings. Of several by one annotator of one pair and protocol the
    last counts, by time and then by line.
    """
    rated = frame[~frame["is_attention_check"].astype(bool)]
    moments = [moment(text).timestamp() for text in rated["timestamp"]]
    ordered = rated.assign(_moment=moments).sort_values("_moment", kind="stable").drop(columns="_moment")
    kept = ordered.drop_duplicates(["annotator_id", "protocol", "pair_id"], keep="last")
    return kept.sort_index(), len(rated) - len(kept)


def votes(frame: pd.DataFrame, annotator_type: str | None = None) -> pd.DataFrame:
    """Per pair, in the order of its first rating, what its annotators voted.

    Columns: `pair_id`, :data:`PER_PAIR`, `protocol`, `annotator_type`, and `k` (votes for label 1), `n` (votes),
    `undecided` ("cannot tell"), `share` (k / n; missing where nobody voted), `majority` (1, 0; missing at a tie).

    Raises DataError where `frame` holds several protocols, or people and proxies and `annotator_type` ("human",
    "proxy") does not choose.
    """
    if annotator_type is not None:
        frame = frame[frame["annotator_type"] == annotator_type]
    for column, sentence in (
        ("protocol", "ratings of several protocols ({}) are never pooled: read the table with one of them"),
        ("annotator_type", "ratings of people and of proxies ({}) are not pooled: choose annotator_type"),
    ):
        held = sorted(set(frame[column]))
        if len(held) > 1:
            raise DataError(sentence.format(", ".join(held)))
    kept, _ = latest(frame)
    groups = kept.groupby("pair_id", sort=False)
    first = groups[[*PER_PAIR, "protocol", "annotator_type"]].first()
    found = first.assign(
        k=groups["label"].sum().astype("Int64"),
        n=groups["label"].count().astype("Int64"),
        undecided=groups["label"].apply(lambda labels: labels.isna().sum()).astype("Int64"),
    ).reset_index()
    share = (found["k"] / found["n"].where(found["n"] > 0)).astype("Float64")
    majority = (share > 0.5).astype("Int64").where(share != 0.5)
    return found.assign(share=share, majority=majority)


def check_images(frame: pd.DataFrame) -> None:
    """Refuse a table whose images are missing or are no longer those that were rated (DataError)."""
    for kind in ("original", "reconstruction"):
        for name, known in (
            frame[[f"{kind}_path", f"{kind}_sha256"]].drop_duplicates().itertuples(index=False)
        ):
            try:
                digest = hashlib.sha256(read_bytes(name, LARGEST_PICTURE)).hexdigest()
            except Unreadable as error:
                raise DataError(f"cannot read the rated image {name}: {error.reason}") from None
            if digest != known:
                raise DataError(
                    f"{name} is not the image that was rated: its SHA-256 is {digest[:12]}..., not {known[:12]}..."
                )
