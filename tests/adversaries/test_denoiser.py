"""The denoiser: what it learns from, that it helps, that it repeats and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from adversaries.inversion.learning import denoiser as denoising
from adversaries.inversion.learning import files
from adversaries.inversion.learning.denoiser import (
    collect_pairs,
    load_denoiser,
    load_pairs,
    train_denoiser,
)
from adversaries.inversion.matching.match import Matching
from fedattack.config import CompressionConfig, DataConfig, ModelConfig, TrainingConfig
from fedattack.data import load_dataset
from fedattack.errors import BadRequest, ConfigError, DataError, NotApplicable
from fedattack.models import initial_weights, resolve
from fedattack.models.decoders.denoisers import DnCNN
from fedattack.observation import Auxiliary, Scenario

ITERATIONS = 6


@pytest.fixture(scope="module")
def auxiliary() -> Auxiliary:
    dataset = load_dataset(DataConfig(name="digits"), 0)
    images, _ = dataset.tensors(np.arange(300))
    return Auxiliary(images, source="digits", groups=torch.arange(300) // 3)


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    model = resolve(ModelConfig(name="lenet-zhu", classes=100), 1, 8, 10)
    return Scenario(model, TrainingConfig(), CompressionConfig(rate=0.05))


@pytest.fixture(scope="module")
def weights(scenario) -> dict[str, Tensor]:
    return initial_weights(scenario.model, 3)


@pytest.fixture(scope="module")
def pairs_file(scenario, weights, auxiliary, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.safetensors"
    collect_pairs(scenario, weights, auxiliary, 128, ITERATIONS, path, seed=0, together=64)
    return path


@pytest.fixture(scope="module")
def denoiser_file(pairs_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.safetensors"
    train_denoiser(pairs_file, path, seed=0, depth=4, width=16, epochs=30)
    return path


def test_pairs_are_partial_reconstructions_of_auxiliary_images(pairs_file, auxiliary):
    pairs = load_pairs(pairs_file)
    assert pairs.noisy.shape == pairs.clean.shape == (128, 1, 8, 8)
    where = (pairs.clean.flatten(1)[:, None] == auxiliary.images.flatten(1)[None]).all(2)
    assert bool(where.any(1).all())
    assert torch.equal(pairs.groups, auxiliary.groups[where.double().argmax(1)])
    error = (pairs.noisy - pairs.clean).square().mean()
    assert 0 < float(error) < float((pairs.mean - pairs.clean).square().mean())


def test_snapshots_continue_from_each_other(scenario, weights, auxiliary):
    both = collect_pairs(scenario, weights, auxiliary, 4, 3, None, seed=1, stretches=2)
    first = collect_pairs(scenario, weights, auxiliary, 4, 3, None, seed=1)
    assert both.stage.tolist() == [1] * 4 + [2] * 4
    assert torch.equal(both.noisy[:4], first.noisy)
    assert torch.equal(both.clean[:4], both.clean[4:])
    assert not torch.equal(both.noisy[:4], both.noisy[4:])


def test_it_improves_images_of_people_it_has_not_seen(denoiser_file, pairs_file):
    denoiser, pairs = load_denoiser(denoiser_file), load_pairs(pairs_file)
    result = denoising.test_denoiser(denoiser_file, pairs_file)
    assert result["psnr"]["denoised"] > result["psnr"]["noisy"] + 0.5
    assert result["psnr"]["denoised"] == pytest.approx(denoiser.metadata["figures"]["psnr"]["denoised"])
    rows = denoising._unseen(denoiser, pairs)
    assert len(rows) == result["pairs"]
    seen = np.setdiff1d(np.arange(len(pairs.groups)), rows.numpy())
    assert not set(pairs.groups[rows].tolist()) & set(pairs.groups[seen].tolist())
    images = denoiser(pairs.noisy[rows]).clamp(0, 1).numpy()
    reference = [
        peak_signal_noise_ratio(truth, image, data_range=1)
        for truth, image in zip(pairs.clean[rows].numpy(), images, strict=True)
    ]
    assert result["psnr"]["denoised"] == pytest.approx(np.mean(reference), abs=1e-4)


def test_same_seed_same_file(pairs_file, tmp_path):
    for name in ("a", "b"):
        train_denoiser(pairs_file, tmp_path / name, seed=4, depth=3, width=4, epochs=2)
    train_denoiser(pairs_file, tmp_path / "c", seed=5, depth=3, width=4, epochs=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_it_works_in_float(denoiser_file):
    denoiser = load_denoiser(denoiser_file)
    noise = denoiser.module
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    torch.testing.assert_close(denoiser(images), images - noise(images))
    # Neither clamped nor rounded: a shift far below 1/255 is not lost.
    assert float(denoiser(images).min()) < 0
    assert not torch.equal(denoiser(images), denoiser(images + 1e-4))
    assert torch.equal(denoiser(images[:1]), denoiser(images[:1]))


def test_published_size():
    network = DnCNN(3)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(convolutions), len(norms)) == (17, 15)
    assert all(c.bias is None and c.kernel_size == (3, 3) for c in convolutions)
    assert convolutions[0].out_channels == 64
    assert network(torch.zeros(1, 3, 9, 7)).shape == (1, 3, 9, 7)


def test_bad_input_is_refused(denoiser_file, pairs_file, scenario, weights, auxiliary, tmp_path):
    with pytest.raises(DataError, match="1 channels; the images have 3"):
        load_denoiser(denoiser_file)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match="should hold a denoiser"):
        load_denoiser(pairs_file)
    tensors, metadata = files.load_learned(denoiser_file, "denoiser")
    for change in (
        {"width": 10**9},
        {"depth": 3},
        {"depth": 10**9},
        {"channels": "one"},
        {"architecture": "os:system"},
    ):
        files.save_learned(tmp_path / "bent", tensors, metadata | change)
        with pytest.raises(BadRequest, match=r"architecture|malformed"):
            load_denoiser(tmp_path / "bent")
    with pytest.raises(DataError, match="no such file"):
        load_pairs(tmp_path / "none")
    with pytest.raises(DataError, match="'count' = 500"):
        collect_pairs(scenario, weights, auxiliary, 500, 2, None, 0)
    with pytest.raises(ConfigError, match=r"denoiser\.depth"):
        train_denoiser(pairs_file, None, 0, depth=1)
    other = dataclasses.replace(load_pairs(pairs_file), metadata={"made": "elsewhere"})
    with pytest.raises(DataError, match="not the pairs"):
        denoising.test_denoiser(denoiser_file, other)
    steps = dataclasses.replace(scenario, training=TrainingConfig(protocol="fedavg", local_steps=3))
    with pytest.raises(NotApplicable, match="local_steps = 3"):
        collect_pairs(steps, weights, auxiliary, 2, 2, None, 0)


def test_matching_settings_are_kept_with_the_pairs(scenario, weights, auxiliary):
    settings = Matching(regularisers={"tv2": 0.1}, iterations=99)
    pairs = collect_pairs(scenario, weights, auxiliary, 2, 2, None, 0, settings=settings)
    assert pairs.metadata["matching"]["regularisers"] == {"tv2": 0.1}
    assert pairs.metadata["matching"]["iterations"] == 2
