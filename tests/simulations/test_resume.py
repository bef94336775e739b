"""A killed run goes on from its journal and ends in the same bits as one that was left alone."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedattack import files
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import RunFailed
from fedattack.files import content_hash
from fedattack.observation import Observation
from simulations.bench import damages
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.engine.journal import Journal
from simulations.engine.strategy_state import NotCaptured, captured, restore

ROOT = Path(__file__).resolve().parents[2]

# FedAdam keeps two moments on the server, DGC two vectors with every client.
SETTINGS = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": 4,
    "rounds": 5,
    "compressor": "dgc",
    "compression": 0.05,
    "strategy": "fedadam",
    "batch-size": 4,
    "dropout": 0.2,
    "engine": "inline",
    "limit": 200,
    "seed": 1,
}
CONFIG = Config.from_mapping(SETTINGS)


@pytest.fixture(scope="module")
def expected() -> FederationResult:
    return run_federation(CONFIG, build_world(CONFIG))


class Stopped(Exception):
    """Stands for a driver that ends between two rounds."""


def stop_after(number: int, run_dir: Path, config: Config = CONFIG, **how: Any) -> None:
    def on_round(record: RoundRecord) -> None:
        if record.round == number:
            raise Stopped

    with pytest.raises(Stopped):
        run_federation(config, build_world(config), run_dir=run_dir, on_round=on_round, **how)


def look_away(observation: Observation) -> None:
    """Observe, so that what is observed is kept."""


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def figures(result: FederationResult) -> list[tuple[object, ...]]:
    return [
        (r.round, r.loss, r.accuracy, r.train_loss, r.clients, r.dropped, r.wire_bytes) for r in result.rounds
    ]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_run_goes_on_where_it_was(number: int, tmp_path: Path, expected: FederationResult) -> None:
    stop_after(number, tmp_path, on_observation=look_away)
    assert Journal(tmp_path / "journal").latest() == number
    seen: list[int] = []
    result = run_federation(
        CONFIG, build_world(CONFIG), run_dir=tmp_path, on_observation=lambda o: seen.append(o.round)
    )
    assert same_weights(result.weights, expected.weights)
    assert figures(result) == figures(expected)
    assert set(seen) == {1, 2, 3, 4, 5}, "journaled rounds are observed again"
    assert len(list((tmp_path / "journal").glob("memories-*"))) == 1, "only the latest memories are kept"
    assert not list((tmp_path / "journal").glob("*.part"))


def test_a_round_that_was_not_fully_written_is_run_again(tmp_path: Path, expected: FederationResult) -> None:
    """Killed after the clients' memories were written and before the replies were: the older memories still hold."""
    stop_after(3, tmp_path)
    folder = tmp_path / "journal"
    kept = {
        name: (folder / name).read_bytes()
        for name in ("memories-00003.safetensors", "state-00003.safetensors")
    }
    stop_after(4, tmp_path)
    (folder / "state-00004.safetensors").unlink()
    (folder / "round-00004.json").unlink()
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    result = run_federation(CONFIG, build_world(CONFIG), run_dir=tmp_path)
    assert same_weights(result.weights, expected.weights)
    assert figures(result) == figures(expected)


def test_a_round_whose_record_is_missing_is_evaluated_again(
    tmp_path: Path, expected: FederationResult
) -> None:
    stop_after(3, tmp_path, on_observation=look_away)
    (tmp_path / "journal" / "round-00003.json").unlink()
    seen: list[int] = []
    again = run_federation(
        CONFIG, build_world(CONFIG), run_dir=tmp_path, on_observation=lambda o: seen.append(o.round)
    )
    assert figures(again) == figures(expected)
    assert set(seen) == {1, 2, 3, 4, 5}


def test_replayed_rounds_run_no_client(tmp_path: Path, expected: FederationResult) -> None:
    stop_after(5, tmp_path)
    world = build_world(CONFIG)
    world.dataset.images[:] = 0  # who trained on this would get other weights
    assert same_weights(run_federation(CONFIG, world, run_dir=tmp_path).weights, expected.weights)


