"""What forgetting leaks, in runs that really federate, forget and are attacked (inline engine)."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fedattack.audit import audit_forgotten
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, DataError
from fedattack.observation import Update
from fedattack.storage import load_observations
from simulations.client_app import Workplace, round_batches
from simulations.experiments.forgotten import ForgottenExperiment, Watching
from simulations.pipeline import RunResult, simulate

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "width": 128,
    "clients": 4,
    "rounds": 3,
    "batch-size": 0,
    "learning-rate": 0.5,
    "compressor": "none",
    "engine": "inline",
    "attack": "analytic",
    "requests": 1,
    "victims": 1,
    "limit": 1200,
    "forgotten": True,
    "unlearning.seeds": 1,
    "data.auxiliary_size": 200,
    "data.nonmembers": 300,
}


def run(folder: Path, **settings: Any) -> RunResult:
    changed = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    return simulate(Config.from_mapping(BASE | {"run-dir": str(folder / "run")} | changed))


def log(result: RunResult) -> str:
    return (result.folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("honest"))


def test_an_honest_deletion_gives_the_forgotten_away(honest: RunResult) -> None:
    """To the server by two updates, to another client by two global models; beside the ordinary attack."""
    assert list(honest.audits) == [
        "analytic",
        "analytic:forgotten",
        "analytic:forgotten-models",
        "losses:forgotten",
    ]
    assert honest.audits["analytic"].level == "failed"  # a batch of 175
    for name, least, seat in (("", 100, "curious server"), ("-models", 60, "another client")):
        audit = honest.audits[f"analytic:forgotten{name}"]
        (record,) = audit.records
        assert record["psnr"] >= least
        assert record["label_right"]
        assert audit.level == "leak"
        assert audit.threat["seat"] == seat
    assert "honest client 0 asks to forget 1 random samples" in log(honest)
    exact = "(175 g - 174 g') / 1, of client 0's updates of round 1 before and after: exactly the gradient"
    assert honest.audits["analytic:forgotten"].summary["told"][0].startswith(exact)
    page = (honest.folder / "report.html").read_text()
    assert "exactly the gradient of the 1 forgotten sample" in page
    assert "finds 1 forgotten by the rank" in page
    with (honest.folder / "records.csv").open() as file:
        attacks = {row["attack"] for row in csv.DictReader(file)}
    assert attacks == set(honest.audits)


def test_members_before_and_after_are_told_of_the_forgotten_and_of_the_retained(honest: RunResult) -> None:
    audit = honest.audits["losses:forgotten"]
    groups = [record["group"] for record in audit.records]
    assert {group: groups.count(group) for group in set(groups)} == {
        "forgotten": 1,
        "retained": 174,
        "unseen": 300,
    }
    assert audit.level == "undecided"  # one sample
    assert set(audit.summary["metrics"]) == {
        "forgotten_before",
        "auc",
        "both",
        "retained_before",
        "retained_after",
    }


def test_the_deletions_of_an_attack_are_looked_at_and_several_at_once(tmp_path: Path) -> None:
    """Its client is 1, its samples those that it asked for."""
    settings = {
        "attack": "spear,unlearn-max-loss",
        "attack.malicious_clients": "1",
        "requests": 4,
        "limit": 600,
    }
    result = run(tmp_path, **settings)
    audit = result.audits["spear:forgotten"]
    assert [record["client"] for record in audit.records] == [1] * 4
    assert min(record["psnr"] for record in audit.records) >= 100
    config = Config.from_mapping(BASE | settings)
    asked = json.loads((result.folder / "parts" / "unlearn-max-loss.json").read_text())["requests"][0]
    partition = build_world(config).partitions[1]
    assert sorted(r["sample"] for r in audit.records) == sorted(partition[asked["positions"]].tolist())
    assert "no attack asks" not in log(result)
    assert (
        result.audits["losses:forgotten"]
        .summary["told"][0]
        .startswith("asked for by unlearn-max-loss; retrain")
    )


def test_two_minibatches_are_told_of_beforehand_and_answered_by_the_prior(tmp_path: Path) -> None:
    result = run(tmp_path, batch_size=16)
    said = log(result)
    assert "seen only roughly: training.batch_size = 16 of 175 samples" in said
    assert said.index("seen only roughly") < said.index("round 1: 4 clients")
    audit = result.audits["analytic:forgotten"]
    assert audit.summary["methods"] == ["prior"]
    assert audit.summary["recovered"] == 0
    assert "only roughly the gradient" in audit.summary["told"][0]
    assert "no number of samples makes" in " ".join(result.audits["losses:forgotten"].summary["told"])


def test_a_mechanism_that_goes_on_elsewhere_is_told_of(tmp_path: Path) -> None:
    """FedEraser asks clients at weights that have moved, and takes no round again."""
    result = run(tmp_path, mechanism="federaser")
    told = result.audits["analytic:forgotten"].summary["told"]
    assert "updates of round 2 before and after: only roughly" in told[0]
    assert "at other weights" in told[1]
    assert "analytic:forgotten-models" not in result.audits
    assert "takes no round of the federation again" in " ".join(
        result.audits["losses:forgotten"].summary["told"]
    )


def test_sums_over_clients_give_the_forgotten_away_as_well(tmp_path: Path) -> None:
    result = run(tmp_path, defense="secure-aggregation")
    (record,) = result.audits["analytic:forgotten"].records
    assert record["psnr"] >= 90
    assert record["client"] == -1


def test_a_client_that_leaves_gives_away_what_it_sent_before(tmp_path: Path) -> None:
    """All of its samples are asked for: its only update is of them."""
    settings = {"attack": "spear,unlearn-max-loss", "requests": 50, "limit": 300, "clients": 8}
    settings |= {"data.auxiliary_size": 60, "data.nonmembers": 100}
    result = run(tmp_path, **settings)
    told = result.audits["spear:forgotten"].summary["told"]
    assert told[0].startswith("all that it sent, of client 0's updates of round 1")
    assert len(result.audits["spear:forgotten"].records) == len(
        build_world(Config.from_mapping(BASE | settings)).partitions[0]
    )


def test_clients_draw_anew_while_the_server_forgets() -> None:
    """Batches, noise and compression; not where damage is measured, and not while they train."""
    settings = BASE | {"batch-size": 8, "unlearning.draws": "anew"}
    for draws in ("anew", "kept"):
        config = Config.from_mapping(settings | {"unlearning.draws": draws})
        place = Workplace.of(config, build_world(config))
        assert place.drawing(False) is config
        again = place.drawing(True)
        assert (again.seed != config.seed) == (draws == "anew")
        first, second = (round_batches(one, 175, 1, 2)[0] for one in (config, again))
        assert np.array_equal(first, second) == (draws == "kept")
        assert again.result_settings() | {"seed": config.seed} == config.result_settings()


def test_what_the_server_saw_before_is_what_it_saw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The round that is looked at again brings the update that came in the run, to the bit."""
    before: list[Update] = []
    original = Watching.as_before

    def noting(self: Watching, *asked: Any) -> Any:
        found = original(self, *asked)
        before.append(found.update)
        return found

    monkeypatch.setattr(Watching, "as_before", noting)
    result = run(tmp_path, save_observations=True, limit=600, compressor="randomk", compression=0.3)
    (seen,) = [o for o in load_observations(result.folder / "observations", 1) if o.client == 0]
    assert torch.equal(before[0].values, seen.update.values)
    assert before[0].indices is not None and seen.update.indices is not None  # noqa: PT018
    assert torch.equal(before[0].indices, seen.update.indices)


