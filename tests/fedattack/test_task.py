"""What a client minimises goes through the task: classifiers, frozen and tied parameters, and a task of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fedattack.config import Config, ModelConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation
from fedattack.task import TASKS, tied_names, trained_parameters
from fedattack.training import CLASSIFY, LossTask, evaluate, local_update
from simulations.engine.federation import Judge, run_federation

BASE = {
    "dataset": "digits",
    "clients": 3,
    "rounds": 3,
    "protocol": "fedavg",
    "local-steps": 4,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "data.auxiliary_size": 0,
    "data.nonmembers": 200,
}


class Frozen(nn.Sequential):
    """A body that stays as it was given."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.classes is not None
        super().__init__(
            nn.Conv2d(1, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, config.classes),
        )
        self[0].requires_grad_(False)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.classes is not None
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, config.classes)
        self.b.weight = self.a.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(images.flatten(1))))))


def lazy(config: ModelConfig) -> nn.Module:
    assert config.classes is not None
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, config.classes))


class Brightness(LossTask):
    """Tell an image's mean: no labels, no accuracy."""

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return mse_loss(model(images)[:, 0], images.mean((1, 2, 3)))

    def measure(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": float((model(images)[:, 0] - images.mean((1, 2, 3))).square().sum())}

    def output(self, model: ModelConfig) -> tuple[int, ...]:
        return (1,)


def federate(**settings: object):
    config = Config.from_mapping(BASE | {name.replace("__", "."): value for name, value in settings.items()})
    world = build_world(config)
    seen: list[Observation] = []
    return config, world, seen, run_federation(config, world, on_observation=seen.append)


def test_a_classifier_is_measured_by_cross_entropy_and_right_answers() -> None:
    config = ModelConfig(name="mlp", classes=4, channels=1, image_size=6, activation="relu")
    model, images = build_model(config), torch.rand(5, 1, 6, 6)
    labels = torch.tensor([0, 3, 1, 2, 2])
    loss, gradient = CLASSIFY.gradient(model, images, labels)
    wanted = cross_entropy(model(images), labels)
    assert torch.equal(loss, wanted)
    assert all(map(torch.equal, gradient, torch.autograd.grad(wanted, list(model.parameters()))))
    with torch.no_grad():
        figures = CLASSIFY.measure(model, images, labels)
    assert figures["loss"] == pytest.approx(5 * float(wanted.detach()), rel=1e-5)
    assert figures["accuracy"] == int((model(images).argmax(1) == labels).sum())
    assert CLASSIFY.output(config) == (4,)
    with pytest.raises(ConfigError, match="unknown task 'clasify'; did you mean 'classify'"):
        TASKS.get("clasify")


def test_a_frozen_body_is_neither_trained_nor_sent() -> None:
    config, world, seen, result = federate(model="test_task:Frozen")
    start = initial_weights(world.scenario.model, config.seed)
    assert set(seen[0].update.names) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert set(seen[0].buffers) == {"1.running_mean", "1.running_var"}
    for name in ("0.weight", "0.bias"):
        assert torch.equal(result.weights[name], start[name])
    assert not result.rejections
    assert [record.clients for record in result.rounds] == [(0, 1, 2)] * 3
    judge = Judge(config, world)
    assert judge(result.weights)["accuracy"] > 0.5 > judge(start)["accuracy"]


def test_tied_weights_are_one_parameter() -> None:
    config, world, seen, result = federate(model="test_task:Tied")
    assert seen[0].update.names == ("a.weight", "a.bias", "b.bias", "head.weight", "head.bias")
    assert not result.rejections
    assert torch.equal(result.weights["a.weight"], result.weights["b.weight"])
    judge, start = Judge(config, world), initial_weights(world.scenario.model, config.seed)
    assert judge(result.weights)["accuracy"] > 0.5 > judge(start)["accuracy"]

    # One step on everything, in autograd's own terms: the gradient of a shared weight is the sum over its uses.
    model = build_model(world.scenario.model)
    assert tied_names(model) == {"b.weight": "a.weight"}
    images, labels = world.dataset.tensors(world.partitions[0][:8])
    training = config.training.model_copy(update={"protocol": "fedsgd", "local_steps": 1})
    sent = local_update(model, start, images, labels, [torch.arange(8).numpy()], training).update
    apart = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    hidden = torch.relu(images.flatten(1) @ apart["a.weight"].T + apart["a.bias"])
    hidden = torch.relu(hidden @ apart["b.weight"].T + apart["b.bias"])
    loss = cross_entropy(hidden @ apart["head.weight"].T + apart["head.bias"], labels)
    loss.backward()
    both = apart["a.weight"].grad + apart["b.weight"].grad
    torch.testing.assert_close(sent["a.weight"], both, rtol=1e-4, atol=1e-7)


def test_a_layer_finds_its_width_before_the_first_round() -> None:
    config, world, _, result = federate(model="test_task:lazy")
    assert result.weights["1.weight"].shape == (16, 64)
    assert Judge(config, world)(result.weights)["accuracy"] > 0.5


def test_a_model_without_trained_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    weights = dict(model.state_dict())
    assert not trained_parameters(model)
    config = Config.from_mapping(BASE)
    with pytest.raises(RunFailed, match="no parameter that is trained"):
        local_update(model, weights, torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), [], config.training)


def test_a_task_of_ones_own_is_what_clients_train_and_the_server_measures() -> None:
    config, world, seen, result = federate(
        model="mlp",
        training__task="test_task:Brightness",
        **{"local-steps": 1, "batch-size": 0, "rounds": 9, "learning-rate": 0.02},
    )
    model = build_model(world.scenario.model)
    weights = initial_weights(world.scenario.model, config.seed)
    images, _ = world.dataset.tensors(world.partitions[1])
    model.load_state_dict(weights)
    loss = mse_loss(model(images)[:, 0], images.mean((1, 2, 3)))
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    sent = next(o for o in seen if (o.round, o.client) == (1, 1)).update.dense()
    for got, gradient in zip(sent.values(), wanted, strict=True):
        torch.testing.assert_close(got, -0.02 * gradient, rtol=1e-3, atol=1e-6)
    held_out, none = world.dataset.tensors(world.pools.nonmembers)
    figures = evaluate(model, result.weights, held_out, none, task=Brightness())
    assert figures.keys() == {"loss"}
    assert result.rounds[-1].loss == pytest.approx(figures["loss"], rel=1e-4)
    assert result.rounds[-1].accuracy is None
    assert result.rounds[-1].loss < 0.5 * evaluate(model, weights, held_out, none, task=Brightness())["loss"]
