"""Which positions max-pooling took: told from sums of patches, and windows that fold back."""

from __future__ import annotations

import pytest
import torch

from adversaries.inversion.matching.below import Below
from adversaries.inversion.matching.positions import Positions, _detected
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.models import initial_weights, resolve
from fedattack.observation import Scenario

CPU = torch.device("cpu")


def test_positions_are_told_from_the_sum_of_their_patches() -> None:
    """40 windows of 4 patches each, 200 numbers: no position is known beforehand, and all are found."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(40, 4, 200, generator=generator, dtype=torch.float64)
    truth = torch.randint(4, (40,), generator=generator)
    target = patches[torch.arange(40), truth].sum(0)
    shares = torch.full((40, 4), 0.25, dtype=torch.float64)
    for _ in range(3):
        shares, still_open = _detected(patches, shares, target, 200)
    left = (target - (shares[..., None] * patches).sum((0, 1))).square().mean()
    assert torch.equal(shares.argmax(1), truth)
    assert shares.amax(1).min() > 0.99
    assert left < 1e-3 * float(target.square().mean())
    assert still_open < 1e-3 * float(target.square().mean())


def test_more_windows_than_numbers_stay_open() -> None:
    """What 400 windows sum to in 20 numbers tells next to nothing, and the chances say so."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(400, 4, 20, generator=generator, dtype=torch.float64)
    truth = torch.randint(4, (400,), generator=generator)
    target = patches[torch.arange(400), truth].sum(0)
    shares, still_open = _detected(patches, torch.full((400, 4), 0.25, dtype=torch.float64), target, 20)
    assert shares.amax(1).mean() < 0.5
    assert still_open > 0.1 * float(target.square().mean())


@pytest.mark.parametrize(("side", "outputs"), [(32, (64, 16, 16)), (20, (64, 10, 10)), (14, (64, 7, 7))])
def test_windows_and_their_adjoint(side: int, outputs: tuple[int, int, int]) -> None:
    model = resolve(ModelConfig(name="cnn-mcmahan", width=8), 1, side, 4)
    weights = initial_weights(model, 0)
    scenario = Scenario(model, TrainingConfig(), CompressionConfig(name="none"))
    below = Below(scenario, "body.7", CPU, torch.float32)
    pooling = below.last_pooling(torch.rand(2, 1, side, side), weights)
    assert pooling is not None
    assert pooling.name == "body.3"
    assert pooling.outputs == outputs
    features = torch.rand(2, 64 * (outputs[1] // 2) ** 2)
    kernel = weights["body.3.weight"].flatten(1)
    positions = Positions(below, pooling, weights, features, features, kernel, kernel != 0)
    generator = torch.Generator().manual_seed(2)
    one = torch.randn(2, *outputs, generator=generator)
    windows = positions._windows(one)
    other = torch.randn(windows.shape, generator=generator)
    assert torch.allclose((windows * other).sum(), (one * positions._unfolded(other)).sum(), rtol=1e-4)