def test_what_cannot_be_forgotten_is_refused() -> None:
    config = Config.from_mapping({"task": "wgan-gp", "forgotten": True, "dataset": "digits"})
    world = build_world(config)
    with pytest.raises(ConfigError, match="trains no classifier"):
        ForgottenExperiment.notes(config, world)


# ---------------------------------------------------------------------- the audit


def losses(seed: int, count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.exponential(1.0, count), rng.exponential(1.0, count) + shift


def test_areas_are_those_of_scikit_learn() -> None:
    forgotten, retained, unseen = losses(0, 40, 0.3), losses(1, 60, -0.2), losses(2, 100, 0.0)
    audit = audit_forgotten("losses", forgotten, retained, unseen, mechanism="retrain")
    asked = {
        "forgotten_before": (-forgotten[0], -unseen[0]),
        "auc": (-forgotten[1], -unseen[1]),
        "both": (forgotten[1] - forgotten[0], unseen[1] - unseen[0]),
        "retained_before": (-retained[0], -unseen[0]),
        "retained_after": (-retained[1], -unseen[1]),
    }
    for key, (ours, others) in asked.items():
        truth = np.repeat([1, 0], [len(ours), len(others)])
        expected = roc_auc_score(truth, np.concatenate([ours, others]))
        found = audit.summary["metrics"][key]
        assert found["mean"] == pytest.approx(expected, abs=1e-12)
        assert found["low"] < expected < found["high"]


def test_the_verdict_is_about_the_forgotten() -> None:
    low, high = losses(0, 400, 0.0), losses(1, 400, 0.0)
    risen = low[0], low[0] + 3.0
    steady = high[0], high[0]
    assert audit_forgotten("a", risen, steady, steady, mechanism="m").level == "leak"  # by both models
    known = low[0] * 1e-3, low[1] * 1e-3
    assert audit_forgotten("b", known, steady, steady, mechanism="m").level == "leak"  # still a member
    again = audit_forgotten("c", losses(5, 4000, 0.0), known, losses(6, 4000, 0.0), mechanism="m")
    assert again.level == "none"
    assert again.verdict.startswith(
        "the forgotten look like samples never seen: AUC of the forgotten before 0."
    )
    few = audit_forgotten("d", losses(5, 3, 0.0), known, losses(6, 40, 0.0), mechanism="m")
    assert few.level == "undecided"
    idle = audit_forgotten("e", known, known, steady, mechanism="m", accuracy=0.1, chance_accuracy=0.12)
    assert idle.level == "undecided"
    assert "at chance" in idle.verdict
    with pytest.raises(DataError, match="0 forgotten"):
        audit_forgotten("f", losses(0, 0, 0.0), known, known, mechanism="m")
    assert dataclasses.asdict(few)["family"] == "forgotten"
