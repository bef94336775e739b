"""Image scores against scikit-image and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fedattack import metrics
from fedattack.errors import DataError


def _pairs(channels: int, size: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and ever noisier versions of them, all inside [0, 1]."""
    generator = torch.Generator().manual_seed(channels * 100 + size)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    sigma = torch.linspace(0.003, 0.5, count)[:, None, None, None]
    noisy = (truth + sigma * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    return noisy, truth


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [7, 28, 32, 65])
@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_equals_scikit_image(channels: int, size: int, data_range: float) -> None:
    noisy, truth = _pairs(channels, size)
    expected = [
        structural_similarity(a.double().numpy(), b.double().numpy(), data_range=data_range, channel_axis=0)
        for a, b in zip(noisy, truth, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(noisy, truth, data_range), expected, atol=1e-10)


def test_ssim_equals_scikit_image_on_float32() -> None:
    noisy, truth = _pairs(3, 32)
    expected = [
        structural_similarity(a.numpy(), b.numpy(), data_range=1.0, channel_axis=0)
        for a, b in zip(noisy, truth, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(noisy, truth), expected, atol=1e-4)


def test_psnr_equals_scikit_image_and_closed_form() -> None:
    noisy, truth = _pairs(3, 32)
    expected = [
        peak_signal_noise_ratio(b.double().numpy(), a.double().numpy(), data_range=1.0)
        for a, b in zip(noisy, truth, strict=True)
    ]
    np.testing.assert_allclose(metrics.psnr(noisy, truth), expected, atol=1e-9)
    half = torch.full((1, 3, 8, 8), 0.5)
    assert metrics.psnr(half, torch.full_like(half, 0.6)).item() == pytest.approx(20.0, abs=1e-5)


def test_pixels_are_clamped_before_scoring() -> None:
    wild = (
        torch.tensor([-3.0, 0.25, 1.0, 1.9])
        .reshape(1, 1, 2, 2)
        .repeat_interleave(4, 2)
        .repeat_interleave(4, 3)
    )
    truth = wild.clamp(0, 1)
    assert metrics.mse(wild, truth).item() == 0.0
    assert metrics.out_of_range_share(wild).item() == 0.5
    assert metrics.out_of_range_share(truth).item() == 0.0


def test_other_scales_are_refused() -> None:
    noisy, truth = _pairs(3, 16)
    for bad in ((255 * noisy).round().to(torch.uint8), (255 * noisy).long(), noisy > 0.5):
        with pytest.raises(DataError, match="takes floats in"):
            metrics.psnr(bad, truth)
    for images, private in ((255 * noisy, truth), (noisy, 255 * truth), (255 * noisy, 255 * truth)):
        with pytest.raises(DataError, match=r"6 of 6 of the (scored|private) images have pixels above 2"):
            metrics.ssim(images, private)
    half = noisy.clone()
    half[:3] *= 255  # half of an attack's answers may lie anywhere
    assert (metrics.mse(half, truth)[3:] == metrics.mse(noisy, truth)[3:]).all()
    with pytest.raises(DataError, match="4 of 6"):
        metrics.mse(torch.cat([half[:3], 3 + noisy[:1], noisy[4:]]), truth)


def test_images_that_are_not_finite_have_no_score() -> None:
    noisy, truth = _pairs(3, 16)
    expected = {name: getattr(metrics, name)(noisy, truth) for name in ("mse", "psnr", "ssim")}
    noisy[1, 0, 3, 3], noisy[2], truth[3, 2, 0, 0] = math.nan, math.inf, -math.inf
    for name, values in expected.items():
        found = getattr(metrics, name)(noisy, truth)
        assert found[1:4].isnan().all()
        assert torch.equal(found[[0, 4, 5]], values[[0, 4, 5]])


def test_not_a_number_counts_as_out_of_range() -> None:
    assert metrics.out_of_range_share(torch.full((1, 1, 8, 8), math.nan)).item() == 1.0


def test_identical_pairs_are_infinite() -> None:
    noisy, truth = _pairs(1, 16)
    noisy[0] = truth[0]
    values = metrics.psnr(noisy, truth)
    assert values[0] == math.inf
    assert values[1:].isfinite().all()


def test_paper_scale_is_inflated_by_a_constant() -> None:
    noisy, truth = _pairs(3, 32)
    inflated, similarity = metrics.paper_scale(noisy, truth)
    published = 10 * torch.log10(255**2 / (noisy.double() - truth.double()).square().mean(dim=(1, 2, 3)))
    np.testing.assert_allclose(inflated, published, atol=1e-6)
    assert round(metrics.INFLATION_DB, 2) == 48.13
    assert (similarity >= metrics.ssim(noisy, truth)).all()


def test_matching_undoes_a_shuffle() -> None:
    noisy, truth = _pairs(3, 16)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = metrics.match(noisy[order], truth)
    assert found.matched_by == "MSE"
    assert torch.equal(order[torch.tensor(found.order)], torch.arange(6))


def test_matching_minimises_the_summed_error() -> None:
    from itertools import permutations

    generator = torch.Generator().manual_seed(3)
    images, truth = torch.rand(2, 5, 1, 8, 8, generator=generator)
    found = metrics.match(images, truth)
    best = min(permutations(range(5)), key=lambda p: metrics.mse(images[list(p)], truth).sum().item())
    assert found.order == best


def test_labels_bind_the_matching_only_when_all_are_right() -> None:
    generator = torch.Generator().manual_seed(4)
    images, truth = torch.rand(2, 3, 1, 8, 8, generator=generator)
    true_labels = torch.tensor([7, 8, 9])
    bound = metrics.match(images, truth, torch.tensor([9, 7, 8]), true_labels)
    assert bound == metrics.Match((1, 2, 0), "labels")
    free = metrics.match(images, truth)
    wrong = metrics.match(images, truth, torch.tensor([9, 7, 7]), true_labels)
    assert wrong == free
    repeated = metrics.match(images, truth, torch.tensor([9, 7, 7]), torch.tensor([7, 9, 7]))
    assert repeated.matched_by == "labels, then MSE"
    assert repeated.order[1] == 0


def test_single_pairs_and_unequal_batches() -> None:
    noisy, truth = _pairs(1, 16)
    assert metrics.match(noisy[:1], truth[:1], torch.tensor([1]), torch.tensor([2])) == metrics.Match(
        (0,), "single"
    )
    fewer = metrics.match(truth[[4, 2]], truth)
    assert fewer.order == (-1, -1, 1, -1, 0, -1)


def test_label_counting_ignores_order_and_minds_repeats() -> None:
    assert metrics.labels_right(torch.tensor([3, 1, 1]), torch.tensor([1, 3, 3])) == [True, True, False]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="must be"):
        metrics.mse(torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    with pytest.raises(DataError, match="do not compare"):
        metrics.match(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(DataError, match="window"):
        metrics.ssim(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    assert metrics.ssim_window(6, 9) == 5
    with pytest.raises(DataError, match="too small"):
        metrics.ssim_window(2, 2)
