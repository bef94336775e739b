"""Live modules, classes and factories as models; what they are found to be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedattack.config import Config, ModelConfig
from fedattack.errors import ConfigError
from fedattack.models import build_model, initial_weights, resolve
from fedattack.models.live import held, hold
from simulations.experiments.choose import check_names


class Net(nn.Module):
    """Functions instead of modules, as tutorials write it."""

    def __init__(self, channels: int = 1, num_classes: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(4 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class Mixed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(F.silu(self.conv(x))).flatten(1))


def _resolved(name: str, classes: int = 7) -> ModelConfig:
    return resolve(ModelConfig(name=name), 1, 8, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_an_instance_keeps_its_weights_whatever_their_type_and_what_is_frozen(dtype) -> None:
    net = Net().to(dtype)
    net.conv.requires_grad_(False)
    model = _resolved(hold(net))
    weights = initial_weights(model, 3)
    assert all(torch.equal(weights[name], one.float()) for name, one in net.state_dict().items())
    built = build_model(model)
    assert [p.requires_grad for p in built.parameters()] == [False, False, True, True]
    with torch.no_grad():
        built.fc.weight.zero_()
    assert bool(initial_weights(model, 3)["fc.weight"].any())  # each copy is its own


def test_the_held_copy_does_not_follow_the_instance() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    model = _resolved(hold(net))
    nn.init.zeros_(net.fc.weight)
    assert torch.equal(initial_weights(model, 0)["fc.weight"], before["fc.weight"])


@pytest.mark.parametrize(
    "make",
    [
        Net,
        lambda channels, classes: Net(channels, classes),
        lambda: Net(),
        lambda c: Net(c.channels, c.classes),
    ],
)
def test_a_class_or_factory_is_called_with_what_it_takes_and_draws_by_the_seed(make) -> None:
    model = _resolved(hold(make))
    torch.manual_seed(1)
    first = initial_weights(model, 5)
    torch.manual_seed(2)
    again, other = initial_weights(model, 5), initial_weights(model, 6)
    assert torch.equal(first["fc.weight"], again["fc.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert model.classes == 7


@pytest.mark.parametrize(
    ("net", "activation"),
    [
        (Net(), "relu"),
        (Mixed(), "other"),
        (nn.Sequential(nn.Conv2d(1, 2, 8), nn.Sigmoid(), nn.Flatten(), nn.Linear(2, 7)), "sigmoid"),
        (nn.Sequential(nn.Conv2d(1, 2, 8), nn.GELU(), nn.Flatten(), nn.Linear(2, 7)), "gelu"),
        (nn.Sequential(nn.Conv2d(1, 2, 8), nn.LeakyReLU(), nn.Flatten(), nn.Linear(2, 7)), "other"),
    ],
)
def test_the_activation_is_found(net, activation) -> None:
    assert _resolved(hold(net)).activation == activation


def test_heads_are_measured_and_too_narrow_ones_refused() -> None:
    assert _resolved(hold(Net(num_classes=20))).classes == 20
    with pytest.raises(ConfigError, match="the data set has 9 classes"):
        _resolved(hold(Net()), classes=9)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (3, "the model is a int; a model is an nn.Module"),
        (lambda: "net", "it makes a str; a model is an nn.Module"),
        (lambda classes, hidden: Net(), "it asks for 'hidden', which nobody gives"),
        (lambda: Net, "it makes the class Net"),
    ],
)
def test_what_is_no_model_is_answered_with_the_contract(model, said) -> None:
    with pytest.raises(ConfigError, match=said):
        _resolved(hold(model))


def test_a_name_stands_for_one_model_and_ends_with_the_block() -> None:
    net = Net()
    with held(net) as first, held(Net()) as second:
        assert first.startswith("live:Net-")
        assert first != second
        assert hold(net) == first
        assert initial_weights(_resolved(first), 0).keys() == net.state_dict().keys()
    with held(Net()) as name:
        pass
    with pytest.raises(ConfigError, match="known to one process alone"):
        build_model(ModelConfig(name=name, classes=7, channels=1, image_size=8))


def test_other_processes_are_refused_before_anything_is_read() -> None:
    config = Config.from_mapping({"model": hold(Net()), "engine": "ray"})
    with pytest.raises(ConfigError, match="--engine inline"):
        check_names(config)
