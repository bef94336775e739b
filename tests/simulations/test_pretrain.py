"""Honest rounds before round 1: what they leave, what is drawn for them, and how they end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation
from fedattack.training import batch_positions, local_update
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.pipeline import resolve_run, simulate

PLAIN = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "protocol": "fedavg",
    "local-steps": 3,
    "batch-size": 4,
    "clients": 3,
    "rounds": 1,
    "pretrain": 2,
    "compressor": "none",
    "engine": "inline",
    "limit": 120,
    "seed": 4,
}
# FedAdam counts its rounds and keeps two moments; DGC keeps two vectors with every client, and counts rounds too.
STATEFUL = PLAIN | {
    "strategy": "fedadam",
    "compressor": "dgc",
    "compression": 0.05,
    "compression.warmup_rounds": 2,
    "dropout": 0.2,
    "participation": 0.7,
    "rounds": 2,
    "pretrain": 3,
    "clients": 4,
}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(config: Config, **how: object) -> FederationResult:
    return run_federation(config, build_world(config), **how)  # type: ignore[arg-type]


def test_round_1_sends_what_honest_rounds_come_to() -> None:
    """The reference trains the same clients by hand, in rounds -1 and 0."""
    config = Config.from_mapping(PLAIN)
    world, seen = build_world(config), list[Observation]()
    result = run_federation(config, world, on_observation=seen.append)
    assert [one.round for one in seen] == [1, 1, 1]
    assert ([one.round for one in result.pretraining], [one.round for one in result.rounds]) == ([-1, 0], [1])
    weights, module = initial_weights(world.scenario.model, config.seed), build_model(world.scenario.model)
    for number in (-1, 0):
        mean, total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}, 0
        for client, ids in enumerate(world.partitions):
            batches = batch_positions(len(ids), config.training, config.seed, number, client)
            found = local_update(module, weights, *world.dataset.tensors(ids), batches, config.training)
            total += found.num_examples
            for name, change in found.update.items():
                mean[name] += found.num_examples * change
        weights = {name: tensor + mean[name] / total for name, tensor in weights.items()}
    for name, tensor in weights.items():
        torch.testing.assert_close(seen[0].weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_no_draw_is_one_of_an_attacked_round() -> None:
    config = Config.from_mapping(PLAIN)
    rounds = [
        [b.tolist() for b in batch_positions(30, config.training, 0, number, 0)] for number in range(-4, 6)
    ]
    assert all(rounds[i] != rounds[j] for i in range(10) for j in range(i))


def test_a_run_killed_in_between_goes_on(tmp_path: Path) -> None:
    config = Config.from_mapping(STATEFUL)
    expected = run(config)
    assert all(math.isfinite(float(tensor.abs().max())) for tensor in expected.weights.values())

    class Stopped(Exception):
        """Stands for a driver that ends after a round."""

    def stop(record: RoundRecord) -> None:
        if record.round == -1:
            raise Stopped

    seen: list[Observation] = []
    with pytest.raises(Stopped):
        run(config, run_dir=tmp_path, on_pretrained=stop)
    left = {path.name for path in (tmp_path / "journal").iterdir()}
    assert left == {
        "state--0001.safetensors",
        "memories--0001.safetensors",
        "round--0002.json",
        "round--0001.json",
    }
    told: list[int] = []
    result = run(
        config, run_dir=tmp_path, on_observation=seen.append, on_pretrained=lambda one: told.append(one.round)
    )
    assert told == [-2, -1, 0]
    assert same_weights(result.weights, expected.weights)
    again: list[
        Observation
    ] = []  # a finished run shows its observed rounds again, the first after pretraining too
    run(config, run_dir=tmp_path, on_observation=again.append)
    assert [(o.round, o.client) for o in again] == [(o.round, o.client) for o in seen]
    for one, other in zip(seen, again, strict=True):
        assert same_weights(one.weights, other.weights)


def test_training_that_diverges_ends_before_the_attack() -> None:
    config = Config.from_mapping(PLAIN | {"learning-rate": 1e6})
    with pytest.raises(RunFailed, match=r"round 1 of 2 before round 1, client 0: .*diverged"):
        run(config)


@pytest.mark.slow
def test_the_report_says_how_long_it_was_trained(tmp_path: Path) -> None:
    config = Config.from_mapping(
        PLAIN | {"attack": "ig", "ig.iterations": 1, "victims": 1, "run-dir": str(tmp_path / "run")}
    )
    simulate(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["federation"]["trained before round 1"].startswith("2 rounds: loss ")
    accuracy = summary["federation"]["pretraining"]["accuracy"]
    assert (
        f"tiny-cnn at {100 * accuracy:.1f} % accuracy; 2 honest rounds before" in summary["headline"]["text"]
    )
    assert "after 2 of honest training" in (tmp_path / "run" / "report.html").read_text()


def test_what_looks_at_all_rounds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'federation.pretrain' = 2: 'canaries.count'"):
        Config.from_mapping(PLAIN | {"canaries": 8})
    with pytest.raises(ConfigError, match=r"'federation.pretrain' = 2: model 'lenet-zhu' \(relu\) cannot be"):
        resolve_run(
            Config.from_mapping(PLAIN | {"model": "lenet-zhu", "activation": "relu", "image-size": 32})
        )
    with pytest.raises(ConfigError, match=r"'federation.pretrain' = 2: what is to be forgotten"):
        resolve_run(Config.from_mapping(PLAIN | {"attack": "unlearn-max-loss"}))


@pytest.mark.slow
def test_ray_comes_to_the_same_bits() -> None:
    inline = run(Config.from_mapping(STATEFUL))
    ray = run(Config.from_mapping(STATEFUL | {"engine": "ray"}))
    assert same_weights(inline.weights, ray.weights)
    figures = [(r.round, r.loss, r.clients, r.wire_bytes) for r in inline.all_rounds]
    assert figures == [(r.round, r.loss, r.clients, r.wire_bytes) for r in ray.all_rounds]
