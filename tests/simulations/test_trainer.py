"""What a mechanism can reach: the clients, their gradients, and the data of one who holds it all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.training import CLASSIFY
from simulations.client_app import Workplace
from simulations.engine.federation import run_federation
from simulations.engine.open_grid import open_grid
from simulations.experiments.trainer import FederationTrainer

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 1,
    "rounds": 2,
    "protocol": "fedavg",
    "local-steps": 6,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "limit": 400,
    "data.auxiliary_size": 0,
    "data.nonmembers": 100,
}
GONE = frozenset(range(40))


@pytest.mark.parametrize(
    "more",
    [{"training.momentum": 0.9, "training.weight_decay": 0.01}, {"protocol": "fedsgd", "local-steps": 1}],
)
def test_the_holders_walk_is_the_federations_training(more: dict[str, object]) -> None:
    config = Config.from_mapping(BASE | more)
    world = build_world(config)
    central = FederationTrainer(config, world, None).central()
    first = initial_weights(world.scenario.model, config.seed)
    for excluded in ((), GONE):
        trained = run_federation(config, world, excluded={0: excluded}).weights
        walked = central.train(first, excluded)
        for name, tensor in trained.items():
            torch.testing.assert_close(walked[name], tensor, rtol=1e-4, atol=1e-6)


def test_derivatives_are_those_of_autograd_and_are_counted() -> None:
    config = Config.from_mapping(BASE)
    world = build_world(config)
    central = FederationTrainer(config, world, None).central()
    weights = initial_weights(world.scenario.model, 3)
    flat, some = central.flat(weights), np.array([5, 1, 8])
    assert all(torch.equal(t, weights[n]) for n, t in central.weights(flat, weights).items())
    model = build_model(world.scenario.model).double()
    model.load_state_dict(weights)
    images, labels = world.dataset.tensors(world.partitions[0][some])

    def loss(vector: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, central.parts(vector), (images.double(),))
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    slope = torch.autograd.functional.jacobian(loss, flat)
    torch.testing.assert_close(central.gradient(flat, weights, some), slope)
    vector = torch.randn(flat.shape, generator=central.rng("test"), dtype=flat.dtype)
    _, curved = torch.autograd.functional.hvp(loss, flat, vector)
    torch.testing.assert_close(central.product(flat, weights, vector, some), curved)
    assert central.cost.gradients == pytest.approx(3 * 3 / len(central))

    # Samples that are brought are looked at like any others, counted, and no part of the training.
    more, brought = central.joined(images[:2], (labels[:2] + 1) % 10)
    more, again = more.joined(images[2:], labels[2:])
    assert (brought.tolist(), again.tolist()) == ([len(central), len(central) + 1], [len(central) + 2])
    assert (len(more), more.cost) == (len(central), central.cost)
    torch.testing.assert_close(more.gradient(flat, weights, again), central.gradient(flat, weights, some[2:]))
    wrong = torch.nn.functional.cross_entropy(model(images[:2].double()), (labels[:2] + 1) % 10)
    assert float(more.loss(flat, weights, brought)) == pytest.approx(2 * float(wrong.detach()))
    assert more.retained({0, 3}).max() < len(central)
    assert all(np.array_equal(a, b) for a, b in zip(more.batches(2), central.batches(2), strict=True))
    assert central.cost.gradients == pytest.approx((9 + 2) / len(central))


def test_clients_give_gradients_over_all_they_have_left() -> None:
    config = Config.from_mapping(BASE | {"clients": 4})
    world = build_world(config)
    weights = initial_weights(world.scenario.model, 0)
    everything = frozenset(range(len(world.partitions[3])))
    with open_grid(config, world) as grid:
        trainer = FederationTrainer(config, world, grid)
        found = list(trainer.gradients({1: GONE, 3: everything}, weights, 1))
        (one,) = trainer.gradients({1: GONE}, weights, 1, clients=[1], objective="forget")
        with pytest.raises(NotApplicable, match="4 clients hold it"):
            trainer.central()
    assert [update.client for update in found] == [0, 1, 2]
    assert (trainer.cost.rounds, trainer.cost.client_steps) == (2, 4)
    assert trainer.cost.bytes > 0
    model = build_model(world.scenario.model)
    model.load_state_dict(weights)
    images, labels = Workplace.of(config, world).samples(1, np.arange(40, len(world.partitions[1])))
    _, wanted = CLASSIFY.gradient(model, images, labels)
    for tensor, slope in zip(found[1].change.values(), wanted, strict=True):
        torch.testing.assert_close(tensor, slope, rtol=1e-4, atol=1e-6)
    right = model(images).softmax(1)[torch.arange(len(labels)), labels]
    (-(1 - right / 2).log()).mean().backward()
    for tensor, parameter in zip(one.change.values(), model.parameters(), strict=True):
        torch.testing.assert_close(tensor, parameter.grad, rtol=1e-4, atol=1e-6)
