"""What a run will cost, before it starts, and what it took: memory counted without data, steps timed, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adversaries.base import Effort
from adversaries.reconstruction.algebra.analytic import Analytic
from adversaries.reconstruction.gauss_newton import GaussNewton
from adversaries.reconstruction.matching.inverting_gradients import InvertingGradients
from fedattack.config import Config, ModelConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import resolve
from simulations.experiments import cost
from simulations.experiments.memory import watched
from simulations.pipeline import simulate


def settings(**more: Any) -> Config:
    given = {
        "dataset": "digits",
        "model": "mlp",
        "clients": 2,
        "compressor": "none",
        "engine": "inline",
        "victims": 1,
    }
    return Config.from_mapping(given | {key.replace("_", "-"): value for key, value in more.items()})


def test_memory_is_counted_as_autograd_saves_it() -> None:
    """A linear layer saves its input for its weight, and the loss its logits' softmax."""
    model = resolve(ModelConfig(name="logistic"), 1, 8, 10)
    found = cost.footprint(model, 4)
    assert found is not None
    assert found.parameters == 4 * (64 * 10 + 10)
    assert found.gradient >= 4 * (4 * 64 + 4 * 10)
    assert found.gradient < 8 * (4 * 64 + 4 * 10)
    assert found.second > found.gradient


@pytest.mark.slow
def test_a_larger_image_takes_more_and_a_huge_network_is_counted_without_memory() -> None:
    small, large = (
        cost.footprint(resolve(ModelConfig(name="torchvision/resnet18"), 3, side, 10), 2)
        for side in (32, 224)
    )
    assert small is not None
    assert large is not None
    assert large.gradient > 20 * small.gradient
    with watched() as peak:
        before = peak.bytes
        huge = cost.footprint(resolve(ModelConfig(name="torchvision/vit_h_14"), 3, 224, 1000), 1)
    assert huge is not None
    assert huge.parameters > 2.5e9
    assert peak.bytes - before < 2e8


def test_efforts_are_counted() -> None:
    scenario = build_world(settings()).scenario
    assert GaussNewton(products=500).effort(scenario, 1) == Effort(products=500)
    assert InvertingGradients(iterations=99, restarts=3).effort(scenario, 1) == Effort(slopes=300)
    assert Analytic().effort(scenario, 1) == Effort(gradients=1)


def test_what_does_not_fit_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(model="imprint", width=4096)
    world = build_world(config)
    cost.require_memory(config, world)
    monkeypatch.setattr(cost, "LARGE_MODEL", 1000)
    cost.require_memory(config, world)
    cost.refuse_too_large(config, world, GaussNewton())
    monkeypatch.setattr(cost, "free_memory", lambda: 1_000_000)
    with pytest.raises(
        ConfigError, match=r"'model\.name' = 'imprint'.* of memory, and 1\.0 MB are free"
    ) as refused:
        cost.require_memory(config, world)
    assert "\n" not in str(refused.value)
    with pytest.raises(NotApplicable, match="second derivatives of a batch of 1"):
        cost.refuse_too_large(config, world, GaussNewton())


def test_times_are_steps_times_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    world, attacks = build_world(config), {"gauss-newton": GaussNewton(products=1000), "analytic": Analytic()}
    monkeypatch.setattr(cost, "timed_steps", lambda *_: cost.Steps(gradient=2.0, slope=5.0, product=0.5))
    newton, analytic = cost.attack_costs(config, world, attacks)
    assert newton.seconds == 500.0
    assert "1,000 Jacobian products" in newton.told
    assert "8 min 20 s" in newton.told
    assert analytic.seconds == 2.0
    assert newton.memory is not None
    assert cost.notes(config, world, attacks) == [], "a small model is not looked at unasked"
    monkeypatch.setattr(cost, "LARGE_SIDE", 4)
    assert cost.notes(config, world, attacks) == [f"gauss-newton: {newton.told}"]


def test_a_surrogate_is_of_all_images_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 images in steps of 3: products for 15, each as long as one of 15 takes."""
    steps = {"protocol": "fedavg", "local-epochs": 1, "batch-size": 3, "clients": 1, "limit": 35}
    config = settings(**steps, **{"auxiliary-size": 10, "data.nonmembers": 10})
    world, timed = build_world(config), []

    def steps_of(model, batch_norm, images: int, *rest) -> cost.Steps:
        timed.append(images)
        return cost.Steps(gradient=1.0, slope=1.0, product=1.0)

    monkeypatch.setattr(cost, "timed_steps", steps_of)
    attacks = {"gauss-newton": GaussNewton(local_steps="surrogate"), "ig": InvertingGradients()}
    newton, _ = cost.attack_costs(config, world, attacks)
    assert timed == [15, 3]
    assert newton.seconds == 200 * 15


def test_real_steps_are_timed() -> None:
    model = build_world(settings()).scenario.model
    found = cost.timed_steps(model, "train", 1, "cpu", 1)
    assert 0 < found.gradient < found.slope < 1
    assert 0 < found.product < 1


def test_the_peak_is_seen() -> None:
    with watched() as peak:
        before = peak.bytes
        held = np.ones(30_000_000)
        torch.from_numpy(held).sum()
        peak.look()
    assert peak.bytes - before > 2e8


@pytest.mark.slow
def test_summary_and_report_tell_of_memory(tmp_path: Path) -> None:
    result = simulate(settings(attack="analytic", rounds=1, **{"run-dir": str(tmp_path / "run")}))
    held = result.summary["attacks"]["analytic"]["peak_memory"]
    assert held > 1e8
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["attacks"]["analytic"]["peak_memory"]
        == held
    )
    assert "at the peak of the process that attacked" in (tmp_path / "run" / "report.html").read_text()
    assert "of memory at the peak" in (tmp_path / "run" / "log.txt").read_text()
