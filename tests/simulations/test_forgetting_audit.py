"""The command that audits what mechanisms leave of forgotten samples, whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import BadRequest
from fedattack.unlearning import Deletion, Forgotten, History, Mechanism, Trainer
from fedattack.unlearning.mechanism import merged
from simulations import run
from simulations.experiments.shadows import Counts, ShadowAudit, balanced, chosen_targets, make_design

SMALL = ["--shadows", "16", "--targets", "6", "--retained", "60", "--probes", "6", "--rounds", "1"]
SMALL += ["--width", "8", "--set", "training.local_steps=6", "--set", "data.nonmembers=60", "--limit", "300"]


def audit(*arguments: str) -> None:
    result = CliRunner().invoke(run.app, ["unlearning", "audit", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_a_page_with_a_row_for_each_mechanism(tmp_path: Path) -> None:
    mechanisms = ["none", "retrain", "gradient-ascent", "mcmc"]
    more = [f"--set=unlearning.mcmc.{short}" for short in ("burn_in=3", "terms=4", "samples=1")]
    more += ["--set", "unlearning.gradient-ascent.steps=2"]
    audit(*SMALL, "--mechanism", ",".join(mechanisms), "--run-dir", str(tmp_path), *more)
    summary = json.loads((tmp_path / "summary.json").read_text())["attacks"]
    assert list(summary) == mechanisms
    # passes of 2 steps over what each model forgets, of all its terms' batches
    assert summary["none"]["samples_passed"] == 0
    assert 2 <= summary["gradient-ascent"]["samples_passed"] <= 12
    assert summary["retrain"]["samples_passed"] > 60
    assert summary["mcmc"]["samples_passed"] > 60
    same = [
        summary[name]["metrics"]["retained_auc_before"]["mean"]
        for name in ("none", "retrain", "gradient-ascent")
    ]
    assert len(set(same)) == 1
    assert all(row["trainings"] == 16 for row in summary.values())
    records = pd.read_csv(tmp_path / "records.csv")
    assert len(records) == 4 * 6
    assert set(records["kind"]) == {"random", "mislabelled"}
    page = (tmp_path / "report.html").read_text()
    assert "What is left of forgotten samples?" in page
    assert page.count("data:image/png;base64") >= 2
    with pytest.raises(BadRequest, match="holds an audit of"):
        audit(*SMALL, "--mechanism", ",".join(mechanisms[2:]), "--run-dir", str(tmp_path), *more)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mechanism", "amnesia"], "unknown mechanism 'amnesia'"),
        (["--mechanism", "gradient-ascent,gradient-ascent"], "name each mechanism once"),
        (["--mechanism", "federaser"], "shadow models have one holder of data"),
        (["--set", "unlearning.mcmc.terms=3", "--mechanism", "gradient-ascent"], "is not audited"),
        (["--set", "unlearning.burn=3", "--mechanism", "gradient-ascent"], "none of gradient-ascent has it"),
        (["--clients", "2"], "one holder of data"),
        (["--model", "resnet20"], "running statistics"),
        (["--shadows", "8"], "at least 16 shadows"),
        (["--retained", "2000"], "needs 2080 samples"),
        (["--attack", "ig"], "one malicious client chooses the targets"),
        (["--set", "compression.name=topk"], "sends nothing"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_a_sentence(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=told):
        audit("--run-dir", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_the_design_has_fair_coins_and_wrong_labels_only_where_it_says(tmp_path: Path) -> None:
    settings = {"dataset": "digits", "model": "mlp", "clients": 1, "data.auxiliary_size": 0, "seed": 4}
    config = Config.from_mapping(settings | {"attack": "unlearn-max-loss", "protocol": "fedavg"})
    world, counts = build_world(config), Counts(shadows=20, targets=10, retained=50, probes=7)
    name, wanted = chosen_targets(config, world, counts) or ("", np.zeros(0))
    design = make_design(config, world, counts, (name, wanted))
    np.testing.assert_array_equal(design.samples[:5], wanted)
    assert design.kinds.tolist() == ["unlearn-max-loss"] * 5 + ["mislabelled"] * 5
    natural = torch.from_numpy(world.dataset.labels[design.samples])
    np.testing.assert_array_equal(np.flatnonzero(natural != design.labels), np.arange(5, 10))
    assert len(np.unique(design.samples)) == 67
    assert not set(design.samples) & set(world.pools.nonmembers)
    for half in (design.asked[:10], design.asked[10:]):
        np.testing.assert_array_equal(half.sum(0), 5)
    assert not (design.kept & design.forgotten).any()
    np.testing.assert_array_equal(
        (design.kept | design.forgotten).sum(1), 50 + design.asked.sum(1) + design.probed.sum(1)
    )
    coins = balanced(np.random.default_rng(0), 16, 400)
    assert abs(np.corrcoef(coins[:8].T)[np.triu_indices(400, 1)].mean()) < 0.02


@pytest.mark.slow
def test_u_lira_sees_what_the_population_test_misses(tmp_path: Path) -> None:
    audit("--mechanism", "retrain,fine-tuning", "--run-dir", str(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())["attacks"]
    exact, tuned = (summary[name]["metrics"] for name in ("retrain", "fine-tuning"))
    assert 0.45 <= exact["auc"]["mean"] <= 0.55
    assert 0.45 <= exact["auc_retrained"]["mean"] <= 0.55
    assert tuned["auc"]["mean"] >= 0.8
    assert tuned["population_auc"]["mean"] <= 0.7
    assert summary["fine-tuning"]["level"] == "leak"
    assert summary["retrain"]["level"] == "none"


class Rewind(Mechanism):
    """Forgets by going back a round; the tests' own."""

    runs = "central"
    keeps = frozenset({"checkpoints"})
    seen: ClassVar[list[tuple[float, int]]] = []

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        excluded = merged(history.excluded, deletions)
        central = trainer.central()
        again = central.train(history.checkpoint(0), history.excluded[0])
        off = max(float((again[name] - tensor).abs().max()) for name, tensor in history.weights.items())
        self.seen.append((off, max(history.checkpoints)))
        return Forgotten(history.checkpoint(history.rounds), excluded, 0)


def test_a_shadow_models_holder_can_train_it_again(tmp_path: Path) -> None:
    """Seeds, batches, exclusions and kept checkpoints are those by which all were trained at once."""
    settings = {"dataset": "digits", "model": "mlp", "width": 8, "clients": 1, "rounds": 3, "limit": 260}
    settings |= {"protocol": "fedavg", "local-steps": 4, "batch-size": 16, "compressor": "none"}
    settings |= {"data.auxiliary_size": 0, "data.nonmembers": 60, "training.momentum": 0.5}
    config = Config.from_mapping(settings)
    world = build_world(config)
    design = make_design(config, world, Counts(16, 6, 0.5, 60, 6))
    (result,) = ShadowAudit(config, world, design, {"rewind": Rewind()}).audit(lambda *_: None)
    assert len(Rewind.seen) == 16
    assert max(off for off, _ in Rewind.seen) < 1e-5
    assert {newest for _, newest in Rewind.seen} == {3}
    m = result.summary["metrics"]
    assert m["retained_auc"]["mean"] == pytest.approx(m["retained_auc_before"]["mean"], abs=1e-3)
