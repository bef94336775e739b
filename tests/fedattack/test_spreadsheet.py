"""No cell of ours is a formula, and what was written is read back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedattack.annotation.pairs import _labels
from fedattack.annotation.table import COLUMNS, csv_lines, parse_table
from fedattack.config import Config
from fedattack.storage import RunFolder
from fedattack.storage.records import write_requests
from fedattack.storage.spreadsheet import csv_bytes, escaped, restored, unescaped

BEGINNINGS = "=+-@\t\r\n＝＋－＠"
TEXTS = [f"{first}cmd|' /C calc'!A0" for first in BEGINNINGS] + [
    "", "a", "'", "''", "'a", "'=1", "''=1+1", "-", "--1", "+1a", "=1", "-1.5", "+2e-3", "-.5", "1", "-inf", "a=b",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_no_formula_and_comes_back(text: str) -> None:
    written = escaped(text)
    assert unescaped(written) == text
    if written[:1] in tuple(BEGINNINGS):
        float(written)  # a number, which computes to itself


def test_random_texts_come_back() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("'=+-@\t\r1.e ax"))
    for _ in range(1000):
        text = "".join(rng.choice(letters, rng.integers(0, 6)))
        assert unescaped(escaped(text)) == text
        assert unescaped(escaped(escaped(text))) == escaped(text)


def test_numbers_and_other_columns_are_untouched() -> None:
    frame = pd.DataFrame(
        {
            "=name": pd.array(["=A1", None, "b"], dtype="string"),
            "value": [-1.5, np.nan, 2.0],
            "count": pd.array([-3, None, 4], dtype="Int64"),
            "mixed": ["@x", -2, None],
        }
    )
    text = csv_bytes(frame).decode()
    assert text.splitlines() == ["'=name,value,count,mixed", "'=A1,-1.5,-3,'@x", ",,,-2", "b,2.0,4,"]
    again = restored(pd.read_csv(io.StringIO(text)))
    assert list(again.columns) == list(frame.columns)
    assert again["=name"].tolist()[::2] == ["=A1", "b"]
    assert again["mixed"].tolist()[0] == "@x"
    assert frame.columns[0] == "=name"  # the frame itself is as it was
    assert csv_bytes(pd.DataFrame({"a": [1, -2]})) == b"a\n1\n-2\n"


def test_reasons_of_requests(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    write_requests(folder, [{"attack": "x", "reason": '=HYPERLINK("http://x")', "samples": 3, "tag": "-7"}])
    (row,) = csv.DictReader(io.StringIO((folder.path / "requests.csv").read_text()))
    assert (row["reason"], row["samples"], row["tag"]) == ('\'=HYPERLINK("http://x")', "3", "-7")


def test_labels_of_records_are_read_back(tmp_path: Path) -> None:
    frame = pd.DataFrame({"attack": ["-odd:Name"], "round": [1], "client": [0], "image": [0], "label": [3]})
    (tmp_path / "records.csv").write_bytes(csv_bytes(frame))
    (told,) = _labels(tmp_path).values()
    assert told == ("-odd:Name", "3")


def test_tables_of_ratings_round_trip(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "") | {
        "schema_version": "1", "pair_id": "-1+1", "original_path": "=a.png", "original_sha256": "0" * 64,
        "reconstruction_path": "@b.png", "reconstruction_sha256": "1" * 64, "class_label": "+cat", "seed": "-3",
        "protocol": "match", "label": "1", "choice": "-yes", "annotator_id": "'=me", "annotator_type": "human",
        "timestamp": "2026-01-02T03:04:05+00:00", "is_attention_check": "0",
    }  # fmt: skip
    path = tmp_path / "ratings.csv"
    path.write_bytes(csv_lines([row, row], header=True))
    assert parse_table(path).rows == (row, row)
    cells = list(csv.reader(io.StringIO(path.read_text())))[1]
    assert not [cell for cell in cells if cell[:1] in tuple("=+@") or (cell[:1] == "-" and cell != "-3")]
    path.write_bytes(path.read_bytes()[:-1])  # an end of line that is lacking
    assert parse_table(path).rows == (row, row)
