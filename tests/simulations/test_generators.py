"""Federations that train a generator: the same bits everywhere, whatever is sent, and what a run leaves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from PIL import Image
from rigged_clients import rigged
from safetensors.torch import save_file

from fedattack.compression.carrier import to_array
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.generative import load_gan
from fedattack.generative.wgan_gp import energy_distance
from fedattack.models import build_model, initial_weights
from fedattack.rng import torch_rng
from fedattack.task import LocalRound, task_of
from fedattack.training import batch_positions
from simulations.client_app import Workplace
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.engine.local_grid import InlineGrid
from simulations.pipeline import simulate
from strategies.messages import PACKED, UPDATE

SMALL: dict[str, Any] = {
    "task": "wgan-gp",
    "dataset": "digits",
    "width": 16,
    "clients": 4,
    "rounds": 4,
    "local-steps": 10,
    "batch-size": 8,
    "learning-rate": 1e-3,
    "limit": 120,
    "data.nonmembers": 40,
    "engine": "inline",
}


def federate(run_dir: Path | None = None, **more: Any) -> FederationResult:
    config = Config.from_mapping(SMALL | more)
    return run_federation(config, build_world(config), run_dir=run_dir)


def same(one: FederationResult, other: FederationResult) -> bool:
    """Weights and figures, bit for bit."""
    told = [
        [(r.round, r.loss, r.train_loss, r.clients, r.wire_bytes) for r in x.rounds] for x in (one, other)
    ]
    names = one.weights.keys()
    return told[0] == told[1] and all(torch.equal(one.weights[n], other.weights[n]) for n in names)


SENT: dict[str, dict[str, Any]] = {
    "both": {},
    "generator": {"gan.share": "generator", "participation": 0.75, "dropout": 0.2},
    "sparse": {"compressor": "topk", "compression": 0.1, "error-feedback": True, "gan.share": "generator"},
    "private": {"defense": "clip-noise", "defense.clip-noise.unit": "sample"},
    "sums": {"defense": "clip-noise,secure-aggregation", "strategy": "fedadam"},
}


@pytest.mark.parametrize("how", SENT)
def test_a_killed_training_goes_on_with_the_same_bits(how: str, tmp_path: Path) -> None:
    """Critics that stay at home come back from the journal's memories."""
    config = Config.from_mapping(SMALL | SENT[how])
    expected = federate(**SENT[how])

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_federation(config, build_world(config), run_dir=tmp_path, on_round=stop)
    assert same(federate(tmp_path, **SENT[how]), expected)
    assert all(math.isfinite(r.loss) for r in expected.rounds if r.loss is not None)
    assert bool(list((tmp_path / "journal").glob("memories-*"))) == (how in ("generator", "sparse"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("how", ["both", "generator", "private"])
def test_ray_finds_what_one_process_finds(how: str) -> None:
    expected = federate(**SENT[how])
    for actors in (1, 2):
        assert same(federate(engine="ray", actors=actors, **SENT[how]), expected)


def test_critics_at_home_are_the_clients_own() -> None:
    """What is sent holds no critic; each client's goes on from where it was, which fresh ones would not."""
    home: dict[str, Any] = {"gan.share": "generator", "rounds": 2}
    config = Config.from_mapping(SMALL | home)
    twice, once = federate(**home), federate(**home | {"rounds": 1})
    assert twice.weights
    assert all(name.startswith("generator.") for name in twice.weights)
    fresh = run_federation(config, build_world(config), initial=once.weights, first_round=2)
    assert any(not torch.equal(fresh.weights[n], twice.weights[n]) for n in twice.weights)


def test_a_federation_is_the_mean_of_its_clients_nets() -> None:
    """FedGAN: both nets are averaged, each client's by its number of samples; worked out anew, client by client."""
    config = Config.from_mapping(SMALL | {"rounds": 1})
    world = build_world(config)
    task, weights = task_of(world.scenario), initial_weights(world.scenario.model, config.seed)
    moved = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in weights.items()}
    total = sum(len(ids) for ids in world.partitions)
    for client, ids in enumerate(world.partitions):
        images, labels = world.dataset.tensors(ids)
        batches = batch_positions(len(ids), config.training, config.seed, 1, client)
        draws = torch_rng(config.seed, "training", 1, client)
        step = task.step(world.scenario, draws)
        model = build_model(world.scenario.model)
        found = task.train(model, LocalRound(weights, images, labels, batches, world.scenario, step, draws))
        for name, change in found.update.items():
            moved[name] += change.double() * len(ids) / total
    for name, tensor in federate(rounds=1).weights.items():
        torch.testing.assert_close(tensor, (weights[name] + moved[name]).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "part"),
    [(b"\x00" * 30, "update"), (np.full(7, np.nan, np.float32).tobytes(), "update")],
)
def test_hostile_replies_are_rejected_and_the_round_goes_on(change: bytes, part: str) -> None:
    config = Config.from_mapping(SMALL | {"rounds": 1})
    world = build_world(config)

    def meddle(message: Message, reply: Message, client: int, round: int) -> Message:
        if client == 2:
            reply.content[UPDATE][PACKED] = to_array(change, reply.content[UPDATE][PACKED].shape[0])
        return reply

    grid = InlineGrid(Workplace.of(config, world), rigged(meddle))
    result = run_federation(config, world, grid=grid)
    grid.close()
    assert [(r, client) for r, client, _ in result.rejections] == [(1, 2)]
    assert result.rounds[0].clients == (0, 1, 3)


