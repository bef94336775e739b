"""The tensor attack on the head's whole gradient: a class's samples by themselves, and as many as there are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from adversaries.reconstruction.tensor import by_class
from adversaries.reconstruction.tensor.head import TwoLayerHead
from fedattack.metrics import match, psnr

SIZE = 6


def batch(
    labels: list[int], width: int, seed: int, name: str = "poly3"
) -> tuple[TwoLayerHead, Tensor, Tensor]:
    """A head with Gaussian neurons, inputs (B, 36) that resemble one another, and the head's gradient in float32."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.rand(1, SIZE**2, generator=generator).double()
    inputs = (0.5 * common + 0.5 * torch.rand(len(labels), SIZE**2, generator=generator)).double()
    last = torch.zeros(10, width)
    last[0] = 1 / width
    head = TwoLayerHead.of(torch.randn(width, SIZE**2, generator=generator) / 3.2, last, name)
    return head, inputs, head.gradient(inputs, torch.tensor(labels))[1].float().double()


@pytest.mark.parametrize("weigher", [None, 9])
def test_jacobian_of_a_class_sum_is_autograds(weigher) -> None:
    head, inputs, _ = batch([3, 3, 3], 20, 0, "tanh")
    head = dataclasses.replace(head, head=20 * head.head, scale=20 * head.scale)
    function = by_class.ClassSum(head, torch.zeros(20).double(), weigher, copies=2)
    wanted = torch.autograd.functional.jacobian(function, inputs).reshape(20, -1)
    torch.testing.assert_close(function.at(inputs)[1](), wanted)


@pytest.mark.parametrize(
    ("labels", "width"), [([5, 5], 160), ([7, 7, 7, 1], 320), ([4, 0, 8, 0], 320), ([0, 0], 320)]
)
def test_equal_labels_come_apart_whatever_the_seed(labels, width) -> None:
    for seed in range(5):
        head, inputs, gradient = batch(labels, width, seed)
        found = by_class.solve(head, gradient, len(labels), torch.Generator().manual_seed(seed))
        assert found is not None
        images, truth = (part.reshape(-1, 1, SIZE, SIZE) for part in (found[1], inputs))
        order = list(match(images, truth).order)
        assert found[0][order].tolist() == labels
        assert psnr(images[order], truth).min() > 80


def test_noise_leaves_no_class_to_subtract() -> None:
    head, _, gradient = batch([5, 5], 160, 0)
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
    noisy = gradient + 1e-3 * gradient.std() * noise
    assert by_class.solve(head, noisy, 2, torch.Generator().manual_seed(0)) is None
    # Two samples of three classes: none is left for the last.
    head, _, gradient = batch([5, 6, 7], 320, 0)
    assert by_class.solve(head, gradient, 2, torch.Generator().manual_seed(0)) is None
