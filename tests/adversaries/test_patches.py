"""Patches of vision transformers: found, solved for to rounding, and refused in words where they cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hcgla_scenes import psnr, smooth_images
from torch import Tensor

from adversaries.inversion.evidence.layers.patches import patch_embedding
from adversaries.inversion.gradients import AutogradGradients, ExplicitGradients, gradient_model
from adversaries.inversion.gradients.products import Network
from adversaries.inversion.gradients.sent import lay_out
from adversaries.reconstruction.algebra.analytic import Analytic
from adversaries.reconstruction.gauss_newton import GaussNewton
from adversaries.refusals import attack_refusals
from fedattack.config import CompressionConfig, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Auxiliary, Observation, Scenario, Update
from fedattack.training import local_update

CPU = torch.device("cpu")
VIT, NARROW = "torchvision_like:vit", "torchvision_like:narrow_vit"
PUBLISHED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def scene(name: str = VIT, size: int = 32, compression: str = "none", model=None, **training) -> Scenario:
    config = resolve(ModelConfig(name=name, **(model or {})), 3, size, 10)
    return Scenario(config, TrainingConfig(**training), CompressionConfig(name=compression))


def observe(scene: Scenario, images: Tensor, labels: Tensor, **given) -> Observation:
    """What a client with this batch sends, uncompressed."""
    weights = given.pop("weights", None) or initial_weights(scene.model, 3)
    steps = [np.arange(len(images))] * scene.training.local_steps
    sent = local_update(build_model(scene.model), weights, images, labels, steps, scene.training).update
    values = torch.cat([tensor.flatten() for tensor in sent.values()])
    kind = "gradient" if scene.training.protocol == "fedsgd" else "delta"
    update = Update(tuple(sent), tuple(tuple(t.shape) for t in sent.values()), None, values, kind)
    return Observation(1, 0, scene, weights, update, len(images), **given)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 100),
        ({"model": PUBLISHED}, 100),
        ({"protocol": "fedavg", "learning_rate": 0.2, "weight_decay": 0.1}, 85),
    ],
)
def test_every_patch_is_solved_for(options: dict, least: float) -> None:
    images, labels = smooth_images(1, 32), torch.tensor([7])
    (answer,) = Analytic().run([observe(scene(**options), images, labels)], 0, CPU)
    assert psnr(answer.images, images) > least
    assert answer.labels.tolist() == [7]
    assert answer.details["status"] == "certified"
    assert (answer.details["patches"], answer.details["directions"]) == (16, 16)
    assert answer.certificate == answer.details["residual"] < 1e-5
    assert answer.method == "analytic (patches)"


def test_the_layout_is_found_by_trying() -> None:
    """Folding undoes unfolding, and black and white are what the convolution sees of them."""
    found = patch_embedding(scene(model=PUBLISHED).model)
    assert (found.weight, found.positions) == ("conv_proj.weight", "encoder.pos_embedding")
    assert (found.skipped, found.size, found.rows, found.columns, found.width) == (1, 8, 4, 4, 64)
    low, high = (
        torch.tensor([(v - m) / s for m, s in zip(*PUBLISHED.values(), strict=True)]) for v in (0, 1)
    )
    torch.testing.assert_close(torch.tensor(found.low), low)
    torch.testing.assert_close(torch.tensor(found.high), high)
    image = smooth_images(1, 32)[0]
    torch.testing.assert_close(found.images(found.patches(image)), image)
    whole = (image - torch.tensor(PUBLISHED["mean"])[:, None, None]) / torch.tensor(PUBLISHED["std"])[
        :, None, None
    ]
    torch.testing.assert_close(found.patches(image)[5], whole[:, 8:16, 8:16].flatten())


def test_fewer_numbers_than_patches_leave_directions_to_the_prior() -> None:
    images, labels = smooth_images(1, 32), torch.tensor([7])
    public = Auxiliary(smooth_images(40, 32, seed=9))
    (answer,) = Analytic().run([observe(scene(NARROW), images, labels, auxiliary=public)], 0, CPU)
    assert answer.details["status"] != "certified"
    assert answer.details["directions"] <= 12
    assert "16 tokens of 12 numbers" in answer.details["reason"]
    assert psnr(answer.images, images) > psnr(answer.floors["prior"], images) + 1


def test_behind_a_head_of_zeros_nothing_is_claimed() -> None:
    made = scene()
    weights = initial_weights(made.model, 3)
    weights["heads.head.weight"].zero_()
    observation = observe(made, smooth_images(1, 32), torch.tensor([7]), weights=weights)
    (answer,) = Analytic().run([observation], 0, CPU)
    assert answer.details["status"] == "failed"
    assert "head of zeros" in answer.details["reason"]
    assert torch.equal(answer.images, answer.floors["prior"])


def test_another_factor_is_taken_for_clipping_only_where_that_is_declared() -> None:
    images, labels = smooth_images(1, 32), torch.tensor([7])
    seen = observe(scene(), images, labels)
    clip = DefenseConfig(names=("clip-noise",), options={"clip-noise": {"clip_norm": 1.0}})
    values = seen.update.values * 0.01
    update = Update(seen.update.names, seen.update.shapes, None, values)
    clipped = Scenario(seen.scenario.model, seen.scenario.training, seen.scenario.compression, clip)
    for declared, status in ((clipped, "certified"), (seen.scenario, "failed")):
        observation = Observation(1, 0, declared, seen.weights, update, 1)
        (answer,) = Analytic().run([observation], 0, CPU)
        assert answer.details["status"] == status
        assert psnr(answer.images, images) > 80


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"compression": "topk"}, "leaves entries out"),
        ({"compression": "qsgd"}, "sent rounded"),
        ({"batch_size": 2}, "tells one image"),
        ({"protocol": "fedavg", "local_steps": 2}, "a sum of gradients"),
    ],
)
def test_what_cannot_be_solved_is_refused(options: dict, part: str) -> None:
    (sentence,) = attack_refusals(Analytic(), scene(**options))
    assert part in sentence


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("lenet-zhu", "nor a linear layer on the pixels"),
        ("torchvision_like:without_positions", "no learned position"),
    ],
)
def test_other_beginnings_are_refused(name: str, part: str) -> None:
    model = resolve(ModelConfig(name=name), 3, 32, 10)
    with pytest.raises(NotApplicable, match=part):
        patch_embedding(model)


def test_attention_is_differentiated_twice() -> None:
    """Both back ends of a transformer against finite differences of its gradient."""
    made, labels = scene(), torch.tensor([7])
    seen = observe(made, smooth_images(1, 32), labels)
    images, direction = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = Network(made.model, seen.weights, seen.update, labels, "train", CPU, torch.float64)
    at = network.linearise(images.double())
    step = 1e-5 * direction.double()
    ahead, behind = (network.linearise(images.double() + s * step).residual for s in (1, -1))
    wanted = (ahead - behind) / 2e-5
    torch.testing.assert_close(at.push(direction.double()), wanted, rtol=1e-4, atol=1e-6)
    backend = gradient_model([seen], labels[None], device=CPU)
    assert isinstance(backend, AutogradGradients)
    turned = images[None].clone().requires_grad_()
    entries = backend.predict(turned, slice(0, 1)).entries
    (slope,) = torch.autograd.grad((entries * network._scale.float()).sum(), turned)
    ones = torch.ones(seen.update.numel, dtype=torch.float64)
    torch.testing.assert_close(
        slope[0].double(), at.pull(ones), rtol=1e-3, atol=1e-3 * float(slope.abs().max())
    )
    (answer,) = GaussNewton(products=100).run([seen], 0, CPU)
    assert answer.loss < network.rms(torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    "name",
    [
        "torchvision_like:Pooled",
        pytest.param("torchvision/resnet18", marks=pytest.mark.slow),
    ],
)
def test_an_imagenet_residual_network_has_explicit_second_derivatives(name: str) -> None:
    """Maximum pooling and in-place sums, against automatic differentiation."""
    made, labels = scene(name, batch_norm="eval"), torch.tensor([7])
    seen = observe(made, smooth_images(1, 32), labels)
    explicit = gradient_model([seen], labels[None], batch_norm="eval", device=CPU)
    assert isinstance(explicit, ExplicitGradients)
    layout = lay_out([seen.update], "all", CPU)
    plain = AutogradGradients(made.model, seen.weights, layout, labels[None], "eval")
    images = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    slopes = []
    for backend in (explicit, plain):
        turned = images.clone().requires_grad_()
        loss = (backend.predict(turned, slice(0, 1)).entries - backend.sent.values).square().sum()
        slopes.append(torch.autograd.grad(loss, turned)[0])
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 1e-4
