"""Feature and Fréchet distance on a model that is named: by a file of its weights, or by ``module:Class``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from fedattack.config import MetricConfig, ModelConfig
from fedattack.errors import ConfigError, DataError
from fedattack.files import write_tensors
from fedattack.metrics import Pairs, build_metrics, score
from fedattack.metrics.features import FeatureDistance, FrechetDistance
from fedattack.metrics.frechet import frechet_distance
from fedattack.models import build_model, initial_weights, resolve
from fedattack.rng import torch_rng


def brightness(images: Tensor) -> Tensor:
    """A function is an embedding."""
    return images.mean((2, 3))


class Fixed(nn.Module):
    """A module that brings its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 2, bias=False)
        self.drop = nn.Dropout()  # off
        with torch.no_grad():
            self.projection.weight.copy_(torch.arange(24.0).view(2, 12))

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.projection(images.flatten(1)))


class Untrained(nn.Module):
    """A module with the weights of its initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images.flatten(1))


class Parameterised:
    """A class that cannot be built alone."""

    def __init__(self, width: int) -> None:
        self.width = width


class Silent:
    """No callable."""


class Spatial:
    """Answers maps, not vectors."""

    def __call__(self, images: Tensor) -> Tensor:
        return images


class Listed:
    def __call__(self, images: Tensor) -> list[float]:
        return images.flatten().tolist()


class Bottomless:
    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).log() * torch.inf


class Picky:
    def __call__(self, images: Tensor) -> Tensor:
        raise ValueError("only 7 channels\nnot these")


def at(name: str) -> str:
    return f"{__name__}:{name}"


def pairs_of(count: int, size: tuple[int, int, int], seed: int = 0) -> Pairs:
    generator = torch_rng(seed, "pairs")
    return Pairs(*(torch.rand(count, *size, generator=generator) for _ in range(2)))


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A tiny CNN for 3 x 16 x 16, of 7 classes, and its weight file."""
    config = resolve(ModelConfig(name="tiny-cnn", classes=7), 3, 16, 7)
    weights = initial_weights(config, seed=5)
    model = build_model(config)
    model.load_state_dict(weights)
    write_tensors(tmp_path / "tiny.safetensors", weights)
    return tmp_path / "tiny.safetensors", model.eval()


def test_distance_in_the_features_of_a_classifier(classifier: tuple[Path, nn.Module]) -> None:
    path, model = classifier
    pairs = pairs_of(5, (3, 16, 16))
    before = torch.get_rng_state()
    metric = FeatureDistance(model="tiny-cnn", weights=str(path))
    metric.check((3, 16, 16))
    found = metric.scores(pairs)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        one, other = (model.features(x) for x in (pairs.images, pairs.truth))  # type: ignore[operator]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx((one - other).norm(dim=1).tolist(), rel=1e-5)
    cosine = FeatureDistance(model="tiny-cnn", weights=str(path), distance="cosine")
    wanted = 1 - nn.functional.cosine_similarity(one.double(), other.double())
    assert cosine.scores(pairs).tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert metric.heading == "feature distance[tiny-cnn]"
    assert cosine.heading == "feature distance[tiny-cnn, cosine]"
    assert metric.record()["model"] == "tiny-cnn"
    assert list(metric.record()["weights"]) == ["tiny.safetensors"]
    assert len(metric.record()["weights"]["tiny.safetensors"]) == 64
    # Images of another size are brought to the model's.
    large = pairs_of(3, (3, 40, 24))
    sized = FeatureDistance(model="tiny-cnn", weights=str(path), side=16)
    sized.check((3, 40, 24))
    small = Pairs(
        *(
            nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
            for x in (large.images, large.truth)
        )
    )
    assert sized.scores(large).tolist() == pytest.approx(metric.scores(small).tolist(), rel=1e-5)


