"""SPEAR: exact batches, the search's parts against the truth, refusals and honest failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adversaries import ATTACKS
from adversaries.inversion.evidence.first_layer import first_layer
from adversaries.inversion.solvers.sparse_directions import Factors, Search, expected_draws
from adversaries.reconstruction.algebra.spear import Spear
from adversaries.reconstruction.base import CERTIFIED
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Observation, Scenario, Update
from fedattack.training import local_update

CPU = torch.device("cpu")
NONE = CompressionConfig(name="none")


def observe(
    images: torch.Tensor,
    labels: torch.Tensor,
    width: int,
    training: TrainingConfig | None = None,
    compression: CompressionConfig = NONE,
    model: str = "mlp",
    activation: str = "relu",
    noise: float = 0.0,
    seed: int = 0,
) -> Observation:
    """One client's real update of an untrained network."""
    settings = {"name": model, "width": width, "activation": activation}
    config = resolve(ModelConfig.model_validate(settings), images.shape[1], images.shape[-1], 10)
    training = training or TrainingConfig(batch_size=len(images))
    weights = initial_weights(config, seed)
    everything = [np.arange(len(images))] * training.local_steps
    sent = local_update(build_model(config), weights, images, labels, everything, training).update
    values = torch.cat([tensor.flatten() for tensor in sent.values()])
    values = values + noise * values.std() * torch.randn(values.shape, generator=generator(5))
    kind = "gradient" if training.protocol == "fedsgd" else "delta"
    update = Update(tuple(sent), tuple(tuple(t.shape) for t in sent.values()), None, values, kind)  # type: ignore[arg-type]
    return Observation(1, 0, Scenario(config, training, compression), weights, update, len(images))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int, size: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    coarse = torch.rand(count, 1, 4, 4, generator=generator(seed))
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return images.clamp(0, 1), torch.randint(0, 10, (count,), generator=generator(seed + 1))


