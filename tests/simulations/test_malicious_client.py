"""The malicious client's seat: what it changes, what it keeps, and that no seed leads it to the others' draws."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from adversaries.inversion.evidence.client import ImitatedClient
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import ConfigError, RunFailed
from fedattack.models import initial_weights
from fedattack.observation import Candidates, Observation
from fedattack.rng import adversary_seed
from fedattack.training import batch_positions, local_update
from simulations.client_app import Workplace
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.engine.local_grid import LocalGrid
from simulations.engine.ray_session import ray_session
from simulations.pipeline import simulate
from strategies.messages import tag_of

SETTINGS = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 3,
    "rounds": 4,
    "batch-size": 8,
    "compressor": "none",
    "engine": "inline",
    "attack": "rigged_attacks:Diary",
    "attack.malicious_clients": "1",
}


def settings(**more: object) -> Config:
    return Config.from_mapping(SETTINGS | {name.replace("_", "-"): value for name, value in more.items()})


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(settings())


def run(config: Config, world: World, **more) -> FederationResult:
    question = Candidates(*world.dataset.tensors(world.pools.nonmembers[:5]))
    return run_federation(config, world, questions={"rigged_attacks:Diary": question}, **more)


def same(a: FederationResult, b: FederationResult) -> bool:
    seen = [r.answers["rigged_attacks:Diary"][1]["seen"] for r in (a, b)]
    return torch.equal(*seen) and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_it_poisons_changes_its_reply_and_remembers(world: World) -> None:
    seen: list[Observation] = []
    result = run(settings(), world, on_observation=seen.append)
    honest: list[Observation] = []
    run_federation(settings(attack=""), world, on_observation=honest.append)
    for mine, theirs in zip(seen[:3], honest[:3], strict=True):  # round 1
        if mine.client != 1:
            assert torch.equal(mine.update.values, theirs.update.values)
            continue
        place = Workplace.of(settings(), world)
        images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        poisoned = local_update(
            place.model, mine.weights, images, labels, [np.arange(8)], world.scenario.training
        )
        for name, tensor in mine.update.dense().items():
            assert torch.equal(tensor, 2 * poisoned.update[name])
    diary = result.answers["rigged_attacks:Diary"]
    assert list(diary) == [1]
    assert diary[1]["seen"][:, 0].tolist() == [1, 2, 3, 4]
    first = next(iter(initial_weights(world.scenario.model, 0).values())).flatten()[0]
    assert diary[1]["seen"][0, 2] == float(first)
    assert len(set(diary[1]["seen"][:, 1].tolist())) == 4


def test_its_memory_survives_a_driver_that_stops(world: World, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def on_round(record: RoundRecord) -> None:
        if record.round == 2:
            raise Stopped

    expected = run(settings(), world)
    with pytest.raises(Stopped):
        run(settings(), world, run_dir=tmp_path, on_round=on_round)
    assert same(run(settings(), world, run_dir=tmp_path), expected)
    assert same(run(settings(), world, run_dir=tmp_path), expected)  # all rounds from the journal


def test_only_who_asks_early_is_told_the_question(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every round, and it stands in no message to another client."""
    told: dict[int, set[str]] = {}
    send = LocalGrid.send_and_receive

    def spy(grid: LocalGrid, messages: Iterable[Message], **more: object) -> Iterable[Message]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                told.setdefault(grid.client_of(message.metadata.dst_node_id), set()).update(message.content)
        return send(grid, messages, **more)

    monkeypatch.setattr(LocalGrid, "send_and_receive", spy)
    names = ["rigged_attacks:Told", "rigged_attacks:Diary"]
    question = Candidates(*world.dataset.tensors(world.pools.nonmembers[:5]))
    config = settings(attack=",".join(names))
    answers = run_federation(config, world, questions=dict.fromkeys(names, question)).answers
    assert torch.equal(answers[names[0]][1]["told"], question.labels)
    assert [len(answers[name][1]["seen"]) for name in names] == [4, 4]
    honest = {"arrays", "config"}
    assert told == {0: honest, 1: honest | {f"question of {tag_of(0, names[0])}"}, 2: honest}


@pytest.mark.slow
@pytest.mark.ray
def test_its_memory_is_the_same_on_ray(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for the actors
    config = settings(engine="ray", actors=2)
    with ray_session(config.engine):
        assert same(run(config, world), run(settings(), world))


def test_bad_attacks_and_settings_are_named(world: World) -> None:
    for name, reason in (
        ("Undeclared", "keeps memory and does not say so"),
        ("Shortening", "must leave images"),
    ):
        config = settings(attack=f"rigged_attacks:{name}", clients=1, **{"attack.malicious_clients": "0"})
        with pytest.raises(RunFailed, match=reason):
            run_federation(config, build_world(config))
    with pytest.raises(ConfigError, match=r"'attack.malicious_clients' = \[3\]: accepted: some of 0 to 2"):
        settings(**{"attack.malicious_clients": "3"})


# ---------------------------------------------------------------------- seeds

NOISY = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 3,
    "seed": 5,
    "compressor": "none",
    "engine": "inline",
    "defense": "clip-noise",
    "attack": "analytic,rigged_attacks:SeedOracle",
}


def gains(folder: Path) -> tuple[float, float]:
    audits = simulate(Config.from_mapping(NOISY | {"run-dir": str(folder)})).audits
    honest, oracle = (audits[name].summary["metrics"]["psnr"]["mean"] for name in NOISY["attack"].split(","))
    return honest, oracle


def test_a_seed_oracle_is_no_better_than_the_honest_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, oracle = gains(tmp_path / "derived")
    print(f"analytic {honest:.1f} dB, seed oracle {oracle:.1f} dB")
    assert oracle < honest + 1
    # With the run's own seed it has everything: the test can fail.
    monkeypatch.setattr("simulations.experiments.reconstruction.adversary_seed", lambda seed, purpose: seed)
    honest, oracle = gains(tmp_path / "passed on")
    print(f"with the run's seed: analytic {honest:.1f} dB, seed oracle {oracle:.1f} dB")
    assert oracle > honest + 20


def test_no_handed_seed_is_another_runs_seed_or_the_same_twice(world: World) -> None:
    purposes = [("attack",), ("membership", 1), ("membership", 2), ("arm", 1), ("client seat of x", 1, 0)]
    found = {adversary_seed(seed, *purpose) for seed in range(200) for purpose in purposes}
    assert len(found) == 1000
    assert min(found) > 2**40
    assert max(found) < 2**63


def test_an_imitated_client_never_draws_what_a_real_one_does() -> None:
    """Whatever seed an attack is called with, a default of 0 too."""
    config = settings(protocol="fedavg", local_steps=2, attack="")
    there = build_world(config)
    weights: dict[str, Tensor] = initial_weights(there.scenario.model, 0)
    images, labels = there.dataset.tensors(there.partitions[0])
    real = Workplace.of(config, there)
    batches = batch_positions(len(labels), there.scenario.training, 0, 1, 0)
    update = local_update(real.model, weights, images, labels, batches, there.scenario.training).update
    imitated = ImitatedClient(there.scenario, weights, 0, 1).compute(images, labels, 0)
    assert not torch.allclose(imitated["1.weight"], update["1.weight"], rtol=1e-3)
