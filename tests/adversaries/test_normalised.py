"""Models that take a mean and a deviation off their images: attacks answer pixels in [0, 1] all the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hcgla_scenes import observe as hcgla_observe
from hcgla_scenes import psnr, smooth_images
from hcgla_scenes import scenario as hcgla_scenario
from malicious_scenes import PUBLIC, batch_of, observe, scenario, scored

from adversaries.inversion.evidence.first_layer import first_layer
from adversaries.inversion.gradients import ExplicitGradients, closed_form, gradient_model
from adversaries.membership.active.relu_trap import ReLUTrap, _is_trap, _read
from adversaries.reconstruction.algebra.analytic import Analytic
from adversaries.reconstruction.algebra.rgap import RGap
from adversaries.reconstruction.algebra.spear import Spear
from adversaries.reconstruction.gauss_newton import GaussNewton
from adversaries.reconstruction.malicious.curious_abandon_honesty import CuriousAbandonHonesty
from adversaries.reconstruction.malicious.imprint import Imprint
from adversaries.reconstruction.malicious.loki import Loki
from adversaries.reconstruction.tensor import TensorAttack
from fedattack.config import Config, ModelConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError
from fedattack.models import build_model, initial_weights, resolve
from fedattack.models.normalise import bare, pixels, shown
from fedattack.observation import Candidates, Scenario

CPU = torch.device("cpu")
GREY = {"mean": (0.4,), "std": (0.25,)}
COLOUR = {"mean": (0.48, 0.45, 0.4), "std": (0.23, 0.22, 0.25)}


def normalised(scene: Scenario, update: dict[str, tuple[float, ...]] = GREY) -> Scenario:
    return dataclasses.replace(scene, model=scene.model.model_copy(update=update))


def colour(model: str, activation: str, batch: int = 1, size: int = 8) -> Scenario:
    found = hcgla_scenario(10, model=model, activation=activation, size=size, name="none", rate=1.0)
    training = found.training.model_copy(update={"batch_size": batch})
    return normalised(dataclasses.replace(found, training=training), COLOUR)


def test_the_model_normalises_and_its_parameters_keep_their_names() -> None:
    model = resolve(ModelConfig(name="lenet-zhu", **COLOUR), 3, 16, 10)
    plain, weights = build_model(bare(model)), initial_weights(model, 0)
    module = build_model(model)
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(weights)
    plain.load_state_dict(weights)
    images = smooth_images(2, 16)
    mean, std = (torch.tensor(COLOUR[one])[:, None, None] for one in ("mean", "std"))
    torch.testing.assert_close(module(images), plain((images - mean) / std))
    torch.testing.assert_close(pixels(shown(images, model), model), images)


@pytest.mark.parametrize("model", ["lenet-zhu", "resnet20", "mlp"])
def test_every_back_end_computes_the_normalised_gradient(model) -> None:
    scene = colour(model, "sigmoid", 2, 16)
    images, labels = smooth_images(2, 16), torch.tensor([3, 1])
    observation = hcgla_observe(scene, images, labels)
    backend = gradient_model([observation], labels[None], device=CPU)
    found = backend.predict(images[None], slice(0, 1)).entries
    wanted = observation.update.values[None]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    assert isinstance(backend, ExplicitGradients)
    if model == "lenet-zhu":
        chain = closed_form.describe(scene.model)
        weights = {name: tensor.double() for name, tensor in observation.weights.items()}
        features = closed_form.features(chain, weights, images.double())
        pulled = closed_form.feature_gradient(weights, closed_form.head_residual(weights, features, labels))
        by_name = closed_form.conv_gradients(chain, weights, images.double(), pulled)
        for name, sent in observation.update.dense().items():
            if name in by_name:
                torch.testing.assert_close(by_name[name].mean(0).float(), sent, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("attack", "model", "activation", "least"),
    [
        (Analytic(), "mlp", "relu", 80),
        (RGap(), "lenet-zhu", "sigmoid", 40),
        (GaussNewton(products=3000), "lenet-zhu", "sigmoid", 40),
    ],
)
def test_one_image_comes_back_in_pixels(attack, model, activation, least) -> None:
    images, labels = smooth_images(1, 8), torch.tensor([3])
    scene = colour(model, activation)
    (answer,) = attack.run([hcgla_observe(scene, images, labels)], 0, CPU)
    assert psnr(answer.images, images) > least
    assert answer.labels.tolist() == [3]


class Placed(Loki):
    """LOKI as the first client sees it."""

    def arm(self, scenario, weights, seed, auxiliary, candidates=None, turn=0):
        sent = super().arm(scenario, weights, seed, auxiliary)
        return sent | self.tailor(scenario, sent, 0)


@pytest.mark.parametrize(
    ("attack", "model", "batch", "width"),
    [
        (Spear(), "mlp", 4, 64),
        (CuriousAbandonHonesty(), "mlp", 8, 128),
        (CuriousAbandonHonesty(), "imprint", 8, 128),
        (Imprint(), "imprint", 8, 64),
        (Imprint(), "imprint-sparse", 8, 64),
        (Placed(), "loki", 8, 32),
        (TensorAttack(), "two-layer", 4, 128),
        (TensorAttack(), "lenet-two-layer", 2, 128),
    ],
    ids=lambda one: one if isinstance(one, str | int) else type(one).__name__,
)
def test_batches_come_back_in_pixels(attack, model, batch, width) -> None:
    images, labels = batch_of(batch)
    scene = normalised(scenario(model, batch, width))
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    quality, right = scored(answer, images, labels)
    plain = scenario(model, batch, width)
    (other,) = attack.run([observe(attack, plain, images, labels)], 0, CPU)
    before, as_before = scored(other, images, labels)
    assert float(quality.clamp(max=50).mean()) > float(before.clamp(max=50).mean()) - 1
    assert right >= as_before - 1


def test_traps_wait_for_normalised_candidates() -> None:
    images, labels = batch_of(12)
    scene = normalised(scenario("mlp", 6, 64, activation="relu"))
    asked = Candidates(images, labels)
    start = initial_weights(scene.model, 0)
    weights = ReLUTrap().arm(scene, start, 0, PUBLIC, asked)

    class Armed(ReLUTrap):
        def arm(self, *given, **more):
            return weights

    observation = observe(Armed(), scene, images[:6], labels[:6])
    inputs = shown(images.double(), scene.model).flatten(1)
    layer = first_layer(scene.model)
    assert _is_trap(observation, layer, inputs)
    scores = _read(observation, layer, inputs)
    assert float(scores[:6].min()) > float(scores[6:].max())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mean": "0.5,0.5"}, "images have 1 channel"),
        ({"mean": "124"}, "numbers from 0 to 1"),
        ({"std": "0"}, "accepted: 1 or 1 numbers"),
    ],
)
def test_what_no_normalisation_is(settings, said) -> None:
    config = Config.from_mapping({"dataset": "digits", "model": "mlp", "clients": 2, **settings})
    with pytest.raises(ConfigError, match=said):
        build_world(config)


def test_words_are_no_numbers() -> None:
    with pytest.raises(ConfigError, match=r"data.mean.*accepted: a number, or one for each channel"):
        Config.from_mapping({"mean": "imagenet"})
