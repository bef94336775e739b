"""Matrix-free Gauss-Newton: its products, its prior, what it recovers, and what it refuses."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import observe, psnr, scenario, smooth_images
from torch import Tensor, nn

from adversaries.inversion.evidence.whitening import common_directions, relaxed, whitening
from adversaries.inversion.gradients import BatchNormMode
from adversaries.inversion.gradients.products import Network, SmoothedReLU
from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from adversaries.reconstruction.gauss_newton import GaussNewton
from adversaries.reconstruction.gauss_newton.attack import default_products
from adversaries.reconstruction.gauss_newton.solver import Settings
from fedattack.config import TrainingConfig
from fedattack.data.cifar import load_batch
from fedattack.data.dataset import as_float
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.models.classifiers import lenet
from fedattack.observation import Auxiliary, Observation
from fedattack.rng import torch_rng

CPU = torch.device("cpu")


def scene(
    model: str = "tiny-cnn", activation: str = "sigmoid", size: int = 8, batch: int = 2, rate: float = 1.0
) -> tuple[Observation, Tensor, Tensor]:
    """An observation, its images and its labels."""
    images = smooth_images(batch, size, seed=3)
    labels = torch.tensor([3, 8, 3, 5])[:batch]
    name = "none" if rate == 1.0 else "topk"
    seen = observe(scenario(10, rate, model, activation, size, name=name), images, labels)
    return seen, images, labels


def network(
    seen: Observation,
    labels: Tensor,
    batch_norm: BatchNormMode = "train",
    dtype: torch.dtype = torch.float32,
) -> Network:
    return Network(seen.scenario.model, seen.weights, seen.update, labels, batch_norm, CPU, dtype)


def normal(shape: tuple[int, ...] | torch.Size, key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch_rng(key, "test"))


@pytest.mark.parametrize(
    ("model", "activation", "batch_norm", "kink"),
    [
        ("lenet-zhu", "sigmoid", "train", 0.0),
        ("lenet-zhu", "relu", "train", 0.3),
        ("tiny-cnn", "gelu", "train", 0.0),
        ("mlp", "tanh", "train", 0.0),
        ("resnet20", "gelu", "eval", 0.0),
        ("resnet20", "relu", "train", 0.1),
    ],
)
def test_both_products_are_one_matrix(
    model: str, activation: str, batch_norm: BatchNormMode, kink: float
) -> None:
    seen, images, labels = scene(model, activation)
    at = network(seen, labels, batch_norm).linearise(smooth_images(2, 8, seed=5), kink)
    for key in range(3):
        v, u = normal(images.shape, key), normal(at.residual.shape, key + 10)
        pushed, pulled = at.push(v), at.pull(u)
        forward, backward = pushed.double() @ u.double(), (v.double() * pulled.double()).sum()
        size = pushed.double().norm() * u.double().norm()
        assert float((forward - backward).abs() / size) <= 7e-6
    assert at.network.products == 6


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_products_equal_the_explicit_jacobian(activation: str, rate: float) -> None:
    seen, _, labels = scene("mlp", activation, size=4, rate=rate)
    net = network(seen, labels, dtype=torch.float64)
    point = smooth_images(2, 4, seed=5).double()
    at = net.linearise(point)
    sent = torch.arange(seen.update.numel) if seen.update.indices is None else seen.update.indices
    unsent = torch.ones(seen.update.numel, dtype=torch.bool)
    unsent[sent] = False
    some = torch.randperm(len(sent), generator=torch_rng(0, "test"))[:150]

    module = build_model(seen.scenario.model).double()
    module.load_state_dict(seen.weights)
    parameters = list(module.parameters())

    def residual(images: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            F.cross_entropy(module(images), labels), parameters, create_graph=True
        )
        difference = torch.cat([g.flatten() for g in gradients])[sent] - seen.update.values
        scales = []
        for _, _, _, values in seen.update.layers():
            scales.append(torch.full((len(values),), float(1 / values.double().square().mean().sqrt())))
        return (difference * torch.cat(scales))[some]

    explicit = torch.autograd.functional.jacobian(residual, point).flatten(1)
    torch.testing.assert_close(at.residual[sent][some], residual(point), rtol=1e-5, atol=1e-6)
    assert not bool(at.residual[unsent].any())
    v, u = normal(point.shape, 1, torch.float64), torch.zeros_like(at.residual)
    u[sent[some]] = normal((len(some),), 2, torch.float64)
    torch.testing.assert_close(at.push(v)[sent][some], explicit @ v.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(at.pull(u).flatten(), explicit.T @ u[sent[some]], rtol=1e-5, atol=1e-6)


def test_smoothed_relu_is_the_mean_over_noise() -> None:
    u = normal((4, 50), 1, torch.float64).requires_grad_()
    pull = normal((4, 50), 2, torch.float64).requires_grad_()
    smooth, deviation = SmoothedReLU(0.5), 0.5 * float(u.detach().std(correction=0))
    noise = torch.distributions.Normal(0.0, deviation)
    levels = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    expected = (u.detach()[..., None] + noise.icdf(levels)).relu().mean(-1)
    torch.testing.assert_close(smooth(u).detach(), expected, rtol=0, atol=1e-3 * deviation)
    (first,) = torch.autograd.grad(smooth(u), u, pull, create_graph=True)
    torch.testing.assert_close(first, pull * noise.cdf(u))
    by_u, by_pull = torch.autograd.grad(first.sum(), (u, pull))
    torch.testing.assert_close(by_u, pull * noise.log_prob(u).exp())
    torch.testing.assert_close(by_pull, noise.cdf(u))


def test_smoothed_relu_without_a_width_is_relu() -> None:
    u = normal((4, 50), 1)
    assert torch.equal(SmoothedReLU()(u), u.relu())
    flat = torch.zeros(3, requires_grad=True)
    assert not bool(SmoothedReLU(0.5)(flat).any())


def test_a_residual_is_reported_without_smoothing() -> None:
    seen, images, labels = scene("tiny-cnn", "relu")
    net = network(seen, labels)
    assert net.linearise(images, kink=0.3).rms > 0.01
    assert net.rms(images) < 1e-5
    assert net.rms(images + 0.1) == pytest.approx(net.linearise(images + 0.1).rms, rel=1e-5)


def test_gradient_of_the_true_images_leaves_no_residual() -> None:
    for model, batch_norm in (("lenet-zhu", "eval"), ("resnet20", "train")):
        seen, images, labels = scene(model, "relu")
        found = network(seen, labels, batch_norm)  # type: ignore[arg-type]
        assert found.linearise(images).rms < 1e-5
        assert found.linearise(images + 0.1).rms > 0.01


def test_conjugate_gradients_solve() -> None:
    half = normal((30, 30), 1, torch.float64)
    matrix, right = half @ half.T + torch.eye(30), normal((30,), 2, torch.float64)
    found, capped = conjugate_gradients(lambda v: matrix @ v, right, 200, 1e-10)
    assert not capped
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right))
    assert conjugate_gradients(lambda v: matrix @ v, right, 2, 1e-10)[1]


def test_whitening_makes_public_images_standard() -> None:
    images = smooth_images(300, 8, seed=1)
    prior = whitening(Auxiliary(images), (3, 8, 8), CPU, torch.float64)
    z, x = normal((2, 3, 8, 8), 1, torch.float64), normal((2, 3, 8, 8), 2, torch.float64)
    torch.testing.assert_close((prior.turn(z) * x).sum(), (z * prior.back(x)).sum())
    torch.testing.assert_close(prior.whiten(prior.mean + prior.turn(z)), z, rtol=1e-4, atol=1e-5)
    white = prior.whiten(images.double())
    assert white.mean(0).abs().max() < 1e-6
    # Coefficients rarer than the 1/f spectrum expects are granted more than they have.
    assert 0.3 < float(white.square().mean()) < 1.05
    half = relaxed(prior, 0.3)
    torch.testing.assert_close(half.deviation.square().mean().sqrt(), torch.tensor(0.3, dtype=torch.float64))
    spread = [p.deviation.log().std() for p in (half, prior)]
    torch.testing.assert_close(spread[0], spread[1] / 2)


def test_common_directions_are_told_from_chance() -> None:
    noise, along = normal((400, 300), 1), normal((400, 2), 2)
    _, gains, bulk = common_directions(noise)
    assert len(gains) <= 1
    assert bulk == pytest.approx(1, abs=0.02)
    directions = torch.linalg.qr(normal((300, 2), 3)).Q
    modes, gains, bulk = common_directions(noise + along * torch.tensor([5.0, 3.0]) @ directions.T)
    assert len(gains) == 2
    assert bulk == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(modes @ modes.T, torch.eye(2), rtol=0, atol=1e-5)
    assert float((modes @ directions).square().sum()) > 1.8
    fresh = normal((5000, 300), 4) + normal((5000, 2), 5) * torch.tensor([5.0, 3.0]) @ directions.T
    torch.testing.assert_close((fresh @ modes.T).std(0), gains, rtol=0.06, atol=0)


def test_without_public_images_the_prior_is_smooth() -> None:
    prior = whitening(None, (3, 16, 16), CPU, torch.float32)
    assert torch.allclose(prior.mean, torch.tensor(0.5))
    draws = prior.turn(normal((50, 3, 16, 16), 1))
    assert 0.2 < float(draws.std()) < 0.3
    assert float(draws.diff(dim=3).std()) < 0.85 * float(draws.std())  # white noise: 1.41


@pytest.mark.parametrize(
    ("activation", "least"),
    [("sigmoid", 40.0), ("gelu", 20.0), pytest.param("relu", 25.0, marks=pytest.mark.slow)],
)
def test_recovers_an_image(activation: str, least: float) -> None:
    seen, images, labels = scene("lenet-zhu", activation, size=16, batch=1)
    answer = GaussNewton(products=1500 if activation == "relu" else 500).run([seen], 0, CPU)[0]
    assert torch.equal(answer.labels, labels)
    assert psnr(answer.images, images) > max(least, psnr(answer.floors["prior"], images) + 6)
    assert answer.certificate == answer.loss == answer.history[-1] or activation == "relu"
    assert answer.details["iterations"] <= 1520
    assert "no evidence" in answer.details["notes"]
    json.dumps(answer.details)


def test_larger_batches_get_more_products() -> None:
    assert [default_products(images) for images in (1, 2, 3, 4)] == [8000, 8000, 12000, 16000]
    assert GaussNewton()._settings(4).products == 16000
    assert GaussNewton(products=500)._settings(4).products == 500


def test_top_k_is_matched_where_it_was_sent() -> None:
    seen, images, _ = scene("lenet-zhu", "sigmoid", size=16, batch=1, rate=0.5)
    answer = GaussNewton(products=300).run([seen], 0, CPU)[0]
    assert psnr(answer.images, images) > psnr(answer.floors["prior"], images) + 6


def test_images_that_share_a_label_come_apart() -> None:
    seen, images, labels = scene("lenet-zhu", "sigmoid", size=16, batch=3)
    answer = GaussNewton(products=1000, starts=1).run([seen], 0, CPU)[0]
    assert answer.labels.tolist() == sorted(labels.tolist())
    same = answer.images[answer.labels == 3]
    assert psnr(same[:1], same[1:]) < 30
    true = images[labels == 3]
    found = max(psnr(same, true), psnr(same, true.flip(0)))
    assert found > psnr(answer.floors["prior"][:2], true) + 3


def test_answers_repeat_to_the_bit_and_depend_on_the_seed() -> None:
    seen, _, _ = scene("tiny-cnn", "relu", size=8, batch=2)
    attack = GaussNewton(products=150)
    first, again, other = (attack.run([seen], seed, CPU)[0] for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert first.history == again.history
    assert first.details == again.details
    assert not torch.equal(first.images, other.images)


def test_refuses_what_is_no_single_gradient() -> None:
    several = TrainingConfig(protocol="fedavg", local_steps=3)
    with pytest.raises(NotApplicable, match="local_steps"):
        GaussNewton().check(scenario(10, training=several))
    with pytest.raises(NotApplicable, match="sign"):
        GaussNewton().check(scenario(10, name="sign"))
    GaussNewton().check(scenario(10, model="resnet20", activation="relu"))


def test_refuses_models_that_draw_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropping(model: object) -> nn.Module:
        del model
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))

    monkeypatch.setattr(lenet, "mlp", dropping)
    before = torch.random.get_rng_state()
    with pytest.raises(NotApplicable, match="random"):
        GaussNewton().check(scenario(10, model="mlp", size=8))
    assert torch.equal(before, torch.random.get_rng_state())


def test_refuses_an_update_of_zeros() -> None:
    seen, _, labels = scene()
    seen.update.values.zero_()
    with pytest.raises(NotApplicable, match="zeros"):
        network(seen, labels)


@pytest.mark.parametrize("setting", [{"products": 3}, {"noise": 0.0}, {"kink": -1.0}, {"starts": 0}])
def test_refuses_settings_that_cannot_work(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Settings(**setting)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=next(iter(setting))):
        GaussNewton(**setting)  # type: ignore[arg-type]


def batch_of(archive: tarfile.TarFile, name: str) -> tuple[Tensor, Tensor]:
    """Images float32 (N, 3, 32, 32) and labels of one CIFAR-10 batch file."""
    member = next(m for m in archive.getmembers() if m.name.endswith(name))
    file = archive.extractfile(member)
    assert file is not None
    held = load_batch(file.read(), name)
    return as_float(np.array(held["data"]).reshape(-1, 3, 32, 32)), torch.tensor(held["labels"])


@pytest.fixture(scope="module")
def cifar(shared_dir: Path) -> tuple[Tensor, Tensor, Auxiliary]:
    """Test images with their labels, and the training images as public data."""
    with tarfile.open(shared_dir / "data" / "CIFAR10" / "cifar-10-subset-python.tar.xz") as archive:
        images, labels = batch_of(archive, "test_batch")
        public = [batch_of(archive, f"data_batch_{number}")[0] for number in range(1, 6)]
    return images, labels, Auxiliary(torch.cat(public), source="CIFAR-10 training images")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "batch", "least"),
    [("sigmoid", 1, 44.0), ("sigmoid", 2, 38.0), ("sigmoid", 4, 33.0), ("relu", 1, 29.0)],
)
def test_bars_on_photographs(
    activation: str, batch: int, least: float, cifar: tuple[Tensor, Tensor, Auxiliary]
) -> None:
    """Labels known; images that nothing was tuned on."""
    images, labels, public = cifar[0][:batch], cifar[1][:batch], cifar[2]
    seen = observe(scenario(10, 1.0, activation=activation, name="none"), images, labels)
    prior = whitening(public, (3, 32, 32), CPU, torch.float32)
    found = GaussNewton().solve(seen, labels, prior, 0, CPU)
    assert psnr(found.images, images) >= least
    assert found.products <= default_products(batch) + 100
