"""FedEraser against its own formula, worked out independently from what really trained clients sent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation
from fedattack.training import batch_positions, local_update
from fedattack.unlearning import MECHANISMS, Deletion, History
from fedattack.unlearning.federaser import FedEraser
from simulations.engine.federation import run_federation
from simulations.engine.open_grid import open_grid
from simulations.experiments.trainer import FederationTrainer
from simulations.pipeline import simulate

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 4,
    "rounds": 4,
    "protocol": "fedavg",
    "local-steps": 6,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "mechanism": "federaser",
    "data.auxiliary_size": 0,
    "data.nonmembers": 300,
}


def trained(folder: Path, **settings: object) -> tuple[Config, World, History, list[Observation]]:
    config = Config.from_mapping(BASE | settings)
    world = build_world(config)
    mechanism = MECHANISMS.get("federaser")
    history = History(folder, world.scenario, mechanism.keeps, config.unlearning.checkpoint_every)
    history.keep_weights(0, initial_weights(world.scenario.model, config.seed))
    seen: list[Observation] = []

    def observed(observation: Observation) -> None:
        seen.append(observation)
        if history.wants_updates(observation.round):
            history.keep_update(observation)

    run_federation(
        config,
        world,
        on_observation=observed,
        on_weights=history.keep_weights,
        on_round=lambda r: history.note_round(r.round, r.clients, r.aggregated),
    )
    return config, world, history, seen


@pytest.mark.parametrize(("protocol", "every"), [("fedavg", 1), ("fedavg", 2), ("fedsgd", 1)])
def test_every_step_is_the_formula(tmp_path: Path, protocol: str, every: int) -> None:
    steps = 6 if protocol == "fedavg" else 1
    config, world, history, seen = trained(
        tmp_path, protocol=protocol, **{"local-steps": steps, "unlearning.checkpoint_every": every}
    )
    gone = frozenset({3, 8, 9, 20})
    with open_grid(config, world) as grid:
        trainer = FederationTrainer(config, world, grid)
        answer = FedEraser(calibration=0.5).forget([Deletion(1, gone)], history, trainer)

    kept = list(range(1, 5, every))
    short = max(1, steps // 2)
    sign = 1.0 if protocol == "fedavg" else -config.training.learning_rate
    model = build_model(world.scenario.model)
    weights = initial_weights(world.scenario.model, config.seed)
    for number in kept:
        total = dict.fromkeys(weights, 0.0)
        examples = 0
        for observation in [o for o in seen if o.round == number]:
            stored = {name: sign * t for name, t in observation.update.dense().items()}
            count = observation.num_examples
            if number == 1:
                if observation.client == 1:
                    continue
                moves = stored
            else:
                images, labels = world.dataset.tensors(world.partitions[observation.client])
                batches = batch_positions(len(labels), config.training, 0, number, observation.client)[:short]
                if observation.client == 1:  # the deleted are left out of batches that stay as they were
                    batches = [np.array([p for p in batch if p not in gone]) for batch in batches]
                fresh = local_update(model, weights, images, labels, batches, config.training)
                count = fresh.num_examples
                new = torch.cat([sign * t.flatten() for t in fresh.update.values()])
                old = torch.cat([t.flatten() for t in stored.values()])
                moves = {n: sign * t * (old.norm() / new.norm()) for n, t in fresh.update.items()}
            examples += count
            total = {name: total[name] + count * moves[name] for name in total}
        weights = {name: weights[name] + total[name] / examples for name in weights}
    for name, tensor in weights.items():
        torch.testing.assert_close(answer.weights[name], tensor, rtol=1e-4, atol=1e-6)
    assert trainer.cost.rounds == len(kept) - 1
    assert trainer.cost.client_steps == (len(kept) - 1) * 4 * short
    assert (answer.resumed_after, answer.excluded) == (0, {1: gone})


@pytest.mark.slow
def test_costs_less_than_retraining_and_keeps_the_accuracy(tmp_path: Path) -> None:
    document = {}
    for mechanism in ("retrain", "federaser"):
        settings = BASE | {"attack": "unlearn-max-loss", "mechanism": mechanism, "rounds": 6, "requests": 10}
        config = Config.from_mapping(settings | {"run-dir": str(tmp_path / mechanism)})
        result = simulate(config)
        assert result.audits["unlearn-max-loss"].summary["mechanism"] == mechanism
        document[mechanism] = json.loads((result.folder / "parts" / "unlearn-max-loss.json").read_text())
    exact, erased = document["retrain"], document["federaser"]
    assert erased["requests"] == exact["requests"]
    before, after = (
        {name: one["accuracy"][arm] for name, one in document.items()} for arm in ("before", "after")
    )
    assert before["federaser"] == before["retrain"]
    costs = {name: one["costs"]["mechanism"] for name, one in document.items()}
    assert (costs["retrain"]["rounds"], costs["federaser"]["rounds"]) == (6, 5)
    steps = {name: one["client_steps"] for name, one in costs.items()}
    assert (steps["retrain"], steps["federaser"]) == (6 * 4 * 6, 5 * 4 * 3)
    assert erased["costs"]["retraining"]["client_steps"] == steps["retrain"]
    assert min(after["retrain"]) > 0.85
    assert min(after["federaser"]) > min(after["retrain"]) - 0.1


def test_a_client_that_leaves_is_not_asked_again(tmp_path: Path) -> None:
    config, world, history, _ = trained(tmp_path, rounds=3)
    whole = frozenset(range(len(world.partitions[2])))
    with open_grid(config, world) as grid:
        trainer = FederationTrainer(config, world, grid)
        answer = FedEraser().forget([Deletion(2, whole, drops_out=True)], history, trainer)
        assert trainer.cost.client_steps == 2 * 3 * 3
        for path in history.folder.glob("update-*-00002.safetensors"):  # what it sent is not looked at either
            path.unlink()
        again = FedEraser().forget([Deletion(2, whole, drops_out=True)], history, trainer)
    assert answer.weights.keys() == again.weights.keys()
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in answer.weights.items())
    assert not any(torch.equal(tensor, history.weights[name]) for name, tensor in answer.weights.items())


def test_needs_single_updates() -> None:
    config = Config.from_mapping(BASE | {"defense": "secure-aggregation"})
    with pytest.raises(NotApplicable, match=r"'federaser' keeps each client's update.*use 'retrain'"):
        FedEraser().check("federaser", build_world(config).scenario, 4)
