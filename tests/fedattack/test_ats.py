"""Automatic Transformation Search: both scores against closed forms, what is drawn, and the order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedattack.defenses.ats import (
    LEAST_ACCURACY,
    STEPS,
    Candidate,
    K,
    Search,
    accuracy_score,
    candidates,
    privacy_score,
    ranked,
)
from fedattack.defenses.transform import SUB_POLICIES, Transform
from fedattack.errors import ConfigError, DataError
from fedattack.rng import torch_rng

INVERT = "0"


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """On 1/255 steps, so that a policy's rounding changes nothing."""
    return (torch.rand(count, 1, 6, 6, generator=torch_rng(seed, "pictures")) * 255).round() / 255


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4, bias=False))


def perceptron(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def test_privacy_of_a_linear_model_by_hand() -> None:
    """Its gradient is an outer product, whose cosine is that of the errors times that of the images."""
    assert SUB_POLICIES[0][0] == "invert"
    model, image, label = linear(), pictures(1), torch.tensor([2])
    noise = torch.rand(1, 1, 6, 6, generator=torch_rng(1, "noise"))
    weights = model[1].weight.detach().double().numpy()
    shown = 1 - image.double().numpy().ravel()

    def error(x: np.ndarray) -> np.ndarray:
        exp = np.exp(weights @ x)
        return exp / exp.sum() - np.eye(4)[2]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    found = []
    for t in range(STEPS + 1):
        x = t / STEPS * shown + (1 - t / STEPS) * noise.double().numpy().ravel()
        found.append(cosine(error(x), error(shown)) * cosine(x, shown))
    wanted = sum((a + b) / 2 for a, b in itertools.pairwise(found)) / STEPS
    transform = Transform(policy=INVERT, crop=False)
    got = privacy_score(model, image, label, noise, transform, torch_rng(0, "t"))
    assert got == pytest.approx(wanted, abs=1e-6)
    assert privacy_score(model, image, label, 1 - image, transform, torch_rng(0, "t")) == pytest.approx(
        1, abs=1e-6
    )


def test_accuracy_against_eigenvalues_of_slopes_taken_one_by_one() -> None:
    model, images = perceptron(), pictures(12)
    rows = []
    for image in images:
        x = image[None].requires_grad_(True)
        model(x).sum().backward()
        assert x.grad is not None
        rows.append(x.grad.double().numpy().ravel())
    values = np.linalg.eigvals(np.corrcoef(np.array(rows))).real.clip(min=0)
    wanted = -float(np.sum(np.log(values + K) + 1 / (values + K)))
    assert accuracy_score(model, images) == pytest.approx(wanted, rel=1e-4)
    assert wanted < -len(images)


def test_a_linear_model_has_equal_slopes() -> None:
    n = 5
    wanted = -(math.log(n + K) + 1 / (n + K)) - (n - 1) * (math.log(K) + 1 / K)
    assert accuracy_score(linear(), pictures(n)) == pytest.approx(wanted, rel=1e-6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(DataError, match="cannot be correlated"):
        accuracy_score(model, pictures(n))


def test_candidates_are_in_range_and_seeded() -> None:
    found = candidates(3000, 0)
    assert found == candidates(3000, 0) != candidates(3000, 1)
    assert len(set(found)) == 3000
    indices = [int(part) for policy in found for part in policy.split("-") if part]
    assert (min(indices), max(indices)) == (0, len(SUB_POLICIES) - 1)
    lengths = np.bincount([len([p for p in policy.split("-") if p]) for policy in found])
    assert lengths[3] / len(found) == pytest.approx((50 / 51) ** 3, abs=0.02)
    with pytest.raises(ConfigError, match="are accepted"):
        candidates(0, 0)


def test_the_order_of_candidates() -> None:
    def made(policy: str, privacy: tuple[float, float], accuracy: float) -> Candidate:
        return Candidate(policy, privacy, (10 * accuracy,), 10)

    even, uneven = made("1", (0.2, 0.2), -1.2), made("2", (0.0, 0.4), -1.2)
    leaky, costly = made("3", (0.8, 0.8), -1.0), made("4", (0.0, 0.0), LEAST_ACCURACY - 0.01)
    order = ranked([leaky, costly, uneven, even])
    assert [one.policy for one, _ in order] == ["1", "2", "3"]
    assert [score for _, score in order] == pytest.approx([0.0, 0.3, 0.7])
    assert ranked([costly]) == []
    assert [score for _, score in ranked([even, even])] == [0.0, 0.0]


def test_a_search_is_repeatable_and_tells_policies_apart() -> None:
    images, labels = pictures(24), torch.arange(24) % 4
    search = Search(perceptron(1), perceptron(2), images, labels, per_class=2, batches=2, batch=8)
    found = search.run(["", "1-1-1", INVERT])
    assert found == search.run(["", "1-1-1", INVERT])
    assert [len(one.privacy) for one in found] == [4] * 3
    assert len({one.mean_privacy for one in found}) == 3
    assert found[0].accuracy == tuple(
        accuracy_score(perceptron(2), part) for part in (images[16:], images[8:16])
    )
    assert all(one.accuracy_per_image <= -1 for one in found)


def test_too_few_images_are_refused() -> None:
    images, labels = pictures(24), torch.arange(24) % 4
    with pytest.raises(DataError, match="there are 24 images"):
        Search(perceptron(), perceptron(), images, labels, batches=3, batch=10)
    with pytest.raises(DataError, match="a class has 6"):
        Search(perceptron(), perceptron(), images, labels, per_class=7, batches=1, batch=2)
