"""Canaries: units whose contribution is there or not by a coin flip, so that a promise of noise can be measured.

Who is a canary, whether it is there and what it contributes are pure functions of the run's seed: the clients plant
them, the auditor knows them, and no adversary is handed that seed. The adjacency is the one for which ``clip-noise``
accounts: one unit's contribution is there, or is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedattack.config import Config, DefenseConfig, TrainingConfig
from fedattack.defenses import build_defenses
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.errors import ConfigError, RunFailed
from fedattack.rng import numpy_rng
from fedattack.task import GradientStep, LossAndGradient, PerSample

Kind = Literal["gradient", "mislabelled", "client"]

UNITS: Mapping[Kind, str] = {"gradient": "sample", "mislabelled": "sample", "client": "update"}
"""Kind of canary -> the unit of ``clip-noise`` that it stands for."""

_OF_UNIT: Mapping[str, Kind] = {"sample": "gradient", "update": "client"}


def agreed_noise(config: DefenseConfig) -> ClipNoise | None:
    """The configured ``clip-noise``, or a defence derived from it; None where there is none."""
    found = (one for one in build_defenses(config).values() if isinstance(one, ClipNoise))
    return next(found, None)


@dataclass(frozen=True, eq=False)
class Canaries:
    """The m canaries of a run.

    `client` and `position`, int64 (m,), say whose they are and which sample of the client's partition, -1 where it is
    the client itself; `present`, bool (m,), whether they contribute. `promise` is what they measure; `classes` are
    those of the model's head.
    """

    kind: Kind
    promise: ClipNoise
    seed: int
    classes: int
    client: NDArray[np.int64]
    position: NDArray[np.int64]
    present: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.client)

    @property
    def bound(self) -> float:
        """The L2 norm that a contribution is clipped to."""
        assert self.promise.clip_norm is not None, "see choose_canaries"
        return self.promise.clip_norm

    @cached_property
    def silent(self) -> Canaries:
        """The same canaries, none of them there."""
        return replace(self, present=np.zeros_like(self.present))

    @cached_property
    def _of_client(self) -> dict[int, NDArray[np.int64]]:
        order = np.argsort(self.client, kind="stable")
        clients, starts = np.unique(self.client[order], return_index=True)
        return dict(zip(clients.tolist(), np.split(order, starts[1:]), strict=True))

    def of(self, client: int) -> NDArray[np.int64]:
        """Numbers of a client's canaries, ascending."""
        return self._of_client.get(client, np.zeros(0, np.int64))

    def replaced(self, client: int, size: int) -> NDArray[np.int64]:
        """Positions of a client's `size` samples that are not trained on, for a canary stands in their place."""
        if self.kind == "client":
            return np.arange(size if len(self.of(client)) else 0)
        return np.sort(self.position[self.of(client)])

    def contribution(self, canary: int, numel: int) -> NDArray[np.float32]:
        """What a canary adds if it is there: the clip norm times a random direction, float32 (numel,)."""
        drawn = numpy_rng(self.seed, "canary direction", canary).standard_normal(numel, np.float32)
        drawn *= np.float32(self.bound / np.sqrt(np.square(drawn, dtype=np.float64).sum()))
        return drawn

    def wrong_label(self, canary: int, label: int) -> int:
        """The label that a mislabelled canary goes by."""
        step = int(numpy_rng(self.seed, "canary label", canary).integers(1, self.classes))
        return (label + step) % self.classes

    # ------------------------------------------------------------------ what clients do

    def coded(self, client: int, positions: NDArray[np.int64], labels: Tensor) -> Tensor:
        """The labels of a client's samples at `positions`; those of canaries turned into negative codes.

        A code holds the canary's number and the label: ``-1 - (number + m * label)``.
        """
        own = self.of(client)
        if self.kind == "client" or not len(own):
            return labels
        chosen = np.flatnonzero(np.isin(positions, self.position[own]))
        place = np.argsort(self.position[own])
        numbers = own[place[np.searchsorted(self.position[own][place], positions[chosen])]]
        coded = labels.clone()
        coded[chosen] = -1 - (torch.from_numpy(numbers) + len(self) * labels[chosen])
        return coded

    def step(self, inner: GradientStep) -> GradientStep:
        """`inner`, but for single samples with a canary's code, whose gradient is the canary's contribution or zero.

        The loss stays that of the sample. RunFailed where canaries are asked about in a batch: nothing then bounds
        what a single one adds. Where `inner` takes samples apart by itself, so does what is returned.
        """
        return _Apart(self, inner) if isinstance(inner, PerSample) else partial(self._answer, inner)

    def _answer(
        self, inner: GradientStep, model: nn.Module, images: Tensor, labels: Tensor
    ) -> LossAndGradient:
        if not bool((labels < 0).any()):
            return inner(model, images, labels)
        if len(labels) != 1:
            raise RunFailed("canaries stand in a batch whose samples are not clipped one by one")
        label, canary = divmod(-1 - int(labels), len(self))
        loss, gradient = inner(model, images, labels.new_tensor([label]))
        if not self.present[canary]:
            return loss, tuple(torch.zeros_like(part) for part in gradient)
        if self.kind == "mislabelled":
            return loss, inner(model, images, labels.new_tensor([self.wrong_label(canary, label)]))[1]
        return loss, tuple(self._shaped(canary, gradient))

    def apart(
        self, inner: PerSample, model: nn.Module, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`step`, of several samples: losses (n,), and a tensor (n, ...) for each parameter."""
        coded = (labels < 0).nonzero()[:, 0].tolist()
        codes = [divmod(-1 - int(labels[row]), len(self)) for row in coded]
        shown, answered = labels.clone(), labels.clone()
        for row, (label, canary) in zip(coded, codes, strict=True):
            shown[row] = label
            answered[row] = self.wrong_label(canary, label) if self.kind == "mislabelled" else label
        losses, gradients = inner.per_sample(model, images, shown)
        if self.kind == "mislabelled" and coded:
            wrong = inner.per_sample(model, images[coded], answered[coded])[1]
            for part, other in zip(gradients, wrong, strict=True):
                part[coded] = other
        for row, (_, canary) in zip(coded, codes, strict=True):
            own = [part[row] for part in gradients]
            if not self.present[canary]:
                for part in own:
                    part.zero_()
            elif self.kind == "gradient":
                for part, drawn in zip(own, self._shaped(canary, own), strict=True):
                    part.copy_(drawn)
        return losses, gradients

    def update(self, client: int, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a client hands to its defences: a canary client its contribution, or zeros; others their `update`."""
        if self.kind != "client" or not len(self.of(client)):
            return update
        (canary,) = self.of(client).tolist()
        if not self.present[canary]:
            return {name: torch.zeros_like(part) for name, part in update.items()}
        return dict(zip(update, self._shaped(canary, list(update.values())), strict=True))

    def _shaped(self, canary: int, like: Sequence[Tensor]) -> list[Tensor]:
        sizes = [part.numel() for part in like]
        flat = torch.from_numpy(self.contribution(canary, sum(sizes)))
        return [part.reshape(old.shape).to(old) for part, old in zip(flat.split(sizes), like, strict=True)]


@dataclass(frozen=True)
class _Apart:
    """A step under canaries that takes the samples of a batch apart."""

    canaries: Canaries
    inner: PerSample

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        return self.canaries._answer(self.inner, model, images, labels)

    def per_sample(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        return self.canaries.apart(self.inner, model, images, labels)


def choose_canaries(config: Config, sizes: Sequence[int], classes: int) -> Canaries | None:
    """The canaries of a run whose clients have `sizes` samples; None where none are asked for.

    Samples are drawn over all clients' partitions, or clients over all clients, without replacement. Raises
    ConfigError where the settings do not go together.
    """
    asked = config.canaries.count
    if not asked:
        return None
    setting, promise = f"setting 'canaries.count' = {asked}", agreed_noise(config.defense)
    if promise is None:
        raise ConfigError(
            f"{setting}: canaries measure the noise of defence 'clip-noise'; add it to 'defense.names'"
        )
    if promise.clip_norm is None or promise.noise == 0:
        what = "clip_norm' = None" if promise.clip_norm is None else "noise' = 0"
        raise ConfigError(
            f"{setting}: setting 'defense.clip-noise.{what} promises nothing; accepted: above 0"
        )
    kind = config.canaries.kind or _OF_UNIT[promise.unit]
    if UNITS[kind] != promise.unit:
        fitting = " or ".join(repr(one) for one, unit in UNITS.items() if unit == promise.unit)
        raise ConfigError(
            f"setting 'canaries.kind' = {kind!r}: 'defense.clip-noise.unit' = {promise.unit!r} bounds "
            f"{'a whole update' if promise.unit == 'update' else 'single samples'}; accepted: {fitting}"
        )
    if kind == "mislabelled" and (config.training.task != "classify" or classes < 2):
        raise ConfigError(
            f"setting 'canaries.kind' = 'mislabelled': task {config.training.task!r} with {classes} classes knows no "
            "wrong label; accepted: 'gradient'"
        )
    most, what = (len(sizes), "clients") if kind == "client" else (sum(sizes), "samples at all clients")
    if not 2 <= asked <= most:
        raise ConfigError(f"{setting}: accepted: 2 to {most}, the number of {what}")
    rng = numpy_rng(config.seed, "canaries")
    drawn = np.sort(rng.choice(most, asked, replace=False))
    client, position = drawn, np.full(asked, -1)
    if kind != "client":
        ends = np.cumsum(sizes)
        client = np.searchsorted(ends, drawn, side="right")
        position = drawn - (ends - sizes)[client]
    present = rng.random(asked) < 0.5
    return Canaries(kind, promise, config.seed, classes, client, position, present)


def release_weights(training: TrainingConfig, sizes: Sequence[int]) -> NDArray[np.float64]:
    """What of each local step's noised sum of gradients is in the update, float64 (steps,); `sizes` of the batches.

    The update is linear in them, under momentum and weight decay too: each decays, and goes on, in the later steps.
    """
    counts = np.asarray(sizes, np.float64)
    if training.protocol == "fedsgd":
        return 1 / counts
    moved, velocity, response = 0.0, 0.0, []
    for step in range(
        len(counts)
    ):  # what one unit of gradient, in the first step, has become after each step
        velocity = training.momentum * velocity + training.weight_decay * moved + (step == 0)
        moved -= training.learning_rate * velocity
        response.append(moved)
    return np.array(response[::-1]) / counts
