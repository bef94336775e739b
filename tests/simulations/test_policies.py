"""The search of augmentation policies as a command: its table, a killed search, refusals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedattack.config import Config
from fedattack.defenses import ats
from fedattack.defenses.ats import Candidate, Search, candidates, ranked
from fedattack.errors import ConfigError, DataError
from simulations.cli.policies import Effort, run_search
from simulations.run import app

EFFORT = Effort(candidates=4, per_class=1, batches=1, batch=10, least_accuracy=-1e9)


def config(**more: Any) -> Config:
    settings = {"dataset": "digits", "auxiliary-size": 300, "data.nonmembers": 60, "model": "tiny-cnn"}
    return Config.from_mapping(settings | more)


def search(place: Path, effort: Effort = EFFORT, **more: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    run_search(config(**more), place, effort, "short", 0.5, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_killed_and_started_again_the_table_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = search(tmp_path / "whole")
    assert "4 of 4 policies" in told
    table = pd.read_csv(tmp_path / "whole" / "candidates.csv", keep_default_na=False)
    assert sorted(table["policy"]) == sorted(candidates(4, 0))
    assert list(table["place"]) == [1, 2, 3, 4]
    found = [
        Candidate(row["policy"], (row["S_pri mean"],), (row["S_acc an image"],), 1)
        for row in table.to_dict("records")
    ]
    assert (
        min(found, key=lambda one: one.mean_privacy).policy
        in [one.policy for one, _ in ranked(found, -1e9)][:2]
    )

    scored, real = [], Search.score

    def killing(self: Search, policy: str) -> Candidate:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(policy)
        return real(self, policy)

    monkeypatch.setattr(ats.Search, "score", killing)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed")
    assert not (tmp_path / "killed" / "candidates.csv").exists()
    monkeypatch.undo()
    counted: list[str] = []
    monkeypatch.setattr(
        ats.Search, "score", lambda self, policy: counted.append(policy) or real(self, policy)
    )
    search(tmp_path / "killed")
    assert counted == candidates(4, 0)[2:]
    whole, killed = ((tmp_path / name / "candidates.csv").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_too_strict_a_bound_leaves_none(tmp_path: Path) -> None:
    told = search(tmp_path, Effort(2, 1, 1, 10, least_accuracy=-1.0))
    assert "the bound belongs to a network" in told
    assert "0 of 2 policies have an S_acc of -1 an image or more" in told


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trains without a defence"):
        search(tmp_path, defense="prune")
    with pytest.raises(DataError, match="there are 150 images"):
        search(tmp_path, Effort(2, 1, 2, 100))
    with pytest.raises(ConfigError, match="unknown schedule 'shrt'; did you mean 'short'"):
        run_search(config(), tmp_path, EFFORT, "shrt", 0.5, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_the_commands_have_their_help() -> None:
    for command, part in (("search", "least-accuracy"), ("benchmark", "annotations")):
        shown = CliRunner().invoke(app, ["semsim", command, "--help"], env={"COLUMNS": "120"})
        assert shown.exit_code == 0
        assert part in shown.output
