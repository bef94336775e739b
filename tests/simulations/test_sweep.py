"""Sweeps: every combination, each a run of its own; what fails or does not apply stops nobody; killed ones go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from adversaries.base import Progress, no_progress
from adversaries.needs import Facts
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.audit.family import get_family
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.reporting.sweep import figures
from fedattack.reporting.sweep.page import write_sweep
from fedattack.reporting.sweep.table import CellOutcome, over_seeds, sweep_table
from simulations.studies import sweep as module
from simulations.studies.sweep import Sweep, run_sweep

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Guess(ReconstructionAttack):
    """Answers one shade, or fails on purpose."""

    shade: float = 0.5
    broken: bool = False

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse pruned updates."""
        if "prune" in scenario.defense.names and self.shade == 0.0:
            raise NotApplicable("no black guesses about pruned updates")

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """The shade."""
        if self.broken:
            raise ZeroDivisionError("as told")
        sizes = [(o.num_examples, *o.scenario.image_shape) for o in observations]
        return [Reconstruction(torch.full(s, self.shade), torch.zeros(s[0]).long(), 0.0) for s in sizes]


def document(**axes: list[Any]) -> dict[str, Any]:
    settings = {
        "dataset": "digits", "limit": 120, "model": "tiny-cnn", "clients": 2, "engine": "inline", "threads": 1,
        "compressor": "none", "attack": "test_sweep:Guess",
    }  # fmt: skip
    return {"settings": settings, "axes": axes}


SHADES = [
    {"label": "grey", "attack.shade": 0.5},
    {"label": "black", "attack.shade": 0.0},
    {"label": "broken", "attack.broken": True},
]


def comparable(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "cells.csv").drop(columns="seconds")


# ---------------------------------------------------------------------- what a file asks for


def test_cells_are_all_combinations_with_labels() -> None:
    sweep = Sweep.from_mapping(
        document(defense=["none", "prune", {"defense": "clip-noise", "defense.noise": 0.1}], seed=[0, 1])
    )
    assert sweep.axes == ("defense", "seed")
    assert [tuple(c.labels.values()) for c in sweep.cells][:3] == [
        ("none", "0"),
        ("none", "1"),
        ("prune", "0"),
    ]
    assert sweep.cells[-1].labels == {"defense": "defense clip-noise, defense.noise 0.1", "seed": "1"}
    assert len({cell.name for cell in sweep.cells}) == 6
    assert sweep.engine.name == "inline"
    config = sweep.cells[-1].config(Path("x"), 1)
    assert (config.defense.names, config.seed, config.engine.threads) == (("clip-noise",), 1, 1)


def test_names_do_not_depend_on_the_engine_or_on_the_other_cells() -> None:
    short, long = document(seed=[1]), document(seed=[0, 1])
    long["settings"] |= {"engine": "ray", "actors": 3}
    assert Sweep.from_mapping(short).cells[0].name == Sweep.from_mapping(long).cells[1].name


def test_parameters_of_what_a_cell_does_not_use_are_left_out() -> None:
    asked = document(attack=["hcgla", "fedmia"], defense=["none", "prune", "clip-noise"])
    asked["settings"] |= {
        "hcgla.iterations": 3, "defense.noise": 0.5, "defense.prune.share": 0.1, "attack.iterations": 9,
    }  # fmt: skip
    for cell in Sweep.from_mapping(asked).cells:
        config = cell.config(Path("x"), 1)
        names, options = config.defense.names, config.defense
        assert config.attack.options == (
            {"hcgla": {"iterations": 3}} if "hcgla" in config.attack.names else {}
        )
        assert bool(config.attack.shared_options) == ("hcgla" in config.attack.names)
        assert options.shared_options == ({"noise": 0.5} if "clip-noise" in names else {})
        assert options.options == ({"prune": {"share": 0.1}} if "prune" in names else {})