def test_frechet_distance_is_of_the_whole_set(classifier: tuple[Path, nn.Module]) -> None:
    path, model = classifier
    pairs = pairs_of(40, (3, 16, 16))
    metric = FrechetDistance(model="tiny-cnn", weights=str(path))
    assert metric.pooled
    assert metric.heading == "frechet[tiny-cnn]"
    with torch.no_grad():
        sets = [model.features(x).double().numpy() for x in (pairs.images, pairs.truth)]  # type: ignore[operator]
    found = metric.scores(pairs)
    assert found.shape == ()
    assert float(found) == pytest.approx(frechet_distance(*sets), rel=1e-6)
    assert float(metric.scores(Pairs(pairs.truth, pairs.truth))) == pytest.approx(0, abs=1e-8)
    order = torch.randperm(40, generator=torch_rng(1, "order"))
    assert float(metric.scores(Pairs(pairs.images[order], pairs.truth))) == pytest.approx(
        float(found), rel=1e-8
    )
    one = Pairs(pairs.images[:1], pairs.truth[:1])
    with pytest.raises(DataError, match="1 pair: at least 2"):
        metric.scores(one)
    assert np.isnan(score({"frechet": metric}, one)["frechet"]).tolist() == [True]


@pytest.mark.parametrize(("n", "m", "width"), [(5, 9, 12), (12, 11, 12), (9, 5, 12), (40, 30, 6)])
def test_frechet_distance_of_few_images(n: int, m: int, width: int) -> None:
    """By the singular values of n x m numbers where the covariances are singular: what their definition gives."""
    rng = np.random.default_rng(n)
    one, other = rng.normal(size=(n, width)), rng.normal(0.3, 2, size=(m, width))
    first, second = (np.cov(x, rowvar=False) for x in (one, other))
    # The matrix root of a singular product is not to be had exactly: of the product plus a little, nearly.
    little = 1e-10 * np.eye(width)
    cross = np.trace(sqrtm((first + little) @ (second + little))).real
    wanted = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * cross
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-9)


def test_an_embedding_by_its_place() -> None:
    pairs = pairs_of(4, (3, 2, 2))
    metric = FeatureDistance(model=at("brightness"))
    metric.check((3, 2, 2))
    wanted = (pairs.images.mean((2, 3)) - pairs.truth.mean((2, 3))).norm(dim=1)
    assert metric.scores(pairs).tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert metric.heading == "feature distance[brightness]"
    assert metric.record() == {"model": at("brightness")}
    fixed = FeatureDistance(model=at("Fixed"))
    matrix = torch.arange(24.0).view(2, 12)
    wanted = ((pairs.images - pairs.truth).flatten(1) @ matrix.T).norm(dim=1)
    assert fixed.scores(pairs).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert len(fixed.record()["state sha256"]) == 64
    # A black image has no direction, and no score; the others keep theirs.
    cosine = FeatureDistance(model=at("Fixed"), distance="cosine")
    dark = Pairs(torch.cat([torch.zeros(1, 3, 2, 2), pairs.images[1:]]), pairs.truth)
    assert cosine.scores(dark).isnan().tolist() == [True, False, False, False]


def test_images_without_a_score() -> None:
    pairs = pairs_of(4, (3, 2, 2))
    images = pairs.images.clone()
    images[2, 0, 0, 0] = torch.nan
    metric = FeatureDistance(model=at("Fixed"))
    assert metric.scores(Pairs(images, pairs.truth)).isnan().tolist() == [False, False, True, False]
    assert metric.scores(Pairs(images[:0], images[:0])).shape == (0,)
    whole = FrechetDistance(model=at("Fixed"))
    assert float(whole.scores(pairs)) > 0
    with pytest.raises(DataError, match="NaN or infinite"):
        whole.scores(Pairs(images, pairs.truth))


