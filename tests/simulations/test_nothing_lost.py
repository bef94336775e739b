"""A run loses nothing: odd victims, attacks that do not apply, kills in mid-attack, models that cannot train."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from faulty_attacks import FAULTS
from flwr.app import Message
from rich.console import Console
from rigged_clients import rigged
from safetensors.torch import load_file
from torch import Tensor, nn

from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable, RunFailed
from fedattack.models import MODELS, build_model, dry_run
from fedattack.observation import Observation, Scenario
from fedattack.registry import Registry
from fedattack.storage import load_observations, load_truths, save_observation, save_truth
from simulations.client_app import Workplace
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.engine.local_grid import InlineGrid
from simulations.pipeline import attack_folder, run_directory, simulate

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "dataset": "digits",
    "image-size": 16,
    "model": "mlp",
    "clients": 7,
    "limit": 300,
    "compressor": "none",
    "engine": "inline",
    "data.auxiliary_size": 0,
}


def settings(folder: Path, **more: object) -> Config:
    named = {n.replace("__", ".") if "__" in n else n.replace("_", "-"): value for n, value in more.items()}
    return Config.from_mapping(BASE | {"run-dir": str(folder)} | named)


def printed() -> tuple[Console, Callable[[], str]]:
    stream = io.StringIO()
    return Console(file=stream, width=250), stream.getvalue


def failed_clients(folder: Path, attack: str) -> dict[int, str]:
    """Client -> status of the rows without an image, as ``records.csv`` has them."""
    rows = pd.read_csv(folder / "records.csv")
    rows = rows[(rows["attack"] == attack) & (rows["status"] != "scored")]
    return dict(zip(rows["client"].tolist(), rows["status"].tolist(), strict=True))


# ---------------------------------------------------------------------- odd victims


def test_one_odd_victim_costs_nobody_else(tmp_path: Path) -> None:
    console, text = printed()
    config = settings(tmp_path / "run", attack="faulty_attacks:Fussy", victims=7)
    result = simulate(config, console=console)
    name = "faulty_attacks:Fussy"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert failed_clients(tmp_path / "run", name).keys() == FAULTS.keys()
    assert result.audits[name].summary["missing"] == len(FAULTS)
    for client, reason in FAULTS.items():
        line = f"{name}: round-0001-client-{client:05d} failed: {reason}"
        assert line in text()
        assert line in log
    assert sorted(result.reconstructions[name]) == ["round-0001-client-00000", "round-0001-client-00006"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_failing_everywhere_is_a_report_of_a_failed_attack_beside_the_others(tmp_path: Path) -> None:
    attacks = "faulty_attacks:Hopeless,ig"
    result = simulate(settings(tmp_path / "run", attack=attacks, ig__iterations=3))
    assert result.audits["faulty_attacks:Hopeless"].level == "failed"
    assert result.audits["ig"].summary["missing"] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["attacks"]["faulty_attacks:Hopeless"]["level"] == "failed"


def test_who_failed_is_tried_again_alone_and_the_others_are_not(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", attack="faulty_attacks:Fussy", victims=7)
    simulate(config)
    parts = tmp_path / "run" / "parts" / "faulty_attacks_Fussy"
    good = parts / "round-0001-client-00006.json"
    before = good.stat().st_mtime_ns
    again = simulate(config)
    assert good.stat().st_mtime_ns == before
    assert again.audits["faulty_attacks:Fussy"].summary["missing"] == len(FAULTS)
    assert len(list(parts.glob("*.failed.json"))) == len(FAULTS)


def test_odd_but_valid_updates_are_failed_rows(tmp_path: Path) -> None:
    """Zeros, a false count of examples, and weights under which the model answers NaN."""
    plain = {"attack": "ig", "ig__iterations": 3, "clients": 4, "victims": 4}
    simulate(settings(tmp_path / "run", save_observations=True, **plain))

    def odd(o: Observation) -> Observation:
        zeros = dataclasses.replace(o.update, values=torch.zeros_like(o.update.values))
        far = {name: torch.full_like(tensor, 1e30) for name, tensor in o.weights.items()}
        changes: dict[int, dict[str, Any]] = {
            1: {"update": zeros},
            2: {"num_examples": 9},
            3: {"round": 2, "weights": far},
        }
        return dataclasses.replace(o, **changes.get(o.client, {}))

    for observation in load_observations(tmp_path / "run" / "observations"):
        save_observation(tmp_path / "odd", odd(observation))
    for one in load_truths(tmp_path / "run" / "truth"):
        save_truth(tmp_path / "truth", dataclasses.replace(one, round=2 if one.client == 3 else 1))
    console, text = printed()
    attack_folder(
        tmp_path / "odd", settings(tmp_path / "later", **plain), truth=tmp_path / "truth", console=console
    )
    assert failed_clients(tmp_path / "later", "ig").keys() == {1, 2, 3}
    assert "client-00001 failed: client 1: the update holds nothing but zeros" in text()
    assert "client-00002 failed: client 2 declares 9 examples; 1 to 1 were agreed" in text()
    assert "round-0002-client-00003 failed: client 3: no image has a finite loss" in text()


def test_a_victim_whose_reply_was_refused_is_a_failed_row(tmp_path: Path) -> None:
    def meddle(message: Message, reply: Message, client: int, round: int) -> Message:
        if client == 2:
            raise RuntimeError("local training diverged")
        return reply

    def federate(config: Config, world: Any, **how: Any) -> FederationResult:
        return run_federation(
            config, world, grid=InlineGrid(Workplace.of(config, world), rigged(meddle)), **how
        )

    console, text = printed()
    config = settings(tmp_path / "run", attack="ig", ig__iterations=3, victims=4)
    result = simulate(config, console=console, federate=federate)
    assert failed_clients(tmp_path / "run", "ig").keys() == {2}
    assert result.audits["ig"].summary["missing"] == 1
    assert "round-0001-client-00002 cannot be attacked: its reply was not used: " in text()
    assert "local training diverged" in text()


def test_a_federation_that_diverges_tells_what_was_seen_before(tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run", attack="ig", ig__iterations=3, rounds=4, attack_rounds="1,4", learning_rate=1e30
    )
    with pytest.raises(RunFailed, match=r"NaN|diverged|error"):
        simulate(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["attacks"]["ig"]["count"] >= 1
    assert "the federation ended after round" in (tmp_path / "run" / "report.html").read_text()


def test_a_full_disk_loses_no_finished_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second victim's answer; with room again the same command ends as it should have."""
    plain = {"attack": "ig", "ig__iterations": 3, "victims": 2, "attack__victims_per_task": 1}
    expected = simulate(settings(tmp_path / "other", **plain)).reconstructions["ig"]
    real = os.fsync

    def full(handle: int) -> None:
        if "parts/ig/.round-0001-client-00001" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match=r"cannot write .*00001.safetensors.*no space left on the device"):
            simulate(settings(tmp_path / "run", **plain))
    first = tmp_path / "run" / "parts" / "ig" / "round-0001-client-00000.json"
    written = first.stat().st_mtime_ns
    found = simulate(settings(tmp_path / "run", **plain)).reconstructions["ig"]
    assert first.stat().st_mtime_ns == written
    assert all(torch.equal(found[key].images, answer.images) for key, answer in expected.items())