def scored(answer, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    order = list(match(answer.images, images).order)
    return psnr(answer.images[order], images), int((answer.labels[order] == labels).sum())


@pytest.mark.parametrize(
    ("count", "width", "seed"), [(1, 16, 0), (2, 64, 0), (8, 256, 0), (8, 256, 1), (12, 512, 0)]
)
def test_batches_are_exact_with_their_labels(count: int, width: int, seed: int) -> None:
    images, labels = batch(count, seed=10 * seed + 1)
    observation = observe(images, labels, width, seed=seed)
    attack = Spear()
    attack.check(observation.scenario)
    answer = attack.run([observation], seed, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.min() >= 100
    assert right == count
    assert answer.details["status"] == "certified"
    assert answer.loss <= CERTIFIED
    assert answer.label_confidence > 0.99
    assert answer.floors["prior"].shape == images.shape


def test_guided_search_needs_few_draws_where_random_rows_need_many() -> None:
    assert expected_draws(2) == 3.0
    assert expected_draws(24) > 3e7
    images, labels = batch(4)
    observation = observe(images, labels, 256)
    guided = Spear().run([observation], 0, CPU)[0]
    published = Spear(method="published", attempts=2).run([observation], 0, CPU)[0]
    for answer in (guided, published):
        assert scored(answer, images, labels)[0].min() >= 100
    assert guided.details["draws"] < 0.1 * published.details["draws"]
    big = observe(*batch(16), 256)
    with pytest.raises(NotApplicable, match=r"about 1\.1e\+05 draws.*'guided'"):
        Spear(method="published", attempts=2).check(big.scenario)


def test_directions_are_those_of_the_samples() -> None:
    """A factor D with exact zeros, another basis of its span: the search must come back to D's own columns."""
    weights = torch.randn(200, 30, generator=generator(0), dtype=torch.float64)
    x = torch.rand(5, 30, generator=generator(1), dtype=torch.float64)
    active = (weights @ x.T > 0).double()
    d = active * torch.randn(200, 5, generator=generator(2), dtype=torch.float64)
    gradient = d @ x
    factors = Factors.of(gradient, weights, torch.linalg.svd(gradient)[2][:5].T)
    found = Search(factors, "guided", generator(3)).collect(20, lambda _: False)
    columns = factors.left @ found.directions.T
    alive = d[gradient.norm(dim=1) > 0]
    cosines = (columns / columns.norm(dim=0)).T @ (alive / alive.norm(dim=0))
    assert cosines.abs().amax(0).min() > 1 - 1e-12
    assert torch.equal(found.zeros.sum(1), found.zeros.sum(1).sort(descending=True).values)


def test_one_local_step_is_solved_up_to_the_rounding_of_the_weights() -> None:
    images, labels = batch(4)
    training = TrainingConfig(protocol="fedavg", batch_size=4, learning_rate=0.5, weight_decay=0.01)
    answer = Spear().run([observe(images, labels, 256, training)], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.min() > 50
    assert right == 4


def test_noise_is_never_certified() -> None:
    images, labels = batch(4)
    answer = Spear(attempts=2).run([observe(images, labels, 256, noise=0.05)], 0, CPU)[0]
    assert answer.details["status"] != "certified"
    assert answer.details["residual"] is None or answer.details["residual"] > 0.01


def test_repeated_images_are_not_certified() -> None:
    images, labels = batch(4)
    images[3] = images[2]
    labels[3] = labels[2]
    answer = Spear().run([observe(images, labels, 256)], 0, CPU)[0]
    assert answer.details["status"] != "certified"
    assert any("3 samples in the spectrum, 4 declared" in note for note in answer.details["notes"])


@pytest.mark.parametrize(
    ("count", "options", "part"),
    [
        (2, {"model": "lenet-zhu", "width": None}, "'head' is followed by nothing"),
        (2, {"activation": "sigmoid"}, "works behind relu"),
        (2, {"model": "two-layer"}, "no bias"),
        (2, {"compression": CompressionConfig(name="topk", rate=0.1)}, "every one is needed"),
        (2, {"compression": CompressionConfig(name="sign")}, "only signs"),
        (40, {}, "64 < 80"),
    ],
)
def test_refusals_before_anything_starts(count: int, options: dict, part: str) -> None:
    observation = observe(*batch(count), **({"width": 64} | options))
    with pytest.raises(NotApplicable, match=part):
        Spear().check(observation.scenario)


def test_a_batch_that_the_layer_cannot_hold_fails_in_words() -> None:
    images, labels = batch(20)
    training = TrainingConfig(batch_size=0)
    answer = Spear(attempts=1).run([observe(images, labels, 32, training)], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert "32 < 40: too few neurons" in answer.details["reason"]
    assert math.isinf(answer.loss)
    with pytest.raises(ConfigError, match=r"spear\.attempts"):
        Spear(attempts=0)


def test_the_first_layer_is_found_and_the_answer_repeats() -> None:
    observation = observe(*batch(3), 64)
    assert first_layer(observation.scenario.model).weight == "1.weight"
    first, second = (Spear().run([observation], 3, CPU)[0] for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert ATTACKS.get("spear") is Spear


@pytest.mark.slow
@pytest.mark.parametrize(("count", "width"), [(8, 1024), (24, 1024), (48, 2048)])
def test_real_digits_by_spear(shared_dir, count: int, width: int) -> None:
    from fedattack.config import Config
    from fedattack.data import build_world

    settings = {"dataset": "mnist", "data-dir": str(shared_dir / "data" / "MNIST"), "limit": "2000"}
    world = build_world(Config.from_mapping(settings))
    ids = np.random.default_rng(0).permutation(len(world.dataset.labels))[:count]
    images, labels = world.dataset.tensors(ids)
    answer = Spear().run([observe(images, labels, width)], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.min() >= 100
    assert right == count
    assert answer.details["status"] == "certified"