def test_weights_that_nobody_trained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"draws its weights at random.*'metric.feature-distance.weights'"):
        FeatureDistance(model=at("Untrained")).check((3, 2, 2))
    path = tmp_path / "weights.safetensors"
    state = {"projection.weight": torch.ones(2, 12), "projection.bias": torch.zeros(2)}
    write_tensors(path, state)
    metric = FeatureDistance(model=at("Untrained"), weights=str(path))
    pairs = pairs_of(2, (3, 2, 2))
    wanted = (pairs.images - pairs.truth).flatten(1).sum(1).abs() * 2**0.5
    assert metric.scores(pairs).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    with pytest.raises(ConfigError, match=r"'metric.frechet.weights' is not set.*'resnet18'.*random ones"):
        FrechetDistance(model="resnet18").check((3, 32, 32))
    with pytest.raises(ConfigError, match="is no torch module"):
        FeatureDistance(model=at("brightness"), weights=str(path)).check((3, 2, 2))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Parameterised", "cannot be built without arguments"),
        ("Silent", "is a Silent"),
        ("Spatial", r"answers shape \(2, 3, 8, 8\)"),
        ("Listed", "answers a list"),
        ("Bottomless", "NaN, infinite"),
        ("Picky", r"fails on images of shape \(2, 3, 8, 8\) \(ValueError: only 7 channels\)"),
        ("Fixed", "fails on images"),
    ],
)
def test_what_is_no_embedding_is_told_the_contract(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"'metric.frechet.model' = .*{text}.*finite features") as refused:
        FrechetDistance(model=at(name)).check((3, 8, 8))
    assert "\n" not in str(refused.value)


def test_bad_models_and_files_are_refused(classifier: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = classifier

    def refusal(error: type[Exception], size: tuple[int, int, int] = (3, 16, 16), **given: Any) -> str:
        with pytest.raises(error) as refused:
            FeatureDistance(**given).check(size)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "did you mean 'resnet18'" in refusal(ConfigError, model="resnet-18")
    assert "cannot load embedding" in refusal(ConfigError, model="nowhere_at_all:Thing")
    assert "no such file" in refusal(DataError, model="tiny-cnn", weights=str(tmp_path / "none"))
    (tmp_path / "torn").write_bytes(path.read_bytes()[:100])
    torn = refusal(DataError, model="tiny-cnn", weights=str(tmp_path / "torn"))
    assert torn.startswith("setting 'metric.feature-distance.weights' = ")
    assert "not a readable safetensors file" in torn
    assert "do not fit" in refusal(DataError, model="resnet18", weights=str(path))
    assert "do not fit" in refusal(DataError, (1, 16, 16), model="tiny-cnn", weights=str(path))
    assert "metric.feature-distance.side" in refusal(
        ConfigError, (3, 16, 20), model="tiny-cnn", weights=str(path)
    )
    with pytest.raises(ConfigError, match=r"metric\.frechet\.side"):
        build_metrics(MetricConfig(names=("frechet",), options={"frechet": {"side": "0"}}))


def test_lite_features_are_what_its_classifier_sees() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'perceptual' is not installed")
    from fedattack.metrics.lite import WEIGHTS_SHA256, LiteFeatures

    pairs = pairs_of(3, (1, 28, 28))
    metric = build_metrics(MetricConfig(names=("feature-distance",)))["feature-distance"]
    metric.check((1, 28, 28))
    network, seen = LiteFeatures(), []
    network.net._fc.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for images in (pairs.images, pairs.truth):
            network.logits(images)
    assert seen[0].shape == (3, 1280)
    assert metric.scores(pairs).tolist() == pytest.approx((seen[0] - seen[1]).norm(dim=1).tolist(), rel=1e-4)
    assert metric.record()["weights"] == {"efficientnet-lite0-57934424.pth": WEIGHTS_SHA256}
    assert metric.heading == "feature distance[lite-features]"
    with pytest.raises(DataError, match="these have 2 channels"):
        FeatureDistance().check((2, 28, 28))
