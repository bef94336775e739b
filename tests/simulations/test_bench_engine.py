"""The engine's benchmark cases run, and compare equal things."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedattack.errors import ConfigError, RunFailed
from simulations.bench import __main__ as command
from simulations.bench import engine, peers, scenes, time_to_quality
from simulations.bench.scenes import Reference


def test_quick_run_agrees_with_the_reference() -> None:
    figures = engine.lenet(quick=True)
    assert figures["objective_error"] < 1e-5
    assert figures["gradient_error"] < 1e-4
    assert figures["victims_1_ratio"] > 0
    assert figures["victims_8_ratio"] > 0
    assert figures["engine_final_loss"] == pytest.approx(figures["reference_final_loss"], rel=1e-2)


def test_a_disagreement_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Reference.loss
    monkeypatch.setattr(Reference, "loss", lambda self: 1.01 * honest(self))
    with pytest.raises(RunFailed, match=r"the engine and the reference disagree: objective by 0\.0099"):
        engine.lenet(quick=True)


def test_peers_run_beside_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeper(everyone: scenes.Scene, tv: float) -> peers.Run:
        assert len(everyone.observations) == 8
        assert tv > 0
        return lambda iterations: time.sleep(0.02 * iterations)

    monkeypatch.setattr(peers, "PEERS", {"json": sleeper})
    figures = engine.lenet(quick=True, peers=True)
    assert 1 / 0.04 < figures["json_iterations_s_each"] <= 1 / 0.02
    monkeypatch.setattr(peers, "PEERS", {"no_such_package": sleeper})
    with pytest.raises(ConfigError, match="no_such_package"):
        engine.lenet(quick=True, peers=True)


def test_pictures_are_tiles_of_different_photographs() -> None:
    found = scenes.pictures(8, None)
    assert found.images.shape == (8, 3, 32, 32)
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1
    distances = torch.cdist(found.images.flatten(1), found.images.flatten(1)) + 100 * torch.eye(8)
    assert float(distances.min()) > 1


@pytest.mark.slow
def test_time_to_quality_runs_until_the_reference_is_met() -> None:
    figures = time_to_quality.run(quick=True)
    assert figures["gauss_newton_failed"] == figures["lbfgs_failed"] == 0
    for victim in figures["victims"]:
        assert victim["lbfgs"]["psnr"] >= victim["psnr"]


def test_options_a_case_has_no_use_for_are_refused() -> None:
    runner = CliRunner()
    import typer

    app = typer.Typer()
    app.command()(command.bench)
    refused = runner.invoke(app, ["hcgla-iteration", "--data", str(Path.cwd())])
    assert isinstance(refused.exception, ConfigError)
    assert "option '--data'" in str(refused.exception)
