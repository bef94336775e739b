"""Images' own matrices beside dense ones from automatic differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.evidence.whitening import whitening
from adversaries.inversion.matching import blocks
from adversaries.inversion.matching.blocks import Blocks, Reach, jacobian, worthwhile
from fedattack.observation import Auxiliary

CPU = torch.device("cpu")
SHAPE = (2, 12, 10)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolved(images: Tensor) -> Tensor:
    return F.max_pool2d(F.conv2d(images, drawn(3, 2, 3, 3, seed=1), padding=1).relu(), 2)


def mixed(images: Tensor) -> Tensor:
    """Every position sees every pixel."""
    return (images.flatten(1) @ drawn(240, 3 * 6 * 5, seed=2)).tanh().view(-1, 3, 6, 5)


@pytest.mark.parametrize("given", [convolved, mixed])
def test_the_jacobian_is_autograds(given: Any) -> None:
    images = drawn(3, *SHAPE)
    reach = Reach.of(given, images)
    assert reach.spacing == ((12, 10) if given is mixed else (5, 5))
    for image in images.split(1):
        found = jacobian(given, image, reach)
        wanted = torch.autograd.functional.jacobian(given, image)[0, :, :, :, 0].flatten(3)
        assert torch.allclose(found, wanted.permute(3, 0, 1, 2), atol=1e-12)


@pytest.mark.parametrize("settings", [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_factors_solve_what_they_were_made_of(monkeypatch: Any, settings: tuple[int, int, int]) -> None:
    """One image: outputs' and gradient's equations with the prior, dense, against its factors."""
    monkeypatch.setattr(blocks, "_SLIGHT", 0.0)
    stride, padding, dilation = settings
    how = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
    public = Auxiliary(torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(5)))
    prior = whitening(public, SHAPE, CPU, torch.float64)
    image, kernel = drawn(1, *SHAPE), drawn(4, 3, 3, 3, seed=3)
    outputs = F.conv2d(convolved(image), kernel, **how)[0]
    weights, factors = drawn(*outputs.shape, seed=6).square(), drawn(*outputs.shape, seed=7)
    noise = drawn(4, seed=8).square() + 0.1

    def residual(image: Tensor) -> Tensor:
        given = convolved(image)
        of_outputs = F.conv2d(given, kernel, **how)[0] * weights.sqrt()
        of_gradient = torch.nn.grad.conv2d_weight(given, kernel.shape, factors[None], **how)
        return torch.cat([of_outputs.flatten(), (of_gradient / noise.sqrt().view(-1, 1, 1, 1)).flatten()])

    slope = torch.autograd.functional.jacobian(residual, image).flatten(1)
    turn = torch.stack([prior.turn(one) for one in torch.eye(240).double().view(240, *SHAPE)]).flatten(1).T
    system = turn.T @ slope.T @ slope @ turn + torch.eye(240).double()
    found = Blocks(prior, convolved, kernel, how, image)
    found.factor(image, weights[None], factors[None], noise)
    right = drawn(1, *SHAPE, seed=9)
    wanted = torch.linalg.solve(system, right.flatten())
    assert torch.allclose(found(right).flatten(), wanted, rtol=1e-6, atol=1e-9)


def test_large_images_and_batches_are_not_factored() -> None:
    assert worthwhile(torch.zeros(16, 3, 32, 32))
    assert not worthwhile(torch.zeros(1, 3, 64, 64))
    assert not worthwhile(torch.zeros(64, 3, 32, 32))


def test_a_matrix_that_cannot_be_factored_still_preconditions(monkeypatch: Any) -> None:
    failing = lambda matrix: (torch.full_like(matrix, float("nan")), torch.ones(()))  # noqa: E731
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    image, kernel = drawn(1, *SHAPE), drawn(4, 3, 3, 3, seed=3)
    how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    prior = whitening(None, SHAPE, CPU, torch.float64)
    found = Blocks(prior, convolved, kernel, how, image)
    outputs = F.conv2d(convolved(image), kernel, **how)
    found.factor(image, outputs.square(), outputs, torch.ones(4).double())
    right = drawn(1, *SHAPE, seed=9)
    assert float((right * found(right)).sum()) > 0
