"""Ridge regression from censored features: scikit-learn's answer, and a sensible strength."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from adversaries.inversion.learning import ridge
from adversaries.inversion.learning.ridge import FeatureRegression
from fedattack.rng import torch_rng


def smooth_images(count: int, seed: int) -> torch.Tensor:
    """(count, 3, 6, 6) images of few degrees of freedom in [0, 1]."""
    generator = torch_rng(seed, "test")
    basis = torch.randn(12, 108, generator=torch_rng(99, "test"))
    return torch.sigmoid(torch.randn(count, 12, generator=generator) @ basis * 0.4).reshape(count, 3, 6, 6)


@pytest.mark.parametrize("count", [30, 300])
def test_equals_scikit_learn(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "STRENGTHS", (1e-2,))
    generator = torch_rng(2, "test")
    images = smooth_images(count, 0)
    features = torch.sigmoid(images.flatten(1) @ torch.randn(108, 50, generator=generator))
    victim, known = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.6
    cap = 0.4
    found = FeatureRegression(features, images).predict(victim, known, cap)
    inputs = features.double().clamp(min=cap).numpy()
    asked = torch.where(known, victim, torch.tensor(cap)).double().numpy()[None]
    strength = 1e-2 * float(((inputs - inputs.mean(0)) ** 2).sum(0).mean())
    reference = Ridge(alpha=strength).fit(inputs, images.double().flatten(1).numpy()).predict(asked)[0]
    np.testing.assert_allclose(found.flatten().numpy(), reference, atol=1e-5)


def test_is_nearer_than_the_mean() -> None:
    images, victim = smooth_images(500, 3), smooth_images(1, 7)
    mixing = torch.randn(108, 60, generator=torch_rng(3, "test"))
    features, seen = (torch.sigmoid(x.flatten(1) @ mixing) for x in (images, victim))
    start = FeatureRegression(features, images).predict(seen[0], seen[0] > 0.3, 0.3)
    assert start.shape == (3, 6, 6)
    assert (start - victim[0]).square().mean() < 0.5 * (images.mean(0) - victim[0]).square().mean()
