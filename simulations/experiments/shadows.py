"""An audit of forgetting by shadow trainings: what the auditor prepares, and asks of each mechanism."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries.membership.logits.base import scaled_confidence
from adversaries.refusals import applicable
from adversaries.seats import ClientView, MaliciousClient
from fedattack.audit import AuditResult
from fedattack.audit.forgetting import MISLABELLED, RANDOM, Shadows, audit_forgetting
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.rng import adversary_seed, numpy_rng, torch_rng
from fedattack.unlearning.central import Central
from fedattack.unlearning.history import ClientUpdate, History, Weights
from fedattack.unlearning.mechanism import Excluded, Mechanism
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.retrain import Retrain
from fedattack.unlearning.shadows import Stack, first_rows, trained
from fedattack.unlearning.steps import Models, StepMechanism
from simulations.client_app import asking
from simulations.experiments.choose import choose_attacks, known_facts

NONE = "none"
"""The name of doing nothing: how much there is to forget."""

ORIGINAL, CONTROL, RETRAINED, CHOICE = range(4)
"""Whose draws: of models that had the targets, of those they are compared with, of those that are audited, and of the
one by which an attack chooses.
"""

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

    @property
    def wrong(self) -> int:
        """Mislabelled targets."""
        return round(self.targets * self.mislabelled)

    @property
    def needed(self) -> int:
        """Samples in all."""
        return self.targets + self.retained + self.probes


def chosen_targets(config: Config, world: World, counts: Counts) -> tuple[str, NDArray[np.int64]] | None:
    """The configured attack, and the samples that it wants a model forgotten that was trained on all; None without.

    That model is none of the shadows. ConfigError or NotApplicable for what chooses none of the samples.
    """
    if not config.attack.names:
        return None
    named = choose_attacks(config)
    told = f"setting 'attack.names' = {', '.join(named)!r}:"
    (name, attack), *more = named.items()
    if more or not isinstance(attack, MaliciousClient):
        raise ConfigError(f"{told} one malicious client chooses the targets, such as unlearn-max-loss")
    applicable(named, world.scenario, known_facts(config, world))
    if type(attack).plant is not MaliciousClient.plant:
        raise NotApplicable(f"{told} it plants samples before training, and targets are samples as they are")
    clean, seed = counts.targets - counts.wrong, config.seed
    pool = numpy_rng(seed, "shadow choice").permutation(world.pools.clients)[: counts.needed]
    images, labels = world.dataset.tensors(pool)
    start = int(numpy_rng(seed, "shadow training", CHOICE).integers(2**31))
    stack = Stack(world.scenario.model, images, labels, initial_weights(world.scenario.model, start))
    everything, rounds = np.ones((1, len(labels)), dtype=bool), config.federation.rounds
    rows = trained(stack, first_rows(stack, [start]), everything, world.scenario.training, rounds, [start])
    weights = stack.state(rows[0])
    shown = weights if attack.access == "weights" else {}
    drawn = adversary_seed(seed, f"client seat of {name}", rounds, 0)
    view = ClientView(rounds, 0, world.scenario, shown, drawn, {}, clean, invited=True)
    view = asking(build_model(world.scenario.model), attack, view, weights)
    own = range(len(pool))
    asked = [place for request in attack.asked(view, images, labels) for place in request.positions]
    places = [place for place in dict.fromkeys(asked) if isinstance(place, int) and place in own]
    if not places:
        raise NotApplicable(
            f"{told} it names none of its samples to forget, and targets are samples as they are"
        )
    return name, pool[places[:clean]]


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
    needed, wrong = counts.needed, counts.wrong
    if len(pool) < needed or not len(world.pools.nonmembers):
        raise DataError(
            f"an audit of {counts.targets} targets, {counts.probes} probes and {counts.retained} retained samples "
            f"needs {needed} samples and some held out; the clients' pool of {config.data.name!r} has {len(pool)}, "
            f"the held-out one {len(world.pools.nonmembers)}"
        )
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


class Holder:
    """One holder of data who is the server (:class:`fedattack.unlearning.Trainer`); there are no clients to ask."""

    def __init__(self, central: Central) -> None:
        self._central, self.cost = central, central.cost

    def central(self) -> Central:
        """The data."""
        return self._central

    def train(self, excluded: Excluded, weights: Weights, first_round: int) -> Weights:
        """Train the rounds from `first_round` again."""
        return self._central.train(weights, excluded.get(0, ()), first_round)

    def updates(self, *_: Any, **__: Any) -> Iterator[ClientUpdate]:
        """Refused (NotApplicable), as :meth:`gradients` and :meth:`evaluate`."""
        raise NotApplicable("a shadow model has no clients")

    gradients = updates

    def evaluate(self, weights: Weights, clients: Collection[int]) -> dict[int, dict[str, float]]:
        """Refused."""
        raise NotApplicable("a shadow model has no clients")


class ShadowAudit:
    """Shadow trainings of a configuration, and the audits of mechanisms, by name, on them; None does nothing.

    Original models, retrained models to compare with and retrained models to audit draw apart. NotApplicable where a
    mechanism, or the model, cannot be asked.
    """

    def __init__(
        self, config: Config, world: World, design: Design, mechanisms: Mapping[str, Mechanism | None]
    ) -> None:
        self.config, self.world, self.design, self.mechanisms = config, world, design, mechanisms
        self.shown: Shown = lambda *_: None
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
        for name, mechanism in mechanisms.items():
            self._check(name, mechanism)

    def audit(self, shown: Shown) -> list[AuditResult]:
        """Train, and audit each mechanism."""
        self.shown, mechanisms = shown, self.mechanisms
        self.shown("shadows", 0.0, "original models")
        kept, forgotten = self.design.kept, self.design.forgotten
        original = self._trained(kept | forgotten, ORIGINAL)
        self.shown("shadows", 0.5, "retrained models to compare with")
        control = self._trained(kept, CONTROL)
        self.shown("shadows", 1.0, "trained")
        found = []
        for number, (name, mechanism) in enumerate(mechanisms.items()):
            self.shown("mechanisms", number / len(mechanisms), name)
            begun = time.perf_counter()
            released, after, cost = self._forgotten(name, mechanism, original)
            against = self._prepared(mechanism, control)
            shadows = self._shadows(*map(self._answers, (released, after, against)))
            seconds, seed = time.perf_counter() - begun, self.config.seed
            found.append(audit_forgetting(name, shadows, samples_passed=cost, seconds=seconds, seed=seed))
        self.shown("mechanisms", 1.0, "done")
        return found

    def _check(self, name: str, mechanism: Mechanism | None) -> None:
        """Refuse (NotApplicable) what shadow models cannot be asked."""
        if mechanism is None or isinstance(mechanism, Retrain):
            return
        mechanism.check(name, self.world.scenario, 1)
        if mechanism.runs != "central" or "updates" in mechanism.keeps:
            raise NotApplicable(
                f"setting '--mechanism' = {name!r}: it forgets by what a federation's clients send, and shadow "
                "models have one holder of data; accepted: retrain, and what runs centrally"
            )

    def _seeds(self, which: int) -> list[int]:
        """Each model's own seed, of its initial weights and its batches."""
        rng = numpy_rng(self.config.seed, "shadow training", which)
        return rng.integers(2**31, size=len(self.design.asked)).tolist()

    def _trained(self, members: NDArray[np.bool_], which: int) -> Tensor:
        """Models of the draws `which`, (T, P)."""
        seeds, rounds = self._seeds(which), self.config.federation.rounds
        rows = first_rows(self.stack, seeds)
        return trained(self.stack, rows, members, self.world.scenario.training, rounds, seeds)

    def _forgotten(
        self, name: str, mechanism: Mechanism | None, original: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """What is released of the models, before and after they forget, and samples passed through each meanwhile."""
        design, count = self.design, len(original)
        before, training = self.stack.passes, self.world.scenario.training
        if mechanism is None:
            return original, original, 0.0
        if isinstance(mechanism, Retrain):
            after = self._trained(design.kept, RETRAINED)
        elif isinstance(mechanism, StepMechanism):
            draws = [torch_rng(seed, f"shadow {name}") for seed in self._seeds(ORIGINAL)]
            models = Models(self.stack, original, design.forgotten, design.kept, training, draws)
            after = mechanism.moved(models)
        else:
            return self._one_by_one(name, mechanism, original)
        return original, after, (self.stack.passes - before) / count

    def _one_by_one(self, name: str, mechanism: Mechanism, original: Tensor) -> tuple[Tensor, Tensor, float]:
        """The same by any mechanism that runs centrally, one model after the other."""
        kept, forgotten = self.design.kept, self.design.forgotten
        released, after, passed = [], [], 0.0
        for t, row in enumerate(original):
            self.shown(name, t / len(original), f"model {t + 1} of {len(original)}")
            with self._holder(mechanism, ORIGINAL, t, row, kept[t] | forgotten[t]) as (history, trainer):
                history.weights = mechanism.prepare(history.excluded, history, trainer)
                released.append(history.weights)
                before = trainer.cost.copy()
                deletion = Deletion(0, frozenset(np.flatnonzero(forgotten[t]).tolist()))
                after.append(mechanism.forget([deletion], history, trainer).weights)
                passed += trainer.cost.since(before).gradients * len(self.design.labels)
        self.shown(name, 1.0, "")
        return self.stack.rows(released), self.stack.rows(after), passed / len(original)

    def _prepared(self, mechanism: Mechanism | None, control: Tensor) -> Tensor:
        """What is released of the retrained models."""
        if mechanism is None or type(mechanism).prepare is Mechanism.prepare:
            return control
        states = []
        for t, (row, members) in enumerate(zip(control, self.design.kept, strict=True)):
            with self._holder(mechanism, CONTROL, t, row, members) as (history, trainer):
                states.append(mechanism.prepare(history.excluded, history, trainer))
        return self.stack.rows(states)

    @contextmanager
    def _holder(
        self, mechanism: Mechanism, which: int, number: int, row: Tensor, members: NDArray[np.bool_]
    ) -> Iterator[tuple[History, Holder]]:
        """One shadow model's history and data, as its only holder has them; what it never had is excluded."""
        scenario, rounds = self.world.scenario, self.config.federation.rounds
        seed, design = self._seeds(which)[number], self.design
        with tempfile.TemporaryDirectory(prefix="shadow-") as folder:
            history = History(Path(folder), scenario, mechanism.keeps)
            first = initial_weights(scenario.model, seed)
            history.keep_weights(0, first)
            gone = frozenset(np.flatnonzero(~members).tolist())
            if "checkpoints" in mechanism.keeps:  # the training once more, for all that it passes through
                past = Central(scenario, design.images, design.labels, seed, rounds)
                for step in past.walk(first, gone):
                    if step.index == 0 and step.round > 1:
                        history.keep_weights(step.round - 1, past.weights(step.before, first))
            history.weights, history.rounds, history.first_rounds = self.stack.state(row), rounds, {0: 1}
            history.excluded = {0: gone}
            yield history, Holder(Central(scenario, design.images, design.labels, seed, rounds))

    def _answers(self, rows: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Log-odds of the labels of all samples (T, N) and of the held-out (T, h), and accuracies (T, 3)."""
        design = self.design
        logits, outside = (self.stack.logits(rows, images) for images in (design.images, design.held_out[0]))
        right = (logits.argmax(-1) == design.labels).double().numpy()
        held_out = (outside.argmax(-1) == design.held_out[1]).double().mean(1).numpy()
        asked, targets = design.asked, right[:, design.targets]
        of_asked = (targets * asked).sum(1) / np.maximum(1, asked.sum(1))
        accuracies = np.stack([of_asked, right[:, design.retained].mean(1), held_out], 1)
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
