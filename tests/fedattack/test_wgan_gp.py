"""Generators: losses against closed forms and reference values, private critics, files, diversity, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from fedattack.config import Config, DefenseConfig, GanConfig, ModelConfig, TrainingConfig
from fedattack.data import build_world
from fedattack.defenses import check_defenses
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.errors import BadRequest, ConfigError, DataError, NotApplicable
from fedattack.generative import GanSettings, load_gan, save_gan
from fedattack.generative.diversity import diversity
from fedattack.generative.nets import Gan
from fedattack.generative.wgan_gp import CriticStep, WganGp, critic_loss, energy_distance, generator_loss
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Scenario
from fedattack.task import LocalRound, LossAndGradient
from fedattack.training import batch_positions
from simulations.experiments.choose import check_model


def settings(name: str = "wgan-gp-mlp", side: int = 8, nets: str = "both", **more: Any) -> ModelConfig:
    return resolve(ModelConfig(name=name, nets=nets, **more), 1, side, 10)  # type: ignore[arg-type]


def scenario(nets: str = "both", steps: int = 10, **training: Any) -> Scenario:
    agreed = {"task": "wgan-gp", "protocol": "fedavg", "local_steps": steps, "batch_size": 8}
    config = Config.from_mapping({"training": agreed | {"learning_rate": 1e-3} | training, "gan.share": nets})
    model = settings(width=16, nets=nets)
    return Scenario(model, config.training, config.compression, config.defense, config.gan)


def test_losses_and_gradients_are_those_of_the_reference(shared_dir: Path) -> None:
    folder = shared_dir / "checks" / "membership"
    given = {name: torch.from_numpy(array) for name, array in np.load(folder / "wgangp_loss.npz").items()}
    expected = json.loads((folder / "wgangp_loss_expected.json").read_text())
    critic = nn.Sequential(nn.Linear(784, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)).double()
    critic.load_state_dict(
        dict(zip(critic.state_dict(), (given[n] for n in ("w1", "b1", "w2", "b2")), strict=True))
    )
    loss, gp = critic_loss(critic, given["real"], given["fake"], given["alpha"], expected["lambda"])
    slopes = torch.autograd.grad(loss, list(critic.parameters()))
    near = {"rel": 0, "abs": 1e-10}
    assert loss.item() == pytest.approx(expected["disc_cost"], **near)
    assert gp.item() == pytest.approx(expected["gradient_penalty_mean"], **near)
    assert (loss - 10 * gp).item() == pytest.approx(expected["wasserstein_part"], **near)
    assert generator_loss(critic, given["fake"]).item() == pytest.approx(expected["gen_cost"], **near)
    torch.testing.assert_close(slopes[0], given["grad_w1"], rtol=0, atol=1e-10)
    torch.testing.assert_close(slopes[2], given["grad_w2"], rtol=0, atol=1e-10)
    assert [float(part.norm()) for part in slopes] == pytest.approx(
        [expected["grad_norms"][name] for name in ("w1", "b1", "w2", "b2")], **near
    )


def test_a_linear_critic_has_a_closed_form() -> None:
    """w . x + b has the slope w everywhere: the penalty is (|w| - 1)^2 wherever the points lie."""
    draws = torch.Generator().manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(36, 1)).double()
    real, fake = (torch.rand(5, 1, 6, 6, generator=draws, dtype=torch.float64) for _ in range(2))
    weight = critic[1].weight
    loss, gp = critic_loss(critic, real, fake, torch.rand(5, generator=draws, dtype=torch.float64), 10.0)
    slope, bias = torch.autograd.grad(loss, [weight, critic[1].bias])
    length, apart = weight.detach().norm(), (fake - real).flatten(1).mean(0)
    assert gp.item() == pytest.approx(float((length - 1) ** 2), rel=1e-12)
    assert loss.item() == pytest.approx(float(weight.detach()[0] @ apart + 10 * (length - 1) ** 2), rel=1e-12)
    torch.testing.assert_close(slope[0], apart + 20 * (length - 1) / length * weight.detach()[0])
    assert float(bias) == 0.0


@pytest.mark.parametrize(
    ("width", "generator", "critic"), [(64, 1_554_177, 1_030_145), (16, 196_545, 65_537)]
)
def test_the_nets_have_the_published_sizes(width: int, generator: int, critic: int) -> None:
    gan = build_model(settings("wgan-gp", 28, width=width))
    assert isinstance(gan, Gan)
    assert [sum(p.numel() for p in net.parameters()) for net in (gan.generator, gan.critic)] == [
        generator,
        critic,
    ]
    images = gan.sample(3, torch.Generator().manual_seed(0))
    assert images.shape == (3, 1, 28, 28)
    assert 0 <= images.min().item() <= images.max().item() <= 1
    assert gan(images).shape == (3, 1)
    inner = gan.generator.to_8(torch.zeros(1, 4 * width, 4, 4))  # type: ignore[operator]
    assert inner.shape[-1] == 8, "cropped to 7 before it is doubled again"


def test_energy_distance_is_that_of_all_pairs_and_zero_for_one_distribution() -> None:
    draws = np.random.default_rng(0)
    one, other = draws.normal(size=(40, 6)), draws.normal(0.5, 2.0, size=(30, 6))
    within = [cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (one, other)]
    wanted = 2 * cdist(one, other).mean() - sum(within)
    assert energy_distance(torch.from_numpy(one), torch.from_numpy(other)) == pytest.approx(wanted, rel=1e-7)
    same = [energy_distance(*torch.from_numpy(draws.normal(size=(2, 40, 6)))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5, "without bias"
    assert wanted > 5 * np.std(same)


class OneByOne:
    """A critic's step that hides that it can take samples apart."""

    def __init__(self, step: CriticStep) -> None:
        self.step = step

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        return self.step(model, images, labels)


