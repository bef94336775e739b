"""`fedattack annotate` as raters and their hosts meet it: in a browser, killed, from elsewhere; and from a run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chromium_tabs import Chromium, Tab, chromium, wait_for
from PIL import Image
from rich.console import Console

from fedattack.annotation import read_table
from fedattack.annotation.pairs import read_pairs
from fedattack.annotation.plan import judged, make_plan
from fedattack.annotation.rating_file import RatingFile
from fedattack.config import Config
from simulations.pipeline import simulate
from simulations.run import app, main

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}


def called(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "simulations" / "run.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
    )  # fmt: skip


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command at work, and the page's address."""
    process = called("annotate", *arguments)
    assert process.stdout is not None
    try:
        told = []
        for line in process.stdout:
            told.append(line)
            if line.startswith("open "):
                yield process, line.split()[1]
                break
        else:
            pytest.fail("".join(told))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Thirty pairs of 8x8 pixels."""
    rng = np.random.default_rng(0)
    for name in ("orig", "rec"):
        (tmp_path / name).mkdir()
        for number in range(30):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return [str(tmp_path / "orig"), str(tmp_path / "rec")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_twenty_ratings_by_keyboard_and_a_kill_in_between(
    tmp_path: Path, sources: list[str], browser: Chromium
) -> None:
    table, port = tmp_path / "t.csv", free_port()
    arguments = (*sources, "--annotator", "a1", "--protocol", "match", "--table", str(table), "--port", port)
    shown = []
    with serving(*arguments) as (process, address):
        tab = browser.tab(address)
        tab.screen(1280, 800)
        tab.practise()
        for number in range(12):
            shown.append(tab.token())
            tab.answer("yn?"[number % 3])
        waiting = tab.token()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(table.read_text().splitlines()) == 13
        tab.key("y")  # pressed while nobody listens: must not be taken as given
        wait_for(lambda: "does not answer" in tab.text("#message"), what="the page to notice")
        assert tab.text("#where").startswith("Question 13 of ")
    with serving(*arguments):
        wait_for(lambda: "please give it again" in tab.text("#message"), what="the page to come back")
        assert tab.token() == waiting
        for number in range(12, 20):
            shown.append(tab.token())
            tab.answer("yn?"[number % 3])
        assert not tab.failed
    frame = read_table(table)
    assert len(frame) == 20
    assert len(set(shown)) == 20
    assert not frame.duplicated(["pair_id", "is_attention_check"]).any()
    assert frame["choice"].tolist() == [("same", "different", "cannot tell")[i % 3] for i in range(20)]
    assert set(frame["shown_px"]) == {256}
    tab.close()


@pytest.mark.slow
def test_held_keys_reloads_undo_and_two_raters(tmp_path: Path, sources: list[str], browser: Chromium) -> None:
    table = tmp_path / "t.csv"

    def rows() -> int:
        return len(table.read_text().splitlines()) - 1

    with serving(*sources, "--annotator", "a1,a2", "--protocol", "match", "--table", str(table)) as (
        _,
        address,
    ):
        one, two = browser.tab(address), browser.tab(address)
        for tab, key in ((one, "1"), (two, "2")):
            wait_for(lambda t=tab: t.text("#question") == "Who are you?", what="the question who rates")
            tab.key(key)
            tab.token()
            tab.run("document.getElementById('skip').click()")
            wait_for(lambda t=tab: t.text("#where").startswith("Question 1 "), what="the first question")
        one.answer("y", held=30)
        time.sleep(0.5)
        assert rows() == 1  # held: once
        for _ in range(3):
            one.answer("n")
            two.answer("y")
        assert rows() == 7
        asked = one.token()
        one.run("location.reload()")
        time.sleep(0.3)
        assert one.token() == asked  # a reload asks the same, and remembers who rates
        assert one.text("#who") == "rating as a1"
        assert rows() == 7
        # The same rater in a second tab: what is answered there is not asked here, nor taken twice.
        twin = browser.tab(address + "#a1")
        twin.answer("y")
        one.answer("y")
        assert one.token() == twin.token()
        assert rows() == 8
        one.key("u")
        wait_for(lambda: one.token() == asked, what="the last question again")
        assert rows() == 7
        one.run("[...document.querySelectorAll('#answers button')][2].click()")
        wait_for(lambda: one.token() != asked, what="the next question")
        frame = read_table(table)
        assert frame[frame["annotator_id"] == "a1"]["choice"].tolist() == [
            "same",
            *["different"] * 3,
            "cannot tell",
        ]
        assert frame[frame["annotator_id"] == "a2"]["choice"].tolist() == ["same"] * 3
        for tab in (one, two, twin):
            assert not tab.failed
            tab.close()


@pytest.mark.slow
def test_the_page_on_screens_of_all_kinds(tmp_path: Path, sources: list[str], browser: Chromium) -> None:
    """Everything is in view without scrolling, enlarged by whole device pixels, and dark where that is asked for."""
    look = """(() => {
      const box = [...document.querySelectorAll('#pictures img, #answers button, footer button')]
        .map(one => one.getBoundingClientRect());
      const image = document.querySelector('#pictures img');
      return {right: Math.max(...box.map(b => b.right)), bottom: Math.max(...box.map(b => b.bottom)),
        side: image.getBoundingClientRect().width, drawn: getComputedStyle(image).imageRendering,
        paper: getComputedStyle(document.body).backgroundColor,
        wide: document.documentElement.scrollWidth,
        keys: getComputedStyle(document.querySelector('#answers kbd')).display}
    })()"""
    arguments = (*sources, "--annotator", "a1", "--protocol", "match", "--table", str(tmp_path / "t.csv"))
    with serving(*arguments) as (_, address):
        tab = browser.tab(address)
        for width, height, ratio, dark, phone in (
            (1280, 800, 1, False, False), (1024, 600, 1.25, True, False),
            (390, 844, 3, True, True), (320, 568, 2, False, True),
        ):  # fmt: skip
            tab.screen(width, height, ratio, dark, phone)
            tab.open(address)
            tab.token()
            found = tab.run(look)
            assert found["right"] <= width
            assert found["bottom"] <= height
            assert found["wide"] <= width
            assert found["drawn"] == "pixelated"
            factor = found["side"] * ratio / 8
            assert factor == pytest.approx(round(factor), abs=0.01)
            assert found["side"] >= 120
            assert (found["paper"] == "rgb(255, 255, 255)") is not dark
            assert found["keys"] == ("none" if phone else "inline-block")  # a phone has no keys
        assert not tab.failed
        tab.close()


def rate_file(tab: Tab, count: int) -> dict[str, object]:
    tab.practise()
    for number in range(count):
        tab.answer("yn?"[number % 3])
    return dict(tab.run("JSON.parse(localStorage.getItem(backend.place('a1')))"))


@pytest.mark.slow
def test_a_file_for_raters_elsewhere(
    tmp_path: Path,
    sources: list[str],
    browser: Chromium,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, table = tmp_path / "page.html", tmp_path / "t.csv"
    export = (
        *sources,
        "--annotator",
        "a1",
        "--protocol",
        "match",
        "--table",
        str(table),
        "--export",
        str(page),
    )
    monkeypatch.setattr(sys, "argv", ["fedattack", "annotate", *export])
    main_returns()
    told = capsys.readouterr().out
    assert "30 pairs, 3 asked again, 3 checks" in told
    tab = browser.tab(page.as_uri())
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "loads"))
    (tmp_path / "loads").mkdir()
    assert len(rate_file(tab, 5)["answers"]) == 5  # type: ignore[arg-type]
    asked = tab.token()
    tab.run("location.reload()")
    time.sleep(0.3)
    assert tab.token() == asked  # kept by the browser
    tab.key("u")
    wait_for(lambda: tab.token() != asked, what="the question before")
    tab.answer("n", held=5)
    assert tab.token() == asked
    tab.run("document.getElementById('download').click()")
    files = wait_for(lambda: list((tmp_path / "loads").glob("ratings-a1-*.json")), what="the download")
    assert not tab.failed
    assert json.loads(files[0].read_text())["annotator"] == "a1"
    for added in (5, 0):
        monkeypatch.setattr(
            sys, "argv", ["fedattack", "annotate", "--import", str(files[0]), "--table", str(table)]
        )
        main_returns()
        assert f"5 answers in {files[0]}, {added} of them new" in " ".join(capsys.readouterr().out.split())
    assert read_table(table)["choice"].tolist() == ["same", "different", "cannot tell", "same", "different"]
    for _ in range(31):
        tab.answer("y")
    assert tab.text("#question") == "Done. Thank you."
    tab.close()


def main_returns() -> None:
    """Run the command in this process; its errors are this test's."""
    app(standalone_mode=False)


