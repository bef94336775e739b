"""Image scores against scikit-image and closed forms."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from fedattack import metrics
from fedattack.config import MetricConfig
from fedattack.errors import ConfigError, DataError


def _pairs(channels: int, size: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and ever noisier versions of them, all inside [0, 1]."""
    generator = torch.Generator().manual_seed(channels * 100 + size)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    sigma = torch.linspace(0.003, 0.5, count)[:, None, None, None]
    noisy = (truth + sigma * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    return noisy, truth


GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def _expected(images: torch.Tensor, truth: torch.Tensor, data_range: float, **options: object) -> list[float]:
    return [
        structural_similarity(a, b, data_range=data_range, channel_axis=0, **options)
        for a, b in zip(images.double().numpy(), truth.double().numpy(), strict=True)
    ]


def _awkward(channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pairs; an identical one, constant ones, flat bright and flat dark ones, a checkerboard, an overshoot."""
    noisy, truth = _pairs(channels, size, 10)
    generator = torch.Generator().manual_seed(size)
    noisy[1] = truth[1]
    noisy[2], truth[2] = 0.4, 0.4
    noisy[3], truth[3] = 1.0, 0.0
    noisy[4] = 0.7
    for index, level in ((5, 0.98), (6, 0.01)):
        flat = level + 1e-3 * torch.randn(2, *truth.shape[1:], generator=generator)
        noisy[index], truth[index] = flat.clamp(0, 1)
    checks = torch.arange(size)[:, None].add(torch.arange(size)) % 2
    noisy[7], truth[7] = checks.float(), 1 - checks.float()
    truth[8] = 0.999
    noisy[9], truth[9] = 0.137, 0.3
    noisy[9, :, :, size // 2 :] = 0.883
    return noisy, truth


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [7, 11, 28, 32, 65, 73, 128])
def test_both_ssim_equal_scikit_image(channels: int, size: int) -> None:
    images, truth = _awkward(channels, size)
    for data_range in (1.0, 2.0) if size > 65 else (0.3, 1.0, 2.0, 255.0):
        found = metrics.ssim(images, truth, data_range)
        np.testing.assert_allclose(found, _expected(images, truth, data_range), atol=1e-6, rtol=0)
        if size >= 11:
            found = metrics.ssim_gaussian(images, truth, data_range)
            np.testing.assert_allclose(
                found, _expected(images, truth, data_range, **GAUSSIAN), atol=1e-6, rtol=0
            )


@pytest.mark.parametrize("channels", [1, 3])
def test_both_ssim_equal_scikit_image_on_large_and_oblong_images(channels: int) -> None:
    images, truth = (x[[0, 1, 5, 7]] for x in _awkward(channels, 224))
    for a, b in (
        (images, truth),
        (images[..., :100, :], truth[..., :100, :]),
        (images[..., :30], truth[..., :30]),
    ):
        np.testing.assert_allclose(metrics.ssim(a, b), _expected(a, b, 1.0), atol=1e-6, rtol=0)
        np.testing.assert_allclose(
            metrics.ssim_gaussian(a, b), _expected(a, b, 1.0, **GAUSSIAN), atol=1e-6, rtol=0
        )


def test_ssim_takes_any_odd_window_and_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truth = _awkward(3, 33)
    for window in (3, 5, 33):
        found = metrics.ssim(images, truth, window=window)
        np.testing.assert_allclose(found, _expected(images, truth, 1.0, win_size=window), atol=1e-6, rtol=0)
    whole = metrics.ssim(images, truth)
    monkeypatch.setattr("fedattack.metrics.structural.CHUNK_VALUES", 1)
    np.testing.assert_allclose(metrics.ssim(images, truth), whole, atol=1e-7)


def _multi_scale(a: np.ndarray, b: np.ndarray, scales: int) -> float:
    """MS-SSIM of (C, H, W) by SciPy's filters, in float64."""
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    values = []
    for one, two in zip(a, b, strict=True):
        product = 1.0
        for scale, weight in enumerate(weights / weights.sum()):
            if scale:
                one, two = (np.pad(x, [(0, n % 2) for n in x.shape], mode="edge") for x in (one, two))
                one, two = (
                    (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (one, two)
                )
            blur = [
                gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]
                for x in (one, two, one * one, two * two, one * two)
            ]
            top = 2 * (blur[4] - blur[0] * blur[1]) + 0.03**2
            contrast = top / (blur[2] - blur[0] ** 2 + blur[3] - blur[1] ** 2 + 0.03**2)
            if scale == scales - 1:
                contrast *= (2 * blur[0] * blur[1] + 0.01**2) / (blur[0] ** 2 + blur[1] ** 2 + 0.01**2)
            product *= max(contrast.mean(), 0) ** weight
        values.append(product)
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "scales"), [(161, 5), (176, 5), (32, 2), (53, 3)])
def test_multi_scale_ssim_equals_filters_of_scipy(size: int, scales: int) -> None:
    images, truth = (x[[0, 1, 4, 7, 9]] for x in _awkward(3, size))
    expected = [
        _multi_scale(a, b, scales)
        for a, b in zip(images.double().numpy(), truth.double().numpy(), strict=True)
    ]
    assert expected[3] == 0  # a negative correlation at the finest scale
    np.testing.assert_allclose(metrics.multi_scale_ssim(images, truth, scales), expected, atol=1e-9)


