"""Requests that are hard to serve, put to every mechanism that one holder of data runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.models import initial_weights
from fedattack.unlearning import MECHANISMS, Central, Deletion, History, build_mechanism
from simulations.experiments.shadows import Holder

OURS = (
    "fine-tuning",
    "gradient-ascent",
    "neg-grad",
    "random-labels",
    "salun",
    "scrub-distil",
    "fisher",
    "ntk",
    "mcmc",
)
COUNT = 48
SETTINGS = {
    "dataset": "digits",
    "model": "mlp",
    "width": 5,
    "clients": 1,
    "rounds": 2,
    "protocol": "fedavg",
    "local-steps": 5,
    "batch-size": 8,
    "learning-rate": 0.2,
    "compressor": "none",
    "limit": 68,
    "data.auxiliary_size": 0,
    "data.nonmembers": 20,
}


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(Config.from_mapping(SETTINGS))


@pytest.mark.parametrize("name", OURS)
def test_every_request_ends_in_a_finite_model(name: str, world: World, tmp_path: Path) -> None:
    images, labels = world.dataset.tensors(world.partitions[0])
    assert len(labels) == COUNT
    a_class = frozenset(np.flatnonzero(labels.numpy() == int(labels[0])).tolist())
    first_batch = frozenset(Central(world.scenario, images, labels, 0, 2).batches(1)[0].tolist())
    options = {"burn_in": 3, "samples": 1, "terms": 4} if name == "mcmc" else {}
    config = Config.from_mapping({"mechanism": name} | {f"unlearning.{k}": v for k, v in options.items()})
    mechanism = build_mechanism(config.unlearning)
    assert mechanism.runs == MECHANISMS.get(name).runs == "central"
    first = initial_weights(world.scenario.model, 0)
    for number, gone in enumerate((a_class, first_batch, frozenset(range(COUNT)))):
        central = Central(world.scenario, images, labels, 0, 2)
        history = History(tmp_path / str(number), world.scenario)
        history.keep_weights(0, first)
        history.weights, history.rounds, history.first_rounds = central.train(first), 2, {0: 1}
        before = {key: tensor.clone() for key, tensor in history.weights.items()}
        answer = mechanism.forget([Deletion(0, gone)], history, Holder(central))
        assert answer.excluded == {0: gone}
        assert all(bool(tensor.isfinite().all()) for tensor in answer.weights.values())
        assert all(torch.equal(tensor, history.weights[key]) for key, tensor in before.items())
        assert central.cost.gradients > 0
        if number:
            continue
        # once more, after what is gone already; and the same bits when asked again
        history.weights, history.excluded = answer.weights, answer.excluded
        more = frozenset(sorted(set(range(COUNT)) - a_class)[:3])
        second, again = (mechanism.forget([Deletion(0, more)], history, Holder(central)) for _ in range(2))
        assert second.excluded == {0: a_class | more}
        assert any(not torch.equal(t, answer.weights[key]) for key, t in second.weights.items())
        assert all(torch.equal(t, again.weights[key]) for key, t in second.weights.items())
        # a holder whose training never began has nothing to forget
        history.first_rounds = {}
        idle = mechanism.forget([Deletion(0, more)], history, Holder(central))
        assert all(torch.equal(t, history.weights[key]) for key, t in idle.weights.items())
