"""Networks of torchvision and timm by name: sizes, seeds, nothing left to chance, refusals."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models import MODELS, build_model, initial_weights, resolve


def made(name: str, size: int = 32, channels: int = 3, classes: int = 10, **settings: Any) -> ModelConfig:
    return resolve(ModelConfig(name=name, **settings), channels, size, classes)


@pytest.mark.parametrize(
    ("name", "settings", "activation", "count"),
    [
        pytest.param(
            "torchvision/resnet18", {"activation": "gelu"}, "gelu", 11_181_642, marks=pytest.mark.slow
        ),
        ("torchvision/shufflenet_v2_x0_5", {}, "relu", 352_042),
        ("torchvision/mobilenet_v3_small", {}, "other", 1_528_106),
        ("timm/test_vit", {}, "gelu", None),
        pytest.param("timm/test_resnet", {}, "relu", None, marks=pytest.mark.slow),
    ],
)
def test_networks_of_libraries(name: str, settings: dict, activation: str, count: int | None) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm (extra 'timm') is not installed")
    channels = 1 if name.startswith("timm") else 3
    model = made(name, channels=channels, **settings)
    assert model.activation == activation
    weights, again, other = (initial_weights(model, seed) for seed in (0, 0, 1))
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert any(not torch.equal(weights[key], other[key]) for key in weights)
    module = build_model(model)
    module.load_state_dict(weights)
    if count is not None:
        assert sum(parameter.numel() for parameter in module.parameters()) == count
    images = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    module.train()
    assert module(images).shape == (2, 10)
    assert torch.equal(module(images), module(images))
    if settings.get("activation"):
        kinds = {type(part) for part in module.modules()}
        assert nn.GELU in kinds
        assert nn.ReLU not in kinds


def test_weights_are_the_librarys_own_draws() -> None:
    """Zeros and ones where torchvision has them, and the deviation of its normal draws; dropout is off."""
    model = made("torchvision/mobilenet_v3_small")
    weights, module = initial_weights(model, 5), build_model(model).train()
    assert bool((weights["features.0.1.weight"] == 1).all())
    assert bool((weights["classifier.3.bias"] == 0).all())
    assert float(weights["classifier.0.weight"].std()) == pytest.approx(0.01, rel=0.02)
    drops = [part for part in module.modules() if isinstance(part, nn.Dropout)]
    assert drops
    assert all(part.p == 0.0 for part in drops)


def test_weights_of_a_file(tmp_path) -> None:
    model = made("torchvision/shufflenet_v2_x0_5")
    wanted, path = initial_weights(model, 1), tmp_path / "w.safetensors"
    save_file(wanted, path)
    found = initial_weights(model.model_copy(update={"weights": str(path)}), 0)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("torchvision/resnet19", {}, "near it: torchvision/resnet18"),
        ("torchvison/resnet18", {}, "did you mean 'torchvision/...'"),
        ("torchvision/resnet18", {"channels": 1}, "images of 3 channels, and these have 1"),
        ("torchvision/vit_b_16", {"size": 30}, "'data.image_size' = 30"),
        ("torchvision/resnet18", {"width": 8}, "no free width"),
        ("torchvision/vit_b_16", {"kernel_sets": 2}, "no kernel sets"),
        ("torchvision/googlenet", {"activation": "tanh"}, "no module that could be exchanged"),
    ],
)
def test_refusals(name: str, options: dict, part: str) -> None:
    options = dict(options)
    size = options.pop("size", 32)
    channels = options.pop("channels", 3)
    with pytest.raises(ConfigError, match=part) as refused:
        made(name, size, channels, **options)
    assert "\n" not in str(refused.value)


def test_unknown_names_of_timm_are_answered_with_near_ones() -> None:
    pytest.importorskip("timm", reason="timm (extra 'timm') is not installed")
    with pytest.raises(ConfigError, match="near it: timm/vit_tiny_patch16_224"):
        made("timm/vit_tiny_patch17_224", 224)


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="extra 'timm'"):
        made("timm/resnet18")


def test_families_are_names_of_the_registry() -> None:
    assert "torchvision/resnet18" in MODELS
    assert "torchvision/resnet18" not in MODELS.names()
    assert MODELS.family("timm/resnet18") == "timm"
    assert MODELS.family("resnet18") is None
