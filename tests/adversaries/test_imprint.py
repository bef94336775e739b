"""Imprint: bins, peeling, the birthday bound, and what compression and local steps leave of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from malicious_scenes import PUBLIC, batch_of, observe, pictures, scenario, scored

from adversaries import ATTACKS
from adversaries.inversion.solvers.peeling import Rows, peel
from adversaries.reconstruction.malicious.bins import alone_share, thresholds
from adversaries.reconstruction.malicious.imprint import Imprint
from fedattack.config import CompressionConfig, Config, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- pieces


@pytest.mark.parametrize("public", [PUBLIC, None])
def test_thresholds_cut_the_measurement_into_equal_shares(public) -> None:
    generator = torch.Generator().manual_seed(0)
    functional, edges = thresholds(torch.randn(64, generator=generator).double(), 8, (1, 8, 8), public)
    assert (edges.diff() > 0).all()
    measured = pictures(4000, seed=5).double().flatten(1) @ functional
    counts = torch.histogram(measured, edges).hist / len(measured)
    assert counts.sum() == pytest.approx(1.0)
    if public is not None:
        assert torch.allclose(counts, torch.full_like(counts, 1 / 8), atol=0.06)


def test_birthday_bound_is_the_share_alone() -> None:
    drawn = np.random.default_rng(0).integers(0, 1024, (2000, 64))
    alone = np.mean(
        [np.mean(np.unique(row, return_counts=True)[1] == 1) * len(np.unique(row)) / 64 for row in drawn]
    )
    assert alone_share(1 / 1024, 64) == pytest.approx(alone, abs=0.01)


def test_peeling_takes_out_what_was_found() -> None:
    """Three images, two rows with two each: only taking the first out uncovers the others; a mixture is refused."""
    x = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.8, 0.4]], dtype=torch.float64)
    shares = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.5, 0.0], [0.0, 0.0, 1.5, 0.0]]).double()
    rows = Rows(shares.sum(0), shares.T @ x, torch.full((4,), 1e-12).double(), 3.0)

    def replay(inputs: torch.Tensor) -> torch.Tensor:
        nearest = torch.cdist(inputs, x)
        known = nearest.amin(1) < 1e-6
        return (shares[nearest.argmin(1)] * known[:, None])[:, None].expand(-1, 2, -1)

    found, left = peel(rows, replay, 2, 3, tolerance=1e-6)
    assert [sample.sweep for sample in found] == [0, 1, 2]
    assert torch.allclose(torch.stack([sample.input for sample in found]), x)
    assert left.vectors.abs().max() < 1e-12
    first_only, _ = peel(rows, replay, 2, 3, tolerance=1e-6, sweeps=1)
    assert len(first_only) == 1


# ---------------------------------------------------------------------- whole batches


@pytest.mark.parametrize("model", ["imprint", "imprint-sparse"])
@pytest.mark.parametrize("public", [PUBLIC, None])
def test_four_measurements_bring_back_whole_batches_with_labels(model, public) -> None:
    images, labels = batch_of(64)
    attack, scene = Imprint(), scenario(model, 64, 512)
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels, public=public)], 0, CPU)
    quality, right = scored(answer, images, labels)
    assert (quality >= 40).all()
    assert right == 64
    assert answer.details["status"] == "certified"
    assert answer.details["birthday_bound"] == pytest.approx((511 / 512) ** 63)
    assert answer.details["recovered"] == 64


def test_one_measurement_finds_those_that_are_alone_and_no_mixture() -> None:
    images, labels = batch_of(64)
    attack = Imprint(functionals=1, functional="brightness")
    observation = observe(attack, scenario("imprint", 64, 256), images, labels)
    (answer,) = attack.run([observation], 0, CPU)
    above = images.flatten(1).double() @ observation.weights["measure.weight"].double().T
    bins = (above + observation.weights["measure.bias"].double() > 0).sum(1)
    alone = sum(int((bins == one).sum() == 1) for one in bins)
    quality, _ = scored(answer, images, labels)
    assert alone < 60
    assert alone - 2 <= answer.details["recovered"] <= alone
    assert int((quality >= 40).sum()) == answer.details["recovered"]
    assert answer.details["status"] == "partial"
    assert answer.details["alone_expected"] == pytest.approx(alone / 64, abs=0.15)
    prior = PUBLIC.images.mean(0)
    assert torch.equal(answer.images[answer.details["recovered"]], prior)
    assert len(answer.labels) == 64


def test_batches_beyond_the_birthday_bound() -> None:
    images, labels = batch_of(128)
    attack = Imprint()
    (answer,) = attack.run([observe(attack, scenario("imprint-sparse", 128, 256), images, labels)], 0, CPU)
    quality, _ = scored(answer, images, labels)
    assert answer.details["birthday_bound"] < 0.62
    assert (quality >= 40).double().mean() > 0.9
    assert answer.details["recovered"] > answer.details["alone"]


def test_sparse_bins_survive_top_k_and_rounding() -> None:
    images, labels = batch_of(16)
    attack = Imprint()
    for compression, least in (
        (CompressionConfig(name="topk", rate=0.2), 16),
        (CompressionConfig(name="qsgd"), 10),
    ):
        scene = scenario("imprint-sparse", 16, 256, compression=compression)
        attack.check(scene)
        (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
        quality, _ = scored(answer, images, labels)
        assert int((quality >= 30).sum()) >= least
        # The ReLU block's rows are moved by nearly all images: little of them survives, and little is claimed.
        dense = scenario("imprint", 16, 256, compression=compression)
        (other,) = attack.run([observe(attack, dense, images, labels)], 0, CPU)
        good = int((scored(other, images, labels)[0] >= 25).sum())
        assert other.details["recovered"] <= good + 3


@pytest.mark.parametrize("rate", [0.1, 0.001])
def test_local_steps_with_sparse_bins(rate) -> None:
    images, labels = batch_of(32)
    training = TrainingConfig(protocol="fedavg", batch_size=0, local_steps=5, learning_rate=rate)
    attack, scene = Imprint(), scenario("imprint-sparse", 32, 512, training=training)
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    quality, _ = scored(answer, images, labels)
    assert int((quality >= 30).sum()) >= 26
    assert answer.details["status"] != "certified"


def test_one_step_of_weights_is_one_gradient() -> None:
    images, labels = batch_of(16)
    training = TrainingConfig(protocol="fedavg", batch_size=16, learning_rate=0.05)
    attack = Imprint()
    (answer,) = attack.run(
        [observe(attack, scenario("imprint", 16, 256, training=training), images, labels)], 0, CPU
    )
    assert int((scored(answer, images, labels)[0] >= 40).sum()) == 16


# ---------------------------------------------------------------------- what cannot be done


def test_refusals() -> None:
    attack = Imprint()
    several = TrainingConfig(protocol="fedavg", local_steps=2)
    for scene, part in (
        (scenario("mlp", 4), "lacks a block for bins"),
        (scenario("imprint", 4, 7), "width = 7 < 8"),
        (scenario("imprint", 4, training=several), "drift apart"),
        (scenario("imprint", 4, compression=CompressionConfig(name="sign")), "only signs"),
        (
            scenario("imprint", 4, compression=CompressionConfig(name="randomk", rate=0.1)),
            "holes in every row",
        ),
    ):
        with pytest.raises(NotApplicable, match=part):
            attack.check(scene)
    for settings in ({"functionals": 0}, {"functional": "brightness"}, {"scale": 0.0}, {"tolerance": 2.0}):
        with pytest.raises(ConfigError, match="imprint"):
            Imprint(**settings)
    assert ATTACKS.get("imprint") is Imprint


def test_honest_weights_fail_with_a_reason() -> None:
    images, labels = batch_of(4)
    attack = Imprint()
    (answer,) = attack.run([observe(attack, scenario("imprint", 4, 64), images, labels, honest=True)], 0, CPU)
    assert answer.details["status"] == "failed"
    assert "no bins" in answer.details["reason"]
    assert len(answer.images) == 0


def test_answer_depends_on_the_observation_only() -> None:
    images, labels = batch_of(8)
    attack = Imprint()
    observation = observe(attack, scenario("imprint", 8, 128), images, labels)
    before = {name: tensor.clone() for name, tensor in observation.weights.items()}
    first = attack.run([observation], 3, CPU)[0]
    torch.manual_seed(99)
    again = attack.run([dataclasses.replace(observation)], 3, CPU)[0]
    assert torch.equal(first.images, again.images)
    assert all(torch.equal(before[name], tensor) for name, tensor in observation.weights.items())


def test_the_block_leaves_an_honest_model_trainable() -> None:
    scene = scenario("imprint", 4, 64)
    module = build_model(scene.model)
    images = pictures(4)
    hidden = module.act(module.measure(images.flatten(1)))
    assert torch.equal(module(images), module.after(hidden, images))


@pytest.mark.slow
def test_bar_on_real_digits(shared_dir, tmp_path) -> None:
    """At least 90 % of a batch of 64 at 40 dB and more with 1,024 bins, through the whole federation."""
    from simulations.pipeline import simulate

    settings = {
        "dataset": "mnist",
        "data-dir": str(shared_dir / "data" / "MNIST"),
        "limit": 3000,
        "attack": "imprint",
        "model": "imprint",
        "compressor": "none",
        "batch-size": 64,
        "clients": 4,
        "engine": "inline",
        "run-dir": str(tmp_path / "run"),
    }
    result = simulate(Config.from_mapping(settings))
    quality = [row["psnr"] for row in result.audits["imprint"].records]
    assert np.mean(np.array(quality) >= 40) >= 0.9
    answers = result.reconstructions["imprint"].values()
    assert all(answer.details["birthday_bound"] == pytest.approx(0.9403, abs=1e-4) for answer in answers)
