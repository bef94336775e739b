"""Pages in a browser: nothing that axe-core calls serious, nothing wider than a telephone, all of it on paper."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium_tabs import Chromium, chromium

from fedattack.audit import audit_membership
from fedattack.audit.membership_pool import Scored
from fedattack.config import Config
from fedattack.reporting.compare import compare, comparison_page
from fedattack.reporting.report import write_results
from fedattack.reporting.sweep.page import write_sweep
from fedattack.reporting.sweep.table import DONE, FAILED, CellOutcome, sweep_table
from fedattack.storage import RunFolder

AXE = Path(os.environ.get("AXE_CORE", "axe.min.js"))
"""The script of the npm package axe-core; with AXE_CORE its place."""

SIZES = {"desk": (1280, False, False), "telephone": (390, False, True), "dark": (390, True, True)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with pictures, a sweep and a comparison, with names as long as people choose them."""
    import datetime

    place, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    member = np.arange(60) < 30
    long = "my.package.of.attacks:AnAttackWithALongName"
    rounds = [
        {
            "round": n,
            "loss": 2.0 / n,
            "accuracy": 0.2 * n,
            "train_loss": 1.0 / n,
            "answered": 4,
            "wire_bytes": 10**6,
        }
        for n in (1, 2, 3)
    ]
    federation = {"clients": 4, "rounds": rounds, "held-out samples": 100,
                  "rejections": [{"round": 1, "client": 0, "reason": "x" * 300}]}  # fmt: skip
    folders = []
    for name, shift in (("one", 1.0), ("two", 0.2)):
        samples = {"samples": np.arange(60), "others": np.zeros(60, dtype=bool)}
        told = Scored(0, rng.normal(size=60) + shift * member, member, **samples)
        settings = {"defense": "none" if name == "one" else "clip-noise"} if name == "two" else {}
        folder = RunFolder.create(place / name, Config.from_mapping(settings))
        found = [
            audit_membership(attack, [told], statistic="loss", seconds=1.0) for attack in (long, "fedmia")
        ]
        counts = {c: {k: int(rng.integers(0, 9)) for k in range(10)} for c in range(4)}
        made = {1: torch.rand(32, 1, 8, 8), 3: torch.rand(32, 1, 8, 8)}
        write_results(folder, found, federation, label_counts=counts, notes=["note " * 40], generated=made)
        folders.append(folder.path)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    cells = [
        CellOutcome(f"c{n}-{n}", {"defense": name, "clients": "4"}, DONE, "", 1.0, summary)
        for n, (name, summary) in enumerate(zip(("none", "clip-noise"), summaries, strict=True))
    ]
    cells.append(CellOutcome("c3-3", {"defense": "other", "clients": "4"}, FAILED, "broke " * 30, 1.0))
    sweep = write_sweep(place / "sweep", sweep_table(["defense", "clients"], cells))
    now = datetime.datetime.now(datetime.UTC)
    (place / "compare.html").write_text(comparison_page(compare(folders), "fedattack compare one two", now))
    return {"report": folders[0] / "report.html", "sweep": sweep, "compare": place / "compare.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "sweep", "compare"])
def test_axe_finds_nothing(browser: Chromium, pages: dict[str, Path], name: str) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not at hand (npm pack axe-core; AXE_CORE: its axe.min.js)")
    tab = browser.tab(pages[name].as_uri())
    for width, dark, phone in SIZES.values():
        tab.screen(width, 900, 1, dark, phone)
        tab.open(pages[name].as_uri())
        tab.run(f"{AXE.read_text(encoding='utf-8')};0")
        found = json.loads(tab.run("axe.run().then(r => JSON.stringify(r.violations.map(v => [v.id, v.impact, "
                                   "v.nodes.map(n => n.html.slice(0, 200))])))"))  # fmt: skip
        assert found == []
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "sweep", "compare"])
def test_no_page_is_wider_than_its_screen(browser: Chromium, pages: dict[str, Path], name: str) -> None:
    tab = browser.tab(pages[name].as_uri())
    for width in (320, 390, 1280):
        tab.screen(width, 900, 1, False, width < 500)
        tab.open(pages[name].as_uri())
        assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        cut = "[...document.querySelectorAll('h1, h2, h3, p, dd, dt, pre, figure, li')].filter(e => e.scrollWidth > "
        assert tab.run(f"{cut} e.clientWidth + 1 && e.clientWidth).map(e => e.outerHTML.slice(0, 99))") == []
    tab.close()


@pytest.mark.slow
def test_a_report_prints_whole(browser: Chromium, pages: dict[str, Path], tmp_path: Path) -> None:
    tab = browser.tab(pages["report"].as_uri())
    tab.screen(1280, 900, 1, True, False)
    printed = tab.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    tab.close()
    path = tmp_path / "report.pdf"
    path.write_bytes(base64.b64decode(printed))
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian: apt-get install poppler-utils)")
    text = subprocess.run(
        ["pdftotext", "-layout", str(path), "-"], capture_output=True, text=True, check=True
    ).stdout
    assert "shards_per_client = 2" in text  # of the settings, which are folded on the screen
    assert "How to read this page" in text
    sheets = [page for page in text.split("\f") if page.strip()]
    assert len(sheets) < 14
    if shutil.which("pdftoppm") is not None:
        subprocess.run(["pdftoppm", "-r", "30", "-gray", str(path), str(tmp_path / "sheet")], check=True)
        shares = [_filled(sheet) for sheet in sorted(tmp_path.glob("sheet-*.pgm"))]
        assert min(shares[:-1]) > 0.5, shares  # but for the last


def _filled(sheet: Path) -> float:
    """How far down a sheet its last ink lies, as a share of its height."""
    from PIL import Image

    ink = np.asarray(Image.open(sheet)) < 200
    return float(np.nonzero(ink.any(1))[0].max() / len(ink))