def test_gates_are_an_axis_as_defences_are() -> None:
    asked = document(gates=["none", "digest,rate", "cap"])
    asked["settings"] |= {"gates.rate.limit": 3, "gates.factor": 4.0}  # the cap's, or the loss's
    gates = [cell.config(Path("x"), 1).gates for cell in Sweep.from_mapping(asked).cells]
    assert [one.names for one in gates] == [(), ("digest", "rate"), ("cap",)]
    assert [one.options for one in gates] == [{}, {"rate": {"limit": 3}}, {}]
    assert [one.shared_options for one in gates] == [{}, {}, {"factor": 4.0}]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[axes]\nseed = 3", "expected a list"),
        ("[axes]\nseed = []", "expected a list"),
        ("[axis]\nseed = [1]", "found axis"),
        ("", "it is empty"),
        ("[axes]\nseed = [1, 1]", "called the same"),
        ("[axes]\nb=[{label='x', seed = 5}, {label='y', seed = 5}]", "same settings"),
        ("[axes]\nseed = [", "not readable TOML"),
        (f"[axes]\nseed = {list(range(200))}\nclients = {list(range(1, 100))}", "19,800 cells"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Sweep.from_toml(path)
    assert part in str(caught.value)
    with pytest.raises(ConfigError, match="does not exist"):
        Sweep.from_toml(tmp_path / "none.toml")


def test_a_sweep_without_a_possible_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'prune'"):
        run_sweep(Sweep.from_mapping(document(defense=["prun"])), tmp_path)


# ---------------------------------------------------------------------- running it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two defences and three attackers, one of which fails and one of which is refused once."""
    folder = tmp_path_factory.mktemp("sweep")
    run_sweep(Sweep.from_mapping(document(defense=["none", "prune"], shade=SHADES)), folder)
    return folder


def test_faults_are_recorded_and_stop_nobody(finished: Path) -> None:
    table = comparable(finished).set_index(["axis.defense", "axis.shade"])
    assert table.loc[("none", "grey"), "status"] == "done"
    assert table.loc[("none", "grey"), "gain"] <= 0.0
    assert table.loc[("none", "grey"), "accuracy_low"] < table.loc[("none", "grey"), "accuracy_high"]
    assert table.loc[("prune", "black"), "status"] == "not applicable"
    assert table.loc[("prune", "black"), "reason"].endswith("no black guesses about pruned updates")
    for defense in ("none", "prune"):
        assert table.loc[(defense, "broken"), "status"] == "failed"
        assert "ZeroDivisionError: as told (test_sweep.py:" in table.loc[(defense, "broken"), "reason"]
    assert pd.read_parquet(finished / "cells.parquet").shape[0] == 6


def test_the_page_links_to_every_run(finished: Path) -> None:
    page = (finished / "index.html").read_text()
    for cell in comparable(finished).query("status == 'done'")["cell"]:
        assert f'href="cells/{cell}/report.html"' in page
        assert (finished / "cells" / cell / "report.html").is_file()
    assert "no black guesses about pruned updates" in page
    for name in ("leakage", "utility"):
        picture = Image.open(finished / "figures" / f"reconstruction-{name}.png")
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_killed_sweep_goes_on_and_ends_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep.from_mapping(document(defense=["none", "prune"], shade=SHADES))
    real, begun, kills = module.run_cell, [], iter([False, True])

    def killed(cell: Any, *arguments: Any) -> Any:
        begun.append(cell.name)
        if next(kills, False):
            raise KeyboardInterrupt
        return real(cell, *arguments)

    monkeypatch.setattr(module, "run_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path)
    first = begun[0]
    before = (tmp_path / "cells" / first / "summary.json").stat().st_mtime_ns
    run_sweep(sweep, tmp_path)
    assert begun.count(first) == 1
    assert (tmp_path / "cells" / first / "summary.json").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(comparable(tmp_path), comparable(finished))
    # A third time, only what failed or was refused is tried again.
    begun.clear()
    run_sweep(sweep, tmp_path)
    assert len(begun) == 3


# ---------------------------------------------------------------------- tables and figures of any shape


def summary(psnr: float, accuracy: float | None = 0.8) -> dict[str, Any]:
    mean = {"mean": psnr, "worst": psnr, "low": None, "high": None}
    return {
        "federation": {"rounds": [{"accuracy": accuracy, "loss": 1.0}], "held-out samples": 50, "privacy": {}},
        "attacks": {
            "a": {
                "family": "reconstruction", "level": "leak", "verdict": "", "seconds": 1.0, "images": 2, "k": 5.0,
                "metrics": {"psnr": mean, "ssim": mean}, "best_floor": "prior", "floors": {"prior": {"psnr": mean}},
                "above_best_floor": {"mean": psnr - 12, "low": None, "high": None}, "recovered": 0,
                "labels": {"right": 1, "of": 2},
            }
        },
    }  # fmt: skip


def outcomes(axes: Mapping[str, int], **more: Any) -> list[CellOutcome]:
    names = list(axes)
    places = np.ndindex(*axes.values())
    return [
        CellOutcome(
            f"cell{number}",
            {axis: f"{axis}{value}" for axis, value in zip(names, place, strict=True)},
            "done",
            "",
            1.0,
            summary(10.0 + number, **more),
        )
        for number, place in enumerate(places)
    ]


@pytest.mark.parametrize(
    "axes",
    [
        {"seed": 2},
        {"defense": 1},
        {"defense": 4, "seed": 2},
        {"batch-size": 2, "defense": 2, "rounds": 3, "x": 4},
    ],
)
def test_figures_of_any_number_of_axes(axes: dict[str, int]) -> None:
    table = sweep_table(list(axes), outcomes(axes))
    for draw in (figures.heat_map, figures.utility_leakage):
        figure = draw(table, "reconstruction")
        assert figure.axes
    if len(axes) == 4:
        shown = figures.heat_map(table, "reconstruction").get_suptitle()
        assert "how far" in shown.lower()


def test_seeds_are_averaged_in_the_heat_map() -> None:
    table = sweep_table(["defense", "seed"], outcomes({"defense": 2, "seed": 2}))
    figure = figures.heat_map(table, "reconstruction")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["-1.5\nbut leaks", "+0.5"]  # the verdict of every run says that it leaks
    assert "mean of 2 seeds" in figure.get_suptitle().replace("\n", " ")


def test_what_leaks_below_its_floor_is_marked() -> None:
    found = outcomes({"defense": 3})
    levels = ("none", "partial", "leak")
    for one, level in zip(found, levels, strict=True):
        one.summary["attacks"]["a"] |= {
            "level": level,
            "above_best_floor": {"mean": -2.0, "low": None, "high": None},
        }
    table = sweep_table(["defense"], found)
    axes = figures.heat_map(table, "reconstruction").axes[0]
    assert [text.get_text() for text in axes.texts] == ["-2.0", "-2.0\nbut leaks", "-2.0\nbut leaks"]
    rings = [
        line for line in figures.utility_leakage(table, "reconstruction").axes[0].lines if line.get_ms() == 17
    ]
    assert len(rings) == 2


def test_seeds_are_told_together(tmp_path: Path) -> None:
    table = sweep_table(["defense", "seed"], outcomes({"defense": 2, "seed": 3}))
    rows = over_seeds(table)
    column = table.frame[get_family("reconstruction").leakage.column]
    assert [row["axis.defense"] for row in rows] == ["defense0", "defense1"]
    for row, values in zip(rows, (column[:3], column[3:]), strict=True):
        wanted = stats.t.interval(0.95, 2, values.mean(), values.std(ddof=1) / 3**0.5)
        assert (row["seeds"], row["worst"]) == (3, values.max())
        assert (row["low"], row["high"]) == pytest.approx(wanted)
    page = write_sweep(tmp_path, table).read_text()
    assert "Over seeds" in page
    assert len((tmp_path / "seeds.csv").read_text().splitlines()) == 3
    assert over_seeds(sweep_table(["defense"], outcomes({"defense": 2}))) == []


def test_without_evaluation_there_is_no_utility() -> None:
    table = sweep_table(["defense"], outcomes({"defense": 2}, accuracy=None))
    assert table.frame["accuracy"].isna().all()
    assert table.families == ["reconstruction"]


# ---------------------------------------------------------------------- from the shell


FILE = """
[settings]
dataset = "digits"
limit = 200
image-size = 16
classes = 500
clients = 2
threads = 1
actors = 2
hcgla.method = "matching"
hcgla.iterations = 20

[axes]
attack = ["hcgla"]
defense = ["none", "prune"]
batch-size = [1, 2]
"""


def shell(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "simulations.run", "sweep", *arguments]


@pytest.mark.slow
@pytest.mark.ray
def test_ray_and_a_killed_sweep_find_the_same(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(FILE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    file = str(tmp_path / "small.toml")

    def run(*arguments: str) -> None:
        done = subprocess.run(
            shell(file, *arguments),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    run("--engine", "inline", "--out", "one")
    run("--engine", "ray", "--out", "two")
    pd.testing.assert_frame_equal(comparable(tmp_path / "one"), comparable(tmp_path / "two"))
    command = shell(file, "--engine", "inline", "--out", "killed")
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "killed").glob("cells/*.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "cells.csv").exists(), "the sweep must have been killed before its end"
    run("--engine", "inline", "--out", "killed")
    pd.testing.assert_frame_equal(comparable(tmp_path / "one"), comparable(tmp_path / "killed"))
