"""The Gauss-Newton solver: its Jacobian, exact recovery, refusals, and the certificate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hcgla_scenes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.evidence.priors import GaussianPrior, gaussian_prior, smooth_prior
from adversaries.inversion.gradients import closed_form
from adversaries.reconstruction.hcgla import annealed_gauss_newton
from adversaries.reconstruction.hcgla.annealed_gauss_newton import GaussNewtonSettings, solve
from adversaries.reconstruction.hcgla.least_squares import Problem, State
from adversaries.reconstruction.hcgla.measurements import read_update, value_precision
from fedattack.config import CompressionConfig, DataConfig, ModelConfig, TrainingConfig
from fedattack.data import load_dataset
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Auxiliary, Observation, Scenario, Update
from fedattack.rng import torch_rng


def draw(prior: GaussianPrior, count: int) -> Tensor:
    """Images from the prior, so that the solver's assumption holds."""
    z = torch.randn(prior.size, count, dtype=torch.float64, generator=torch_rng(1, "test"))
    images = prior.mean[:, None] + 0.5 * prior.factor() @ z
    return images.T.reshape(count, *prior.image_shape).float().clamp(0, 1)


def observe(
    images: Tensor, labels: Tensor, classes: int = 10, rate: float = 1.0, compressor: str = "topk"
) -> Observation:
    """What a server sees of one client, computed by autograd."""
    _, channels, size, _ = images.shape
    config = ModelConfig(classes=classes, channels=channels, image_size=size, activation="sigmoid")
    weights = initial_weights(config, 7)
    model = build_model(config)
    model.load_state_dict(weights)
    F.cross_entropy(model(images), labels).backward()
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    order = {
        "none": torch.arange(len(flat)),
        "topk": flat.abs().argsort(descending=True),
        "randomk": torch.randperm(len(flat), generator=torch_rng(0, "test")),
    }[compressor]
    indices = order[: max(1, round(len(flat) * rate))].sort().values
    sent = None if compressor == "none" else indices
    update = Update(names, tuple(tuple(p.shape) for p in parameters), sent, flat[indices])
    scenario = Scenario(
        config, TrainingConfig(batch_size=len(images)), CompressionConfig(name=compressor, rate=rate)
    )
    return Observation(1, 0, scenario, weights, update, len(images))


def psnr(images: Tensor, truth: Tensor) -> float:
    return -10 * math.log10(float((images - truth).square().mean(dim=(1, 2, 3)).max()) + 1e-12)


def problem(observation: Observation, labels: Tensor, prior: GaussianPrior) -> Problem:
    chain = closed_form.describe(observation.scenario.model)
    measured = read_update(chain, observation, labels, weight_floor=0.1, head_entries=40)
    return Problem(
        chain,
        observation.weights,
        measured,
        prior.mean,
        prior.factor(),
        feature_noise=0.03,
        least_feature_noise=1e-3,
        chunk=50,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("batch", "classes", "compressor", "rate", "moving", "hinged"),
    [
        (1, 10, "topk", 0.05, False, False),
        (1, 10, "topk", 0.01, True, False),
        (2, 40, "topk", 0.02, True, True),
        (1, 10, "randomk", 0.05, True, False),
        (2, 40, "randomk", 0.05, True, False),
    ],
)
def test_jacobian_equals_finite_differences(
    batch: int, classes: int, compressor: str, rate: float, moving: bool, hinged: bool
) -> None:
    prior = smooth_prior((1, 8, 8))
    labels = torch.tensor([3, 8])[:batch]
    observation = observe(draw(prior, batch), labels, classes, rate, compressor)
    posed = problem(observation, labels, prior)
    z = 0.1 * torch.randn(batch, prior.size, dtype=torch.float64, generator=torch_rng(2, "test"))
    anchor = posed.anchor(posed.evaluate(z, 0.3, posed.anchor()))
    state = posed.evaluate(z, 0.3, anchor)
    assert bool(state.moving.any()) == moving, "each kind of feature must be covered by its case"
    assert bool((state.active & ~anchor.known).any()) == hinged
    if batch > 1:
        assert len(posed.measured.head_values) > 0
    per_image, joint = posed.jacobian(state)

    def scaled(at: State) -> tuple[Tensor, Tensor]:
        return at.feature_residual / at.feature_noise, at.joint_residual / at.joint_noise

    for position in torch.randint(batch * prior.size, (12,), generator=torch_rng(3, "test")).tolist():
        shift = torch.zeros(batch * prior.size, dtype=torch.float64)
        shift[position] = 1e-5
        shift = shift.reshape(batch, -1)
        ahead, behind = (scaled(posed.evaluate(z + sign * shift, 0.3, anchor)) for sign in (1, -1))
        slope_features, slope_joint = ((a - b) / 2e-5 for a, b in zip(ahead, behind, strict=True))
        sample = position // prior.size
        features = per_image[sample][position % prior.size]
        assert_close(features, slope_features[sample, state.active[sample]])
        assert_close(joint[position], slope_joint)


