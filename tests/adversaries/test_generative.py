"""GGL, GIFD and the deep image prior: generators of one's own and trained ones, stages, refusals."""

from __future__ import annotations

import pytest
import torch
from hcgla_scenes import observe, psnr, scenario
from safetensors.torch import save_file
from simple_pictures import mixtures
from torch import nn

from adversaries import ATTACKS
from adversaries.inversion.learning import image_generator
from adversaries.reconstruction.matching.generator_priors import GGL, GIFD, DeepImagePrior
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.models.decoders.from_latent import ImageGenerator
from fedattack.observation import Auxiliary

CPU = torch.device("cpu")
SIDE = 8


class Palette(nn.Module):
    """A user's generator: 3 x 3 coarse pixels, enlarged as the test's images are."""

    latent_shape = (27,)

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        coarse = torch.sigmoid(latent + self.shift).reshape(-1, 3, 3, 3)
        return nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)


class Wrong(Palette):
    """Draws out of range."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return super().forward(latent) * 2


class Mute(nn.Module):
    """Does not say what it takes."""


MINE = f"{__name__}:Palette"


def victims(public: torch.Tensor | None = None, count: int = 2, **options):
    """Of the palette; or, where public images are granted, of their kind."""
    options = {"name": "none", "rate": 1.0, "activation": "sigmoid", "size": SIDE} | options
    with torch.no_grad():
        images = Palette()(torch.randn(count, 27, generator=torch.Generator().manual_seed(5)))
    if public is not None:
        images = mixtures(count, SIDE, seed=55)
    scene = scenario(10, model="lenet-zhu", **options)
    labels = torch.tensor([4])
    return [observe(scene, x[None], labels, n, public) for n, x in enumerate(images)], images


def mean_gain(answers, images) -> float:
    pairs = zip(answers, images, strict=True)
    gains = [psnr(a.images, x[None]) - psnr(a.floors["prior"], x[None]) for a, x in pairs]
    return sum(gains) / len(gains)


def test_the_latent_of_a_generator_of_ones_own_is_found() -> None:
    observations, images = victims()
    attack = GGL(generator=MINE, iterations=150, restarts=2, prior=0.0)
    attack.check(observations[0].scenario)
    answers = attack.run(observations, 0, CPU)
    assert all(psnr(a.images, x[None]) > 25 for a, x in zip(answers, images, strict=True))
    assert all(a.labels.tolist() == [4] for a in answers)
    alone = attack.run(observations[1:], 0, CPU)[0]
    torch.testing.assert_close(alone.images, answers[1].images, rtol=0, atol=1e-3)


def test_weights_of_ones_own_are_read(tmp_path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({"shift": torch.ones(1)}, path)
    found = image_generator.given_generator(MINE, str(path), (3, SIDE, SIDE))
    assert float(found.module.shift) == 1.0
    with pytest.raises(DataError, match="no such file"):
        image_generator.given_generator(MINE, str(tmp_path / "other"), (3, SIDE, SIDE))
    save_file({"bent": torch.ones(1)}, path)
    with pytest.raises(DataError, match="does not fit"):
        image_generator.given_generator(MINE, str(path), (3, SIDE, SIDE))
    for name, part in (("Wrong", r"images of \(3, 8, 8\) in \[0, 1\]"), ("Mute", "latent_shape")):
        with pytest.raises(ConfigError, match=part):
            image_generator.given_generator(f"{__name__}:{name}", None, (3, SIDE, SIDE))


def test_a_trained_generator_draws_better_than_the_mean() -> None:
    public = Auxiliary(mixtures(200, SIDE, seed=1))
    found = image_generator.train_image_generator(public, 0, 16, 32, 80, CPU)
    assert found.figures["generator's held-out PSNR"] > found.figures["mean image's held-out PSNR"] + 2
    latent = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    drawn = found.module(latent)
    for stage in range(found.depth):
        latent = found.step(stage, latent)
    assert torch.equal(latent, drawn)
    short = [
        image_generator.train_image_generator(public, 3, 16, 8, 2, CPU).module(drawn.new_ones(1, 16))
        for _ in "ab"
    ]
    assert torch.equal(*short)


@pytest.mark.parametrize("kind", [GGL, GIFD])
def test_generators_trained_on_public_images(kind) -> None:
    observations, images = victims(mixtures(200, SIDE, seed=1))
    attack = kind(iterations=50, restarts=2, epochs=80, latent=16, width=32)
    answers = attack.run(observations, 0, CPU)
    assert mean_gain(answers, images) > 1
    if kind is GIFD:
        assert len(answers[0].details["mean loss by stage"]) == 4
        latent_only = GGL(iterations=50, restarts=2, epochs=80, latent=16, width=32)
        floor = latent_only.run(observations, 0, CPU)
        assert all(a.loss <= b.loss for a, b in zip(answers, floor, strict=True))


def test_an_untrained_network_needs_no_public_images() -> None:
    observations, images = victims()
    answers = DeepImagePrior(iterations=150, width=16).run(observations, 0, CPU)
    assert mean_gain(answers, images) > 5
    assert answers[0].details["weights"] > 1000


def test_refusals_of_generative_attacks() -> None:
    observations, _ = victims()
    with pytest.raises(NotApplicable, match="0 were granted"):
        GGL().run(observations, 0, CPU)
    with pytest.raises(NotApplicable, match="no 'stages'"):
        GIFD(generator=MINE, iterations=2).run(observations, 0, CPU)
    for make, part in (
        (lambda: GGL(latent=0), "latent"),
        (lambda: GGL(prior=-1.0), "prior"),
        (lambda: GGL(generator_weights="x"), "name its class"),
        (lambda: GIFD(radius=0.0), "radius"),
        (lambda: DeepImagePrior(width=2), "width"),
    ):
        with pytest.raises(ConfigError, match=part):
            make()
    names = {"ggl": GGL, "gifd": GIFD, "dip": DeepImagePrior}
    assert all(ATTACKS.get(name) is cls for name, cls in names.items())


@pytest.mark.parametrize("side", [8, 28, 30, 32])
def test_the_small_generator_draws_any_side(side) -> None:
    drawn = ImageGenerator(8, (3, side, side), 16)(torch.zeros(2, 8)).detach()
    assert drawn.shape == (2, 3, side, side)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1
