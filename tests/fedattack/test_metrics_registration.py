"""Registered scores against scikit-image's masked correlation and an explicit loop over all shifts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from skimage.registration._masked_phase_cross_correlation import cross_correlate_masked

from fedattack import metrics
from fedattack.errors import ConfigError, DataError
from fedattack.metrics.registration import (
    RegisteredCorrelation,
    RegisteredPSNR,
    correlation_table,
    registered_correlation,
    registered_psnr,
)


def _smooth(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


def _common(x: np.ndarray, y: np.ndarray, dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
    """Common parts of (C, H, W) images where pixel p of x lies on p + d of y."""
    _, h, w = x.shape
    a = x[:, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)]
    return a, y[:, max(0, dy) : h - max(0, -dy), max(0, dx) : w - max(0, -dx)]


def _by_loop(x: torch.Tensor, y: torch.Tensor, overlap: float, mirror: bool) -> float:
    """Greatest correlation by trying every shift."""
    first, second = x.double().numpy(), y.double().numpy()
    _, h, w = first.shape
    best = -math.inf
    for other in (second, second[:, :, ::-1]) if mirror else (second,):
        for dy, dx in itertools.product(range(1 - h, h), range(1 - w, w)):
            if (h - abs(dy)) * (w - abs(dx)) < overlap * h * w:
                continue
            a, b = _common(first, other, dy, dx)
            if a.var() >= 1e-6 and b.var() >= 1e-6:
                best = max(best, float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))
    return best


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (32, 32), (15, 22), (64, 64)])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.9])
def test_one_channel_equals_scikit_image(height: int, width: int, overlap: float) -> None:
    truth = _smooth(3, 1, height, width)
    images = (truth.roll((2, 3), (-2, -1)) + 0.1 * _smooth(3, 1, height, width, 1)).clamp(0, 1)
    full = np.ones((height, width), dtype=bool)
    tables = [
        cross_correlate_masked(
            a[0].double().numpy(), b[0].double().numpy(), full, full, overlap_ratio=overlap
        )
        for a, b in zip(truth, images, strict=True)
    ]
    expected = [table[table != 0].max() for table in tables]  # 0 at the shifts it leaves out
    found = registered_correlation(images, truth, overlap, mirror=False)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("overlap", [0.25, 0.6])
@pytest.mark.parametrize("mirror", [True, False])
def test_three_channels_and_flips_equal_an_explicit_loop(overlap: float, mirror: bool) -> None:
    truth = _smooth(4, 3, 12, 14)
    images = torch.stack([truth[0].flip(-1), truth[1].roll(4, -1) * 0.3 + 0.5, truth[3], 1 - truth[3]])
    expected = [_by_loop(a, b, overlap, mirror) for a, b in zip(truth, images, strict=True)]
    np.testing.assert_allclose(registered_correlation(images, truth, overlap, mirror), expected, atol=1e-9)


def test_moved_mirrored_and_relit_images_are_recognised() -> None:
    wide = _smooth(2, 3, 32, 48)
    truth = wide[..., :32]
    moved = 0.4 * wide[..., 14:46] + 0.3  # 14 pixels to the left, with a gain and an offset
    for images in (moved, moved.flip(-1)):
        np.testing.assert_allclose(registered_correlation(images, truth), 1.0, atol=1e-9)
    assert (registered_correlation(moved.flip(-1), truth, mirror=False) < 0.999).all()
    assert (registered_correlation(moved, truth, overlap=0.8) < 0.999).all()


def test_table_equals_pairs_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truth = _smooth(5, 3, 10, 13), _smooth(7, 3, 10, 13, 1)
    images[2], truth[3] = 0.25, math.nan
    expected = torch.stack([registered_correlation(a.expand_as(truth), truth) for a in images[:, None]])
    assert expected[2].isnan().all()
    assert expected[:, 3].isnan().all()
    assert int(expected.isfinite().sum()) == 4 * 6
    np.testing.assert_allclose(correlation_table(images, truth), expected, atol=1e-12)
    monkeypatch.setattr("fedattack.metrics.registration.CHUNK_VALUES", 2**11)
    np.testing.assert_allclose(correlation_table(images, truth), expected, atol=1e-12)
    np.testing.assert_allclose(
        correlation_table(images, truth, mirror=False)[0],
        registered_correlation(images[:1].expand_as(truth), truth, mirror=False),
        atol=1e-12,
    )


def test_images_without_a_score_do_not_touch_others() -> None:
    truth, images = _smooth(5, 1, 16, 16), _smooth(5, 1, 16, 16, 1)
    expected = registered_correlation(images, truth)
    images[0], images[1, 0, 3, 3], truth[2], truth[3, 0, 0, 0] = 0.7, math.nan, 1.0, math.inf
    found = registered_correlation(images, truth)
    assert found[:4].isnan().all()
    assert found[4] == expected[4]
    moved = registered_psnr(images, truth)
    assert moved[[1, 3]].isnan().all()
    assert moved[[0, 2, 4]].isfinite().all()  # an error of a constant image is an error like any other


def _psnr_by_loop(x: torch.Tensor, y: torch.Tensor, shift: int) -> float:
    first, second = x.double().numpy(), y.double().numpy()
    errors = []
    for other in (second, second[:, :, ::-1]):
        for dy, dx in itertools.product(range(-shift, shift + 1), repeat=2):
            a, b = _common(first, other, dy, dx)
            if a.var() >= 1e-6 or dy == dx == 0:
                errors.append(((a - b) ** 2).mean())
    return -10 * math.log10(min(errors)) if min(errors) else math.inf


def test_registered_psnr_equals_an_explicit_loop() -> None:
    truth = _smooth(6, 3, 14, 12)
    images = (truth.roll((2, -3), (-2, -1)) + 0.05 * _smooth(6, 3, 14, 12, 1)).clamp(0, 1)
    images[3] = truth[3].flip(-1)
    truth[4] = 0.0
    truth[5, :, :, 2:] = 0.0
    images[5] = 0.0
    expected = [_psnr_by_loop(a, b, 4) for a, b in zip(truth, images, strict=True)]
    assert expected[3] == math.inf
    np.testing.assert_allclose(registered_psnr(images, truth), expected, atol=1e-9)
    unmoved = registered_psnr(images, truth, shift=0, mirror=False)
    np.testing.assert_allclose(unmoved, metrics.psnr(images, truth), atol=1e-9)


def test_names_parameters_and_refusals() -> None:
    truth = _smooth(2, 3, 16, 16)
    pairs = metrics.Pairs(truth.roll(1, -1), truth)
    for name, kind in (("regcorr", RegisteredCorrelation), ("registered-psnr", RegisteredPSNR)):
        assert metrics.METRICS.get(name) is kind
        with pytest.raises(ConfigError, match=r"overlap 0\.0: accepted"):
            kind(overlap=0.0).check((3, 16, 16))
        kind().check((3, 16, 16))
        assert kind().scores(pairs).shape == (2,)
    with pytest.raises(ConfigError, match="shift -1: accepted"):
        RegisteredPSNR(shift=-1).check((3, 16, 16))
    with pytest.raises(DataError, match="same channels and size"):
        correlation_table(truth, truth[:, :1])
    with pytest.raises(DataError, match="divide by 255"):
        correlation_table(255 * truth, truth)
