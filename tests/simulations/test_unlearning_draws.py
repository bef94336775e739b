"""What keeping the other samples' batches is for: damage that other draws do not drown."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from fedattack.config import Config, ModelConfig
from fedattack.data import build_world
from simulations.engine.federation import Judge, run_federation

CENTRAL = {
    "model": "test_unlearning_draws:softmax",
    "clients": 1,
    "rounds": 1,
    "local-steps": 314,
    "batch-size": 32,
}
FEDERATED = {"model": "mlp", "clients": 4, "rounds": 6, "local-steps": 8, "batch-size": 16, "limit": 1540}


def softmax(config: ModelConfig) -> nn.Module:
    """Regression on the pixels."""
    channels, side, classes = config.resolved
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def cost(seed: int, draws: str, **more: object) -> tuple[float, float]:
    """Accuracy lost and loss gained by 20 random deletions."""
    settings = {
        "dataset": "digits",
        "protocol": "fedavg",
        "compressor": "none",
        "engine": "inline",
        "seed": seed,
    }
    settings |= {"data.auxiliary_size": 0, "data.nonmembers": 540, "federation.evaluate": False}
    config = Config.from_mapping(settings | {"unlearning.draws": draws} | more)
    world = build_world(config)
    judge = Judge(config, world)
    gone = np.random.default_rng(1000 + seed).choice(len(world.partitions[0]), 20, replace=False).tolist()
    whole, without = (judge(run_federation(config, world, excluded=e).weights) for e in ({}, {0: gone}))
    return whole["accuracy"] - without["accuracy"], without["loss"] - whole["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "rate", "accuracy", "loss"), [(CENTRAL, 0.5, 2.5, 5.0), (FEDERATED, 0.1, 1.0, 2.0)]
)
def test_deviations_of_what_random_deletions_cost(
    setting: dict[str, object], rate: float, accuracy: float, loss: float
) -> None:
    """Over 24 seeds, of batches drawn anew over those of batches that were kept."""
    spread = {
        draws: np.std([cost(seed, draws, **setting, **{"learning-rate": rate}) for seed in range(24)], axis=0)
        for draws in ("kept", "anew")
    }
    ratios = spread["anew"] / spread["kept"]
    print(f"deviations, anew over kept: accuracy {ratios[0]:.1f}, loss {ratios[1]:.1f}")
    assert ratios[0] >= accuracy
    assert ratios[1] >= loss
