"""Pixel metrics beside scikit-image's loops, and which of them follow a judge over 24 degradations of an image."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional

from fedattack import metrics
from fedattack.errors import ConfigError
from fedattack.metrics.degradations import ARMS
from fedattack.metrics.registration import RegisteredCorrelation
from fedattack.metrics.semsim.evaluation import Evaluation
from fedattack.metrics.semsim.labeller import Labeller, train_labeller
from fedattack.metrics.semsim.rated import Rated
from fedattack.rng import torch_rng
from simulations.bench.scenes import data_set

Floats = NDArray[np.float64]

SSIM_FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "ssim": (metrics.ssim, {}),
    "ssim_gaussian": (
        metrics.ssim_gaussian,
        {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    ),
}
"""Our function, and what makes scikit-image's the same."""

SCORES = ("psnr", "ssim", "ssim-gaussian", "ms-ssim-short", "registered-psnr", "regcorr", "tv")
PIQ_SCORES = (
    "piq-haarpsi",
    "piq-gmsd",
    "piq-ms-gmsd",
    "piq-fsim",
    "piq-vif",
    "piq-mdsi",
    "piq-srsim",
    "piq-dss",
)

# Data set, originals, images that judge and labeller are trained on, each; steps.
SETS = (("mnist", 48, 5000, 800), ("cifar10", 64, 1050, 800))

SEEDS = (0, 1, 2)
_SIDE = 32
_LOOP_PAIRS = 3


def run(quick: bool = False, data: Path | None = None, long: bool = False) -> dict[str, Any]:
    """1,000 pairs against scikit-image; with --data also the 24 arms on MNIST and CIFAR-10; --long: also memory.

    ``speed_<metric>_<side>``: CPU seconds of scikit-image's loop over ours, medians of three goes taken in turn, one
    thread; ``error_...`` the greatest difference. Of regcorr the loop over all shifts, of 3 pairs and scaled.
    ``<set>_<metric>_auc``: of single images against the judge's answers; ``..._spearman`` over the arms, means over
    the seeds; each seed's rows with intervals are under ``<set>_arms``, regcorr with an overlap of .5 as
    ``regcorr-half``. ``<set>_regcorr_less_ssim``: paired difference in AUC, with ``..._low`` and ``..._high`` by
    bootstrap over originals, the outermost of the seeds; ``<set>_sure_...`` the same where recognised means a
    probability of at least .5, not the first rank.
    ``memory_<metric>``: MiB beyond the inputs, of 2,000 pairs of 128 x 128 x 3.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = speed(quick)
        if data is not None:
            for name, originals, trained_on, steps in SETS:
                seeds = SEEDS[:1] if quick else SEEDS
                figures |= over_seeds(
                    name, [arms(name, data, originals, trained_on, steps, quick, seed) for seed in seeds]
                )
        if long:
            figures |= {f"memory_{name}": memory(name, 20 if quick else 2000) for name in SSIM_FORMS}
    finally:
        torch.set_num_threads(threads)
    return figures


def over_seeds(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several seeds as one: means, of intervals the outermost ends, and each seed's rows."""
    rows = f"{name}_arms"
    figures: dict[str, Any] = {rows: [one[rows] for one in found]}
    for key in found[0].keys() - {rows}:
        values = [float(one[key]) for one in found]
        pick = min if key.endswith("_low") else max if key.endswith("_high") else statistics.fmean
        figures[key] = pick(values)
    return figures


