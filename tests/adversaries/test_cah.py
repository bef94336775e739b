"""Curious abandon honesty: trap weights, what one neuron isolates, and what taking images out adds."""

from __future__ import annotations

import pytest
import torch
from malicious_scenes import PUBLIC, batch_of, observe, scenario, scored

from adversaries import ATTACKS
from adversaries.reconstruction.malicious.curious_abandon_honesty import CuriousAbandonHonesty
from fedattack.config import CompressionConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import initial_weights

CPU = torch.device("cpu")


def test_trap_weights_wake_for_few_images() -> None:
    scene = scenario("mlp", 20, 256)
    start = initial_weights(scene.model, 0)
    published = CuriousAbandonHonesty(shrink=0.9, peel=False).arm(scene, start, 0, None)["1.weight"]
    negative, positive = published.clamp(max=0), published.clamp(min=0)
    assert ((negative < 0).sum(1) == 32).all()
    # The positive half are the negative half's numbers, times the factor.
    torch.testing.assert_close(
        positive.sort(1).values[:, 32:], 0.9 * (-negative).sort(1).values[:, 32:], rtol=1e-5, atol=0
    )
    images, _ = batch_of(500, seed=77)
    for peel, share in ((False, 1 / 20), (True, 3 / 20)):
        weights = CuriousAbandonHonesty(peel=peel).arm(scene, start, 0, PUBLIC)
        awake = images.flatten(1) @ weights["1.weight"].T > 0
        assert float(awake.double().mean()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("model", ["mlp", "imprint"])
def test_small_batches_are_exact_with_labels(model) -> None:
    images, labels = batch_of(8)
    attack, scene = CuriousAbandonHonesty(), scenario(model, 8, 128)
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    quality, right = scored(answer, images, labels)
    assert quality.min() > 80
    assert right == 8
    assert answer.details["status"] == "certified"


def test_taking_images_out_finds_more_than_single_neurons() -> None:
    images, labels = batch_of(32, seed=4)
    scene, found = scenario("mlp", 32, 128), {}
    for peel in (False, True):
        attack = CuriousAbandonHonesty(peel=peel)
        (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
        quality, right = scored(answer, images, labels)
        found[peel] = answer.details["recovered"]
        assert int((quality >= 40).sum()) == right == found[peel]  # no mixture is taken for an image
    assert found[True] > found[False] > 0


def test_top_k_and_local_steps_claim_no_more_than_they_have() -> None:
    images, labels = batch_of(8)
    attack = CuriousAbandonHonesty()
    several = TrainingConfig(protocol="fedavg", batch_size=0, local_steps=3, learning_rate=1e-3)
    for scene, least in (
        (scenario("mlp", 8, 128, compression=CompressionConfig(name="topk", rate=0.6)), 6),
        (scenario("mlp", 8, 128, training=several), 6),
    ):
        attack.check(scene)
        (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
        good = int((scored(answer, images, labels)[0] >= 25).sum())
        assert good >= least
        assert answer.details["recovered"] <= good + 1


def test_refusals() -> None:
    attack = CuriousAbandonHonesty()
    for scene, part in (
        (scenario("lenet-zhu", 4), "linear layer on the pixels"),
        (scenario("two-layer", 4), "no bias"),
        (scenario("mlp", 4, activation="sigmoid"), "works behind relu"),
        (scenario("imprint-sparse", 4), "must sleep"),
    ):
        with pytest.raises(NotApplicable, match=part):
            attack.check(scene)
    for settings in ({"shrink": 1.5}, {"scale": 0.0}, {"tolerance": 0.0}):
        with pytest.raises(ConfigError, match="cah"):
            CuriousAbandonHonesty(**settings)
    images, labels = batch_of(4)
    (answer,) = attack.run([observe(attack, scenario("mlp", 4), images, labels, honest=True)], 0, CPU)
    assert answer.details["status"] == "failed"
    assert "no trap weights" in answer.details["reason"]
    assert ATTACKS.get("cah") is CuriousAbandonHonesty
