"""Compiled passes give what the passes give, and do without where nothing can be compiled."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import observe, scenario, smooth_images
from torch import Tensor, nn

from adversaries.inversion.gradients import Compile, gradient_model
from adversaries.inversion.gradients.compiled import LONG
from adversaries.inversion.gradients.convolution import Adjoint
from adversaries.inversion.matching.match import Match, match
from adversaries.inversion.matching.pixels import Pixels
from adversaries.inversion.matching.problem import Problem
from adversaries.inversion.matching.settings import Matching
from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models.classifiers.resnet import ResNet
from fedattack.observation import Observation

CPU = torch.device("cpu")


def residual(config: ModelConfig) -> nn.Module:
    """Every kind of layer of a ResNet, once: compiling takes as long as there are layers."""
    return ResNet(config, (1, 1), width=8)


def victims(model: str, count: int = 1) -> tuple[list[Observation], Tensor]:
    images, labels = smooth_images(count, 16), torch.arange(count) + 3
    scene = scenario(10, model=model, size=16, name="none")
    seen = [
        observe(scene, image[None], label[None], client=client)
        for client, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    return seen, labels[:, None]


def settings(how: Compile, iterations: int = 6) -> Matching:
    return Matching(
        objective="cosine", optimiser="adam", learning_rate=0.1, iterations=iterations, compile=how
    )


def matched(model: str, how: Compile, count: int = 1) -> list[Match]:
    seen, labels = victims(model, count)
    starts = smooth_images(count, 16, seed=9)[None, :, None]
    return match(seen, labels, starts, settings(how), CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "count"), [("lenet-zhu", 1), ("lenet-zhu", 5), ("test_compiled:residual", 1)]
)
def test_compiled_passes_are_the_passes(model: str, count: int) -> None:
    plain, compiled = matched(model, "never", count), matched(model, "always", count)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours.compiled, theirs.compiled) == ("compiled", "no")
        assert ours.history[:4] == pytest.approx(theirs.history[:4], rel=1e-3)
        torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=5e-3)


def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        del args, options

        def call(*values: Any) -> Any:
            raise RuntimeError("no working C++ compiler\n  and a long explanation")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING, "fedattack.attacks"):
        found, plain = matched("tiny-cnn", "always"), matched("tiny-cnn", "never")
    assert torch.equal(found[0].images, plain[0].images)
    assert found[0].compiled == "not compiled: RuntimeError: no working C++ compiler"
    assert caplog.text.count("no working C++ compiler") == 1


@pytest.mark.parametrize(
    ("how", "iterations", "wanted"),
    [("auto", LONG - 1, False), ("auto", LONG, True), ("always", 1, True), ("never", LONG, False)],
)
def test_long_runs_are_compiled(how: Compile, iterations: int, wanted: bool) -> None:
    seen, labels = victims("tiny-cnn")
    gradients = gradient_model(seen, labels, device=CPU)
    problem = Problem(gradients, Pixels((1, 3, 16, 16)), settings(how, iterations))
    assert (problem.compiled == "not yet") == wanted


def test_settings_without_written_slopes_are_not_compiled() -> None:
    seen, labels = victims("tiny-cnn")
    starts = smooth_images(1, 16, seed=9)[None, :, None]
    chosen = Matching(objective="layer-cosine", optimiser="adam", iterations=1, compile="always")
    assert "automatic differentiation" in match(seen, labels, starts, chosen, CPU)[0].compiled
    with pytest.raises(ConfigError, match="compile"):
        Matching(compile="often")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        ((5, 5), (2, 2), (2, 2), (32, 32)),
        ((3, 3), (1, 1), (1, 1), (8, 8)),
        ((3, 3), (2, 2), (1, 1), (9, 8)),
        ((1, 1), (2, 2), (0, 0), (7, 8)),
        ((2, 3), (3, 2), (0, 2), (11, 10)),
        ((4, 2), (2, 3), (3, 1), (10, 13)),
        ((1, 1), (3, 3), (0, 0), (10, 10)),
        ((7, 7), (2, 2), (0, 0), (12, 12)),
    ],
)
def test_adjoint_of_a_strided_convolution(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(2, 4, 3, *kernel, dtype=torch.float64)
    outputs = [F.conv2d(x[v : v + 1], kernels[v], stride=stride, padding=padding) for v in (0, 1)]
    delta = torch.randn(2, *outputs[0].shape[1:], dtype=torch.float64)
    (wanted,) = torch.autograd.grad(outputs, x, list(delta.split(1)))
    adjoint = Adjoint(kernels.shape[1:], (list(stride), list(padding), [1, 1]), CPU)
    product = torch.bmm(adjoint.matrices(kernels), adjoint.fields(delta, x.shape))
    torch.testing.assert_close(adjoint.images(product, x.shape), wanted)