def test_sizes_that_a_window_does_not_fit_are_refused_before_work() -> None:
    chosen = {
        name: metrics.METRICS.get(name)() for name in ("ssim", "ssim-gaussian", "ms-ssim", "ms-ssim-short")
    }
    for name, least in (("ssim", 3), ("ssim-gaussian", 11), ("ms-ssim", 161), ("ms-ssim-short", 21)):
        chosen[name].check((3, least, least))
        with pytest.raises((ConfigError, DataError), match=r"\d+ x \d+"):
            chosen[name].check((3, least + 5, least - 1))
        pair = torch.zeros(1, 1, least + 5, least - 1)
        with pytest.raises(DataError, match="too small"):
            chosen[name].scores(metrics.Pairs(pair, pair))
    short = metrics.METRICS.get("ms-ssim-short")(scales=3)
    assert short.heading == "MS-SSIM (3 of 5 scales)"
    for scales in (0, 5):
        with pytest.raises(ConfigError, match=f"is {scales}: accepted are 1 to 4"):
            metrics.METRICS.get("ms-ssim-short")(scales=scales).check((3, 224, 224))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mse", "ssim", "ssim_gaussian"])
def test_scores_of_many_large_images_need_little_memory(name: str) -> None:
    """2,000 pairs of 128 x 128 x 3: at most 256 MiB beyond the inputs."""
    code = f"""
import re, torch
from pathlib import Path
from fedattack import metrics

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
truth = torch.rand(2000, 3, 128, 128)
images = truth.flip(0)
metrics.{name}(images[:2], truth[:2])
before = peak()
values = metrics.{name}(images, truth)
assert len(values) == 2000 and values.isfinite().all(), values
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) / 1024 < 256


def test_total_variation_and_labels() -> None:
    ramp = torch.linspace(0, 1, 5).expand(2, 1, 4, 5).clone()
    steps = torch.stack([ramp[0], (torch.arange(20).reshape(1, 4, 5) % 2).float()])
    found = metrics.METRICS.get("tv")().scores(metrics.Pairs(steps, ramp))
    # Across: |step| 1 instead of 1/4; down, an odd width changes the colour of each row.
    np.testing.assert_allclose(found, [0.0, (1 - 0.25) + 1.0], atol=1e-12)
    accuracy = metrics.METRICS.get("labels")()
    assert accuracy.scores(metrics.Pairs(ramp, ramp, label_right=(True, False))).tolist() == [1.0, 0.0]
    assert accuracy.scores(metrics.Pairs(ramp, ramp)).isnan().all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [7, 32, 65, 224])
def test_psnr_and_mse_equal_scikit_image(channels: int, size: int) -> None:
    images, truth = _awkward(channels, size)
    pairs = list(zip(truth.double().numpy(), images.double().numpy(), strict=True))
    squares = [mean_squared_error(b, a) for b, a in pairs]
    np.testing.assert_allclose(metrics.mse(images, truth), squares, atol=1e-12)
    with np.errstate(divide="ignore"):
        expected = [peak_signal_noise_ratio(b, a, data_range=1.0) for b, a in pairs]
    assert expected[1] == expected[2] == math.inf
    np.testing.assert_allclose(metrics.psnr(images, truth), expected, atol=1e-9)


def test_psnr_has_a_closed_form() -> None:
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


def test_no_images_have_no_scores() -> None:
    none = torch.zeros(0, 3, 32, 32)
    for name in ("mse", "psnr", "ssim", "ssim-gaussian", "ms-ssim-short", "tv", "regcorr", "registered-psnr"):
        assert metrics.METRICS.get(name)().scores(metrics.Pairs(none, none)).shape == (0,)
    assert metrics.correlation_table(none, torch.rand(2, 3, 32, 32)).shape == (0, 2)
    assert metrics.correlation_table(torch.rand(2, 3, 32, 32), none).shape == (2, 0)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="must be"):
        metrics.mse(torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    with pytest.raises(DataError, match="do not compare"):
        metrics.match(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(DataError, match="window"):
        metrics.ssim(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(DataError, match="same number, channels and size"):
        metrics.psnr(torch.zeros(2, 3, 0, 8), torch.zeros(2, 3, 0, 8))
    assert metrics.ssim_window(6, 9) == 5
    with pytest.raises(DataError, match="too small"):
        metrics.ssim_window(2, 2)


@pytest.mark.parametrize("factor", ["integers", 255.0])
def test_no_metric_by_name_takes_another_scale(factor: str | float) -> None:
    noisy, truth = _pairs(1, 16)
    chosen = metrics.build_metrics(MetricConfig(names=("psnr", "ssim", "regcorr")))
    other = (255 * truth).to(torch.uint8) if factor == "integers" else float(factor) * truth
    with pytest.raises(DataError, match="a score takes floats in"):
        metrics.score(chosen, metrics.Pairs(other, other))
    with pytest.raises(DataError, match="with the same number, channels and size"):
        metrics.score(chosen, metrics.Pairs(noisy, truth[:, :, 1:]))
    assert set(metrics.score(chosen, metrics.Pairs(noisy, truth))) == set(chosen)
