"""An audit of forgetting by shadow trainings: what the auditor prepares, and asks of each mechanism."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries.membership.logits.base import scaled_confidence
from fedattack.audit import AuditResult
from fedattack.audit.forgetting import MISLABELLED, RANDOM, Shadows, audit_forgetting
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import DataError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.rng import numpy_rng, torch_rng
from fedattack.unlearning.mechanism import Mechanism
from fedattack.unlearning.retrain import Retrain
from fedattack.unlearning.shadows import Stack, first_rows, trained
from fedattack.unlearning.steps import Models, StepMechanism

log = logging.getLogger("fedattack.shadows")

NONE = "none"
"""The name of doing nothing: how much there is to forget."""

Shown = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Design:
    """Which samples shadow models are trained on, and which of those they must forget.

    Positions, int64, into `images` and `labels`, which hold N samples: `targets` (K,), `probes` (R,) and `retained`,
    which all models have. By coins, bool, (T, K) and (T, R), a model has a target, and must forget it, or a probe,
    and keeps it.
    """

    images: Tensor
    labels: Tensor  # as trained on
    samples: NDArray[np.int64]  # (N,): ids in the data set
    targets: NDArray[np.int64]
    kinds: NDArray[np.str_]  # (K,)
    probes: NDArray[np.int64]
    retained: NDArray[np.int64]
    asked: NDArray[np.bool_]
    probed: NDArray[np.bool_]
    held_out: tuple[Tensor, Tensor]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """What each model keeps, (T, N)."""
        members = self._none()
        members[:, self.retained] = True
        members[:, self.probes] = self.probed
        return members

    @property
    def forgotten(self) -> NDArray[np.bool_]:
        """What each model forgets, (T, N)."""
        members = self._none()
        members[:, self.targets] = self.asked
        return members

    def _none(self) -> NDArray[np.bool_]:
        return np.zeros((len(self.asked), len(self.labels)), dtype=bool)


@dataclass(frozen=True)
class Counts:
    """How much of what: shadow models, targets, the mislabelled share of them, retained samples and probes."""

    shadows: int = 128
    targets: int = 40
    mislabelled: float = 0.5
    retained: int = 400
    probes: int = 40


def make_design(
    config: Config,
    world: World,
    counts: Counts,
    chosen: tuple[str, NDArray[np.int64]] | None = None,
) -> Design:
    """Draw targets, probes and retained samples from the clients' pool, and the coins; all from the run's seed.

    `chosen`: an attack, and the samples that it wants forgotten; they take the place of the random targets. DataError
    where the pool is too small.
    """
    rng = numpy_rng(config.seed, "shadow design")
    pool = world.pools.clients
    needed = counts.targets + counts.probes + counts.retained
    if len(pool) < needed or not len(world.pools.nonmembers):
        raise DataError(
            f"an audit of {counts.targets} targets, {counts.probes} probes and {counts.retained} retained samples "
            f"needs {needed} samples and some held out; the clients' pool of {config.data.name!r} has {len(pool)}, "
            f"the held-out one {len(world.pools.nonmembers)}"
        )
    wrong = round(counts.targets * counts.mislabelled)
    name, wanted = chosen or (RANDOM, np.empty(0, np.int64))
    wanted = wanted[: counts.targets - wrong]
    others = rng.permutation(np.setdiff1d(pool, wanted))
    order = np.concatenate([wanted, others])[:needed]
    places = np.arange(needed)
    targets, probes, retained = np.split(places, [counts.targets, counts.targets + counts.probes])
    kinds = np.array(
        [name] * len(wanted) + [RANDOM] * (counts.targets - wrong - len(wanted)) + [MISLABELLED] * wrong
    )
    images, labels = world.dataset.tensors(order)
    classes = world.dataset.classes
    if wrong and classes < 2:
        raise DataError("with one class there are no mislabelled targets; set --mislabelled 0")
    shifted = torch.from_numpy(rng.integers(1, max(2, classes), wrong))
    labels[targets[kinds == MISLABELLED]] = (labels[targets[kinds == MISLABELLED]] + shifted) % classes
    shape = counts.shadows, counts.targets
    return Design(
        images=images,
        labels=labels,
        samples=order,
        targets=targets,
        kinds=kinds,
        probes=probes,
        retained=retained,
        asked=balanced(rng, *shape),
        probed=balanced(rng, counts.shadows, counts.probes),
        held_out=world.dataset.tensors(world.pools.nonmembers),
    )


def balanced(rng: np.random.Generator, trainings: int, samples: int) -> NDArray[np.bool_]:
    """Fair coins (T, K), of which in each half of the trainings each sample gets as many of either side."""
    halves = trainings // 2, trainings - trainings // 2
    sides = [np.tile((np.arange(rows) % 2 == 0)[:, None], (1, samples)) for rows in halves]
    return np.concatenate([rng.permuted(side, axis=0) for side in sides])


class ShadowAudit:
    """Shadow trainings of a configuration, and the audits of mechanisms on them.

    Original models, retrained models to compare with and retrained models to audit draw apart.
    """

    def __init__(self, config: Config, world: World, design: Design, shown: Shown) -> None:
        self.config, self.world, self.design, self.shown = config, world, design, shown
        scenario = world.scenario
        if scenario.training.task != "classify":
            raise NotApplicable(
                f"setting 'training.task' = {scenario.training.task!r}: forgetting is audited of classifiers; "
                "accepted: classify"
            )
        if any(buffer.is_floating_point() for _, buffer in build_model(scenario.model).named_buffers()):
            raise NotApplicable(
                f"setting 'model.name' = {scenario.model.name!r}: shadow models are trained many at a time, which "
                "running statistics (BatchNorm) do not allow; use a model without, such as mlp or tiny-cnn"
            )
        base = initial_weights(scenario.model, config.seed)
        self.stack = Stack(scenario.model, design.images, design.labels, base)

    def audit(self, mechanisms: Mapping[str, Mechanism | None]) -> list[AuditResult]:
        """Audit each; None does nothing."""
        self.shown("shadows", 0.0, "original models")
        kept, forgotten = self.design.kept, self.design.forgotten
        original = self._trained(kept | forgotten, 0)
        self.shown("shadows", 0.5, "retrained models to compare with")
        control = self._trained(kept, 1)
        self.shown("shadows", 1.0, "trained")
        before, against = self._answers(original), self._answers(control)
        found = []
        for number, (name, mechanism) in enumerate(mechanisms.items()):
            self.shown("mechanisms", number / len(mechanisms), name)
            begun, passes = time.perf_counter(), self.stack.passes
            after = self._answers(self._forgotten(name, mechanism, original))
            cost = (self.stack.passes - passes) / len(original)
            shadows = self._shadows(before, after, against)
            seconds = time.perf_counter() - begun
            seed = self.config.seed
            found.append(audit_forgetting(name, shadows, samples_passed=cost, seconds=seconds, seed=seed))
        self.shown("mechanisms", 1.0, "done")
        return found

    def _trained(self, members: NDArray[np.bool_], which: int) -> Tensor:
        """Models with their own initial weights and batches, of the draws of number `which`."""
        seed = int(numpy_rng(self.config.seed, "shadow training", which).integers(2**31))
        rows = first_rows(self.stack, len(members), seed)
        return trained(
            self.stack, rows, members, self.world.scenario.training, self.config.federation.rounds, seed
        )

    def _forgotten(self, name: str, mechanism: Mechanism | None, original: Tensor) -> Tensor:
        """The models after they forgot their targets."""
        design, seed = self.design, self.config.seed
        if mechanism is None:
            return original
        if isinstance(mechanism, Retrain):
            return self._trained(design.kept, 2)
        if isinstance(mechanism, StepMechanism):
            draws = [torch_rng(seed, f"shadow {name}", row) for row in range(len(original))]
            training = self.world.scenario.training
            return mechanism.moved(
                Models(self.stack, original, design.forgotten, design.kept, training, draws)
            )
        raise NotApplicable(f"setting '--mechanisms' = {name!r}: cannot be audited by shadow trainings")

    def _answers(self, rows: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Log-odds of the labels of all samples (T, N) and of the held-out (T, h), and accuracies (T, 3)."""
        design = self.design
        logits, outside = (self.stack.logits(rows, images) for images in (design.images, design.held_out[0]))
        right = (logits.argmax(-1) == design.labels).double().numpy()
        held_out = (outside.argmax(-1) == design.held_out[1]).double().mean(1).numpy()
        asked = np.where(design.asked, right[:, design.targets], np.nan)
        accuracies = np.stack([np.nanmean(asked, 1), right[:, design.retained].mean(1), held_out], 1)
        return (
            scaled_confidence(logits, design.labels).numpy(),
            scaled_confidence(outside, design.held_out[1]).numpy(),
            accuracies,
        )

    def _shadows(self, before: tuple, after: tuple, control: tuple) -> Shadows:
        design = self.design
        return Shadows(
            asked=design.asked,
            after=after[0][:, design.targets],
            control=control[0][:, design.targets],
            probed=design.probed,
            probes_before=before[0][:, design.probes],
            probes_after=after[0][:, design.probes],
            retained=(after[0][:, design.retained], control[0][:, design.retained]),
            held_out=(after[1], control[1]),
            accuracies=(after[2], control[2]),
            samples=design.samples[design.targets],
            labels=design.labels[design.targets].numpy(),
            kinds=design.kinds,
            classes=design.held_out[1].numpy(),
        )