@pytest.mark.parametrize("name", ["wgan-gp-mlp", "wgan-gp"])
def test_gradients_of_single_samples_are_those_of_batches_of_one(name: str) -> None:
    side = 8 if name == "wgan-gp-mlp" else 28
    gan = build_model(settings(name, side, width=8))
    images = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(1))
    assert isinstance(gan, Gan)
    made, alpha = gan.sample(3, torch.Generator().manual_seed(2)).detach(), torch.tensor([0.1, 0.5, 0.9])
    step = CriticStep(10.0, torch.Generator())
    object.__setattr__(step, "_drawn", lambda *_: (gan.critic, made, alpha))
    losses, gradients = step.per_sample(gan, images, torch.zeros(3))
    for place in range(3):
        one = [x[place : place + 1] for x in (images, made, alpha)]
        loss, _ = critic_loss(gan.critic, *one, 10.0)  # type: ignore[arg-type]
        wanted = torch.autograd.grad(loss, list(gan.critic.parameters()))
        assert losses[place].item() == pytest.approx(loss.item(), rel=1e-5)
        for found, right in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found[place], right, rtol=1e-4, atol=1e-6)


def test_clipping_at_once_is_clipping_one_by_one() -> None:
    """A batch of twenty, so that it is taken in two parts; the sums of clipped gradients, and no noise."""
    gan = build_model(settings(width=8))
    images, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    clip = ClipNoise(clip_norm=0.5, noise=0.0, unit="sample")

    class Fixed:
        """Each sample's gradient depends on the sample alone."""

        def __call__(self, model: nn.Module, some: Tensor, _: Tensor) -> LossAndGradient:
            loss = model(some).mean()
            return loss, torch.autograd.grad(loss, list(model.critic.parameters()))  # type: ignore[arg-type]

    class AtOnce(Fixed):
        def per_sample(self, model: nn.Module, some: Tensor, _: Tensor) -> LossAndGradient:
            each = [self(model, one, _) for one in some.split(1)]
            return torch.stack([loss for loss, _ in each]), tuple(
                torch.stack(parts) for parts in zip(*(g for _, g in each), strict=True)
            )

    one, other = (clip.gradient(gan, images, labels, step, torch.Generator()) for step in (Fixed(), AtOnce()))
    torch.testing.assert_close(one[0], other[0])
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    total = torch.stack([part.square().sum() for part in other[1]]).sum().sqrt()
    assert 0.2 < float(total) <= 0.5 * 1.00001


