"""CSV files that a spreadsheet may open: no text is taken for a formula, and our own readers get it back as it was.

A text that a spreadsheet would compute (it begins with = + - @, a tab, or an end of line) gets an apostrophe before
it, as spreadsheets themselves mark texts; so does a text that begins with apostrophes and then one of these, so that
reading is exact. Numbers are untouched, negative ones too, and texts that are numbers.

OWASP, "CSV Injection".
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

_ACTS = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_MARKED = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def escaped(value: Any) -> Any:
    """A cell as it is written; anything but a text as it is."""
    if isinstance(value, str) and _ACTS.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def unescaped(value: Any) -> Any:
    """The cell that :func:`escaped` wrote so."""
    return value[1:] if isinstance(value, str) and _MARKED.match(value) else value


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """A frame as CSV in UTF-8, without its index, headings and texts :func:`escaped`."""
    return _mapped(frame, escaped).to_csv(index=False).encode()


def restored(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as it was before :func:`csv_bytes`."""
    return _mapped(frame, unescaped)


def _mapped(frame: pd.DataFrame, change: Any) -> pd.DataFrame:
    texts = [
        place
        for place, kind in enumerate(frame.dtypes)
        if pd.api.types.is_object_dtype(kind) or pd.api.types.is_string_dtype(kind)
    ]
    if not texts and not any(change(str(name)) != str(name) for name in frame.columns):
        return frame
    changed = frame.copy()
    for place in texts:
        column = frame.iloc[:, place]
        written: Any = column.map(change, na_action="ignore").astype(column.dtype)
        changed.isetitem(place, written)
    return changed.rename(columns=change)
