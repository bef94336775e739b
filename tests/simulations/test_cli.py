"""The command as a person meets it: help, lists, errors with exit code 2, a run that ends in a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fedattack.config import Config
from fedattack.defenses import build_defenses
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.defenses.transform import Transform
from simulations.cli.catalogue import settings_tables
from simulations.run import main

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "simulations" / "run.py"), *arguments],
        cwd=cwd, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


def test_help_fits_a_screen() -> None:
    shown = command("--help")
    assert shown.returncode == 0
    assert len(shown.stdout.splitlines()) <= 50
    for word in ("--attack", "--compression", "--engine", "list", "settings"):
        assert word in shown.stdout


def test_list_names_everything_with_a_line_each() -> None:
    shown = command("list").stdout
    for word in (
        "hcgla",
        "fedmia",
        "unlearn-max-loss",
        "retrain",
        "faces",
        "qmnist",
        "lenet-zhu",
        "resnet34",
        "krum",
    ):
        assert word in shown


def test_settings_lists_attack_parameters() -> None:
    shown = command("settings").stdout
    for word in ("compression.rate", "--compression", "hcgla.iterations", "federation.clients"):
        assert word in shown
    assert "defense.clip-noise.clip_norm" in shown  # long names are not broken


def test_parameters_are_explained_by_their_docstrings() -> None:
    tables = settings_tables()
    meanings = {name: meaning for rows in tables.values() for name, _, _, meaning in rows}
    assert meanings["defense.prune.scope"] == "layer | global"
    assert meanings["dlg.patience"].startswith("Iterations without a better loss")  # from a base class
    own = [name for title, rows in tables.items() if title != "Settings of a run" for name, *_ in rows]
    unexplained = [name for name in own if not meanings[name]]
    assert not unexplained


def test_parameters_can_be_none_and_come_back(tmp_path: Path) -> None:
    given = {"attack": "hcgla", "defense": "clip-noise,transform", "engine": "inline"}
    empty = {"hcgla.start_image": "", "defense.clip-noise.clip_norm": "", "defense.transform.policy": ""}
    config = Config.from_mapping(given | empty)
    (tmp_path / "config.toml").write_text(config.to_toml())
    for read in (config, Config.from_toml(tmp_path / "config.toml")):
        clip, transform = build_defenses(read.defense).values()
        assert isinstance(clip, ClipNoise)
        assert isinstance(transform, Transform)
        assert (clip.clip_norm, transform.policy) == (None, "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--attack", "hcgal"], "did you mean 'hcgla'"),
        (["--dataset", "facse"], "did you mean 'faces'"),
        (["--model", "lenet"], "did you mean 'lenet-zhu'"),
        (["--strategy", "fedavgg"], "did you mean 'fedavg"),
        (["--compressor", "topq"], "did you mean 'topk'"),
        (["--compression", "0"], "greater than 0"),
        (["--compression", "2"], "less than or equal to 1"),
        (["--dataset", "mnist"], "data.dir"),
        (["--dataset", "mnist", "--data-dir", "no/such/folder"], "no/such/folder"),
        (["--clients", "5000"], "5000"),
        (["--set", "nonsense"], "NAME=VALUE"),
        (["--set", "hcgla.itrations=3", "--attack", "hcgla"], "hcgla.iterations"),
        (["--set", "hcgla.iterations=3"], "not in setting 'attack.names'"),
        (["--config", "no-such.toml"], "does not exist"),
        (["--device", "cuda:77"], "engine.device"),
        (["--attack", "hcgla", "--compressor", "sign"], "compression.name = 'sign'"),
    ],
)
def test_mistakes_are_answered_in_one_message(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["fedattack", *arguments, "--engine", "inline"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2, told
    assert part in told.replace("\n", " ")
    assert not list(tmp_path.iterdir()), "nothing may be left behind by a request that was refused"


def test_a_mistake_ends_the_process(tmp_path: Path) -> None:
    answer = command("--dataset", "mnist", "--engine", "inline", cwd=tmp_path)
    assert answer.returncode == 2
    assert "data.dir" in answer.stderr
    assert "Traceback" not in answer.stderr


SMALL = [
    "--engine", "inline", "--dataset", "digits", "--image-size", "16", "--clients", "4", "--classes", "1000",
]  # fmt: skip


@pytest.mark.slow
def test_three_seats_in_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = command(
        "--attack", "hcgla,fedmia,unlearn-max-loss", *SMALL, "--batch-size", "1", "--victims", "2",
        "--run-dir", str(folder), "--save-observations",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["attacks"]) == {"hcgla", "fedmia", "unlearn-max-loss"}
    for attack in summary["attacks"].values():
        assert attack["verdict"]
        assert attack["floors"]
        assert attack["seconds"] >= 0
    hcgla = summary["attacks"]["hcgla"]
    assert hcgla["k"] == round(0.001 * 200_536)
    assert {"flat grey", "auxiliary mean"} <= set(hcgla["floors"])
    assert {"mean", "worst"} <= set(hcgla["metrics"]["psnr"])
    records = pd.read_csv(folder / "records.csv")
    assert (records["attack"] == "hcgla").sum() == 2
    assert len(pd.read_parquet(folder / "records.parquet")) == len(records)
    report = (folder / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "data:image/png;base64," in report
    assert (folder / "config.toml").is_file()
    assert "round 1" in (folder / "log.txt").read_text()

    # The same folder again: everything is there, so nothing is done twice, and the figures are the same.
    again = command(
        "--attack", "hcgla,fedmia,unlearn-max-loss", *SMALL, "--batch-size", "1", "--victims", "2",
        "--run-dir", str(folder), "--save-observations",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    repeated = json.loads((folder / "summary.json").read_text())
    assert repeated["attacks"]["hcgla"] == summary["attacks"]["hcgla"]

    # Another configuration is refused.
    other = command("--attack", "hcgla", *SMALL, "--seed", "1", "--run-dir", str(folder))
    assert other.returncode == 2
    assert "other settings" in other.stderr.replace("\n", " ")

    # Saved observations, attacked later without the federation, give the same reconstruction.
    later = command(
        "attack", str(folder / "observations"), "--attack", "hcgla", "--engine", "inline",
        "--truth", str(folder / "truth"), "--run-dir", str(tmp_path / "later"),
    )  # fmt: skip
    assert later.returncode == 0, later.stderr
    scored = json.loads((tmp_path / "later" / "summary.json").read_text())
    assert scored["attacks"]["hcgla"]["metrics"]["psnr"] == hcgla["metrics"]["psnr"]

    unscored = command(
        "attack",
        str(folder),
        "--attack",
        "hcgla",
        "--engine",
        "inline",
        "--run-dir",
        str(tmp_path / "unscored"),
    )
    assert unscored.returncode == 0, unscored.stderr
    # All that was saved, also what fedmia alone saw.
    assert len(list((tmp_path / "unscored" / "images" / "hcgla").glob("*.png"))) == 4
