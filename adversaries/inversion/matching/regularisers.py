"""What images ought to look like beside explaining the update: the regularisers of gradient matching.

Each gives one number for each victim, (V,), that is small for likely images. Pixel terms are means, so that a weight
means the same at every image size and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from adversaries.inversion.gradients import Statistics
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation
from fedattack.registry import Registry

PixelTerm = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(Images (V, B, C, H, W), weight) -> weight times the term (V,), and its gradient (V, B, C, H, W), written out."""


def tv_l2(images: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean squared difference of neighbouring pixels, vertical plus horizontal, and its gradient."""
    return _variation(images, weight, torch.square, lambda steps, share: steps.mul_(2 * share))


def tv_l1(images: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean absolute difference of neighbouring pixels, vertical plus horizontal, and its gradient."""
    return _variation(images, weight, torch.abs, lambda steps, share: steps.sign_().mul_(share))


def _variation(
    images: Tensor, weight: float, cost: Callable[[Tensor], Tensor], pull: Callable[[Tensor, float], Tensor]
) -> tuple[Tensor, Tensor]:
    """What neighbours' differences cost, and its gradient; `pull` is that at the differences, made in place."""
    slope, values = torch.zeros_like(images), []
    for axis in (3, 4):
        steps, count = images.diff(dim=axis), images.shape[axis] - 1
        share = weight * len(steps) / max(steps.numel(), 1)
        values.append(cost(steps).sum((1, 2, 3, 4)) * share)
        steps = pull(steps, share)
        slope.narrow(axis, 1, count).add_(steps)
        slope.narrow(axis, 0, count).sub_(steps)
    return values[0] + values[1], slope


def l2(images: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean squared pixel and its gradient."""
    share = weight * len(images) / images.numel()
    return images.square().sum((1, 2, 3, 4)) * share, images * (2 * share)


def group(images: Tensor, centres: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean squared distance to the mean image of a victim's restarts, and its gradient (Yin et al. 2021, eq. 11).

    Unlike there the restarts are not registered to each other first, and the mean is held fixed.
    """
    return l2(images - centres, weight)


PIXEL_TERMS: Registry[PixelTerm] = Registry(
    "regulariser", {"tv2": tv_l2, "tv1": tv_l1, "l2": l2}, group="fedattack.regularisers"
)
"""Terms of the images alone."""

SPECIAL = ("batch-norm", "group")
"""Regularisers that see more than the images."""


def batch_norm(statistics: Statistics, targets: Statistics) -> Tensor:
    """Distances (V,) between BatchNorm inputs' statistics and their targets (Yin et al. 2021, eq. 6).

    The sum over layers of the Euclidean distances of means and of variances, (V, channels) each.
    """
    terms = [
        (found - wanted).norm(dim=1)
        for layer, target in zip(statistics, targets, strict=True)
        for found, wanted in zip(layer, target, strict=True)
    ]
    return torch.stack(terms).sum(0)


def batch_norm_targets(observations: Sequence[Observation], batch: int, device: torch.device) -> Statistics:
    """What the private batch's BatchNorm statistics are, or the best guess at them.

    A client that sends its buffers after one step gives its batch's statistics away exactly: new = (1 - m)
    old + m batch, with the unbiased variance. Without them, under frozen statistics or after several steps,
    they are taken to be those of the data that the model was trained on before, the running statistics that
    were sent out (as Yin et al. 2021 do).

    Answers mean and biased variance of each layer's input, first layer first, float32 (V, channels) each;
    NotApplicable if the model has no BatchNorm with running statistics.
    """
    first = observations[0]
    layers = _batch_norm_layers(first)
    if not layers:
        raise NotApplicable(
            f"regulariser 'batch-norm': model {first.scenario.model.name!r} has no BatchNorm; use a ResNet, or leave "
            "the regulariser out"
        )
    training = first.scenario.training
    one_step = training.protocol == "fedsgd" or training.local_steps == 1
    exact = one_step and training.batch_norm == "train"
    found = []
    for name, momentum, positions in layers:
        count = batch * positions
        means, variances = [], []
        for observation in observations:
            mean, variance = (
                _batch_buffer(observation, f"{name}.{part}", momentum if exact else None)
                for part in ("running_mean", "running_var")
            )
            means.append(mean)
            sent_by_client = exact and f"{name}.running_var" in observation.buffers
            variances.append(variance * (count - 1) / count if sent_by_client else variance)
        found.append((torch.stack(means).to(device), torch.stack(variances).clamp(min=0).to(device)))
    return tuple(found)


def _batch_buffer(observation: Observation, name: str, momentum: float | None) -> Tensor:
    """The batch's part of a running statistic, where the client sent it and `momentum` is given; else the old one."""
    old = observation.weights[name].double().cpu()
    if momentum is None or name not in observation.buffers:
        return old.float()
    return ((observation.buffers[name].double().cpu() - (1 - momentum) * old) / momentum).float()


def _batch_norm_layers(observation: Observation) -> list[tuple[str, float, int]]:
    """Name, momentum and positions per image of each BatchNorm, in the order in which they run."""
    module = build_model(observation.scenario.model).eval()
    names = {part: name for name, part in module.named_modules()}
    layers: list[tuple[str, float, int]] = []

    def note(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(part, nn.modules.batchnorm._BatchNorm)
        if part.momentum is None:
            raise ConfigError(
                f"regulariser 'batch-norm': layer {names[part]!r} averages over all batches (momentum None), which "
                "hides the last one; leave the regulariser out"
            )
        layers.append((names[part], part.momentum, inputs[0][0, 0].numel()))

    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            part.register_forward_pre_hook(note)
    with torch.no_grad():
        module(torch.zeros(1, *observation.scenario.image_shape))
    return layers
