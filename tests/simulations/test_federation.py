"""A federation's arithmetic against plain torch, and what it lets be seen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import ConfigError
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation
from fedattack.training import batch_positions, local_update
from simulations.client_app import Workplace, round_batches
from simulations.engine.federation import ask_unlearning, run_federation
from simulations.engine.local_grid import InlineGrid
from strategies import STRATEGIES

BASE = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": 5,
    "rounds": 1,
    "compressor": "none",
    "batch-size": 0,
    "learning-rate": 0.5,
    "engine": "inline",
    "limit": 200,
}


def settings(**more: object) -> Config:
    return Config.from_mapping(BASE | {k.replace("_", "-"): v for k, v in more.items()})


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(settings())


def gradient(world: World, weights: dict[str, Tensor], ids: np.ndarray) -> dict[str, Tensor]:
    model = build_model(world.scenario.model)
    model.load_state_dict(weights)
    images, labels = world.dataset.tensors(ids)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = cross_entropy(model(images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_fedsgd_over_everything_is_one_step_of_gradient_descent(world: World) -> None:
    """Means weighted by examples: the clients' gradients make the gradient over all their samples."""
    result = run_federation(settings(), world)
    start = initial_weights(world.scenario.model, 0)
    whole = gradient(world, start, np.concatenate(world.partitions))
    for name, tensor in result.weights.items():
        torch.testing.assert_close(tensor, start[name] - 0.5 * whole[name], rtol=1e-5, atol=1e-6)


def test_the_servers_learning_rate_is_its_own(world: World) -> None:
    config = Config.from_mapping({**BASE, "training.server_learning_rate": 0.125})
    result = run_federation(config, build_world(config))
    start = initial_weights(world.scenario.model, 0)
    whole = gradient(world, start, np.concatenate(world.partitions))
    torch.testing.assert_close(
        result.weights["head.bias"], start["head.bias"] - 0.125 * whole["head.bias"], rtol=1e-5, atol=1e-6
    )


def test_fedavg_averages_what_clients_reach_by_sgd(world: World) -> None:
    config = settings(protocol="fedavg", local_steps=3, batch_size=7)
    result = run_federation(config, build_world(config))
    start = initial_weights(world.scenario.model, 0)
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in start.items()}
    total = 0
    for client, ids in enumerate(world.partitions):
        model = build_model(world.scenario.model)
        model.load_state_dict(start)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        batches = round_batches(config, len(ids), 1, client)
        for batch in batches:
            images, labels = world.dataset.tensors(ids[batch])
            optimiser.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimiser.step()
        examples = len(np.unique(np.concatenate(batches)))
        total += examples
        for name, tensor in model.state_dict().items():
            sums[name] += examples * tensor.double()
    for name, tensor in result.weights.items():
        torch.testing.assert_close(tensor, (sums[name] / total).float(), rtol=1e-5, atol=1e-6)


def test_fedprox_pulls_back_to_the_received_weights(world: World) -> None:
    config = Config.from_mapping(
        {
            **BASE,
            "protocol": "fedavg",
            "local-steps": 3,
            "strategy": "fedprox",
            "clients": 1,
            "federation.strategy_options": {"proximal-mu": 0.7},
        }
    )
    world = build_world(config)
    result = run_federation(config, world)
    model = build_model(world.scenario.model)
    model.load_state_dict(initial_weights(world.scenario.model, 0))
    received = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    images, labels = world.dataset.tensors(world.partitions[0])
    for _ in range(3):
        optimiser.zero_grad()
        drift = sum(((p - r) ** 2).sum() for p, r in zip(model.parameters(), received, strict=True))
        (cross_entropy(model(images), labels) + 0.35 * drift).backward()
        optimiser.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_fedprox_with_local_momentum_is_refused(world: World) -> None:
    config = Config.from_mapping({**BASE, "strategy": "fedprox", "training.momentum": 0.9})
    with pytest.raises(ConfigError, match=r"'training.momentum' = 0.9: strategy 'fedprox' needs 0"):
        run_federation(config, world)


