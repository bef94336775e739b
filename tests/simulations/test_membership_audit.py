"""What the auditor is handed of a membership run, and what its report then says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.storage import RunFolder
from simulations.pipeline import RunResult, attack_folder, simulate

SETTINGS = {
    "attack": "fedmia,grad-cosine,client-loss",
    "dataset": "digits",
    "model": "mlp",
    "width": 32,
    "clients": 4,
    "rounds": 3,
    "protocol": "fedavg",
    "local-steps": 6,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "candidates": 40,
    "save-observations": True,
    "data.nonmembers": 300,
    "attack.negatives": "both",
    "defense": "clip-noise",
    "defense.clip-noise.unit": "sample",
    "defense.clip-noise.noise": 6.0,
    "defense.clip-noise.clip_norm": 1.0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("audit") / "run"
    return simulate(Config.from_mapping(SETTINGS | {"run-dir": str(folder)}))


def test_records_say_what_each_candidate_is(run: RunResult) -> None:
    world = build_world(Config.from_mapping(SETTINGS))
    frame = pd.read_parquet(run.folder / "records.parquet")
    homes = {int(i): client for client, ids in enumerate(world.partitions) for i in ids}
    asked = frame[frame.attack == "fedmia"]
    owners = asked["sample"].astype(int).map(homes)
    kinds = np.where(
        owners == asked.client.astype(int), "member", np.where(owners.isna(), "held out", "member of another")
    )
    assert (asked.kind == kinds).all()
    assert (asked.is_member == (asked.kind == "member")).all()
    assert set(asked.kind) == {"member", "member of another", "held out"}
    assert (asked.label == world.dataset.labels[asked["sample"].astype(int)]).all()
    assert set(asked.rounds) == {"1-3"}
    area = run.audits["fedmia"].summary["metrics"]["auc"]["mean"]
    assert area == pytest.approx(roc_auc_score(asked.is_member.astype(bool), asked.score))


def test_the_right_client_is_read_from_the_scores_of_all_targets(run: RunResult) -> None:
    folder = RunFolder(run.folder, Config.from_toml(run.folder / "config.toml"))
    records = run.audits["fedmia"].records
    targets = sorted({row["client"] for row in records})
    everybody = np.stack([folder.load_scores("fedmia", target)[0].scores.numpy() for target in targets])
    of = {}  # sample -> its place in the list, found by its own target's score
    for row in records:
        (place,) = np.flatnonzero(everybody[targets.index(row["client"])] == row["score"])
        of[row["sample"]] = place
    members = [row for row in records if row["is_member"]]
    right = sum(
        np.argsort(everybody[:, of[row["sample"]]])[-1] == targets.index(row["client"]) for row in members
    )
    found = run.audits["fedmia"].summary["metrics"]["right_client"]
    assert (found["right"], found["of"]) == (right, len(members))
    assert found["chance"] == 1 / len(targets)
    assert "right_client" not in run.audits["client-loss"].summary["metrics"]


def test_floors_and_guarantee_of_a_run(run: RunResult) -> None:
    first, second, anybody = (run.audits[n].summary for n in ("fedmia", "grad-cosine", "client-loss"))
    assert first["floors"]["pixels alone"] == second["floors"]["pixels alone"]
    assert first["floors"]["pixels alone"] != anybody["floors"]["pixels alone"]
    (account,) = run.summary["federation"]["privacy"].values()
    for summary in (first, second, anybody):
        assert summary["allowed"]["epsilon"] == account["epsilon"]
        assert summary["allowed"]["client"] == account["client"]
        assert len(summary["exposed"]) == 8
    (best,) = run.summary["together"]["membership"]["best"]
    assert best["attacks"] == ["fedmia", "grad-cosine"]


def test_the_report_tells_it(run: RunResult) -> None:
    page = " ".join((run.folder / "report.html").read_text().split())
    for words in (
        "what the accounted epsilon allows (",
        "best of 2 attacks (fedmia, grad-cosine), chosen on one half",
        "floors without a model: null control, members",
        "floor: pixels alone",
        "right client first: ",
        "against held-out samples: AUC",
        "warning: with ",
        "the members with the highest scores beside the best-scoring non-members",
    ):
        assert words in page, words


def test_saved_observations_are_told_the_same(run: RunResult, tmp_path: Path) -> None:
    config = Config.from_mapping({"attack": "fedmia", "engine": "inline", "run-dir": str(tmp_path / "again")})
    again = attack_folder(run.folder, config, truth=run.folder / "truth").audits["fedmia"].summary
    first = run.audits["fedmia"].summary
    assert again["metrics"] == first["metrics"]
    assert again["floors"] == first["floors"]
    assert again["exposed"] == first["exposed"]