def assert_close(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < 1e-4, float(error)


@pytest.mark.parametrize(
    ("shape", "batch", "rate", "classes"),
    [((1, 8, 8), 1, 1.0, 10), ((3, 8, 8), 1, 0.2, 10), ((1, 8, 8), 2, 0.2, 200), ((1, 9, 9), 3, 1.0, 40)],
)
def test_recovers_exactly(shape: tuple[int, int, int], batch: int, rate: float, classes: int) -> None:
    prior = smooth_prior(shape)
    truth, labels = draw(prior, batch), torch.tensor([3, 8, 1])[:batch]
    compressor = "none" if rate == 1 else "topk"
    result = solve(observe(truth, labels, classes, rate, compressor), labels, prior)
    assert result.explained
    assert result.images.shape == truth.shape
    assert psnr(result.images, truth) > 40
    assert psnr(prior.mean.reshape(prior.image_shape).float().expand_as(truth), truth) < 20


def test_a_real_face_from_a_thousandth_of_the_published_lenets_gradient() -> None:
    faces = load_dataset(DataConfig(name="faces"), seed=0)
    public, _ = faces.tensors(np.arange(45))
    truth, _ = faces.tensors(np.array([60]))
    labels = torch.tensor([4711])
    prior = gaussian_prior(Auxiliary(public), (1, 32, 32))
    observation = observe(truth, labels, classes=10_177, rate=0.001)
    result = solve(observation, labels, prior)
    assert result.explained
    assert psnr(result.images, truth) > 45
    assert psnr(prior.mean.reshape(prior.image_shape).float()[None], truth) < 20


def test_same_observation_same_bits() -> None:
    prior = smooth_prior((1, 8, 8))
    truth, labels = draw(prior, 1), torch.tensor([3])
    observation = observe(truth, labels, rate=0.1)
    first, second = solve(observation, labels, prior), solve(observation, labels, prior)
    assert torch.equal(first.images, second.images)
    assert first.history == second.history


def test_certificate_stops_annealing_where_values_are_noised() -> None:
    prior = smooth_prior((1, 8, 8))
    truth, labels = draw(prior, 1), torch.tensor([3])
    clean = observe(truth, labels, rate=0.2)
    values = clean.update.values
    noise = torch.randn(len(values), generator=torch_rng(4, "test")) * 0.1 * values.abs().mean()
    noised = dataclasses.replace(clean, update=dataclasses.replace(clean.update, values=values + noise))
    trusting = GaussNewtonSettings(max_objective=math.inf)
    stopped, driven = solve(noised, labels, prior), solve(noised, labels, prior, trusting)
    assert stopped.objective_per_number <= 1.5 or not stopped.explained
    assert stopped.history[-1] > 1.5 * min(stopped.details["schedule"]) ** 2  # type: ignore[call-overload]
    assert len(stopped.details["reached"]) < len(stopped.details["schedule"])  # type: ignore[arg-type]
    assert psnr(stopped.images, truth) > psnr(driven.images, truth)
    assert solve(clean, labels, prior).explained


def smooth_victim(rate: float, contrast: float = 1.0) -> tuple[Observation, Tensor, GaussianPrior]:
    """One image of a family of pictures, and a prior from others with so much of its contrast."""
    truth = hcgla_scenes.smooth_images(1, 16, seed=1)
    public = 0.5 + contrast * (hcgla_scenes.smooth_images(200, 16, seed=11) - 0.5)
    observation = hcgla_scenes.observe(hcgla_scenes.scenario(100, rate, size=16), truth, torch.tensor([3]))
    return observation, truth, gaussian_prior(Auxiliary(public), (3, 16, 16))


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.2])
def test_the_answer_predicts_its_own_quality(rate: float) -> None:
    observation, truth, prior = smooth_victim(rate)
    result = solve(observation, torch.tensor([3]), prior)
    kept = {name: len(values) for name, _, _, values in observation.update.layers()}
    assert result.explained
    found, predicted = psnr(result.images, truth), float(str(result.details["predicted_psnr"]))
    assert min(115, predicted) == pytest.approx(min(115, found), abs=3)
    assert (found > 100) == (rate == 0.2)
    measurements, measuring = result.details["measurements"], result.details["measuring"]
    assert measurements - measuring == kept["head.bias"]  # type: ignore[operator]


def test_a_level_refused_for_the_images_length_is_tried_again() -> None:
    observation, truth, prior = smooth_victim(0.05, contrast=0.3)
    labels = torch.tensor([3])
    once = solve(observation, labels, prior, GaussNewtonSettings(retries=0))
    again = solve(observation, labels, prior)
    assert once.details["reached"] == [1.0, 0.1, 0.01]
    assert again.details["retried"]
    assert again.details["reached"][-1] == again.details["schedule"][-1]  # type: ignore[index]
    assert again.explained
    assert psnr(again.images, truth) > psnr(once.images, truth) + 5
    assert again.details["predicted_psnr"] > once.details["predicted_psnr"] + 5  # type: ignore[operator]


