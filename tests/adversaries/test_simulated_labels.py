"""Label counts by simulation, beside the best constant answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hcgla_scenes import observe, scenario, smooth_images
from scipy import stats
from torch import Tensor

from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.labels import simulated_labels
from adversaries.inversion.evidence.labels.label_strategies import infer
from adversaries.inversion.evidence.labels.simulated_labels import rounded
from adversaries.inversion.solvers.linear_gaussian import LinearGaussian
from adversaries.needs import Facts, Needs
from adversaries.refusals import refusals
from fedattack.config import CompressionConfig, DataConfig, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.data import load_dataset
from fedattack.errors import NotApplicable
from fedattack.metrics.labels import constant_hits
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Auxiliary, Observation, Scenario, Update
from fedattack.training import batch_positions, local_update

CLASSES = 4


def of_classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose brightness tells their class, now and then."""
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    images = 0.7 * smooth_images(count, 8, seed=seed) + 0.3 * labels[:, None, None, None] / (CLASSES - 1)
    return images, labels


def victim(number: int, **training: object) -> tuple[Observation, Tensor]:
    agreed = {"protocol": "fedavg", "local_steps": 8, "learning_rate": 0.2, "momentum": 0.9} | training
    scene = scenario(CLASSES, model="tiny-cnn", activation="relu", size=8, name="none")
    scene = dataclasses.replace(scene, training=TrainingConfig.model_validate(agreed))
    images, labels = of_classes(12, 1000 + number)
    seen = observe(scene, images, labels, client=number)
    public, told = of_classes(150, 1)
    return dataclasses.replace(seen, auxiliary=Auxiliary(public, told, source="test")), labels


def right(found: Tensor, truth: Tensor, classes: int = CLASSES) -> int:
    counts = [torch.bincount(one, minlength=classes) for one in (found, truth)]
    return int(torch.minimum(*counts).sum())


def test_a_linear_model_is_read_backwards() -> None:
    """Exactly, where errors are small and the prior wide."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(300, 3, dtype=torch.float64, generator=generator)
    y = y / y.sum(1, keepdim=True)
    x = y @ torch.randn(3, 8, dtype=torch.float64, generator=generator)
    noisy = x + 1e-5 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    model = LinearGaussian.fit(torch.cat([noisy, torch.ones(300, 1)], 1), y, 0.1)
    assert model.kept.tolist() == [True] * 8 + [False]
    asked = torch.cat([x[:5], torch.ones(5, 1)], 1)
    one_sum = torch.eye(3, dtype=torch.float64) - 1 / 3
    found = model.posterior(asked, y.mean(0), one_sum, [10.0])
    torch.testing.assert_close(found, y[:5], atol=1e-4, rtol=0)


def test_counts_have_the_sum_that_was_declared() -> None:
    counts = torch.tensor([[1.4, -2.0, 0.6], [0.0, 0.0, 0.0], [2.5, 2.5, 0.0]], dtype=torch.float64)
    assert rounded(counts, 5).tolist() == [[4, 0, 1], [2, 2, 1], [3, 2, 0]]


@pytest.mark.slow
def test_a_trained_network_gives_counts_away_after_five_steps(shared_dir: Path) -> None:
    """Flower's tutorial net after 15 rounds on CIFAR-10, ten clients of 80 images: above the best constant answer."""
    dataset = load_dataset(DataConfig(name="cifar10", dir=str(shared_dir / "data" / "CIFAR10")), seed=3)
    images, labels = dataset.tensors(np.random.default_rng(3).permutation(len(dataset)))
    training = TrainingConfig(protocol="fedavg", local_steps=5, batch_size=16, learning_rate=0.05)
    model = resolve(ModelConfig(name="cnn-flower"), 3, 32, 10)
    weights, module = initial_weights(model, 3), build_model(model)
    own = [slice(80 * client, 80 * client + 80) for client in range(10)]

    def update(client: int, round: int) -> dict[str, Tensor]:
        batches = batch_positions(80, training, 3, round, client)
        return local_update(
            module, weights, images[own[client]], labels[own[client]], batches, training
        ).update

    for round in range(1, 16):
        sent = [update(client, round) for client in range(10)]
        weights = {name: w + sum(one[name] for one in sent) / 10 for name, w in weights.items()}
    public = Auxiliary(images[800:1800], labels[800:1800], source="test")
    scene = Scenario(model, training, CompressionConfig(name="none"))
    observations = []
    for client in range(10):
        one = update(client, 16)
        dense = torch.cat([part.flatten() for part in one.values()])
        found = Update(tuple(one), tuple(tuple(part.shape) for part in one.values()), None, dense, "delta")
        observations.append(Observation(16, client, scene, weights, found, 80, auxiliary=public))
    evidence = Evidence.of_round(observations)
    gains = []
    for client, seen in enumerate(evidence):
        truth = labels[own[client]]
        named = right(infer("simulated", seen).values, truth, 10)
        gains.append(named - constant_hits(np.full(10, 0.1), truth.tolist()))
    assert len(evidence[0].shared) == 1  # one simulation for all
    mean, deviation = np.mean(gains), np.std(gains, ddof=1)
    assert mean - stats.t.ppf(0.95, 9) * deviation / 10**0.5 > 0


def test_one_gradient_will_do_and_a_round_shares_its_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_labels, "SIMULATED", 60)
    cases = [victim(number, protocol="fedsgd", local_steps=1, momentum=0.0) for number in range(2)]
    together = Evidence.of_round([seen for seen, _ in cases])
    found = [infer("simulated", one).values for one in together]
    assert sum(right(one, truth) for one, (_, truth) in zip(found, cases, strict=True)) >= 22
    assert len(together[1].shared) == 1
    assert torch.equal(found[1], infer("simulated", Evidence(cases[1][0])).values)


def test_without_labels_it_is_refused_beforehand() -> None:
    seen, _ = victim(0)
    bare = dataclasses.replace(seen, auxiliary=Auxiliary(smooth_images(4, 8)))
    with pytest.raises(NotApplicable, match="needs labelled public images"):
        infer("simulated", Evidence(bare))
    needs = Needs(labels="simulated")
    for facts in (Facts(auxiliary=0), Facts(auxiliary=9, labelled=False)):
        assert "labelled public images" in refusals(needs, seen.scenario, facts)[0]
    assert not refusals(needs, seen.scenario, Facts(auxiliary=9, labelled=True))
    summed = dataclasses.replace(seen.scenario, defense=DefenseConfig(names=("secure-aggregation",)))
    assert "shows sums alone" in refusals(needs, summed, Facts(auxiliary=9, labelled=True))[0]
