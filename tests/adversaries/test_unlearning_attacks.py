"""Deletion requests ordered by loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adversaries import ATTACKS
from adversaries.seats import ClientView
from adversaries.unlearning.max_loss import MaxLoss
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.models import build_model, initial_weights
from fedattack.models.classifiers.resnet import ResNet
from fedattack.observation import Scenario
from fedattack.registry import build_plugin


def samples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def network(name: str) -> nn.Module:
    config = ModelConfig(name=name, classes=10, channels=1, image_size=8, activation="relu")
    model = build_model(config)
    model.load_state_dict(initial_weights(config, 1))
    return model


def view(client: int, requests: int, model: nn.Module) -> ClientView:
    config = ModelConfig(name="mlp", classes=10, channels=1, image_size=8, activation="relu")
    scenario = Scenario(config, TrainingConfig(), CompressionConfig())
    return ClientView(1, client, scenario, {}, 0, {}, requests, model=model.eval())


def brute_force(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Positions by loss, computed in NumPy from the logits of each sample alone, and sorted in Python."""
    model.eval()
    losses = []
    with torch.no_grad():
        for x, y in zip(images, labels, strict=True):
            logits = model(x[None])[0].double().numpy()
            losses.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[int(y)]))
    return sorted(range(len(losses)), key=lambda i: (-losses[i], i))


@pytest.mark.parametrize("name", ["mlp", "tiny-cnn"])
@pytest.mark.parametrize("requests", [1, 7, 300])
def test_order_equals_a_brute_force_sort(name: str, requests: int) -> None:
    model, (images, labels) = network(name), samples(300)
    request = MaxLoss().ask(view(4, requests, model), images, labels)
    assert request.client == 4
    assert list(request.positions) == brute_force(model, images, labels)[:requests]
    assert all(type(position) is int for position in request.positions)


def test_equal_losses_keep_the_order_of_position() -> None:
    model = network("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every loss is log 10
    images, labels = samples(20)
    assert MaxLoss().ask(view(0, 20, model), images, labels).positions == tuple(range(20))
    with torch.no_grad():
        list(model.parameters())[-1][3] = 2.0  # class 3 becomes the easy one
    easy, hard = torch.where(labels == 3)[0].tolist(), torch.where(labels != 3)[0].tolist()
    assert MaxLoss().ask(view(0, 20, model), images, labels).positions == (*hard, *easy)


def test_batch_statistics_neither_count_nor_change() -> None:
    torch.manual_seed(0)
    model = ResNet(ModelConfig(classes=10, channels=1, image_size=8, activation="relu"), (1, 0, 0, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = samples(12)
    together = MaxLoss().ask(view(0, 12, model), images, labels).positions
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(together) == brute_force(model, images, labels)


def test_asks_for_no_more_than_there_are() -> None:
    images, labels = samples(5)
    assert len(MaxLoss().ask(view(2, 6, network("mlp")), images, labels).positions) == 5


def test_is_registered() -> None:
    attack = build_plugin(ATTACKS.get("unlearn-max-loss"), "unlearn-max-loss", {}, {})
    assert isinstance(attack, MaxLoss)
    assert (attack.family, attack.seat) == ("unlearning", "malicious client")
