"""What a server keeps to forget later: read from the journal where it lies there, and checked against the disk."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, RunFailed
from fedattack.models import initial_weights
from fedattack.observation import Observation
from fedattack.unlearning import Deletion, History
from fedattack.unlearning.fedrecover import FedRecover
from simulations.engine.federation import run_federation
from simulations.engine.journal import Journal
from simulations.engine.journaled_replies import JournaledReplies
from simulations.experiments.unlearning import UnlearningExperiment
from simulations.pipeline import simulate

BASE = {
    "dataset": "digits",
    "limit": 500,
    "model": "tiny-cnn",
    "clients": 3,
    "rounds": 3,
    "batch-size": 8,
    "learning-rate": 0.3,
    "engine": "inline",
    "data.auxiliary_size": 0,
    "data.nonmembers": 200,
    "federation.evaluate": False,
}


@pytest.mark.parametrize(
    "more",
    [
        {"protocol": "fedavg", "local-steps": 3, "compressor": "none"},
        {"protocol": "fedavg", "local-steps": 3, "compressor": "topk-qsgd", "compression": 0.1},
        {"compressor": "topk", "compression": 0.1, "error-feedback": True},
    ],
)
def test_the_journal_gives_what_files_of_its_own_would(tmp_path: Path, more: dict[str, object]) -> None:
    config = Config.from_mapping(BASE | more)
    world = build_world(config)
    journal = Journal(tmp_path / "journal")
    own = History(tmp_path / "own", world.scenario, {"updates"}, every=2)
    read = History(
        tmp_path / "read", world.scenario, {"updates"}, 2, replies=JournaledReplies(journal, world.scenario)
    )
    seen: list[Observation] = []

    def observed(observation: Observation) -> None:
        if own.wants_updates(observation.round):
            own.keep_update(observation)
            read.keep_update(observation)
        seen.append(observation)

    run_federation(config, world, run_dir=tmp_path, on_observation=observed)
    assert own.update_rounds == read.update_rounds == [1, 3]
    assert not (tmp_path / "read").exists()
    assert read.bytes == sum(
        (tmp_path / "journal" / f"replies-0000{n}.safetensors").stat().st_size for n in (1, 3)
    )
    for round in (1, 3):
        for one, other in zip(
            own.updates(round), read.fork(tmp_path / "fork", {}, {}).updates(round), strict=True
        ):
            assert (one.client, one.examples) == (other.client, other.examples)
            assert one.change.keys() == other.change.keys()
            assert all(torch.equal(one.change[name], other.change[name]) for name in one.change)
    read.note_round(3, [0, 1, 2], aggregated=False)
    assert read.update_rounds == [1]
    (tmp_path / "journal" / "replies-00001.safetensors").unlink()
    with pytest.raises(RunFailed, match="the journal has no file"):
        list(read.updates(1))


def test_a_run_writes_no_update_twice_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    more = {"attack": "unlearn-max-loss", "mechanism": "fedrecover", "model": "mlp", "unlearning.seeds": 1}
    more |= {"protocol": "fedavg", "local-steps": 3, "compressor": "none", "clients": 4}
    folder = tmp_path / "run"
    config = Config.from_mapping(BASE | more | {"run-dir": str(folder)})
    simulate(config)
    assert not list((folder / "history").glob("update-*"))
    assert len(list((folder / "history").glob("weights-*"))) == 4
    part = folder / "parts" / "unlearn-max-loss-seed-0.json"
    found = json.loads(part.read_text())
    part.unlink()  # as if killed while it forgot
    simulate(config)
    again = json.loads(part.read_text())
    assert again["accuracy"] == found["accuracy"]
    assert again["losses"] == found["losses"]
    written = sum(path.stat().st_size for path in (folder / "history").glob("*"))
    written += sum(path.stat().st_size for path in (folder / "journal").glob("replies-*"))
    assert again["costs"]["history_bytes"] == written


def test_what_was_not_kept_and_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "protocol": "fedavg",
        "local-steps": 3,
        "compressor": "none",
        "mechanism": "fedrecover",
        "rounds": 50,
    }
    config = Config.from_mapping(BASE | more | {"run-dir": str(tmp_path / "new" / "run")})
    world = build_world(config)
    UnlearningExperiment.check(config, world)
    usage = namedtuple("usage", "total used free")
    size = 4 * sum(tensor.numel() for tensor in initial_weights(world.scenario.model, 0).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 201 * size - 1))
    needed = f"{(51 + 50 * 3) * size:,} bytes"  # checkpoints 0 to 50, and a second training's updates
    with pytest.raises(ConfigError, match=f"takes about {needed}, and .* left; raise it, or give another"):
        UnlearningExperiment.check(config, world)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 201 * size))
    UnlearningExperiment.check(config, world)
    history = History(tmp_path / "history", world.scenario, {"checkpoints", "updates"}, 10, rounds=3)
    history.first_rounds = {0: 2}
    history.keep_weights(0, {"x": torch.zeros(1)})
    with pytest.raises(RunFailed, match=r"no client update was kept after round 0; .*_every' = 10"):
        FedRecover().forget([Deletion(0, frozenset({1}))], history, None)  # type: ignore[arg-type]