def test_a_generator_learns_and_a_run_leaves_it(tmp_path: Path) -> None:
    config = Config.from_mapping(
        SMALL
        | {"rounds": 8, "local-steps": 20, "learning-rate": 5e-3, "width": 32}
        | {"run-dir": str(tmp_path), "output.checkpoint_every": 3}
    )
    result = simulate(config)
    assert result.federation is not None
    distances = [r.loss for r in result.federation.rounds]
    assert distances[-1] is not None
    assert distances[0] is not None
    assert 0 < distances[-1] < distances[0] / 2
    gan, told = load_gan(tmp_path / "generator.safetensors")
    weights = result.federation.weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gan.state_dict().items())
    assert (told.rounds, told.image_shape, told.gan.share) == (8, (1, 8, 8), "both")
    world = build_world(config)
    held_out, _ = world.dataset.tensors(world.pools.nonmembers)
    with torch.no_grad():
        found = energy_distance(held_out, gan.sample(40, torch.Generator().manual_seed(0)))
    assert found == pytest.approx(distances[-1], rel=1e-6), "the last round's figure is that of the file"
    kept = sorted(path.name for path in (tmp_path / "generators").iterdir())
    assert kept == ["round-00003.safetensors", "round-00006.safetensors"]
    sheets = {path.name: Image.open(path).size for path in (tmp_path / "images" / "generator").iterdir()}
    assert sheets["round-00008.png"] == (16 * 8, 8 * 8), "8 rows of 16 images of 8 x 8"
    assert {sheets[f"round-0000{n}.png"] for n in (1, 2, 4)} == {(16 * 8, 8)}
    report = (tmp_path / "report.html").read_text()
    assert re.search(r"<th[^>]*>energy distance</th>\s*<th[^>]*>critic&#39;s loss</th>", report)
    assert "test accuracy" not in report
    summary = json.loads((tmp_path / "summary.json").read_text())["federation"]
    assert summary["generator"]["distinct"] == 1.0
    assert "round 8: 4 clients, energy distance" in (tmp_path / "log.txt").read_text()


def test_a_generator_that_collapsed_is_said(tmp_path: Path) -> None:
    """It starts from one that draws the same image whatever the latents are, and hardly moves."""
    stuck = initial_weights(build_world(Config.from_mapping(SMALL)).scenario.model, 0)
    stuck["generator.4.weight"] = torch.zeros_like(stuck["generator.4.weight"])
    save_file(stuck, tmp_path / "start.safetensors")
    few = {
        "rounds": 1,
        "local-steps": 5,
        "learning-rate": 1e-6,
        "weights": str(tmp_path / "start.safetensors"),
    }
    result = simulate(Config.from_mapping(SMALL | few | {"run-dir": str(tmp_path / "run")}))
    figures = result.summary["federation"]["generator"]
    assert figures["distinct"] == 1 / 1000
    report = (tmp_path / "run" / "report.html").read_text()
    assert "warning: the generator collapsed: 0.1% of 1,000 samples are distinct" in report
