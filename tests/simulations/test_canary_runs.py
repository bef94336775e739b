"""Canaries in a federation: what they measure of real noise, and that everything else goes on around them."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedattack.audit.canaries import CanaryAudit
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, NotApplicable
from simulations.bench.canaries import measured
from simulations.engine.federation import run_federation
from simulations.experiments.privacy import CanaryWatch
from simulations.experiments.question import trained_on
from simulations.pipeline import simulate

BASE = {"dataset": "digits", "model": "mlp", "compressor": "none", "engine": "inline", "auxiliary-size": 0}
SAMPLES = {"defense": "clip-noise", "defense.unit": "sample", "clients": 4, "batch-size": 0}
CLIENTS = {"defense": "clip-noise", "federation.evaluate": False}


def watched(**settings: Any) -> CanaryAudit:
    config = Config.from_mapping(BASE | settings)
    world = build_world(config)
    watch = CanaryWatch(config, world)
    done = run_federation(config, world, on_observation=watch.observe, on_round=watch.after_round)
    found = watch.audit(done.rounds)
    assert found is not None
    return found


def test_the_agreed_noise_is_measured_and_half_of_it_is_called_broken() -> None:
    kept = measured(0, 500, **{"defense.noise": 2.0, "width": 64})
    assert kept.account.epsilon == pytest.approx(1.993, abs=1e-3)
    assert kept.estimate is not None
    assert kept.estimate.low < kept.account.epsilon < kept.estimate.high
    assert max(kept.bound, kept.gaussian_bound) < kept.account.epsilon
    half = measured(0, 2000, "simulations.bench.canaries:HalfNoise", **{"defense.noise": 2.0, "width": 64})
    assert half.account.epsilon == pytest.approx(1.993, abs=1e-3)
    assert half.broken
    assert half.gaussian_bound > half.account.epsilon
    assert half.estimate is not None
    assert half.estimate.epsilon == pytest.approx(4.377, rel=0.15)


def test_what_other_samples_add_is_taken_out() -> None:
    """A third of the samples are canaries: without what is known of the others their gradients pass for noise."""
    given = {**SAMPLES, "limit": 800, "clients": 2, "canaries": 300, "defense.noise": 0.5}
    known, unknown = watched(**given), watched(**given, **{"canaries.others_known": False})
    assert known.estimate is not None
    assert unknown.estimate is not None
    assert known.estimate.mu == pytest.approx(2.0, abs=2.5 * known.estimate.error)
    assert unknown.estimate.mu < 1.5


def test_mislabelled_images_show_less_and_something() -> None:
    found = watched(
        **{**SAMPLES, "batch-size": 32, "rounds": 4, "canaries": 800, "defense.noise": 0.5},
        **{"canaries.kind": "mislabelled"},
    )
    assert found.estimate is not None
    assert 3 * found.estimate.error < found.estimate.mu < math.sqrt(found.inclusions) / 0.5
    assert found.view is not None
    assert found.response == pytest.approx(1.0, abs=0.3)


def test_steps_of_a_round_share_what_one_of_them_would_show() -> None:
    found = watched(
        **{**SAMPLES, "batch-size": 32, "protocol": "fedavg", "local-steps": 8, "training.momentum": 0.5},
        **{"canaries": 800, "defense.noise": 0.5, "canaries.others_known": False},
    )
    assert found.inclusions == pytest.approx(1 / 8, rel=0.1)
    assert found.account.releases == 1
    assert found.estimate is not None
    assert found.estimate.mu == pytest.approx(math.sqrt(found.inclusions) / 0.5, abs=3 * found.estimate.error)
    assert any("releases' worth" in remark for remark in found.remarks)


@pytest.mark.parametrize("behind", [1, 40])
def test_canary_clients_show_the_square_root_of_releases_over_noise(behind: int) -> None:
    """Seen singly, or in sums over 40 clients with batches of one size."""
    hidden = behind > 1
    given = {
        "clients": 40 if hidden else 150,
        "canaries": 40 if hidden else 120,
        "rounds": 3,
        "batch-size": 4,
    }
    names = "clip-noise,secure-aggregation" if hidden else "clip-noise"
    found = watched(**{**CLIENTS, "defense": names, "defense.clip-noise.noise": 0.8, **given})
    assert found.account.unit == "client"
    mu = math.sqrt(3 / behind) / 0.8
    assert math.sqrt(found.inclusions) / 0.8 == pytest.approx(mu)
    assert found.estimate is not None
    assert found.estimate.mu == pytest.approx(mu, abs=2.5 * found.estimate.error)
    assert not found.broken


def test_what_was_not_sent_is_not_scored() -> None:
    given = {"compression": 0.2, "defense.noise": 0.5, "width": 64}
    found = measured(0, 500, **{**given, "compressor": "randomk"})
    assert found.inclusions == pytest.approx(0.2, rel=0.02)
    assert found.estimate is not None
    assert found.estimate.mu == pytest.approx(math.sqrt(0.2) / 0.5, abs=3 * found.estimate.error)
    top = measured(0, 500, **{**given, "compressor": "topk"})
    assert top.estimate is not None
    assert found.estimate.mu < top.estimate.mu < 2.0  # the largest entries hold more of a canary than a fifth
    assert top.view is None
    assert any("'topk'" in remark for remark in top.remarks)


def test_a_run_tells_it_everywhere_and_resumes(tmp_path: Path) -> None:
    given = {
        **SAMPLES,
        "limit": 400,
        "batch-size": 16,
        "rounds": 3,
        "canaries": 100,
        "attack": "loss-threshold",
        "candidates": 20,
    }
    terminal = io.StringIO()
    config = Config.from_mapping(BASE | given | {"run-dir": str(tmp_path / "run")})
    simulate(config, console=Console(file=terminal, width=400))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    told = summary["federation"]["canaries"]
    assert told["text"] in terminal.getvalue()
    assert told["text"] in (tmp_path / "run" / "report.html").read_text()
    assert set(summary["attacks"]) == {"loss-threshold"}
    scores = pd.read_csv(tmp_path / "run" / "canaries.csv")
    assert len(scores) == told["count"] <= 100
    assert (tmp_path / "run" / "figures" / "canaries.png").stat().st_size > 10_000
    journal = sorted((tmp_path / "run" / "journal").iterdir())
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    for path in sorted((again / "journal").iterdir()):  # as if it had been killed in its third round
        if "3" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(list((again / "journal").iterdir())) < len(journal)
    simulate(Config.from_mapping(BASE | given | {"run-dir": str(again)}))
    assert (again / "canaries.csv").read_bytes() == (tmp_path / "run" / "canaries.csv").read_bytes()


@pytest.mark.slow
def test_scores_are_the_same_on_ray(tmp_path: Path) -> None:
    given = {
        **SAMPLES,
        "limit": 400,
        "batch-size": 16,
        "rounds": 2,
        "canaries": 100,
        "compressor": "topk-qsgd",
    }
    given |= {"compression": 0.1, "error-feedback": True}
    for engine in ("inline", "ray"):
        simulate(Config.from_mapping(BASE | given | {"engine": engine, "run-dir": str(tmp_path / engine)}))
    inline, ray = (tmp_path / engine / "canaries.csv" for engine in ("inline", "ray"))
    assert inline.read_bytes() == ray.read_bytes()


@pytest.mark.slow
def test_a_broken_guarantee_is_the_headline(tmp_path: Path) -> None:
    given = {
        **SAMPLES,
        "defense": "simulations.bench.canaries:HalfNoise",
        "defense.noise": 2.0,
        "canaries": 1500,
    }
    config = Config.from_mapping(BASE | given | {"run-dir": str(tmp_path / "run")})
    result = simulate(config)
    top = result.summary["headline"]
    assert top["level"] == "leak"
    assert top["text"].startswith("broken guarantee: canaries show epsilon")
    assert top["text"] in (tmp_path / "run" / "report.html").read_text()


def test_nobody_is_asked_about_canaries_as_members() -> None:
    config = Config.from_mapping(BASE | SAMPLES | {"canaries": 700})
    world = build_world(config)
    canaries = CanaryWatch(config, world).canaries
    assert canaries is not None
    used = trained_on(config, world, {client: [1] for client in range(4)})
    planted = [world.partitions[c][p] for c, p in zip(canaries.client, canaries.position, strict=True)]
    assert not np.intersect1d(used, planted).size
    assert len(used) == sum(map(len, world.partitions)) - 700


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(NotApplicable, match="nobody could rebuild"):
        simulate(Config.from_mapping(BASE | SAMPLES | {"canaries": 10, "attack": "dlg", "batch-size": 1}))
    home = {
        "task": "wgan-gp",
        "model": "wgan-gp-mlp",
        "gan.share": "generator",
        "canaries": 10,
        "local-steps": 5,
    }
    with pytest.raises(ConfigError, match=r"'gan.share' = 'generator'"):
        simulate(Config.from_mapping(BASE | SAMPLES | home | {"batch-size": 8, "protocol": "fedavg"}))


def test_the_critic_of_a_private_gan_is_measured() -> None:
    found = watched(
        **{
            **SAMPLES,
            "task": "wgan-gp",
            "model": "wgan-gp-mlp",
            "width": 32,
            "protocol": "fedavg",
            "clients": 2,
        }
        | {
            "local-steps": 5,
            "batch-size": 32,
            "canaries": 1500,
            "defense.noise": 0.1,
            "federation.evaluate": False,
        },
    )
    assert found.count > 50
    assert found.estimate is not None
    assert found.estimate.mu > 3 * found.estimate.error
    assert not found.broken
    assert any("optimiser of task 'wgan-gp'" in remark for remark in found.remarks)