def test_a_wrong_update_is_not_explained() -> None:
    prior = smooth_prior((1, 8, 8))
    labels = torch.tensor([3])
    observation = observe(draw(prior, 1), labels, rate=0.2)
    shuffled = observation.update.values[
        torch.randperm(observation.update.kept, generator=torch_rng(5, "test"))
    ]
    wrong = dataclasses.replace(observation, update=dataclasses.replace(observation.update, values=shuffled))
    assert not solve(wrong, labels, prior).explained


@pytest.mark.parametrize("factor", [0.0, 1e4, 1e30])
def test_absurd_values_are_not_explained_and_do_no_harm(factor: float) -> None:
    prior = smooth_prior((1, 8, 8))
    labels = torch.tensor([3])
    observation = observe(draw(prior, 1), labels, rate=0.2)
    values = observation.update.values * factor
    absurd = dataclasses.replace(observation, update=dataclasses.replace(observation.update, values=values))
    result = solve(absurd, labels, prior)
    assert not result.explained
    assert torch.isfinite(result.images).all()


@pytest.mark.parametrize(("images", "measurements"), [(1, 40), (2, 30), (3, 200)])
def test_both_ways_to_solve_a_step_agree_with_dense_least_squares(images: int, measurements: int) -> None:
    generator = torch_rng(8, "test")
    modes, known = 20, (5, 0, 12)
    z = torch.randn(images, modes, dtype=torch.float64, generator=generator)
    joint = torch.randn(images * modes, measurements, generator=generator)
    blocks = [torch.randn(modes, known[b], generator=generator) for b in range(images)]
    others = torch.randn(measurements, dtype=torch.float64, generator=generator)
    features = [torch.randn(known[b], dtype=torch.float64, generator=generator) for b in range(images)]
    rows = [joint.T, *(torch.zeros(known[b], images * modes) for b in range(images))]
    for b, block in enumerate(blocks):
        rows[b + 1][:, b * modes : (b + 1) * modes] = block.T
    stacked = torch.cat([*rows, torch.eye(images * modes)]).double()
    residual = torch.cat([others, *features, z.flatten()])
    expected = torch.linalg.lstsq(stacked, -residual[:, None]).solution.reshape(z.shape)
    for way in (annealed_gauss_newton.OnUnknowns, annealed_gauss_newton.OnMeasurements):
        equations = way(blocks, joint, torch.float64)
        found = equations.step(z[..., None], [f[:, None] for f in features], others[:, None])[..., 0]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_precision_of_half_values_is_seen() -> None:
    values = torch.rand(100, generator=torch_rng(6, "test"))
    assert value_precision(values) == 2.0**-22
    assert value_precision(values.half().float()) == 2.0**-11
    assert value_precision(values.bfloat16().float()) == 2.0**-9


def test_default_modes_follow_the_batch() -> None:
    found = [annealed_gauss_newton.default_modes(3072, batch) for batch in (1, 2, 4, 8, 16)]
    assert found == [3072, 2048, 1536, 1024, 614]
    assert annealed_gauss_newton.default_modes(1024, 4) == 1024


def scenario(**changes: Any) -> Scenario:
    parts: dict[str, dict[str, Any]] = {
        "model": {"classes": 10, "channels": 1, "image_size": 8, "activation": "sigmoid"},
        "training": {},
        "compression": {},
    }
    for key, value in changes.items():
        section, field = key.split("__")
        parts[section][field] = value
    return Scenario(
        ModelConfig(**parts["model"]),
        TrainingConfig(**parts["training"]),
        CompressionConfig(**parts["compression"]),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__activation": "relu"}, "activation"),
        ({"model__name": "resnet18"}, "resnet18"),
        ({"model__image_size": 65, "model__channels": 3}, "covariance"),
        ({"training__protocol": "fedavg"}, "fedavg"),
        ({"training__batch_size": 17}, "17"),
        ({"compression__name": "sign"}, "sign"),
        ({"compression__name": "qsgd", "compression__norm": "l2"}, "norm"),
        ({"compression__name": "topk-qsgd", "compression__norm": "l2"}, "norm"),
        ({"compression__name": "dgc", "compression__clip_norm": 1.0}, "clip"),
    ],
)
def test_refuses_scenarios_it_does_not_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotApplicable, match=message):
        annealed_gauss_newton.applies(scenario(**changes))


def test_refuses_later_rounds_of_error_feedback_and_repeated_labels() -> None:
    remembering = scenario(compression__error_feedback=True)
    annealed_gauss_newton.applies(remembering, round=1)
    with pytest.raises(NotApplicable, match="round 2"):
        annealed_gauss_newton.applies(remembering, round=2)
    with pytest.raises(NotApplicable, match="repeat"):
        annealed_gauss_newton.applies(scenario(), num_examples=2, labels=torch.tensor([1, 1]))


def test_refuses_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="schedule"):
        GaussNewtonSettings(schedule=(0.1, 0.3))
    with pytest.raises(ConfigError, match="modes"):
        GaussNewtonSettings(modes=0)