def test_excluded_samples_are_as_if_they_had_never_been(world: World) -> None:
    excluded = {1: [0, 3, 4], 3: range(len(world.partitions[3]))}
    result = run_federation(settings(), world, excluded=excluded)
    kept = [np.delete(ids, list(excluded.get(c, []))) for c, ids in enumerate(world.partitions)]
    start = initial_weights(world.scenario.model, 0)
    whole = gradient(world, start, np.concatenate(kept))
    torch.testing.assert_close(
        result.weights["head.weight"], start["head.weight"] - 0.5 * whole["head.weight"], rtol=1e-5, atol=1e-6
    )
    assert result.rounds[0].clients == (0, 1, 2, 4)
    assert result.rounds[0].dropped == (3,)
    # No bit of the excluded samples is left: with other pixels there, the result is the same.
    images = world.dataset.images.copy()
    for client, positions in excluded.items():
        images[world.partitions[client][list(positions)]] = (
            255 - images[world.partitions[client][list(positions)]]
        )
    painted = replace(world, dataset=replace(world.dataset, images=images))
    again = run_federation(settings(), painted, excluded=excluded)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in result.weights.items())


def test_a_deletion_leaves_the_other_samples_batches_as_they_were() -> None:
    """Local SGD on what is left of each batch, worked out anew; an emptied batch moves nothing."""
    decay = {"training.weight_decay": 0.01}
    config = settings(protocol="fedavg", batch_size=4, local_steps=6, learning_rate=0.1, **decay)
    world = build_world(config)
    size = len(world.partitions[1])
    whole = batch_positions(size, config.training, config.seed, 1, 1)
    gone = [*whole[1].tolist(), int(whole[2][0]), int(whole[4][1])]
    kept = [np.setdiff1d(batch, gone, assume_unique=True) for batch in whole]
    found = round_batches(config, size, 1, 1, gone)
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in kept]
    assert [len(batch) for batch in found].count(0) == 1
    seen: list[Observation] = []
    run_federation(config, world, excluded={1: gone}, on_observation=seen.append)
    (sent,) = [observation for observation in seen if observation.client == 1]
    model, start = build_model(world.scenario.model), initial_weights(world.scenario.model, config.seed)
    images, labels = world.dataset.tensors(world.partitions[1])
    wanted = local_update(model, start, images, labels, [b for b in found if len(b)], config.training).update
    for name, tensor in sent.update.dense().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-7)
    one = settings(protocol="fedavg", batch_size=4, local_steps=1)
    (first,) = round_batches(one, size, 1, 1)
    assert run_federation(one, build_world(one), excluded={1: first.tolist()}).rounds[0].dropped == (1,)
    anew = config.model_copy(update={"unlearning": config.unlearning.model_copy(update={"draws": "anew"})})
    left = np.setdiff1d(np.arange(size), gone)
    drawn = [left[b] for b in batch_positions(len(left), config.training, config.seed, 1, 1)]
    assert all(map(np.array_equal, round_batches(anew, size, 1, 1, gone), drawn))


def test_going_on_from_a_checkpoint_is_the_same_run(world: World) -> None:
    config = settings(rounds=3, batch_size=4, dropout=0.3, participation=0.8)
    checkpoints: dict[int, dict[str, Tensor]] = {}
    whole = run_federation(config, world, on_weights=lambda r, w: checkpoints.update({r: copy.deepcopy(w)}))
    rest = run_federation(config, world, initial=checkpoints[1], first_round=2)
    assert [r.round for r in rest.rounds] == [2, 3]
    assert all(torch.equal(rest.weights[name], tensor) for name, tensor in whole.weights.items())
    none = run_federation(config, world, initial=checkpoints[3], first_round=4)
    assert none.rounds == []
    assert all(torch.equal(none.weights[name], tensor) for name, tensor in whole.weights.items())


def test_observations_are_what_came_over_the_wire(world: World) -> None:
    config = settings(compressor="topk", compression=0.02, rounds=2)
    seen: list[Observation] = []
    world = build_world(config)
    run_federation(config, world, on_observation=seen.append, observe=lambda r, c: r == 2 and c in (1, 4))
    assert [(o.round, o.client) for o in seen] == [(2, 1), (2, 4)]
    for observation in seen:
        dense = gradient(world, observation.weights, world.partitions[observation.client])
        flat = torch.cat([tensor.reshape(-1) for tensor in dense.values()])
        kept = observation.update.indices
        assert kept is not None
        assert len(kept) == round(0.02 * len(flat)) == observation.update.kept
        assert set(kept.tolist()) == set(flat.abs().topk(len(kept)).indices.tolist())
        torch.testing.assert_close(observation.update.values, flat[kept], rtol=1e-4, atol=1e-6)
        assert observation.num_examples == len(world.partitions[observation.client])
        assert 0 < observation.wire_bytes < 8 * len(kept) + 64
        assert observation.auxiliary is world.auxiliary


