"""Clipping and Gaussian noise, with the epsilon accounted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from fedattack.config import TrainingConfig
from fedattack.defenses.accounting import Privacy, gaussian_epsilon, sampled_epsilon
from fedattack.defenses.base import Defense
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.task import GradientStep, LossAndGradient, PerSample

_AT_ONCE = 16
"""Samples whose gradients lie side by side in memory."""


@dataclass
class ClipNoise(Defense):
    """Clip to an L2 norm and add Gaussian noise: each whole update, or each sample's gradient as in DP-SGD.

    The guarantee is about updates. The training loss that clients report goes to the record and to no adversary, but
    is not noised; BatchNorm statistics void it (epsilon is infinite then).

    Parameters
    ----------
    clip_norm : float or None
        The L2 bound C; None: no clipping, hence no guarantee.
    noise : float
        Noise multiplier s: N(0, (s C)^2) in every entry; without clipping the standard deviation itself.
    unit : {"update", "sample"}
        "update": clip what the client sends, then add noise. "sample": in every local step clip each sample's
        gradient, add noise to their sum and divide by the batch's size.
    delta : float
        At which epsilon is reported.

    References
    ----------
    Abadi et al., Deep Learning with Differential Privacy, 2016, algorithm 1 ("sample"); McMahan et al., Learning
    Differentially Private Recurrent Language Models, 2018, clip each user's update ("update", here with local noise).
    """

    draws: ClassVar[bool] = True

    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    noise: Annotated[float, Field(ge=0)] = 1.0
    unit: Literal["update", "sample"] = "update"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    @property
    def clips_samples(self) -> bool:
        """Under unit "sample"."""
        return self.unit == "sample"

    def check(self, scenario: Scenario) -> None:
        """Refuse per-sample gradients of a model whose samples share statistics."""
        if self.unit == "sample" and _mixes_samples(build_model(scenario.model)):
            raise NotApplicable(
                f"setting 'defense.clip-noise.unit' = 'sample': model {scenario.model.name!r} has BatchNorm, under "
                "which a sample has no gradient of its own; use unit 'update' or a model without it"
            )

    def gradient(
        self, model: nn.Module, images: Tensor, labels: Tensor, inner: GradientStep, generator: Generator
    ) -> LossAndGradient:
        """Mean of the clipped gradients of the samples, with noise; `inner` unchanged under unit "update"."""
        if self.unit == "update":
            return inner(model, images, labels)
        several = isinstance(inner, PerSample)
        losses: list[Tensor] = []
        total: list[Tensor] = []
        parts = (part.split(_AT_ONCE if several else 1) for part in (images, labels))
        for some, truth in zip(*parts, strict=True):
            if isinstance(inner, PerSample):
                loss, gradients = inner.per_sample(model, some, truth)
                clipped = self._clipped_sum(gradients)
            else:
                loss, gradient = inner(model, some, truth)
                clipped = self.clipped(gradient)
            if losses:
                torch._foreach_add_(total, clipped)
            else:
                total = [part.clone() for part in clipped]
            losses.append(loss.detach().reshape(-1))
        mean = [(part + self._noise(part, generator)) / len(images) for part in total]
        return torch.cat(losses).mean(), tuple(mean)

    def update(self, update: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The clipped update with noise; unchanged under unit "sample"."""
        if self.unit == "sample":
            return update
        clipped = self.clipped(list(update.values()))
        return {n: t + self._noise(t, generator) for n, t in zip(update, clipped, strict=True)}

    def privacy(self, training: TrainingConfig, samples: int, rounds: int, statistics_sent: bool) -> Privacy:
        """Epsilon at `delta`; adjacency: one unit's contribution is there or is zero."""
        unit: Literal["client", "sample"] = "sample" if self.unit == "sample" else "client"
        releases, rate = rounds, 1.0
        if self.unit == "sample":
            batch = min(training.batch_size or samples, samples)
            in_epoch = math.ceil(samples / batch)
            releases, rate = rounds * math.ceil(training.steps(samples) / in_epoch), batch / samples
        note = ""
        if self.clip_norm is None:
            note = "nothing bounds a client's contribution: set defense.clip-noise.clip_norm"
        elif self.noise == 0:
            note = "no noise"
        elif statistics_sent:
            note = "BatchNorm statistics are sent beside the update, unprotected"
        if note:
            return Privacy(math.inf, self.delta, unit, releases, None, note)
        sampled = None
        if unit == "sample":
            steps = rounds * training.steps(samples)
            sampled = sampled_epsilon(rate, self.noise, steps, self.delta)
        there_or_zero, replaced = (
            gaussian_epsilon(s, releases, self.delta) for s in (self.noise, self.noise / 2)
        )
        return Privacy(there_or_zero, self.delta, unit, releases, sampled, replacement_epsilon=replaced)

    def _clipped_sum(self, gradients: tuple[Tensor, ...]) -> list[Tensor]:
        """Of gradients that lie side by side, (n, ...) for each parameter."""
        # row by row, then in float64: as exact as in float64 throughout, without a copy of twice the size
        rows = [torch.linalg.vector_norm(part.reshape(*part.shape[:2], -1), dim=2) for part in gradients]
        norms = torch.stack([part.double().square().sum(1) for part in rows]).sum(0).sqrt()
        bound = self.clip_norm
        scale = torch.ones_like(norms) if bound is None else bound / norms.clamp(min=bound)
        return [torch.tensordot(scale.to(part.dtype), part, dims=1) for part in gradients]

    def clipped(self, parts: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
        """The tensors of one contribution, scaled to have at most the clip norm together."""
        if self.clip_norm is None:
            return list(parts)
        norm = torch.stack(torch._foreach_norm(list(parts))).double().square().sum().sqrt()
        scale = (self.clip_norm / norm.clamp(min=self.clip_norm)).float()
        return list(torch._foreach_mul(list(parts), scale))

    def _noise(self, like: Tensor, generator: Generator) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator)
        return (drawn * (self.noise * (self.clip_norm or 1.0))).to(like)


def _mixes_samples(model: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