@pytest.mark.parametrize("nets", ["both", "generator"])
def test_data_reach_a_client_through_the_steps_gradient_alone(nets: str) -> None:
    """With a step that answers the same whatever it is shown, other images train the same nets, bit for bit.

    So noise on the step's gradient is noise on everything that touches data: the generator's part is post-processing.
    """
    task, agreed = WganGp(), scenario(nets)
    model = build_model(agreed.model)
    assert isinstance(model, Gan)
    weights = initial_weights(agreed.model, 0)
    fixed = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in model.critic.parameters()
    ]
    labels = torch.zeros(24, dtype=torch.int64)
    batches = batch_positions(24, agreed.training, 0, 1, 0)
    calls = []

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        calls.append(len(images))
        return torch.tensor(0.0), tuple(part.clone() for part in fixed)

    found = []
    for images in (torch.zeros(24, 1, 8, 8), torch.rand(24, 1, 8, 8)):
        draws = torch.Generator().manual_seed(5)
        found.append(task.train(model, LocalRound(weights, images, labels, batches, agreed, step, draws)))
    assert calls == [8] * 20
    one, other = found
    assert all(torch.equal(one.update[n], other.update[n]) for n in one.update)
    assert any(bool(part.abs().max() > 0) for n, part in one.update.items() if n.startswith("generator"))
    assert one.memory.keys() == ({} if nets == "both" else model.critic.state_dict()).keys()
    assert all(torch.equal(one.memory[n], other.memory[n]) for n in one.memory)


def test_epsilon_counts_the_critics_steps() -> None:
    """16 of 32 samples a step: a sample is in 50 of 100 critic steps a round."""
    training = TrainingConfig(task="wgan-gp", protocol="fedavg", local_steps=100, batch_size=16)
    account = ClipNoise(unit="sample", noise=144.487).privacy(training, 32, 30, False)
    assert (account.unit, account.releases) == ("sample", 1500)
    assert account.epsilon == pytest.approx(1.0, abs=1e-4)


def test_what_makes_no_sense_on_a_generator_is_refused() -> None:
    base = scenario()
    for name in ("soteria", "precode", "transform"):
        asked = Scenario(base.model, base.training, base.compression, DefenseConfig(names=(name,)), base.gan)
        with pytest.raises(NotApplicable, match=rf"'{name}': makes no sense where a generator is trained"):
            check_defenses(asked)
    check_defenses(
        Scenario(base.model, base.training, base.compression, DefenseConfig(names=("clip-noise",)), base.gan)
    )


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"local-steps": 7}, "a multiple of gan.critic_steps = 5"),
        ({"protocol": "fedsgd", "local-steps": 1}, "needs 'fedavg'"),
        ({"model": "mlp"}, "accepted: wgan-gp-mlp, wgan-gp"),
        ({"task": "classify", "local-steps": 1}, "use --task wgan-gp, or a classifier"),
        ({"model": "wgan-gp"}, "made for 1 x 28 x 28 images, not 1 x 8 x 8"),
        ({"strategy": "fedprox"}, "adds a proximal term to one loss"),
        ({"training.momentum": 0.9}, "uses Adam; needs 0"),
        ({"activation": "gelu"}, "has nets with their own"),
        ({"weights": "other.safetensors"}, "tensors do not fit the model"),
    ],
)
def test_refused_before_anything_is_trained(asked: dict[str, Any], part: str, tmp_path: Path) -> None:
    save_file(initial_weights(settings(width=4), 0), tmp_path / "other.safetensors")
    asked = {name: str(tmp_path / v) if name == "weights" else v for name, v in asked.items()}
    base = {"task": "wgan-gp", "model": "wgan-gp-mlp", "dataset": "digits", "clients": 2, "limit": 60}
    config = Config.from_mapping(base | {"local-steps": 10} | asked)
    with pytest.raises(BadRequest) as refused:
        check_model(config, build_world(config))
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_generator_comes_back_from_its_file(tmp_path: Path) -> None:
    model = settings(width=16, nets="generator", weights="/home/somebody/start.safetensors")
    weights = initial_weights(model.model_copy(update={"weights": None}), 3)
    told = GanSettings(model=model, gan=GanConfig(share="generator", penalty=5.0), rounds=7, privacy="none")
    path = tmp_path / "generator.safetensors"
    save_gan(path, weights, told)
    gan, found = load_gan(path)
    assert found == told.model_copy(update={"model": model.model_copy(update={"weights": None})})
    assert (found.image_shape, found.has_critic) == ((1, 8, 8), False)
    assert not gan.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gan.state_dict().items())
    fresh = build_model(found.model)
    fresh.load_state_dict(weights)
    assert isinstance(fresh, Gan)
    one, other = (net.sample(4, torch.Generator().manual_seed(0)) for net in (gan, fresh))
    assert torch.equal(one, other)
    assert b"somebody" not in path.read_bytes(), "a folder of the machine it was trained on"
    start = initial_weights(model.model_copy(update={"weights": str(path)}), 0)
    assert all(torch.equal(start[name], weights[name]) for name in weights), "a run can start from it"


