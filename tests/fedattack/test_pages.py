"""Pages as those use them who hear them, print them, or get them from Flower; and what a comparison says."""

from __future__ import annotations

import datetime
import io
import itertools
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_report import FEDERATION, reconstruction_result, scored

from fedattack.audit import AuditResult, audit_membership, audit_unlearning
from fedattack.config import Config
from fedattack.errors import ConfigError
from fedattack.metrics.membership import auc_difference
from fedattack.reporting.compare import compare, comparison_page
from fedattack.reporting.finished import Finished
from fedattack.reporting.report import write_results
from fedattack.reporting.sweep.page import write_sweep
from fedattack.reporting.sweep.table import DONE, REFUSED, CellOutcome, sweep_table
from fedattack.reporting.tracking import tracked
from fedattack.storage import RunFolder

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "fedattack" / "reporting" / "templates").iterdir())


class Tree(HTMLParser):
    """What a page holds, for rules that need no browser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.within: list[str] = []
        self.text: dict[int, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), tuple(self.within)))
        if tag not in ("meta", "img"):
            self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag

    def handle_data(self, data: str) -> None:
        place = len(self.tags) - 1
        self.text[place] = self.text.get(place, "") + data

    def all(self, *names: str) -> list[tuple[dict[str, str | None], str]]:
        found = enumerate(self.tags)
        return [(attrs, self.text.get(n, "").strip()) for n, (tag, attrs, _) in found if tag in names]


def check_page(text: str) -> Tree:
    """The rules that hold for every page."""
    page = Tree(text)
    assert page.within == []
    ((html, _),) = page.all("html")
    assert html["lang"] == "en"
    assert all(len(page.all(name)) == 1 for name in ("title", "h1", "main", "header"))
    assert not page.all("script", "link", "iframe", "object", "form")
    ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    inside = [attrs["href"] for attrs, _ in page.all("a") if str(attrs["href"]).startswith("#")]
    assert inside[0] == "#main"
    assert {str(href)[1:] for href in inside} <= set(ids)
    assert {i for i in ids if i != "main"} == {str(href)[1:] for href in inside[1:]}  # each section is named
    levels = [int(tag[1]) for tag, _, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    for tag, attrs, within in page.tags:
        if tag == "th":
            assert attrs.get("scope") == ("col" if "thead" in within else "row")
        assert tag != "td" or "tbody" in within
        assert tag != "img" or len(attrs["alt"] or "") > 20
        if "scroll" in (attrs.get("class") or "").split():
            assert attrs["tabindex"] == "0"
            assert attrs["role"] == "group"
            assert attrs["aria-label"]
        assert "on" not in {name[:2] for name in attrs}
    assert all(text for _, text in page.all("th", "h1", "h2", "h3"))
    assert len(page.all("table")) == len(page.all("thead")) == len(page.all("tbody"))
    assert len({attrs["aria-label"] for attrs, _ in page.all("div") if "aria-label" in attrs}) == len(
        [1 for attrs, _ in page.all("div") if "aria-label" in attrs]
    )
    return page


def members(shift: float, seed: int = 0) -> AuditResult:
    rng = np.random.default_rng(seed)
    member = np.arange(60) < 30
    return audit_membership(
        "fedmia", [scored(rng.normal(size=60) + shift * member, member, 2)], statistic="loss", seconds=1.0
    )


def damage(lost: float) -> AuditResult:
    after = [0.9 - lost, 0.91 - lost, 0.9 - lost]
    arms = {"before": [0.9, 0.91, 0.9], "after": after, "random": [0.89, 0.9, 0.89]}
    return audit_unlearning("unlearn-max-loss", arms, requests=5, mechanism="retrain")


def write(folder: Path, settings: dict[str, object], *results: AuditResult) -> Path:
    run = RunFolder.create(folder, Config.from_mapping(settings))
    write_results(run, results, FEDERATION)
    run.close()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, drawn = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    with drawn.context() as patched:  # what is drawn has tests of its own, and takes seconds
        patched.setattr("fedattack.reporting.report._attack_pictures", lambda *_: [])
        given: dict[str, tuple[dict[str, object], list[AuditResult]]] = {
            "bare": ({}, [reconstruction_result(0.02), members(1.0), damage(0.2)]),
            "noised": ({"defense": "clip-noise"}, [reconstruction_result(0.2), members(0.0), damage(0.01)]),
            "others": ({"seed": 1}, [members(1.0, 1)]),
            "nobody": ({}, []),
            "images": ({}, [reconstruction_result(0.05, name="ig")]),
        }
        return {
            name: write(place / name, *told) for name, told in ((n, (s, *r)) for n, (s, r) in given.items())
        }


# ---------------------------------------------------------------------- the files


@pytest.mark.slow
def test_templates_are_in_the_checkout_the_wheel_and_flowers_bundle() -> None:
    from flwr.cli.build import build_fab_from_disk
    from hatchling.builders.wheel import WheelBuilder

    names = {str(path.relative_to(ROOT)) for path in TEMPLATES if path.name.endswith(".md")}
    assert len(names) >= 7
    assert {path.name for path in TEMPLATES} - {"__pycache__"} == {Path(name).name for name in names}
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))
    assert names <= set(bundle.namelist())
    assert all(bundle.read(name) == (ROOT / name).read_bytes() for name in names)
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert names <= packed


def test_templates_alone_hold_markup() -> None:
    written = [
        path
        for path in (ROOT / "fedattack").rglob("*.py")
        if re.search(r"</(p|div|table)>", path.read_text())
    ]
    assert written == []


# ---------------------------------------------------------------------- the report


def test_a_report_follows_the_rules(runs: dict[str, Path]) -> None:
    for run in runs.values():
        check_page((run / "report.html").read_text())


def test_a_report_says_when_with_what_and_on_what(runs: dict[str, Path]) -> None:
    text = (runs["noised"] / "report.html").read_text()
    told = json.loads((runs["noised"] / "summary.json").read_text())["run"]
    assert datetime.datetime.fromisoformat(told["begun"]) <= datetime.datetime.fromisoformat(told["ended"])
    assert told["sessions"] == 1
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert told["machine"]["memory"] > 2**30
    assert re.search(r"<dt>Begun</dt><dd>20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC</dd>", text)
    for term in ("Duration", "Processor", "Graphics processor", "Versions", "Seed"):
        assert f"<dt>{term}</dt>" in text
    assert "<dt>defense.names</dt><dd>clip-noise</dd>" in text
    bare = (runs["bare"] / "report.html").read_text()
    assert "<dt>defense.names</dt>" not in bare


def test_alternative_texts_say_what_was_found(tmp_path: Path) -> None:
    report = write(tmp_path / "run", {}, reconstruction_result(0.01)) / "report.html"
    page = check_page(report.read_text())
    texts = [str(attrs["alt"]) for attrs, _ in page.all("img")]
    assert all("private images recovered, PSNR" in text and "best floor" in text for text in texts[:3])
    assert "test accuracy from 11.0 % in round 1 to 35.0 % in round 2" in texts[3]


# ---------------------------------------------------------------------- a sweep


def sweep_of(folder: Path, runs: dict[str, Path]) -> str:
    def cell(name: str, defense: str, batch: str) -> CellOutcome:
        summary = json.loads((runs[name] / "summary.json").read_text())
        labels = {"defense": defense, "batch-size": batch}
        return CellOutcome(f"{name}-{batch}", labels, DONE, "", 1.0, summary)

    cells = [cell("bare", "none", "1"), cell("noised", "=noise", "1"), cell("bare", "none", "4")]
    cells.append(CellOutcome("x", {"defense": "=noise", "batch-size": "4"}, REFUSED, "no <b>", 0.0))
    return write_sweep(folder, sweep_table(["defense", "batch-size"], cells)).read_text()


def test_a_sweep_says_what_would_change_the_verdict(runs: dict[str, Path], tmp_path: Path) -> None:
    page = check_page(sweep_of(tmp_path, runs))
    headings = [text for _, text in page.all("h2")]
    assert headings[:2] == ["Worst found, by attack", "What would change this"]
    pairs = pd.read_csv(tmp_path / "changes.csv")
    psnr = {
        n: json.loads((runs[n] / "summary.json").read_text())["attacks"]["hcgla"] for n in ("bare", "noised")
    }
    gains = {n: one["gain"]["mean"] if "gain" in one else None for n, one in psnr.items()}
    (row,) = (
        pairs[(pairs["setting"] == "defense") & (pairs["from_cell"] == "bare-1")].iloc[[0]].to_dict("records")
    )
    assert (row["from"], row["to"], row["to_cell"]) == ("none", "'=noise", "noised-1")
    assert row["moved"] == (psnr["bare"]["level"] != psnr["noised"]["level"])
    if None not in gains.values():
        assert row["change"] == pytest.approx(gains["noised"] - gains["bare"])
    same = pairs[pairs["setting"] == "batch-size"]
    assert len(same) == 3
    assert not same["moved"].any()
    assert same["change"].abs().max() == 0
    assert pd.read_csv(tmp_path / "cells.csv")["axis.defense"].tolist()[3] == "'=noise"


# ---------------------------------------------------------------------- a comparison


def test_runs_are_compared(runs: dict[str, Path]) -> None:
    found = compare([runs["bare"], runs["noised"]])
    c = found.document
    settings = {row["setting"]: row["values"] for row in c["settings"]}
    assert settings == {"defense.names": ["–", "clip-noise"]}
    told = {(row["attack"], row["metric"]): row for row in c["differences"]}
    frames = [Finished.read(runs[name]).attack("hcgla") for name in ("bare", "noised")]
    expected = float((frames[1]["psnr"].to_numpy() - frames[0]["psnr"].to_numpy()).mean())
    psnr = told["hcgla", "psnr"]
    assert psnr["mean"] == pytest.approx(expected)
    assert psnr["low"] < psnr["mean"] < psnr["high"] < 0
    assert (psnr["units"], psnr["reading"]) == (4, "less found")
    assert told["fedmia", "auc"]["reading"] == "less found"
    assert told["unlearn-max-loss", "damage"]["mean"] == pytest.approx(-19.0)
    figures = {(row["attack"], row["metric"]): row["values"] for row in c["figures"]}
    assert figures["hcgla", "psnr"][0]["mean"] == pytest.approx(float(frames[0]["psnr"].mean()))
    assert c["text"].startswith("hcgla finds less in noised than in bare (PSNR, dB -")
    page = check_page(comparison_page(found, "fedattack compare a b", datetime.datetime.now(datetime.UTC)))
    assert [text for _, text in page.all("h2")][:3] == [
        "Runs",
        "Settings that differ",
        "Differences, of the same victims",
    ]


def test_other_victims_are_not_paired(runs: dict[str, Path]) -> None:
    c = compare([runs["bare"], runs["others"]]).document
    assert c["differences"] == []
    assert c["unpaired"] == ["others and bare: no paired differences: other seeds, so other victims"]
    assert {row["attack"] for row in c["figures"]} == {"fedmia"}


def test_a_familys_only_attacks_are_compared_whatever_they_are_called(runs: dict[str, Path]) -> None:
    c = compare([runs["bare"], runs["images"]]).document
    assert {row["attack"] for row in c["differences"]} == {"hcgla / ig"}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["bare"], "compare needs two runs or more; 1 given"),
        (["bare", "bare"], "is given twice; give different runs"),
        (["bare", "nobody"], "RUN 'nobody': was not attacked"),
        (
            ["others", "images"],
            "the runs have no question in common: others asked membership; images asked recons",
        ),
        (["bare", ".."], "is no run folder"),
        (["bare", "nowhere"], "is no folder; give the folder of a finished run"),
    ],
)
def test_what_cannot_be_compared(runs: dict[str, Path], names: list[str], sentence: str) -> None:
    place = runs["bare"].parent
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        compare([place / name for name in names])


def test_auc_difference_against_definitions() -> None:
    """DeLong's components by their definition, pair by pair; a sample as its own group."""
    rng = np.random.default_rng(3)
    member = np.arange(90) < 40
    a = np.round(rng.normal(size=90) + member, 1)
    b = np.round(0.5 * a + rng.normal(size=90), 1)

    def components(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wins = np.sign(scores[member][:, None] - scores[~member][None]) / 2 + 0.5
        return wins.mean(1), wins.mean(0)

    (a10, a01), (b10, b01) = components(a), components(b)
    variance = np.var(a10 - b10, ddof=1) / 40 + np.var(a01 - b01, ddof=1) / 50
    found = auc_difference(a, b, member)
    assert found.mean == pytest.approx(roc_auc_score(member, a) - roc_auc_score(member, b))
    reach = (found.high - found.low) / 2
    assert reach == pytest.approx(1.959964 * variance**0.5, rel=0.02)  # it divides by n - 1 on each side
    grouped = auc_difference(a, b, member, np.arange(90))
    assert (grouped.low, grouped.high) == (found.low, found.high)
    twice = auc_difference(np.tile(a, 2), np.tile(b, 2), np.tile(member, 2), np.tile(np.arange(90), 2))
    assert (twice.high - twice.low) / 2 == pytest.approx(reach, rel=1e-9)  # a copy of everybody tells nothing
    assert not auc_difference([1, 2], [2, 1], [True, False]).known


# ---------------------------------------------------------------------- a tracker


def test_figures_for_a_tracker(runs: dict[str, Path]) -> None:
    run = Finished.read(runs["noised"])
    told, attack = tracked(run), run.summary["attacks"]["hcgla"]
    assert told.metrics["hcgla/psnr/mean"] == attack["metrics"]["psnr"]["mean"]
    assert (
        told.metrics["hcgla/floor/auxiliary mean/psnr"] == attack["floors"]["auxiliary mean"]["psnr"]["mean"]
    )
    assert told.rounds["federation/accuracy"] == [(1, 0.11), (2, 0.35)]
    assert told.params["defense.names"] == "clip-noise"
    assert told.tags["fedattack.verdict.fedmia"] == run.summary["attacks"]["fedmia"]["verdict"][:500]
    assert all(re.fullmatch(r"[\w\-. /:]+", name) for name in [*told.metrics, *told.rounds, *told.tags])
    assert max(map(len, [*told.params.values(), *told.tags.values()])) <= 560


def test_without_mlflow_it_says_how_to_install_it(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from simulations.cli.export import run_export

    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedattack\[mlflow\]'"):
        run_export([runs["bare"]], "mlflow", None, "x", False, Console(quiet=True))
    with pytest.raises(ConfigError, match="unknown tracker 'mlfow'; did you mean 'mlflow'"):
        run_export([runs["bare"]], "mlfow", None, "x", False, Console(quiet=True))


@pytest.mark.slow
def test_mlflow_reads_back_what_was_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")
    from rich.console import Console

    from simulations.cli.export import run_export

    uri, run = f"file:{tmp_path / 'mlruns'}", Finished.read(runs["bare"])
    for pictures in (False, True):
        run_export([runs["bare"]], "mlflow", uri, "leaks", pictures, Console(quiet=True))
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("leaks").experiment_id])
    assert len(found) == 2
    names = [{one.path for one in client.list_artifacts(each.info.run_id)} for each in found]
    assert sorted(names, key=len) == [{"summary.json"}, {"summary.json", "report.html", "figures"}]
    for each in found:
        assert (
            each.data.metrics["hcgla/psnr/mean"] == run.summary["attacks"]["hcgla"]["metrics"]["psnr"]["mean"]
        )
        assert each.data.params == tracked(run).params
        assert each.data.params
        assert [m.value for m in client.get_metric_history(each.info.run_id, "federation/accuracy")] == [
            0.11,
            0.35,
        ]
