"""Local epochs: steps that follow from each client's own samples, wherever they are counted; and the last round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedattack.config import Config, TrainingConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError
from fedattack.observation import Observation
from fedattack.task import task_of
from fedattack.training import batch_positions
from simulations.client_app import round_batches, share_of
from simulations.engine.federation import run_federation
from simulations.experiments.victims import groups

SMALL = {"dataset": "digits", "limit": 90, "model": "logistic", "compressor": "none", "engine": "inline"}


def config(**more: Any) -> Config:
    named = {name.replace("_", "-"): value for name, value in more.items()}
    return Config.from_mapping(SMALL | {"protocol": "fedavg", "batch-size": 8} | named)


@pytest.mark.parametrize(
    ("batch", "samples", "steps"), [(8, 30, 4), (8, 32, 4), (8, 5, 1), (0, 30, 1), (1, 7, 7)]
)
def test_steps_follow_from_the_samples(batch: int, samples: int, steps: int) -> None:
    training = TrainingConfig(protocol="fedavg", batch_size=batch, local_epochs=3)
    assert training.steps(samples) == 3 * steps
    batches = batch_positions(samples, training, seed=4, round=2, client=1)
    assert len(batches) == 3 * steps
    for epoch in range(3):
        seen = np.concatenate(batches[epoch * steps : (epoch + 1) * steps])
        assert sorted(seen) == list(range(samples))
    said = training.of(samples)
    assert (said.local_steps, said.local_epochs) == (3 * steps, None)
    same = batch_positions(samples, said, seed=4, round=2, client=1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, same, strict=True))


def test_epochs_and_as_many_steps_are_the_same_training() -> None:
    by_epochs, by_steps = (
        config(clients=3, rounds=2, local_epochs=2),
        config(clients=3, rounds=2, local_steps=4),
    )
    world = build_world(by_epochs)
    sizes = {len(ids) for ids in world.partitions}
    assert {math.ceil(size / 8) for size in sizes} == {2}, sizes
    first = run_federation(by_epochs, world)
    second = run_federation(by_steps, build_world(by_steps))
    assert all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


def test_every_observation_says_its_clients_own_steps() -> None:
    settings = config(clients=4, rounds=1, local_epochs=2, partition="dirichlet", alpha=0.5, seed=3)
    world, seen = build_world(settings), list[Observation]()
    run_federation(settings, world, on_observation=seen.append)
    sizes = [len(ids) for ids in world.partitions]
    steps = [2 * math.ceil(size / 8) for size in sizes]
    assert len(set(steps)) > 1
    assert [o.num_examples for o in seen] == sizes
    assert [o.scenario.training.local_steps for o in seen] == steps
    assert [len(round_batches(settings, size, 1, client)) for client, size in enumerate(sizes)] == steps
    assert world.scenario.training.local_steps == max(steps)
    together = groups(seen, 4)
    assert all(len({o.scenario.training.local_steps for o in group}) == 1 for group in together)
    assert sum(map(len, together)) == len(seen)
    assert [share_of(0.5, number) for number in (1, 2, 5)] == [1, 1, 3]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"local-epochs": 2}, "local_epochs = 2: a client takes no passes under protocol 'fedsgd'"),
        ({"protocol": "fedavg", "local-epochs": 2, "local-steps": 3}, "say two things; accepted"),
        ({"protocol": "fedavg", "local-epochs": 0}, "'training.local_epochs' = 0"),
        ({"attack-rounds": "lst"}, "'attack.rounds' = 'lst': accepted: numbers of rounds from 1, and last"),
        ({"rounds": 2, "attack-rounds": "3,last"}, r"'attack.rounds' = \[3\]"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Config.from_mapping(settings)


def test_a_generator_counts_steps() -> None:
    settings = {
        "task": "wgan-gp",
        "local-epochs": 2,
        "local-steps": 1,
        "dataset": "digits",
        "engine": "inline",
    }
    asked = Config.from_mapping(settings)
    scenario = build_world(asked).scenario
    with pytest.raises(ConfigError, match=r"'training.local_epochs' = 2: task 'wgan-gp' counts steps"):
        task_of(scenario).check(scenario)


@pytest.mark.parametrize(
    ("rounds", "asked", "meant"),
    [
        (5, "last", (5,)),
        ("5", "1,last", (1, 5)),
        (3, "3,last", (3,)),
        (1, "last", (1,)),
        (4, ("last", 2), (4, 2)),
    ],
)
def test_the_last_round_by_its_name(rounds: Any, asked: Any, meant: tuple[int, ...]) -> None:
    found = Config.from_mapping({"rounds": rounds, "attack-rounds": asked})
    assert found.attack.rounds == meant
    assert "last" not in found.to_toml()