# ---------------------------------------------------------------------- attacks that do not apply


def test_an_attack_that_does_not_apply_is_left_out(tmp_path: Path) -> None:
    console, text = printed()
    few = {"clients": 2, "ig__iterations": 3}
    result = simulate(settings(tmp_path / "run", attack="fedmia,ig", **few), console=console)
    assert list(result.audits) == ["ig"]
    sentence = json.loads((tmp_path / "run" / "summary.json").read_text())["left_out"]["fedmia"]
    assert "3 clients must answer in one round" in sentence
    assert f"fedmia is left out: {sentence}" in text()
    assert "fedmia is left out: " in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(NotApplicable, match="3 clients must answer in one round"):
        simulate(settings(tmp_path / "none", attack="fedmia", clients=2))
    assert not (tmp_path / "none").exists()


def test_two_runs_of_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config.from_mapping(BASE)
    made = {run_directory(config) for _ in range(3)}
    assert len(made) == 3
    assert all(path.is_dir() for path in made)


# ---------------------------------------------------------------------- kills

COMMAND = """
import math
from adversaries.inversion.matching import checkpoint
checkpoint.SHARE = math.inf
from simulations.run import main
main()
"""


def attack_run(folder: Path, iterations: int, *more: str) -> subprocess.Popen[bytes]:
    plain = [
        "--dataset",
        "digits",
        "--image-size",
        "16",
        "--model",
        "mlp",
        "--clients",
        "3",
        "--limit",
        "200",
    ]
    attack = [
        "--attack",
        "ig",
        "--set",
        f"ig.iterations={iterations}",
        "--set",
        "attack.victims_per_task=1",
        "--set",
        "attack.state_seconds=0.1",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *plain, *attack, "--victims", "2", "--run-dir", str(folder), *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def wait_for(what: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def found_images(folder: Path) -> dict[str, Tensor]:
    return {p.stem: load_file(p)["images"] for p in folder.glob("parts/ig/*.safetensors")}


def killed_and_resumed(tmp_path: Path, iterations: int, kept: str, *more: str) -> None:
    """Killed as soon as the pattern `kept` has a state; the end is that of a run that was left alone."""
    with attack_run(tmp_path / "whole", iterations, "--engine", "inline") as whole:
        assert whole.wait(600) == 0
    folder = tmp_path / "killed"
    with attack_run(folder, iterations, *more) as process:
        wait_for(lambda: list(folder.glob(f"checkpoints/ig/{kept}/*.safetensors")), process)
        process.send_signal(signal.SIGKILL)
    assert list(folder.glob("checkpoints/ig/*/*.safetensors")), "killed in the middle of an attack"
    assert not (folder / "summary.json").exists()
    with attack_run(folder, iterations, *more) as process:
        assert process.wait(600) == 0
    expected, found = found_images(tmp_path / "whole"), found_images(folder)
    assert expected.keys() == found.keys()
    assert len(expected) == 2
    assert all(torch.equal(found[key], images) for key, images in expected.items())
    assert not list(folder.rglob("checkpoints/ig/*")), "finished attacks need no state"


@pytest.mark.slow
def test_an_attack_killed_in_its_middle_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """In the second victim's: the first one's answer is there."""
    killed_and_resumed(tmp_path, 800, "round-0001-client-00001", "--engine", "inline")
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert log.count("an attack goes on from its state after ") == 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_long_attack_killed_on_ray_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """The two victims may be attacked at once, or one after the other, as the cluster has room."""
    killed_and_resumed(tmp_path, 24_000, "*", "--engine", "ray", "--actors", "1")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_answers_are_on_disk_while_the_federation_goes_on(engine: str, tmp_path: Path) -> None:
    seen: list[int] = []

    def federate(config: Config, world: Any, **how: Any) -> FederationResult:
        told = how.pop("on_round")

        def on_round(record: RoundRecord) -> None:
            told(record)
            deadline = time.monotonic() + (60 if record.round == 1 else 0)  # Ray's first worker takes a while
            parts = tmp_path / "run" / "parts" / "ig"
            while len(list(parts.glob("*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            seen.append(len(list(parts.glob("*.json"))))

        return run_federation(config, world, on_round=on_round, **how)

    more = {"engine": engine, "rounds": 2, "attack_rounds": "1", "victims": 2, "clients": 2}
    simulate(settings(tmp_path / "run", attack="ig", ig__iterations=3, **more), federate=federate)
    assert seen == [2, 2]


# ---------------------------------------------------------------------- models


def sized(config: ModelConfig) -> int:
    assert config.image_size is not None
    return config.image_size**2


class NaN(nn.Sequential):
    """Answers NaN."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.nan


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 10)
        self.b.weight = self.a.weight

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.b(self.a(images.flatten(1))))
        return logits


def built(monkeypatch: pytest.MonkeyPatch, made: object) -> None:
    """Have every name of a model stand for `made`."""
    get = Registry.get
    monkeypatch.setattr(Registry, "get", lambda self, name: made if self is MODELS else get(self, name))


def plain(model: ModelConfig) -> Scenario:
    return Scenario(model, TrainingConfig(), CompressionConfig())


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


MADE: dict[str, tuple[Callable[[ModelConfig], nn.Module], str]] = {
    "nan": (lambda c: NaN(nn.Flatten(), nn.Linear(sized(c), 10)), "answers NaN or infinite values"),
    "narrow": (lambda c: flat(nn.Linear(sized(c), 3)), r"answers shape \(2, 3\).*logits \(2, 10\)"),
    "unfit": (
        lambda c: flat(nn.Linear(5, 10)),
        "cannot be trained on 2 images.*RuntimeError: .*mat1 and mat2",
    ),
    "double": (lambda c: flat(nn.Linear(sized(c), 10)).double(), "of type torch.float64; only float32"),
    "empty": (lambda c: flat(nn.AdaptiveAvgPool1d(10)), "no parameter that can be trained"),
    "broken": (lambda c: [][0], "IndexError: list index out of range"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_model_that_cannot_be_trained_is_refused_in_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, words = MADE[name]
    built(monkeypatch, made)
    model = ModelConfig(name=name, classes=10, channels=1, image_size=8, activation="relu")
    with pytest.raises(ConfigError, match=rf"^setting 'model.name' = '{name}':.*{words}"):
        dry_run(2, plain(model), 0)


def test_odd_models_that_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(name="odd", classes=10, channels=1, image_size=8, activation="relu")
    built(monkeypatch, lambda c: Tied(64))
    assert dry_run(2, plain(model), 0) == [
        "model 'odd': one parameter under several names (a.weight = b.weight)"
    ]
    frozen = flat(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 10))
    built(monkeypatch, lambda c: frozen)
    assert dry_run(2, plain(model), 0) == ["model 'odd': 2 of 4 parameters are frozen (1.weight, 1.bias)"]
    built(monkeypatch, lambda c: flat(nn.LazyLinear(10)))
    assert dry_run(2, plain(model), 0) == []
    assert build_model(model)[1].weight.shape == (10, 64)


def test_batch_norm_on_single_values_is_refused_before_the_run(tmp_path: Path) -> None:
    config = Config.from_mapping(
        BASE | {"model": "resnet20", "image-size": 4, "run-dir": str(tmp_path / "run")}
    )
    with pytest.raises(ConfigError, match=r"'resnet20': cannot be trained on 1 images.*more than 1 value"):
        simulate(config)
    assert not (tmp_path / "run").exists()