def speed(quick: bool = False) -> dict[str, Any]:
    """Ratios to scikit-image, and to a loop over shifts; the originals smooth, noise of deviation .01 to .5."""
    figures: dict[str, Any] = {}
    for side in (32, 64, 128):
        images, truth = _pairs(20 if quick else 1000, side)
        pairs = list(zip(truth.double().numpy(), images.double().numpy(), strict=True))
        for name, (ours, options) in SSIM_FORMS.items():

            def theirs(pairs: list[Any] = pairs, options: dict[str, Any] = options) -> Floats:
                found = [
                    structural_similarity(a, b, data_range=1.0, channel_axis=0, **options) for a, b in pairs
                ]
                return np.array(found)

            figures |= _beside(f"{name}_{side}", lambda ours=ours: ours(images, truth).numpy(), theirs)  # type: ignore[misc]  # noqa: B023
    images, truth = _pairs(20 if quick else 1000, _SIDE)
    found, seconds = _timed(lambda: metrics.registered_correlation(images, truth).numpy())
    looped, loop_seconds = _timed(
        lambda: np.array([correlation_by_loop(truth[i], images[i]) for i in range(_LOOP_PAIRS)])
    )
    figures["seconds_regcorr_32"] = seconds
    figures["speed_regcorr_32"] = loop_seconds / _LOOP_PAIRS * len(images) / seconds
    figures["error_regcorr_32"] = float(np.abs(found[:_LOOP_PAIRS] - looped).max())
    return figures


def correlation_by_loop(truth: Tensor, images: Tensor, overlap: float = 0.25) -> float:
    """Registered correlation of one pair (C, H, W), a shift at a time."""
    first, second = truth.double().numpy(), images.double().numpy()
    _, height, width = first.shape
    best = -math.inf
    for other in (second, second[:, :, ::-1]):
        for down, right in itertools.product(range(1 - height, height), range(1 - width, width)):
            if (height - abs(down)) * (width - abs(right)) < overlap * height * width:
                continue
            a = first[
                :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
            ].ravel()
            b = other[
                :, max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)
            ].ravel()
            a, b = a - a.mean(), b - b.mean()
            spread_a, spread_b = a @ a, b @ b
            if min(spread_a, spread_b) >= 1e-6 * len(a):
                best = max(best, a @ b / math.sqrt(spread_a * spread_b))
    return best


