"""Fishing: what a head lets through, that it is counted and checked, and that it is found."""

from __future__ import annotations

import pytest
import torch
from malicious_scenes import NONE, PUBLIC, batch_of, observe, pictures, scenario

from adversaries import ATTACKS
from adversaries.reconstruction.fishing import Fishing
from fedattack.config import CompressionConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import psnr
from fedattack.models import build_model

CPU = torch.device("cpu")


def best(answer, images: torch.Tensor) -> float:
    """PSNR of the first image answered against the nearest private one."""
    return float(psnr(answer.images[:1].expand_as(images), images).clamp(max=150).max())


@pytest.mark.parametrize("model", ["mlp", "imprint"])
def test_the_only_sample_of_a_class_is_read_off(model) -> None:
    images, _ = batch_of(32)
    labels = torch.arange(32) % 9
    labels[5] = 9
    attack, scene = Fishing(mode="class", target=9), scenario(model, 32)
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    assert answer.details["status"] == "certified"
    assert answer.details["caught"] == pytest.approx(1.0, abs=1e-3)
    assert float(psnr(answer.images[:1], images[5:6]).clamp(max=150)) > 80
    assert int(answer.labels[0]) == 9
    assert torch.equal(answer.images[1], PUBLIC.images.mean(0))


def test_feature_fishing_catches_the_sample_over_the_threshold() -> None:
    """The head has two classes more than the data, so that no sample of its row's class spoils the catch."""
    scene, hits = scenario("mlp", 16, classes=12), 0
    attack = Fishing(mode="feature", most=1)
    for seed in range(12):
        images, labels = batch_of(16, seed=seed)
        observation = observe(attack, scene, images, labels, seed=seed)
        module = build_model(scene.model)
        module.load_state_dict(observation.weights)
        over = int((module(images)[:, 10:].amax(1) > 0).sum())
        (answer,) = attack.run([observation], 0, CPU)
        assert answer.details["caught"] == pytest.approx(over, abs=0.05)
        if over == 1:
            hits += 1
            assert answer.details["status"] == "certified"
            assert best(answer, images) > 80
        else:
            assert answer.details["status"] == "failed"
            assert answer.details["recovered"] == 0
    assert hits >= 2


def test_samples_of_the_class_and_of_others_do_not_pass_for_one() -> None:
    """Two over the threshold, one of the class below: the count is one, the features are nobody's."""
    scene = scenario("mlp", 16)
    refused = 0
    for seed in range(40):
        attack = Fishing(mode="feature", target=3, quantile=0.8, most=1)
        images, labels = batch_of(16, seed=seed)
        (answer,) = attack.run([observe(attack, scene, images, labels, seed=seed)], 0, CPU)
        if answer.details["status"] == "certified":
            assert best(answer, images) > 60
        refused += "mixed" in answer.details.get("reason", "")
    assert refused


def test_a_convolutional_network_is_handed_to_another_attack() -> None:
    images = pictures(8, seed=3)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    attack = Fishing(mode="class", target=4, attack="gauss-newton", options={"products": 300, "starts": 1})
    scene = scenario("tiny-cnn", 8, activation="sigmoid")
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    floor = float(psnr(PUBLIC.images.mean(0, keepdim=True), images[4:5]))
    assert answer.details["status"] == "approximate"
    assert float(psnr(answer.images[:1], images[4:5])) > floor + 30
    assert answer.loss < 1e-4  # its features are those that the head's row shows


def test_refusals() -> None:
    attack = Fishing()
    for scene, part in (
        (scenario("resnet20", 4), "BatchNorm"),
        (scenario("two-layer", 4), "no bias"),
        (scenario("mlp", 4, compression=CompressionConfig(name="topk", rate=0.1)), "drops entries"),
    ):
        with pytest.raises(NotApplicable, match=part):
            attack.check(scene)
    with pytest.raises(ConfigError, match=r"target' = 10"):
        Fishing(target=10).check(scenario("mlp", 4, compression=NONE))
    for settings in ({"quantile": 1.0}, {"most": 0}, {"attack": "imprint"}):
        with pytest.raises(ConfigError, match="fishing"):
            Fishing(**settings)
    images, labels = batch_of(4)
    (answer,) = attack.run([observe(attack, scenario("mlp", 4), images, labels, honest=True)], 0, CPU)
    assert answer.details["status"] == "failed"
    assert "honest" in answer.details["reason"]
    assert ATTACKS.get("fishing") is Fishing