def test_failures_are_replayed_with_their_reasons(tmp_path: Path) -> None:
    config = Config.from_mapping(SETTINGS | {"rounds": 2, "dropout": 0.0})
    world = build_world(config)
    partitions = tuple(ids[:0] if client == 2 else ids for client, ids in enumerate(world.partitions))
    world = dataclasses.replace(world, partitions=partitions)
    first = run_federation(config, world, run_dir=tmp_path)
    again = run_federation(config, world, run_dir=tmp_path)
    assert "no samples" in first.rounds[0].failed[0][1]
    assert again.rounds == first.rounds
    assert same_weights(first.weights, again.weights)


SCRIPT = """
import sys
from pathlib import Path
from simulations.engine.federation import run_federation
from fedattack.config import Config
from fedattack.data import build_world
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file
config = Config.model_validate_json(sys.argv[1])
def on_round(record):
    print("done", record.round, flush=True)
    if record.round == int(sys.argv[4]):
        sys.stdin.readline()
result = run_federation(config, build_world(config), run_dir=Path(sys.argv[2]), on_round=on_round)
save_file(result.weights, sys.argv[3])
"""


def start(config: Config, run_dir: Path, target: Path, wait_at: int) -> subprocess.Popen[str]:
    arguments = [config.model_dump_json(), str(run_dir), str(target), str(wait_at)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def kill_after(number: int, config: Config, run_dir: Path, target: Path) -> None:
    process = start(config, run_dir, target, number)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == f"done {number}":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL
    assert not target.exists()


def test_a_driver_killed_between_rounds(tmp_path: Path, expected: FederationResult) -> None:
    target = tmp_path / "weights.safetensors"
    kill_after(2, CONFIG, tmp_path, target)
    process = start(CONFIG, tmp_path, target, 0)
    assert process.wait(120) == 0
    assert same_weights(load_file(target), expected.weights)


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_killed_on_ray_goes_on_inline_and_the_other_way_round(
    tmp_path: Path, expected: FederationResult
) -> None:
    ray = Config.from_mapping(SETTINGS | {"engine": "ray", "actors": 2})
    target = tmp_path / "weights.safetensors"
    kill_after(2, ray, tmp_path, target)
    kill_after(3, CONFIG, tmp_path, target)
    process = start(ray, tmp_path, target, 0)
    assert process.wait(300) == 0
    assert same_weights(load_file(target), expected.weights)
    time.sleep(1)


def test_a_full_disk_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: FederationResult
) -> None:
    """The disk is full while round 3 is written: nothing half-written stays, and the run can go on later."""
    folder = tmp_path / "journal"
    real = os.fsync

    def full(handle: int) -> None:
        if "state-00003" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"cannot write .*journal.*: no space left on the device"):
        run_federation(CONFIG, build_world(CONFIG), run_dir=tmp_path)
    monkeypatch.undo()
    assert not list(folder.glob("*.part"))
    assert Journal(folder).latest() == 2
    assert same_weights(
        run_federation(CONFIG, build_world(CONFIG), run_dir=tmp_path).weights, expected.weights
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    monkeypatch.setattr(files, "open", lambda path, mode, opener=None: open(path, "wb"), raising=False)  # noqa: SIM115
    with pytest.raises(RunFailed, match="no space left on the device"):
        Journal(tmp_path).write_record(1, {"round": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file, where a folder should be")
    with pytest.raises(RunFailed, match=r"cannot write .*journal"):
        run_federation(CONFIG, build_world(CONFIG), run_dir=tmp_path)


def test_a_damaged_or_foreign_journal_is_refused(tmp_path: Path) -> None:
    stop_after(2, tmp_path)
    path = tmp_path / "journal" / "state-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFailed, match=r"journal/state-00002.safetensors is damaged"):
        run_federation(CONFIG, build_world(CONFIG), run_dir=tmp_path)
    save_file({"0": torch.zeros(3)}, path)
    with pytest.raises(RunFailed, match=r"state-00002\.safetensors is damaged"):
        run_federation(CONFIG, build_world(CONFIG), run_dir=tmp_path)
    path.write_bytes(whole)
    smaller = Config.from_mapping(SETTINGS | {"clients": 3})
    with pytest.raises(RunFailed, match=r"run\.json belongs to another run: its settings were others"):
        run_federation(smaller, build_world(smaller), run_dir=tmp_path)


def test_the_journal_is_plain_safetensors_and_json(tmp_path: Path) -> None:
    """Whoever wants to read it needs no code of this project, and nothing in it can be executed."""
    stop_after(1, tmp_path, on_observation=look_away)
    folder = tmp_path / "journal"
    assert sorted(path.name for path in folder.iterdir()) == [
        "memories-00001.safetensors",
        "replies-00001.safetensors",
        "round-00001.json",
        "state-00001.safetensors",
    ]
    for path in folder.glob("*.safetensors"):
        assert all(tensor.dtype == torch.uint8 for tensor in load_file(path).values())
    assert json.loads((folder / "round-00001.json").read_text())["round"] == 1


def test_records_of_any_content_come_back(tmp_path: Path) -> None:
    """Errors, odd metrics, byte strings, empty and scalar arrays."""
    answers = {
        7: (3, "no\nreason é"),
        1: [
            (
                "update",
                "arrays",
                {
                    "a": ("float32", (5,), "fedattack.update", b"\x00\xff"),
                    "b": np.arange(6, dtype=np.int64).reshape(2, 3),
                    "c": np.array(2.5, np.float32),
                    "d": np.zeros((0, 4), np.float32),
                },
            ),
            ("metrics", "metrics", {"loss": 0.1 + 0.2, "n": 2**40, "list": [1.5, 2.5]}),
            ("config", "config", {"bytes": b"\x00\x01", "flag": True, "text": "x"}),
        ],
    }
    journal = Journal(tmp_path)
    journal.write_replies(4, answers)
    found = journal.read_replies(4)
    assert found[7] == answers[7]
    (_, _, arrays), *others = found[1]
    assert arrays["a"] == ("float32", (5,), "fedattack.update", b"\x00\xff")
    for name in "bcd":
        wanted = answers[1][0][2][name]
        assert arrays[name].dtype == wanted.dtype
        assert arrays[name].shape == wanted.shape
        assert np.array_equal(arrays[name], wanted)
    assert others == answers[1][1:]


@pytest.mark.slow
def test_a_damaged_folder_is_refused_by_name_or_leads_to_the_same_bits() -> None:
    """A part of ``python -m simulations.bench damages``."""
    for damage, count in ((damages.journals, 45), (damages.observations, 18)):
        found, silent = damage(count)
        assert silent == []
        assert found["unnamed"] == 0
        assert found["refused"] > count // 2


STRATEGIES = {
    "fedavg": {},
    "fedavgm": {"federation.strategy_options.server-momentum": 0.9},
    "fedadagrad": {},
    "fedyogi": {},
    "fedprox": {"federation.strategy_options.proximal-mu": 0.1},
    "fedmedian": {},
    "fedtrimmedavg": {},
    "krum": {"federation.strategy_options.num-malicious-nodes": 1},
    "multikrum": {
        "federation.strategy_options.num-malicious-nodes": 1,
        "federation.strategy_options.num-nodes-to-select": 2,
    },
    "bulyan": {"federation.strategy_options.num-malicious-nodes": 0},
    "qfedavg": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_goes_on_in_the_same_bits(strategy: str, tmp_path: Path) -> None:
    more = {"strategy": strategy, "clients": 6, "rounds": 3, "dropout": 0.0} | STRATEGIES[strategy]
    config = Config.from_mapping(SETTINGS | more)
    whole = run_federation(config, build_world(config))
    stop_after(2, tmp_path, config)
    assert not list((tmp_path / "journal").glob("replies-*"))
    again = run_federation(config, build_world(config), run_dir=tmp_path)
    assert same_weights(again.weights, whole.weights)
    assert figures(again) == figures(whole)


class Drawing(FedAvg):
    """Keeps what cannot be written down: its draws are the generator's."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.generator = random.Random(0)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        kept = list(replies)
        return super().aggregate_train(server_round, [kept[self.generator.randrange(len(kept))]])


class Late(FedAvg):
    """The same from its second round on, for its first round shows nothing."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.generator = random.Random(0) if server_round == 2 else None
        return super().aggregate_train(server_round, replies)


def test_a_strategy_that_cannot_be_written_down_is_given_all_replies_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.from_mapping(SETTINGS | {"strategy": f"{__name__}:Drawing", "rounds": 3})
    with caplog.at_level("INFO"):
        whole = run_federation(config, build_world(config))
        stop_after(2, tmp_path, config)
        again = run_federation(config, build_world(config), run_dir=tmp_path)
    assert same_weights(again.weights, whole.weights)
    assert len(list((tmp_path / "journal").glob("replies-*"))) == 3
    assert "the journal keeps all replies" in caplog.text
    assert "Drawing.generator is a Random" in caplog.text


def test_a_strategy_of_which_that_is_seen_late_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.from_mapping(SETTINGS | {"strategy": f"{__name__}:Late", "rounds": 3})
    whole = run_federation(config, build_world(config))
    stop_after(2, tmp_path, config)
    assert "a run that is killed will begin anew: Late.generator is a Random" in caplog.text
    assert same_weights(run_federation(config, build_world(config), run_dir=tmp_path).weights, whole.weights)


def test_a_strategys_state_comes_back_as_it_was() -> None:
    one, other = FedAvg(), FedAvg()
    kept = {
        "a": np.arange(3.0),
        "b": [np.float32(2.5), (1, "x", None, True)],
        "c": {1: torch.ones(2), "n": float("nan")},
        "d": ArrayRecord({"w": Array(np.ones((2, 2), np.float32))}),
        "e": MetricRecord({"m": 1.5}),
    }
    one.kept, one.inner = kept, FedAvg(fraction_train=0.25)  # type: ignore[attr-defined]
    other.inner = FedAvg()  # type: ignore[attr-defined]
    tree, arrays = captured(one)
    restore(other, json.loads(json.dumps(tree)), arrays)
    found = other.kept  # type: ignore[attr-defined]
    assert np.array_equal(found["a"], kept["a"])
    assert found["b"] == kept["b"]
    assert type(found["b"][0]) is np.float32
    assert torch.equal(found["c"][1], torch.ones(2))
    assert math.isnan(found["c"]["n"])
    assert np.array_equal(found["d"]["w"].numpy(), np.ones((2, 2), np.float32))
    assert found["e"] == kept["e"]
    assert other.inner.fraction_train == 0.25  # type: ignore[attr-defined]
    one.kept = {"f": np.array([object()])}  # type: ignore[attr-defined]
    with pytest.raises(NotCaptured, match=r"FedAvg\.kept\['f'\] holds objects"):
        captured(one)


def test_only_what_is_looked_at_again_is_kept(tmp_path: Path) -> None:
    """Replies of the observed, the model before and after their round, and the end of the last round."""
    config = Config.from_mapping(SETTINGS | {"dropout": 0.0, "error-feedback": False, "compressor": "topk"})
    seen: list[tuple[int, int, str]] = []

    def note(o: Observation) -> None:
        seen.append((o.round, o.client, content_hash({**o.weights, "sent": o.update.values})))

    watch: dict[str, Any] = {
        "on_observation": note,
        "observe": lambda round, client: (round, client) == (3, 1),
    }
    stop_after(4, tmp_path, config, **watch)
    names = {path.name for path in (tmp_path / "journal").iterdir() if not path.name.startswith("round-")}
    assert names == {"replies-00003.safetensors", *(f"state-0000{n}.safetensors" for n in (2, 3, 4))}
    assert list(Journal(tmp_path / "journal").read_replies(3)) == [1]
    told: list[int] = []
    run_federation(
        config, build_world(config), run_dir=tmp_path, on_weights=lambda r, w: told.append(r), **watch
    )
    assert seen[0] == seen[1]
    assert len(seen) == 2
    assert told == [2, 3, 4, 5]
    with pytest.raises(
        RunFailed, match=r"replies-00001\.safetensors, and an attack of this run reads that round"
    ):
        run_federation(config, build_world(config), run_dir=tmp_path, on_observation=look_away)