def arms(
    name: str, data: Path, originals: int, trained_on: int, steps: int, quick: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Every metric's AUC and Spearman against a judge, over 24 degradations of so many originals.

    Recognised is what the judge gives the right name. Judge and labeller are small CNNs trained on other images, each
    on its own, with changes of contrast and brightness, shifts and noise. Originals are those that the judge knows as
    they are. MNIST is padded to 32 pixels.
    """
    if quick:
        originals, trained_on, steps = 8, 200, 20
    images, labels = _images(name, data, seed)
    first, second, rest = (
        slice(0, trained_on),
        slice(trained_on, 2 * trained_on),
        slice(2 * trained_on, None),
    )
    judge = train_labeller(images[first], labels[first], "judge", seed, name, 24, steps)
    labeller = train_labeller(images[second], labels[second], "labeller", seed + 1, name, 16, steps)
    images, labels = images[rest][:2000], labels[rest][:2000]
    known = torch.ones(len(images), dtype=torch.bool) if quick else _named(judge, images, labels)
    truth, labels = images[known][:originals], labels[known][:originals]
    if len(truth) < originals:
        raise ConfigError(f"{name}: the judge knows {len(truth)} of the images left; {originals} are needed")
    changed = torch.cat([change(truth, torch_rng(seed, f"bench arm {arm}")) for arm, change in ARMS])
    many = len(ARMS)
    rated = Rated(
        truth,
        changed,
        np.tile(np.arange(originals), many),
        _named(judge, changed, labels.repeat(many)).numpy(),
        {"attack": np.repeat(np.array([arm for arm, _ in ARMS]), originals)},
        labels.numpy(),
        judge.facts.name,
    )
    surely = dataclasses.replace(
        rated, recognised=(judge.true_class(changed, labels.repeat(many)) >= 0.5).numpy()
    )
    pairs = metrics.Pairs(changed, truth.repeat(many, 1, 1, 1), labels.repeat(many))
    chosen = {one: metrics.METRICS.get(one)() for one in (*SCORES, *(PIQ_SCORES if find_spec("piq") else ()))}
    chosen["regcorr-half"] = RegisteredCorrelation(overlap=0.5)
    scores = {
        one: values if chosen[one].higher else -values
        for one, values in ((one, metric.scores(pairs).numpy()) for one, metric in chosen.items())
    }
    scores["labeller"] = labeller.true_class(changed, labels.repeat(many)).numpy()
    told = Evaluation(rated, scores, ("attack",), seed, over_groups=False)
    figures: dict[str, Any] = {
        f"{name}_originals": originals,
        f"{name}_recognised": float(rated.recognised.mean()),
        f"{name}_judge_accuracy": judge.facts.figures["accuracy"],
        f"{name}_labeller_accuracy": labeller.facts.figures["accuracy"],
    }
    rows: dict[str, dict[str, Any]] = {}
    for one in scores:
        found = told.figures(one)
        figures |= {f"{name}_{one}_{what}": found[what].value for what in ("auc", "spearman")}
        rows[one] = {what: str(found[what]) for what in ("auc", "spearman")}
        rows[one]["unscored"] = int(np.isnan(scores[one]).sum())
    for kind, one in (("", rated), ("sure_", surely)):
        compared = Evaluation(one, scores, ("attack",), seed, over_groups=False)
        less = compared.difference("regcorr", "ssim")["auc"]
        ends = {"": less.value, "_low": less.low, "_high": less.high}
        figures |= {f"{name}_{kind}regcorr_less_ssim{end}": value for end, value in ends.items()}
    share = {arm: float(rated.recognised[rated.facts["attack"] == arm].mean()) for arm, _ in ARMS}
    return figures | {f"{name}_arms": {"metrics": rows, "recognised": share}}


def memory(name: str, pairs: int) -> float:
    """MiB by which a process grows beyond its inputs, pairs of 128 x 128 x 3, while it scores them."""
    code = f"""
import re, torch
from pathlib import Path
from fedattack import metrics

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
truth = torch.rand({pairs}, 3, 128, 128)
images = truth.flip(0)
metrics.{name}(images[:2], truth[:2])
before = peak()
metrics.{name}(images, truth)
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _pairs(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Smooth colour images with noise, and without."""
    generator = torch_rng(side, "bench metrics")
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    truth = functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    deviation = torch.linspace(0.01, 0.5, count)[:, None, None, None]
    return (truth + deviation * torch.randn(truth.shape, generator=generator)).clamp(0, 1), truth


def _images(name: str, data: Path, seed: int) -> tuple[Tensor, Tensor]:
    """A data set's images, in an order of the seed, padded with black to 32 pixels."""
    dataset = data_set(name, data)
    order = torch.randperm(len(dataset), generator=torch_rng(seed, f"bench {name}"))[:12_000]
    images, labels = dataset.tensors(order.numpy())
    reach = (_SIDE - images.shape[-1]) // 2
    return functional.pad(images, [reach] * 4), labels


def _named(judge: Labeller, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the classifier gives each image its right name, bool (N,)."""
    return judge.probabilities(images).argmax(1) == labels


def _beside(name: str, ours: Callable[[], Floats], theirs: Callable[[], Floats]) -> dict[str, float]:
    """Medians of three goes in turn: seconds of ours, the ratio, and how far the answers are apart."""
    ours()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        wanted, their_seconds = _timed(theirs)
        found, our_seconds = _timed(ours)
        seconds[0].append(our_seconds)
        seconds[1].append(their_seconds)
    mine, other = (statistics.median(each) for each in seconds)
    return {
        f"seconds_{name}": mine,
        f"speed_{name}": other / mine,
        f"error_{name}": float(np.abs(found - wanted).max()),
    }


def _timed(work: Callable[[], Floats]) -> tuple[Floats, float]:
    """What it gives, and its CPU seconds."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started
