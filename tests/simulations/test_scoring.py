"""Metrics by name in runs, sweeps and scores; a run's images are scored as floats, or said to be 8 bit."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from fedattack.config import Config, MetricConfig
from fedattack.errors import ConfigError, DataError
from fedattack.metrics import METRICS, ImageMetric, Pairs
from fedattack.storage.plain import read_json
from simulations.cli.catalogue import catalogue, settings_tables
from simulations.pipeline import simulate
from simulations.studies.scoring import score_sources
from simulations.studies.sweep import Sweep, run_sweep

BRIGHTNESS = "test_scoring:Brightness"


@dataclass
class Brightness(ImageMetric):
    """How far apart the brightness of two images is.

    Parameters
    ----------
    scale : float
        What the difference is multiplied by.
    """

    title: ClassVar[str] = "brightness apart"
    unit: ClassVar[str] = "lux"
    higher: ClassVar[bool] = False

    scale: float = 1.0

    def scores(self, pairs: Pairs) -> torch.Tensor:
        """Difference of the means."""
        return self.scale * (pairs.images.mean((1, 2, 3)) - pairs.truth.mean((1, 2, 3))).abs().double()


@dataclass
class Whole(ImageMetric):
    """Deviation of the answers' pixels over that of the private images': one figure of all."""

    title: ClassVar[str] = "spread"
    pooled: ClassVar[bool] = True

    def scores(self, pairs: Pairs) -> torch.Tensor:
        """One ratio."""
        return (pairs.images.std() / pairs.truth.std()).double()


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {
        "dataset": "digits", "limit": 160, "model": "tiny-cnn", "clients": 4, "engine": "inline", "threads": 1,
        "compressor": "none", "attack": "test_sweep:Guess", "run-dir": str(folder), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "run"
    chosen = {"metrics": f"psnr,regcorr,{BRIGHTNESS},test_scoring:Whole", "metric.Brightness.scale": 2.0}
    simulate(Config.from_mapping(settings(folder, **chosen)))
    return folder


def score(sources: list[Path], names: str, out: Path, **options: object) -> tuple[Path, str]:
    console = Console(file=io.StringIO(), width=100)
    chosen = Config.from_mapping({"metrics": names} | {f"metric.{k}": v for k, v in options.items()}).metric
    page = score_sources(sources, chosen, out, console=console)
    return page, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_metric_is_one_class(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = pd.read_csv(run / "records.csv")
    assert np.isfinite(records[BRIGHTNESS]).all()
    assert np.isfinite(records[f"floor.flat grey.{BRIGHTNESS}"]).all()
    assert np.isfinite(records[f"control_{BRIGHTNESS}"]).all()
    np.testing.assert_array_equal(
        records[BRIGHTNESS], records[f"floor.flat grey.{BRIGHTNESS}"]
    )  # it answered grey
    summary = read_json(run / "summary.json")["attacks"]["test_sweep:Guess"]
    described = summary["metrics"][BRIGHTNESS]
    assert described["worst"] == pytest.approx(records[BRIGHTNESS].max())  # less means more alike
    assert summary["metrics"]["test_scoring:Whole"]["mean"] == 0.0
    assert summary["floors"]["flat grey"]["test_scoring:Whole"]["mean"] == 0.0
    page = (run / "report.html").read_text()
    assert "brightness apart, lux" in page
    assert "spread" in page
    monkeypatch.setitem(METRICS._targets, "brightness", BRIGHTNESS)
    assert ("brightness", Brightness.__doc__.partition("\n")[0]) in catalogue()["Metrics"]
    rows = settings_tables("brightness")["Metric brightness"]
    assert rows == [("metric.brightness.scale", "", "1.0", "What the difference is multiplied by")]
    page, shown = score([run], "brightness", tmp_path / "scores", **{"brightness.scale": 2.0})
    assert "brightness apart, lux" in page.read_text()
    assert "brightness apart, lux" in shown
    again = pd.read_csv(tmp_path / "scores" / "records.csv")
    np.testing.assert_array_equal(again["brightness"], records[BRIGHTNESS])


def test_a_metric_in_a_sweep_and_in_its_scores(tmp_path: Path) -> None:
    chosen = {"metrics": f"psnr,{BRIGHTNESS}", "metric.scale": 2.0, "attack": "test_sweep:Guess"}
    document = {"settings": settings(tmp_path) | chosen, "axes": {"attack.shade": [0.25, 0.5]}}
    document["settings"].pop("run-dir")
    table = run_sweep(Sweep.from_mapping(document), tmp_path / "sweep")
    column = table.frame[BRIGHTNESS]
    assert column.notna().all()
    assert table.frame[f"floor_{BRIGHTNESS}"].notna().all()
    page = (tmp_path / "sweep" / "index.html").read_text()
    assert "brightness apart, lux" in page
    assert "floor: brightness apart, lux" in page
    page_again, _ = score([tmp_path / "sweep"], BRIGHTNESS, tmp_path / "again", scale=1.0)
    frame = pd.read_parquet(tmp_path / "again" / "cells.parquet")
    np.testing.assert_allclose(2 * frame[BRIGHTNESS], column)
    assert (page_again.parent / "cells" / frame["cell"][0] / "report.html").is_file()
    assert f'href="cells/{frame["cell"][0]}/report.html"' in page_again.read_text()


def test_scores_of_a_run_are_those_of_its_floats(run: Path, tmp_path: Path) -> None:
    _, shown = score([run], "psnr,regcorr,mse", tmp_path / "scores")
    assert "8 bit" not in shown
    there, here = (pd.read_csv(place / "records.csv") for place in (run, tmp_path / "scores"))
    for name in ("psnr", "ssim", "control_psnr", "floor.auxiliary mean.psnr", "k", "own_rank", "label_right"):
        np.testing.assert_array_equal(there[name], here[name])
    first, second = (
        read_json(place / "summary.json")["attacks"]["test_sweep:Guess"]
        for place in (run, tmp_path / "scores")
    )
    assert first["verdict"] == second["verdict"]
    assert first["threat"] == second["threat"]


def test_without_its_data_a_run_is_scored_by_its_pictures_and_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise DataError("setting 'data.dir' = '/nowhere': there is no such folder")

    monkeypatch.setattr("fedattack.data.load.load_dataset", gone)
    monkeypatch.setattr("fedattack.data.world.load_dataset", gone)
    _, shown = score([run], "psnr", tmp_path / "scores")
    assert "8 bit" in shown
    assert "the data set is not at hand" in shown.replace("\n", " ")
    there, here = (pd.read_csv(place / "records.csv") for place in (run, tmp_path / "scores"))
    np.testing.assert_allclose(there["psnr"], here["psnr"], atol=0.2)


def test_a_run_whose_data_changed_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    changed = next(copy.glob("images/*/*-original.png"))
    Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
    with pytest.raises(DataError, match="the data have changed since"):
        score([copy], "psnr", tmp_path / "scores")


def pictures(folder: Path, count: int = 6, size: int = 12, seed: int = 0, mode: str = "RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (size, size, 3) if mode == "RGB" else (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_two_folders(tmp_path: Path) -> None:
    originals = pictures(tmp_path / "originals")
    same, other = shutil.copytree(originals, tmp_path / "same"), pictures(tmp_path / "other", seed=1)
    page, shown = score([originals, Path(same), other], "psnr,regcorr", tmp_path / "scores")
    frame = pd.read_csv(tmp_path / "scores" / "records.csv").set_index("attack")
    assert np.isinf(frame.loc["same", "psnr"]).all()
    np.testing.assert_allclose(frame.loc["same", "regcorr"], 1.0)
    assert frame.loc["other", "psnr"].max() < 12
    told = read_json(tmp_path / "scores" / "summary.json")["attacks"]
    levels = {name: one["level"] for name, one in told.items()}
    assert levels["same"] == "leak"
    assert levels["other"] not in ("leak", "partial")
    assert "are 8 bit" in shown
    assert "6 of 6" in page.read_text()


def test_bad_sources_are_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    originals = pictures(tmp_path / "originals")
    fewer, larger = pictures(tmp_path / "fewer", 5), pictures(tmp_path / "larger", 6, 13)
    grey = pictures(tmp_path / "grey", mode="L")
    twice = Path(shutil.copytree(originals, tmp_path / "twice"))
    Image.open(twice / "0.png").save(twice / "0.bmp")
    moving = Path(shutil.copytree(originals, tmp_path / "moving"))
    frames = [Image.fromarray(np.full((12, 12), v, dtype=np.uint8)) for v in (0, 99)]
    (moving / "0.png").unlink()
    frames[0].save(moving / "0.gif", save_all=True, append_images=frames[1:])
    torn = Path(shutil.copytree(originals, tmp_path / "torn"))
    (torn / "3.png").write_bytes((torn / "3.png").read_bytes()[:60])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "summary.json").unlink()
    cases: list[tuple[list[Path], str, str]] = [
        ([originals, fewer], "psnr", "has no picture of its name"),
        ([originals, larger], "psnr", "have one size|has 12x12"),
        ([grey, originals], "psnr", "has colours and the originals are grey"),
        ([originals, twice], "psnr", "have one name"),
        ([originals, moving], "psnr", "has 2 frames"),
        ([originals, torn], "psnr", "cannot read picture"),
        ([originals], "psnr", "one folder of pictures"),
        ([originals, tmp_path / "absent"], "psnr", "no such folder"),
        ([unfinished], "psnr", "did not finish"),
        ([run, originals], "psnr", "one run or sweep is scored at a time"),
        ([originals, originals], "ms-ssim", "ms-ssim.*161"),
        ([originals, originals], "sim", "unknown metric 'sim'; did you mean 'ssim'"),
    ]
    for sources, names, words in cases:
        with pytest.raises((DataError, ConfigError), match=words):
            score(sources, names, tmp_path / "out")
        assert not (tmp_path / "out" / "report.html").exists()
    full = pictures(tmp_path / "full")
    with pytest.raises(ConfigError, match="is not empty, and holds no scores"):
        score([originals, full], "psnr", full)
    with pytest.raises(ConfigError, match=r"'metric\.names' is empty"):
        score_sources([originals, full], MetricConfig(names=()), tmp_path / "out")


def test_a_score_ranks_the_same_photographs_as_its_run(tmp_path: Path) -> None:
    rng, people = np.random.default_rng(3), tmp_path / "people"
    for who in range(12):
        face = rng.integers(60, 200, (12, 12))
        for number in range(8):
            pixels = face + rng.normal(0, 8, (12, 12))
            (people / f"p{who:02}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                people / f"p{who:02}" / f"{number}.png"
            )
    told = {"dataset": "image-folder", "data-dir": str(people), "data.groups": "folder", "limit": ""}
    run = tmp_path / "run"
    simulate(Config.from_mapping(settings(run, **told) | {"attack": "analytic", "model": "mlp"}))
    score([run], "mse", tmp_path / "scores")
    there, here = (
        read_json(place / "summary.json")["attacks"]["analytic"] for place in (run, tmp_path / "scores")
    )
    assert there["person"]["of"] == 4
    assert there["person"]["first"] == 4  # another photograph of the same person is recognised
    assert here["person"] == there["person"]
    assert here["verdict"] == there["verdict"]
