"""Analytic division and R-GAP: exact where they can be, and in words where they cannot."""

from __future__ import annotations

import pytest
import torch
from hcgla_scenes import observe, psnr, scenario, smooth_images

from adversaries import ATTACKS
from adversaries.reconstruction.algebra.analytic import Analytic
from adversaries.reconstruction.algebra.rgap import _UNDO, RGap, _undone
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models.classifiers.layers import ACTIVATIONS

CPU = torch.device("cpu")


def scene(model: str = "mlp", training: TrainingConfig | None = None, **options):
    options = {"name": "none", "rate": 1.0, "activation": "relu", "size": 8} | options
    return scenario(10, model=model, training=training, **options)


@pytest.mark.parametrize(
    "training",
    [
        TrainingConfig(),
        TrainingConfig(protocol="fedavg", learning_rate=0.2, weight_decay=0.1),
        TrainingConfig(protocol="fedavg", local_steps=5, learning_rate=0.05, momentum=0.9),
    ],
)
def test_division_gives_the_image(training: TrainingConfig) -> None:
    images, labels = smooth_images(1, 8), torch.tensor([3])
    observation = observe(scene(training=training), images, labels)
    answer = Analytic().run([observation], 0, CPU)[0]
    assert psnr(answer.images, images) > (100 if training.protocol == "fedsgd" else 60)
    assert answer.labels.tolist() == [3]
    assert answer.details["status"] in ("certified", "approximate")
    assert answer.floors["prior"].shape == images.shape


def test_division_of_what_was_sent() -> None:
    """Top-k: pixels with an entry and their neuron's bias are exact, the others are the prior's."""
    images, labels = smooth_images(1, 8), torch.tensor([3])
    observation = observe(
        scene(name="topk", rate=0.02), images, labels, auxiliary=smooth_images(20, 8, seed=5)
    )
    answer = Analytic().run([observation], 0, CPU)[0]
    known = answer.details["pixels_known"]
    assert 0 < known < images.numel()
    error = (answer.images - images).abs()
    assert int((error < 1e-4).sum()) >= known
    assert answer.details["status"] == "approximate"
    assert psnr(answer.images, images) > psnr(answer.floors["prior"], images)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model": "lenet-zhu"}, "linear layer on the pixels"),
        ({"model": "two-layer"}, "no bias"),
        ({"training": TrainingConfig(batch_size=4)}, "an attack on batches"),
        ({"name": "sign"}, "as signs, and quotients"),
        ({"training": TrainingConfig(protocol="fedavg", local_steps=2, weight_decay=0.1)}, "weight_decay"),
    ],
)
def test_division_refuses(options: dict, part: str) -> None:
    with pytest.raises(NotApplicable, match=part):
        Analytic().check(scene(**options) if options.get("model") != "two-layer" else two_layer())


def two_layer():
    scene_ = scene("two-layer")
    import dataclasses

    return dataclasses.replace(scene_, model=scene_.model.model_copy(update={"width": 32}))


@pytest.mark.parametrize("name", sorted(_UNDO))
def test_activations_are_undone(name: str) -> None:
    u = torch.linspace(-4, 4, 41, dtype=torch.float64)
    found, known = _undone(name, ACTIVATIONS[name]()(u))
    torch.testing.assert_close(found[known], u[known], rtol=1e-6, atol=1e-6)
    assert int(known.sum()) == (int((u > 0).sum()) if name == "relu" else len(u))


def test_recursion_gives_the_image_of_a_smooth_network() -> None:
    images = smooth_images(1, 12)
    observation = observe(scene("lenet-zhu", activation="sigmoid", size=12), images, torch.tensor([7]))
    answer = RGap().run([observation], 0, CPU)[0]
    assert psnr(answer.images, images) > 40
    assert answer.labels.tolist() == [7]
    assert answer.details["residual"] < 1e-2
    assert [layer["layer"] for layer in answer.details["layers"]] == ["body.4", "body.2", "body.0"]
    assert all(layer["equations"] > layer["unknowns"] for layer in answer.details["layers"])
    again = RGap().run([observation], 5, CPU)[0]
    assert torch.equal(again.images, answer.images)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model": "mlp"}, "chain of convolutions"),
        ({"model": "lenet-zhu", "activation": "gelu"}, "works behind sigmoid or tanh or relu or softplus"),
        ({"model": "lenet-zhu", "training": TrainingConfig(batch_size=2)}, "tells one image"),
        ({"model": "lenet-zhu", "name": "topk"}, "leaves entries out"),
    ],
)
def test_recursion_refuses(options: dict, part: str) -> None:
    options = {"activation": "sigmoid"} | options
    made = scene(**options) if options.get("name") != "topk" else scenario(10, rate=0.1)
    with pytest.raises(NotApplicable, match=part):
        RGap().check(made)
    with pytest.raises(ConfigError, match=r"rgap\.ridges"):
        RGap(ridges=())


def test_both_are_registered() -> None:
    assert ATTACKS.get("analytic") is Analytic
    assert ATTACKS.get("rgap") is RGap