def test_bad_requests_are_one_sentence_and_exit_2(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = str(taken.getsockname()[1])
        rater, match = ("--annotator", "a1"), ("--protocol", "match", "--table", str(tmp_path / "t.csv"))
        for arguments, sentence in (
            ((*sources, *match), "--annotator is missing"),
            ((*sources, *rater), "--protocol is missing; accepted: match"),
            ((*sources, *rater, "--protocol", "identify_3"), "--protocol 'identify_3'; accepted: match"),
            ((*rater, *match), "SOURCE is missing"),
            ((sources[0], *rater, *match), "is one folder of pictures; accepted: runs, sweeps"),
            ((*sources, *rater, *match, "--ask", "class"), "--ask class goes with --protocol recognise"),
            ((*sources, *rater, *match, "--port", busy), f"--port {busy}: Address already in use"),
            ((*sources, *rater, *match, "--export", "x.pdf"), "--export 'x.pdf': the page is an .html file"),
            ((*sources, *rater, "--protocol", "match", "--table", "t.xlsx"), "appended to a .csv file"),
            ((*sources, "--import", "x.json"), "--import goes with --table alone"),
            (("--import", str(tmp_path / "x.json"), *match[2:]), "cannot read"),
            ((*sources, "--annotator", "../x", *match), "--annotator '../x': a pseudonym"),
        ):
            monkeypatch.setattr(sys, "argv", ["fedattack", "annotate", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
            told = capsys.readouterr().err
            assert ended.value.code == 2, told
            assert sentence in told
            assert told.count("\n") == 1


def report(table: Path, *more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedattack", "annotations", "report", str(table), *more])
    main_returns()


def test_the_report_on_the_terminal_and_for_machines(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, pairs = tmp_path / "t.csv", read_pairs([Path(source) for source in sources])
    file = RatingFile(table, "match")
    for name in ("a1", "a2"):
        plan = make_plan(pairs, "match", name, 0)
        for number, question in enumerate(plan.questions):
            seen = int(Path(question.told["reconstruction_path"]).stem) % 2 == 0
            option = plan.options[
                0 if question.kind == "identical" or (seen and question.kind != "wrong") else 1
            ]
            file.append(judged(question.told, option, 256, f"2025-03-01T12:{number:02d}:00+00:00"))
    report(table, monkeypatch=monkeypatch)
    told = capsys.readouterr().out
    assert "Ratings by people, protocol match: 30 pairs (15 same, 15 different)" in told
    assert re.search(r"a1 +30 of 30 +0 +0 of 3 +0 of 3 +0 of 36", told)
    assert "Krippendorff's alpha 1.000, 95 % interval [1.000, 1.000], 30 pairs" in " ".join(told.split())
    report(table, "--json", monkeypatch=monkeypatch)
    document = json.loads(capsys.readouterr().out)
    assert document["kinds"][0]["alpha"]["mean"] == 1.0
    assert document["kinds"][0]["annotators"][1]["name"] == "a2"
    monkeypatch.setattr(
        sys, "argv", ["fedattack", "annotations", "votes", str(table), "--out", str(tmp_path / "v.csv")]
    )
    main_returns()
    header, first = (tmp_path / "v.csv").read_text().splitlines()[:2]
    assert header.endswith(",k,n,undecided,share,majority")
    assert first.endswith((",2,2,0,1.0,1", ",0,2,0,0.0,0"))


def test_pairs_of_a_run_and_of_a_sweep(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "cells" / "one"
    given = {
        "dataset": "digits", "model": "mlp", "attack": "dlg", "dlg.iterations": 3, "clients": 3, "engine": "inline",
        "compressor": "none", "limit": 200, "seed": 4, "run-dir": str(run), "defense": "prune",
    }  # fmt: skip
    simulate(Config.from_mapping(given), console=Console(quiet=True), command="")
    found = read_pairs([run])
    assert len(found) == 3
    assert [pair.told for pair in read_pairs([tmp_path / "sweep"])] == [pair.told for pair in found]
    told = found[0].told
    assert {name: told[name] for name in ("dataset", "attack", "model", "defence", "compression", "seed")} == {
        "dataset": "digits", "attack": "dlg", "model": "mlp", "defence": "prune", "compression": "1", "seed": "4",
    }  # fmt: skip
    records = pd.read_csv(run / "records.csv").set_index("client")
    labels = [str(records.loc[client, "label"]) for client in range(3)]
    assert [pair.told["class_label"] for pair in found] == labels
