"""The adapter of piq: what it hands over and gives back, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedattack import metrics
from fedattack.errors import ConfigError, DataError
from fedattack.metrics import piq_metrics

NAMES = [name for name in metrics.METRICS if name.startswith("piq-")]


def _images(channels: int, side: int, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    noise = torch.linspace(0, 0.4, count)[:, None, None, None] * torch.randn(truth.shape, generator=generator)
    return (truth + noise).clamp(0, 1), truth


def test_ten_metrics_have_names_and_their_summaries_say_what_they_are() -> None:
    assert len(NAMES) == 10
    for name in NAMES:
        kind = metrics.METRICS.get(name)
        assert kind.name == name
        assert len(metrics.METRICS.summary(name)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piq_metrics, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"'{name}' needs the package piq.*fedattack\[piq\]"):
        metrics.METRICS.get(name)().check((3, 192, 192))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_equals_piq_one_pair_at_a_time(name: str, channels: int) -> None:
    piq = pytest.importorskip("piq", reason="piq is not installed")
    side = 164 if name == "piq-iw-ssim" else 64
    images, truth = _images(channels, side, 3)
    metric = metrics.METRICS.get(name)()
    metric.check((channels, side, side))
    found = metric.scores(metrics.Pairs(images, truth))
    options = {"chromatic": channels == 3} if name == "piq-fsim" else {}
    if channels == 1 and name in ("piq-mdsi", "piq-vsi"):
        images, truth = (x.repeat(1, 3, 1, 1) for x in (images, truth))
    expected = [
        getattr(piq, metric.function)(a[None], b[None], data_range=1.0, **options).item()
        for a, b in zip(images, truth, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    best = 1.0 if metric.higher else 0.0
    assert found[0] == pytest.approx(best, abs=1e-4)  # identical
    ordered = found if metric.higher else -found
    assert (ordered.diff() < 0).all()  # ever more noise


def test_small_images_are_enlarged_by_request_and_the_heading_says_so() -> None:
    pytest.importorskip("piq", reason="piq is not installed")
    images, truth = _images(3, 32)
    metric = metrics.METRICS.get("piq-haarpsi")()
    assert metric.heading == "HaarPSI (from 64 px)"
    large = (
        torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
        for x in (images, truth)
    )
    pairs = metrics.Pairs(images, truth)
    enlarged = metric.scores(pairs)
    np.testing.assert_allclose(enlarged, metric.scores(metrics.Pairs(*large)), atol=1e-6)
    plain = metrics.METRICS.get("piq-haarpsi")(side=0)
    assert plain.heading == "HaarPSI"
    assert (plain.scores(pairs) - enlarged).abs().max() > 1e-3
    assert metric.record()["library"].startswith("piq ")


def test_images_that_are_not_finite_have_no_score() -> None:
    pytest.importorskip("piq", reason="piq is not installed")
    images, truth = _images(1, 20)
    metric = metrics.METRICS.get("piq-gmsd")()
    expected = metric.scores(metrics.Pairs(images, truth))
    images[1, 0, 2, 2] = math.nan
    found = metric.scores(metrics.Pairs(images, truth))
    assert found[1].isnan()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_sizes_and_channels_are_refused_before_work() -> None:
    pytest.importorskip("piq", reason="piq is not installed")
    vif = metrics.METRICS.get("piq-vif")
    with pytest.raises(ConfigError, match=r"'metric\.piq-vif\.side' is 32.*at least 41 x 41.*are 28 x 28"):
        vif(side=32).check((1, 28, 28))
    with pytest.raises(ConfigError, match="side' is -1: accepted"):
        vif(side=-1).check((1, 64, 64))
    with pytest.raises(ConfigError, match="1 or 3 channels, and these have 2"):
        vif().check((2, 64, 64))
    with pytest.raises(DataError, match="at least 161"):
        metrics.METRICS.get("piq-iw-ssim")().scores(metrics.Pairs(*_images(3, 64)))
    images, truth = _images(3, 64)
    with pytest.raises(DataError, match="divide by 255"):
        vif().scores(metrics.Pairs(255 * images, truth))