def test_records_hold_the_figures(world: World) -> None:
    config = settings(rounds=2)
    result = run_federation(config, world)
    model = build_model(world.scenario.model)
    model.load_state_dict(result.weights)
    images, labels = world.dataset.tensors(world.pools.nonmembers)
    with torch.no_grad():
        logits = model(images)
    last = result.rounds[-1]
    assert last.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    assert last.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert last.wire_bytes == 5 * (sum(p.numel() for p in model.parameters()) * 4 + 28)
    assert last.clients == (0, 1, 2, 3, 4)
    assert (last.failed, last.rejected, last.dropped) == ((), (), ())


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm"])
def test_batch_norm_buffers_are_averaged_and_stay_variances(strategy: str) -> None:
    options = {"federation.strategy_options": {"eta": 1.0}} if strategy == "fedadam" else {}
    config = Config.from_mapping(
        {
            **BASE,
            **options,
            "model": "rigged_models:batch_norm_net",
            "strategy": strategy,
            "rounds": 3,
            "clients": 3,
        }
    )
    world = build_world(config)
    seen: list[Observation] = []
    states: dict[int, dict[str, Tensor]] = {}
    result = run_federation(
        config,
        world,
        on_observation=seen.append,
        on_weights=lambda r, w: states.update({r: copy.deepcopy(w)}),
    )
    assert result.rounds[-1].buffer_bytes == 3 * 2 * 4 * 4
    assert result.rounds[-1].rejected == ()
    for number, state in states.items():
        mine = [o for o in seen if o.round == number]
        total = sum(o.num_examples for o in mine)
        for name in ("1.running_mean", "1.running_var"):
            mean = sum(o.buffers[name].double() * o.num_examples / total for o in mine)
            torch.testing.assert_close(state[name], mean.float(), rtol=1e-5, atol=1e-7)
        assert (state["1.running_var"] > 0).all()
        assert state["1.num_batches_tracked"].dtype == torch.int64


OPTIONS = {
    "fedprox": {"proximal-mu": 0.1},
    "krum": {"num-malicious-nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "bulyan": {"num-malicious-nodes": 0},
}


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_every_strategy_of_flower_trains(strategy: str) -> None:
    config = Config.from_mapping(
        {
            **BASE,
            "learning-rate": 0.1,
            "strategy": strategy,
            "rounds": 3,
            "federation.strategy_options": OPTIONS.get(strategy, {}),
        }
    )
    result = run_federation(config, build_world(config))
    assert all(r.aggregated and not r.failed and not r.rejected for r in result.rounds)
    assert result.rounds[-1].loss is not None
    assert math.isfinite(result.rounds[-1].loss)
    start = initial_weights(build_world(config).scenario.model, 0)
    assert not torch.equal(result.weights["head.weight"], start["head.weight"])


def test_a_strategy_that_does_not_aggregate_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.from_mapping(
        {
            **BASE,
            "strategy": "bulyan",
            "federation.strategy_options": {"num-malicious-nodes": 1},
            "clients": 7,
            "dropout": 0.4,
        }
    )
    world = build_world(config)
    result = run_federation(config, world)
    assert not result.rounds[0].aggregated
    assert "the strategy did not aggregate" in caplog.text
    start = initial_weights(world.scenario.model, 0)
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in start.items())


def test_only_the_malicious_client_asks_to_forget(world: World) -> None:
    config = Config.from_mapping(
        {**BASE, "attack": "unlearn-max-loss", "requests": 3, "attack.malicious_clients": 2}
    )
    weights = initial_weights(world.scenario.model, 0)
    grid = InlineGrid(Workplace.of(config, world))
    try:
        ((sender, request),) = ask_unlearning(grid, weights, config, world)["unlearn-max-loss"]
        left = {2: request.positions}
        ((_, again),) = ask_unlearning(grid, weights, config, world, left)["unlearn-max-loss"]
    finally:
        grid.close()
    assert sender == request.client == 2
    model = build_model(world.scenario.model)
    model.load_state_dict(weights)
    images, labels = world.dataset.tensors(world.partitions[2])
    with torch.no_grad():
        losses = cross_entropy(model(images), labels, reduction="none")
    order = losses.argsort(descending=True).tolist()
    assert list(request.positions) == order[:3]
    assert list(again.positions) == order[3:6]
