"""Classifiers: published sizes, seeded weights, errors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, DataError
from fedattack.models import build_model, hopeless, initial_weights, resolve
from fedattack.observation import Scenario


@pytest.mark.parametrize(
    ("name", "activation", "channels", "count"),
    [
        ("lenet-zhu", None, 3, 7_834_249),  # HCGLA's LeNet with its 10,177-way head
        ("lenet-zhu", "relu", 3, 7_834_249),
        ("resnet18", None, 3, 11_173_962),  # the usual CIFAR ResNet-18 with a 10-way head
        ("resnet20", None, 3, 272_474),  # 0.27M in the paper
        ("resnet20-4", None, 3, 4_327_754),  # the same at four times the width
        ("convnet", None, 3, 2_904_970),  # eight convolutions of 64 to 256 channels
        ("logistic", None, 1, (32 * 32 + 1) * 10),
        ("lcodec-cnn", None, 3, 157_140),  # L-CODEC's on CIFAR-10
        ("cnn-mcmahan", None, 3, 2_156_490),
        ("cnn-flower", None, 3, 62_006),  # Flower's tutorial net
        ("resnet18", "sigmoid", 3, 11_168_832 + 32_768 * 500 + 500),  # HCGLA's: same trunk, 32,768 features
    ],
)
def test_published_parameter_counts(name, activation, channels, count) -> None:
    model = resolve(ModelConfig(name=name, activation=activation), channels, 32, 10)
    assert sum(p.numel() for p in build_model(model).parameters()) == count


@pytest.mark.parametrize(
    "name",
    [
        "lenet-zhu",
        "tiny-cnn",
        "mlp",
        "logistic",
        "lcodec-cnn",
        "cnn-mcmahan",
        "cnn-flower",
        "resnet18",
        "resnet20",
        "resnet20-4",
        "convnet",
    ],
)
def test_forward_and_seed(name) -> None:
    model = resolve(ModelConfig(name=name, classes=12), 1, 16, 10)
    module = build_model(model)
    module.eval().load_state_dict(initial_weights(model, 5))
    assert module(torch.rand(3, 1, 16, 16)).shape == (3, 12)
    again, other = initial_weights(model, 5), initial_weights(model, 6)
    assert all(torch.equal(a, b) for a, b in zip(again.values(), module.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(again.values(), other.values(), strict=True))


def test_lenet_starts_as_published_with_different_layers() -> None:
    weights = initial_weights(resolve(ModelConfig(), 3, 32, 10), 0)
    assert all(w.abs().max() <= 0.5 for w in weights.values())
    assert not torch.equal(weights["body.2.weight"], weights["body.4.weight"])


def test_refusals(tmp_path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        resolve(ModelConfig(name="resnet-18"), 3, 32, 10)
    with pytest.raises(ConfigError, match="the data set has 10 classes"):
        resolve(ModelConfig(classes=5), 3, 32, 10)
    with pytest.raises(ConfigError, match="needs images of 16 x 16 pixels or more, not 8"):
        build_model(resolve(ModelConfig(name="lcodec-cnn"), 1, 8, 10))
    model = resolve(ModelConfig(name="mlp"), 1, 8, 10)
    path = tmp_path / "w.safetensors"
    for weights, part in [({"x": torch.zeros(1)}, "do not fit"), (None, "no such file")]:
        if weights is not None:
            save_file(weights, path)
        else:
            path.unlink()
        with pytest.raises(DataError, match=part):
            initial_weights(model.model_copy(update={"weights": str(path)}), 0)
    good = initial_weights(model, 0)
    save_file(good, path)
    read = initial_weights(model.model_copy(update={"weights": str(path)}), 1)
    assert all(torch.equal(read[n], good[n]) for n in good)
    good["1.bias"][0] = float("nan")
    save_file(good, path)
    with pytest.raises(DataError, match="NaN"):
        initial_weights(model.model_copy(update={"weights": str(path)}), 0)
    path.write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="not a readable safetensors"):
        initial_weights(model.model_copy(update={"weights": str(path)}), 0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_given_weights_are_read_as_float32(tmp_path, kind: torch.dtype) -> None:
    model = ModelConfig(name="resnet20", classes=4, channels=1, image_size=8, activation="relu")
    wanted = initial_weights(model, 1)
    path = tmp_path / "w.safetensors"
    save_file({n: t.to(kind) if t.is_floating_point() else t for n, t in wanted.items()}, path)
    found = initial_weights(model.model_copy(update={"weights": str(path)}), 0)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in wanted.items()}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "initialisation", "trains"),
    [("relu", "published", False), ("relu", "kaiming", True), ("sigmoid", "published", True)],
)
def test_an_initialisation_that_cannot_be_trained_is_known(activation, initialisation, trains) -> None:
    asked = ModelConfig(name="lenet-zhu", activation=activation, initialisation=initialisation, classes=10)
    training = TrainingConfig(protocol="fedavg", local_steps=5, learning_rate=0.05)
    why = hopeless(Scenario(resolve(asked, 3, 32, 10), training, CompressionConfig()), 0)
    assert (why == "") == trains
    assert trains or "accepted: model.initialisation = kaiming" in why