def damaged(header: dict[str, str], **change: Any) -> dict[str, str]:
    inner = json.loads(header["settings"])
    for name, value in change.items():
        section, _, leaf = name.partition("__")
        if leaf:
            inner[section][leaf] = value
        else:
            inner[section] = value
    return header | {"settings": json.dumps(inner)}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w, h: (w, {}), "format 'none'"),
        (lambda w, h: (w, h | {"format": "fedattack references 1"}), "format 'fedattack references 1'"),
        (lambda w, h: (w, h | {"settings": "{"}), "its settings are malformed"),
        (lambda w, h: (w, damaged(h, model__image_size=None)), "its settings are malformed"),
        (lambda w, h: (w, damaged(h, task="classify")), "task 'classify'"),
        (lambda w, h: (w, damaged(h, model__name="os:system")), "model 'os:system'"),
        (lambda w, h: (w, h | {"image_shape": "[1, 9, 9]"}), "says images of [1, 9, 9]"),
        (lambda w, h: (w, damaged(h, model__width=2_000_000)), "do not fit"),
        (lambda w, h: (w, damaged(h, model__nets="generator")), "do not fit"),
        (lambda w, h: (w | {"generator.0.bias": torch.zeros(3)}, h), "do not fit"),
        (lambda w, h: ({n: t.half() for n, t in w.items()}, h), "do not fit"),
        (lambda w, h: (w | {"generator.0.bias": torch.full((16,), torch.nan)}, h), "NaN or infinite"),
    ],
)
def test_files_of_another_kind_are_refused(
    change: Callable[[dict[str, Tensor], dict[str, str]], tuple[dict[str, Tensor], dict[str, str]]],
    part: str,
    tmp_path: Path,
) -> None:
    from safetensors import safe_open

    path = tmp_path / "generator.safetensors"
    save_gan(path, initial_weights(settings(width=16), 0), GanSettings(model=settings(width=16)))
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors, header = change(load_file(path), header)
    save_file(tensors, path, header)
    with pytest.raises(DataError) as refused:
        load_gan(path)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_gan(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_gan(tmp_path / "text")


def test_a_generator_that_collapsed_is_told_from_one_that_did_not() -> None:
    draws = torch.Generator().manual_seed(0)
    real = torch.rand(60, 1, 6, 6, generator=draws)
    several = diversity(torch.rand(80, 1, 6, 6, generator=draws), real)
    assert (several.distinct, several.collapsed) == (1.0, False)
    assert several.spread == pytest.approx(1.0, abs=0.05)
    few = diversity(real[:4].repeat(20, 1, 1, 1), real)
    assert (few.distinct, few.collapsed) == (4 / 80, True), (
        "spread as far as real images are, but four of them"
    )
    assert few.text.startswith("the generator collapsed: 5.0% of 80 samples are distinct")
    alike = diversity(real[:1] + 0.02 * torch.randn(80, 1, 6, 6, generator=draws), real)
    assert (alike.distinct, alike.collapsed) == (1.0, True), "no two equal, all of one picture"


def test_an_unknown_setting_of_a_file_is_not_ignored() -> None:
    with pytest.raises(ValueError, match="extra"):
        GanSettings.model_validate({"model": settings().model_dump(), "pickle": "x"})
    with pytest.raises(ConfigError, match="uses Adam"):
        WganGp().check(scenario(weight_decay=0.1))
