"""Tables of ratings: what is accepted, what is refused and how, the votes they hold, and agreement on them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedattack.annotation import (
    COLUMNS,
    check_images,
    fleiss_kappa,
    krippendorff_alpha,
    latest,
    read_table,
    votes,
    write_table,
)
from fedattack.annotation.agreement import rating_matrix
from fedattack.annotation.table import csv_lines, to_frame
from fedattack.errors import ConfigError, DataError

N = np.nan
SPEC = (
    "schema_version, pair_id, original_path, original_sha256, reconstruction_path, reconstruction_sha256, dataset, "
    "class_label, attack, model, defence, compression, seed, protocol, label, choice, confidence, annotator_id, "
    "annotator_type, proxy_name, shown_px, timestamp, is_attention_check"
)


def row(
    pair: str = "p1", annotator: str = "a1", label: str = "1", second: int = 0, **more: str
) -> dict[str, str]:
    choice = {"1": "yes", "0": "no", "": "cannot tell"}[label]
    given = {
        "schema_version": "1", "pair_id": pair, "original_path": f"images/{pair}-o.png",
        "original_sha256": hashlib.sha256(f"{pair}o".encode()).hexdigest(),
        "reconstruction_path": f"images/{pair}-r.png",
        "reconstruction_sha256": hashlib.sha256(f"{pair}r".encode()).hexdigest(),
        "dataset": "digits", "attack": "dlg", "compression": "0.001", "seed": "0", "protocol": "match",
        "label": label, "choice": choice, "annotator_id": annotator, "annotator_type": "human", "shown_px": "256",
        "timestamp": f"2025-03-01T12:00:{second:02d}.000+00:00", "is_attention_check": "0",
    }  # fmt: skip
    return dict.fromkeys(COLUMNS, "") | given | more


def table(path: Path, *rows: dict[str, str], tail: bytes = b"") -> Path:
    path.write_bytes(csv_lines(rows, header=True) + tail)
    return path


def test_the_columns_are_the_agreed_ones() -> None:
    assert ", ".join(COLUMNS) == SPEC


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_comes_back_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    rows = [
        row(),
        row("p2", label="", class_label='a "b", c', confidence="0.25"),
        row("p2", is_attention_check="1"),
    ]
    path = tmp_path / f"t{suffix}"
    write_table(path, to_frame(rows).assign(original_path=str(tmp_path / "images" / "x.png")))
    frame = read_table(path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["original_path"].tolist() == [str(tmp_path / "images" / "x.png")] * 3
    assert frame["class_label"].tolist() == ["", 'a "b", c', ""]
    assert frame["label"].tolist() == [1, pd.NA, 1]
    assert frame["is_attention_check"].tolist() == [False, False, True]
    assert frame["compression"].tolist() == [0.001] * 3
    if suffix == ".csv":
        assert frame.index.tolist() == [2, 3, 4]
        assert ",images/x.png," in path.read_text()  # relative: the folder can be moved


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label": "2"}, "label = '2'; accepted: 0, 1, or empty"),
        ({"label": "", "choice": "yes"}, "a label is empty exactly where the choice is 'cannot tell'"),
        ({"protocol": "identify_1"}, "protocol = 'identify_1'; accepted: recognise, match, identify_<k>"),
        ({"original_sha256": "ABC"}, "original_sha256 = 'ABC'; accepted: 64 lower-case hexadecimal digits"),
        ({"annotator_type": "robot"}, "annotator_type = 'robot'; accepted: human, proxy"),
        ({"annotator_type": "proxy"}, "a proxy, and nobody else, has a name"),
        ({"proxy_name": "cnn"}, "a proxy, and nobody else, has a name"),
        ({"timestamp": "yesterday"}, "timestamp = 'yesterday'; accepted: a time of ISO 8601"),
        ({"schema_version": "2"}, "schema_version = '2'; accepted: 1"),
        ({"confidence": "high"}, "confidence = 'high'; accepted: a number in [0, 1], or empty"),
        ({"shown_px": "-3"}, "shown_px = '-3'; accepted: pixels of a side, or empty"),
        ({"annotator_id": " "}, "annotator_id = ' '; accepted: a text, not empty"),
        ({"seed": "x"}, "seed = 'x'; accepted: a whole number, or empty"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_line(tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    path = table(tmp_path / "t.csv", row(), row("p2") | change, row("p3"))
    with pytest.raises(DataError) as told:
        read_table(path)
    assert str(told.value).startswith(f"{path} line 3: ")
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_other_faulty_lines_are_counted(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", *(row(f"p{i}", label="1") | {"label": "7"} for i in range(8)))
    with pytest.raises(DataError, match=r"line 2: .*\(faulty too: line 3, 4, 5, 6, 7 and 2 more\)"):
        read_table(path)


def test_a_parquet_row_is_named(tmp_path: Path) -> None:
    frame = to_frame([row(), row("p2")])
    frame["label"] = [1, 5]
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    with pytest.raises(DataError, match="row 2: label = '5'"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="is not readable Parquet"):
        read_table(tmp_path / "bad.parquet")


def test_malformed_files(tmp_path: Path) -> None:
    good = csv_lines([row()], header=True)
    cases: list[tuple[bytes, str]] = [
        (b"", "is empty; a table begins with"),
        (good.replace(b"pair_id,", b"pair,", 1), "line 1: the header lacks pair_id; has the unknown pair"),
        (good + b"1,p2\n", "line 3: has 2 fields; the header has 23"),
        (good + "1,\u00e9\n".encode("latin-1"), "line 3: is not UTF-8"),
        (good + b'1,"p2\n', "is not CSV"),
    ]
    for data, sentence in cases:
        (tmp_path / "t.csv").write_bytes(data)
        with pytest.raises(DataError, match=sentence):
            read_table(tmp_path / "t.csv")
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(ConfigError, match=r"\.csv or a \.parquet"):
        read_table(tmp_path / "t.xlsx")


def test_a_torn_last_line_is_left_out_with_a_note_and_nothing_else(tmp_path: Path) -> None:
    whole = csv_lines([row("p3")]).rstrip(b"\n")
    for cut in (*range(1, len(whole), 9), len(whole) - 1):
        frame = read_table(table(tmp_path / "t.csv", row(), row("p2"), tail=whole[:cut]))
        assert frame["pair_id"].tolist() == ["p1", "p2"]
        assert frame.attrs["notes"] == [
            f"{tmp_path / 't.csv'} line 4 is torn ({cut} characters, no end of line) and is left out"
        ]
    frame = read_table(table(tmp_path / "t.csv", row(), row("p2"), tail=whole))
    assert frame["pair_id"].tolist() == ["p1", "p2", "p3"]  # merely lacks its end, as some editors leave it
    assert frame.attrs["notes"] == []


def test_contradictions_between_lines(tmp_path: Path) -> None:
    other = row("p1", "a2") | {"reconstruction_sha256": "0" * 64}
    with pytest.raises(
        DataError, match=r"line 3: pair_id = 'p1' has another original_sha256 or .* than on line 2"
    ):
        read_table(table(tmp_path / "t.csv", row(), other))
    proxy = row("p2", annotator_type="proxy", proxy_name="cnn")
    with pytest.raises(DataError, match="line 3: annotator_id = 'a1' has another annotator_type"):
        read_table(table(tmp_path / "t.csv", row(), proxy))


def test_protocols_are_never_pooled(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", row(), row("p1", protocol="recognise"), row("p2"))
    with pytest.raises(
        DataError, match=r"several protocols \(match, recognise\).*choose one with --protocol"
    ):
        read_table(path)
    assert read_table(path, "match").index.tolist() == [2, 4]
    with pytest.raises(
        DataError, match="holds no rating of protocol 'identify_4'; it holds match, recognise"
    ):
        read_table(path, "identify_4")
    both = pd.concat([read_table(path, "match"), read_table(path, "recognise")])
    with pytest.raises(DataError, match="never pooled"):
        votes(both)


def test_votes_and_the_last_of_two_ratings(tmp_path: Path) -> None:
    rows = [
        row("p1", "a1", "0", 1), row("p1", "a2", "1", 2), row("p1", "a1", "1", 3),  # a1 changed their mind
        row("p2", "a1", "1", 9), row("p2", "a1", "0", 4),  # a merged file: the later one stands above
        row("p3", "a1", "1", 5), row("p3", "a2", "0", 6),
        row("p4", "a1", "", 7),
        row("p1", "a1", "0", 8, is_attention_check="1"),  # a silent repeat votes for nothing
    ]  # fmt: skip
    frame = read_table(table(tmp_path / "t.csv", *rows))
    kept, superseded = latest(frame)
    assert superseded == 2
    assert kept.index.tolist() == [3, 4, 5, 7, 8, 9]
    found = votes(frame).set_index("pair_id")
    assert found["k"].tolist() == [2, 1, 1, 0]
    assert found["n"].tolist() == [2, 1, 2, 0]
    assert found["undecided"].tolist() == [0, 0, 0, 1]
    assert found["share"].tolist() == [1.0, 1.0, 0.5, pd.NA]
    assert found["majority"].tolist() == [1, 1, pd.NA, pd.NA]
    assert found.loc["p2", "original_path"] == str(tmp_path / "images/p2-o.png")


def test_people_and_proxies_are_not_pooled(tmp_path: Path) -> None:
    proxy = row("p1", "cnn-1", "0", annotator_type="proxy", proxy_name="cnn")
    frame = read_table(table(tmp_path / "t.csv", row(), proxy))
    with pytest.raises(DataError, match=r"people and of proxies \(human, proxy\)"):
        votes(frame)
    assert votes(frame, "proxy")["majority"].tolist() == [0]
    assert votes(frame, "human")["majority"].tolist() == [1]


def test_images_that_changed_since_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for kind in "or":
        (tmp_path / "images" / f"p1-{kind}.png").write_bytes(f"p1{kind}".encode())
    frame = read_table(table(tmp_path / "t.csv", row()))
    check_images(frame)
    (tmp_path / "images" / "p1-r.png").write_bytes(b"another")
    with pytest.raises(DataError, match=r"p1-r\.png is not the image that was rated"):
        check_images(frame)
    (tmp_path / "images" / "p1-r.png").unlink()
    with pytest.raises(DataError, match="cannot read the rated image"):
        check_images(frame)


TWO = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
FOUR = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_agreement_on_published_examples() -> None:
    two, four, fleiss = krippendorff_alpha(TWO), krippendorff_alpha(FOUR), fleiss_kappa(FLEISS)
    assert round(two.mean, 3) == 0.095
    assert round(four.mean, 3) == 0.743
    assert round(fleiss.mean, 3) == 0.210
    assert (two.count, four.count, fleiss.count) == (10, 11, 10)  # a unit with one rating is left out
    for found in (two, four, fleiss):
        assert found.low < found.mean < found.high <= 1
    assert krippendorff_alpha(FOUR) == four  # same seed, same interval


def pairwise_alpha(ratings: Any) -> float:
    """Alpha by its definition: a loop over pairs of ratings, of one unit and of all units."""
    columns = [[v for v in column if not np.isnan(v)] for column in np.asarray(ratings, float).T]
    columns = [column for column in columns if len(column) > 1]
    values = [v for column in columns for v in column]
    observed = sum(
        (a != b) / (len(column) - 1)
        for column in columns
        for i, a in enumerate(column)
        for j, b in enumerate(column)
        if i != j
    )
    expected = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    return 1 - (observed / len(values)) / (expected / (len(values) * (len(values) - 1)))


def test_alpha_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ratings = rng.integers(0, 3, (4, 12)).astype(float)
        ratings[rng.random(ratings.shape) < 0.4] = N
        assert krippendorff_alpha(ratings, replicates=10).mean == pytest.approx(
            pairwise_alpha(ratings), abs=1e-12
        )


def test_the_interval_covers() -> None:
    """Two raters who err in a fifth of the cases: of 200 samples of 60 units, most intervals hold the true alpha."""
    rng, held = np.random.default_rng(1), 0
    for trial in range(200):
        truth = rng.integers(0, 2, 60)
        ratings = np.where(rng.random((2, 60)) < 0.2, 1 - truth, truth)
        found = krippendorff_alpha(ratings, seed=trial, replicates=400)
        held += found.low <= 0.36 <= found.high  # agreement .68 of balanced classes: 1 - .32 / .5
    assert 180 <= held <= 200


def test_agreement_that_is_undefined() -> None:
    assert np.isnan(krippendorff_alpha([[1, 1, 1, 1], [1, 1, 1, 1]]).mean)
    assert np.isnan(fleiss_kappa([[3, 0], [3, 0], [3, 0]]).mean)
    perfect = krippendorff_alpha([[0, 1], [0, 1]])
    assert perfect.mean == 1
    assert not perfect.known  # two units tell nothing about the spread
    with pytest.raises(DataError, match="two annotators or more"):
        krippendorff_alpha([[1, N], [N, 1]])
    with pytest.raises(DataError, match="same number of ratings"):
        fleiss_kappa([[2, 1], [1, 1]])


def test_a_table_as_a_matrix_of_ratings(tmp_path: Path) -> None:
    rows = [row("p1", "a1", "1"), row("p1", "a2", "0"), row("p2", "a1", ""), row("p2", "a2", "1")]
    kept, _ = latest(read_table(table(tmp_path / "t.csv", *rows)))
    np.testing.assert_array_equal(rating_matrix(kept), [[1, N], [0, 1]])
