"""What mechanisms say that their releases are at the minimum of, written down again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.models import initial_weights, resolve
from fedattack.observation import Scenario
from fedattack.unlearning import Central, History, Mechanism
from fedattack.unlearning.certified import CertifiedRemoval
from fedattack.unlearning.curvature import minimise
from fedattack.unlearning.newton import Newton
from fedattack.unlearning.retrain import Retrain


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(
    "mechanism",
    [
        Newton(),
        CertifiedRemoval(sigma=0.0),
        CertifiedRemoval(sigma=0.0, loss="ridge", scale=0.5),
        CertifiedRemoval(sigma=0.0, l2=0.3),
    ],
)
def test_releases_are_at_the_minimum_of_what_is_said(
    tmp_path: Path, mechanism: Mechanism, classes: int
) -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images[:300] / 16.0).float()[:, None]
    labels = torch.from_numpy(digits.target[:300].astype("int64")) % classes
    training = TrainingConfig(protocol="fedavg", batch_size=0, weight_decay=0.05)
    scenario = Scenario(
        resolve(ModelConfig(name="logistic"), 1, 8, classes), training, CompressionConfig(name="none")
    )
    central = Central(scenario, images, labels, 0, 1)
    history = History(tmp_path, scenario)
    history.keep_weights(0, initial_weights(scenario.model, 0))
    trainer: Any = SimpleNamespace(central=lambda: central)
    released = mechanism.prepare({}, history, trainer)
    goal = mechanism.minimises(scenario)
    assert goal is not None
    weights = {name: tensor.double().requires_grad_() for name, tensor in released.items()}
    logits = images.flatten(1).double() @ weights["head.weight"].T + weights["head.bias"]
    truth = one_hot(labels, classes).double()
    losses = {
        "softmax": lambda: cross_entropy(logits, labels),
        "logistic": lambda: binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(labels),
        "ridge": lambda: (
            (logits - (truth - 0.5) * (1 if classes == 2 else 2)).square().sum() / 2 / len(labels)
        ),
    }
    loss = losses[goal.link]()
    penalty = goal.decay / 2 * sum(tensor.square().sum() for tensor in weights.values())
    pulls = [torch.autograd.grad(part, list(weights.values()), retain_graph=True) for part in (loss, penalty)]
    left = sum(float((one + other).square().sum()) for one, other in zip(*pulls, strict=True)) ** 0.5
    size = sum(float(one.square().sum()) for one in pulls[0]) ** 0.5
    assert left < 1e-5 * size  # released in float32


def test_a_minimum_is_found_where_values_are_equal_to_rounding() -> None:
    """Values are known to 1e-9 of what they are, gradients exactly, as where sums of many losses are taken."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    curvature = matrix @ matrix.T + torch.eye(20, dtype=torch.float64)
    wanted = torch.randn(20, generator=generator, dtype=torch.float64)

    def evaluate(point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = curvature @ (point - wanted)
        return ((point - wanted) @ gradient / 2).mul(1e7).round().div(1e7) + 100, gradient

    found = minimise(evaluate, torch.zeros(20, dtype=torch.float64), 1e-9, 1000)
    assert float((curvature @ (found - wanted)).abs().max()) <= 1e-9
    assert float((found - wanted).abs().max()) < 1e-8


def test_others_are_at_the_minimum_of_nothing_known() -> None:
    training = TrainingConfig(protocol="fedavg", batch_size=0, weight_decay=0.05)
    none = CompressionConfig(name="none")
    deep = Scenario(resolve(ModelConfig(name="mlp"), 1, 8, 10), training, none)
    flat = Scenario(resolve(ModelConfig(name="logistic"), 1, 8, 10), training, none)
    assert Newton().minimises(deep) is None
    assert CertifiedRemoval().minimises(deep) is None  # of the last layer alone
    assert Newton(converge=False).minimises(flat) is None
    assert Retrain().minimises(flat) is None
