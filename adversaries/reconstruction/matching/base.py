"""The base of all attacks that search for images whose gradient is the one that was sent.

Such an attack is a table of recipes: named settings of :func:`adversaries.inversion.matching.match.match`, of
the start and of the label strategy, with the published ones as the default. Everything else is here, once:
what the protocol and the compression allow, labels, starts, grouping of victims, floors and the answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adversaries.base import Effort, Progress, no_progress
from adversaries.inversion.evidence import defences, one_gradient
from adversaries.inversion.evidence.evidence import Evidence, Labels
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.labels import label_strategies
from adversaries.inversion.gradients import Compile, Layers, Moves, schedule_for
from adversaries.inversion.matching.match import Match, match
from adversaries.inversion.matching.parts import in_parts
from adversaries.inversion.matching.pixels import PIXEL_DEVIATION, PIXEL_MEAN, Chart
from adversaries.inversion.matching.problem import Penalty
from adversaries.inversion.matching.settings import Matching, Optimiser
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.matching.recipes import LocalSteps, Recipe, Start
from fedattack.config import Count, Positive, Strength, Weight
from fedattack.errors import NotApplicable, PayloadError, unknown_name
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.rng import torch_rng

_RESTART_DEVIATION = 0.1
"""Standard deviation, in pixel values, of what tells repeated labels and further restarts of a fixed start apart."""

_USUAL_RATES = {"lbfgs": 1.0, "adam": 0.1, "sgd": 0.1}
"""Learning rates for an optimiser that replaces the preset's own."""

_OF_MATCHING = ("iterations", "learning_rate", "objective", "layers", "batch_norm", "patience", "compile")
_OF_RECIPE = ("tv", "restarts", "start", "labels")


@dataclass
class OptimisationAttack(ReconstructionAttack):
    """Base of the attacks over the matching engine; a subclass brings :attr:`recipes`.

    A setting that is None keeps the preset's; see :class:`Recipe` and
    :class:`adversaries.inversion.matching.settings.Matching`.

    Parameters
    ----------
    preset : str
        A key of :attr:`recipes`: "published" or another by name.
    iterations : int, optional
        Evaluations of objective and gradient.
    learning_rate : float, optional
        Step size; None under another `optimizer`: its usual one.
    tv : float, optional
        Weight of total variation.
    restarts : int, optional
        Starts, of which the one with the lowest loss is answered.
    start : str, optional
        "random", "uniform", "grey", "mean" or "tiled".
    labels : str, optional
        How labels are inferred: "auto", "joint" (optimised beside the images) or a strategy by name.
    objective : str, optional
        Distance of gradients. A key of :data:`adversaries.inversion.matching.objectives.OBJECTIVES`; None: the
        preset's, but the cosine where declared clipping hides the gradient's length.
    optimizer : str, optional
        lbfgs, adam, signed-adam or sgd.
    layers : str, optional
        Which layers' gradients are matched.
    batch_norm : {"train", "eval"}, optional
        Whose statistics BatchNorm uses: the batch's own, or the running ones; None: as declared.
    patience : int, optional
        Iterations without a better loss after which a victim is left; 0: never.
    compile : {"auto", "always", "never"}, optional
        Whether the network's passes are compiled; "auto": in long runs.
    local_steps : {"unrolled", "surrogate", "ignored"}
        What is done with a weight delta of several local steps: the steps are simulated and differentiated through;
        the delta is taken for a multiple of one gradient at a point between the weights before and after, found
        beside the images (:mod:`adversaries.inversion.evidence.one_gradient`); or of one at the weights before.
    """

    needs: ClassVar[Needs] = Needs(update="steps", signs=True, sums="dense", fresh=True, labels="auto")
    recipes: ClassVar[Mapping[str, Recipe]] = {}

    preset: str = "published"
    iterations: Positive | None = None
    learning_rate: Strength | None = None
    tv: Weight | None = None
    restarts: Positive | None = None
    start: Start | None = None
    labels: str | None = None
    objective: str | None = None
    optimizer: Optimiser | None = None
    layers: Layers | None = None
    batch_norm: Literal["train", "eval"] | None = None
    patience: Count | None = None
    compile: Compile | None = None
    local_steps: LocalSteps = "unrolled"

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        if self.preset not in self.recipes:
            raise unknown_name("preset", self.preset, self.recipes)
        self.recipe()

    def recipe(self) -> Recipe:
        """The preset with this attack's own settings in it."""
        base = self.recipes[self.preset]
        changes = self._given(_OF_MATCHING)
        if self.optimizer is not None and self.optimizer != base.matching.optimiser:
            kind = self.optimizer.removeprefix("signed-")
            usual = {"learning_rate": _USUAL_RATES[kind], "momentum": 0.0, "block": 0}
            changes = usual | changes | {"optimiser": self.optimizer}
        matching = dataclasses.replace(base.matching, **changes)
        recipe = dataclasses.replace(base, matching=matching, **self._given(_OF_RECIPE))
        if recipe.labels != "joint":
            label_strategies.STRATEGIES.get(recipe.labels)
        return recipe

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def needs_now(self, scenario: Scenario) -> Needs:
        """The labels are read as the recipe says; several local steps are more than one gradient."""
        labels = self.recipe().labels.replace("joint", "")
        update: Literal["", "gradient"] = "" if scenario.training.local_steps > 1 else "gradient"
        return dataclasses.replace(self.needs, labels=labels, update=update)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Settle protocol and compression."""
        plan(self, scenario)

    def effort(self, scenario: Scenario, images: int) -> Effort:
        """An evaluation of objective and gradient an iteration, from each start and through each simulated step."""
        settled = plan(self, scenario)
        steps = scenario.training.local_steps
        slopes = (settled.settings.iterations + 1) * settled.recipe.restarts
        if settled.unrolled:
            return Effort(slopes=slopes * steps)
        return Effort(slopes=slopes, whole=steps > 1)

    def penalty(
        self, observations: Sequence[Observation], labels: Tensor, device: torch.device
    ) -> Penalty | None:
        """A term of the attack's own, for V victims with one batch size and labels (V, B); None: there is none."""
        del observations, labels, device
        return None

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Match a group of victims, in their order, with what goes into each one's record (JSON-able).

        An attack that turns other things than pixels does that here.
        """
        return task.match(), {}

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        if not observations:
            return []
        return _Run(self, observations, seed, device, progress).answers()


@dataclass(frozen=True)
class Task:
    """Victims with one batch size, ready to be matched: V observations, whose updates are matched.

    `labels` are int64 (V, B), `starts` float32 (R, V, B, C, H, W), and `options` go to
    :func:`adversaries.inversion.matching.match.match`.
    """

    observations: list[Observation]
    labels: Tensor
    starts: Tensor
    settings: Matching
    device: torch.device
    progress: Progress
    options: dict[str, Any]
    seed: int

    def match(self, starts: Tensor | None = None, chart: Chart | None = None) -> list[Match]:
        """Match from the recipe's starts; or from other variables of a chart, (R, V, N)."""
        return match(
            self.observations,
            self.labels,
            self.starts if starts is None else starts,
            self.settings,
            self.device,
            self.progress,
            chart=chart,
            seed=self.seed,
            **self.options,
        )


@dataclass(frozen=True)
class Plan:
    """What an attack does under one scenario: settings as that needs them, and how it reads local steps.

    `unrolled`: they are simulated; `surrogate`: read as one gradient at a learned point.
    """

    recipe: Recipe
    settings: Matching
    unrolled: bool
    surrogate: bool
    notes: list[str]


def plan(attack: OptimisationAttack, scenario: Scenario) -> Plan:
    """Settle protocol and compression; NotApplicable for updates that cannot be matched."""
    recipe, notes = attack.recipe(), []
    settings, training = recipe.matching, scenario.training
    several = training.local_steps > 1
    unrolled = several and attack.local_steps == "unrolled"
    reads = one_gradient.reads_surrogate(attack.local_steps, scenario)
    if reads:
        one_gradient.check_moves(scenario)
        notes.append(f"{training.local_steps} local steps read as one gradient at a learned point")
    elif several and not unrolled:
        notes.append(
            f"{training.local_steps} local steps taken for one: the delta is read as their mean gradient"
        )
    if scenario.compression.name == "sign":
        if training.weight_decay and not unrolled:
            raise NotApplicable(
                f"training.weight_decay = {training.weight_decay} with compression 'sign': the signs are of "
                "gradient plus decay, which cannot be told apart; use weight_decay 0 or another compression"
            )
        if settings.objective != "sign":
            notes.append(f"objective 'sign' instead of {settings.objective!r}: only signs were sent")
            settings = dataclasses.replace(settings, objective="sign")
    cosine = "cosine" if settings.layer_weights == "equal" else "layer-cosine"
    lengthless = settings.objective in defences.DIRECTIONS
    if defences.clips(scenario) and attack.objective is None and not lengthless:
        notes.append(
            f"objective {cosine!r} instead of {settings.objective!r}: clipping hides the gradient's length"
        )
        settings = dataclasses.replace(settings, objective=cosine)
    if recipe.tv:
        unit = PIXEL_DEVIATION if recipe.standardised else 1.0
        regularisers = settings.regularisers | {"tv1": recipe.tv / unit}
        settings = dataclasses.replace(settings, regularisers=regularisers)
    if recipe.labels == "joint":
        settings = dataclasses.replace(settings, labels="joint")
    return Plan(recipe, settings, unrolled, reads, notes)


@dataclass(frozen=True)
class _Victim:
    """One observation as it is matched: the update to match, its labels, and what its local steps did."""

    observation: Observation
    labels: Labels
    moves: Moves


class _Run:
    """One call: what its victims share is made once, here."""

    def __init__(
        self,
        attack: OptimisationAttack,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._attack, self._seed, self._device, self._progress = attack, seed, device, progress
        scenario = observations[0].scenario
        attack.check(scenario)
        self._plan = plan(attack, scenario)
        self._recipe = self._plan.recipe
        self._details: dict[int, dict[str, Any]] = {}
        self._victims = []
        for evidence in Evidence.of_round(observations):
            one_gradient.check_declared(evidence.observation)
            if self._recipe.labels == "joint":
                nothing = torch.zeros(evidence.batch, dtype=torch.int64)
                labels = Labels(nothing, 1.0, "optimised beside the images")
            else:
                labels = label_strategies.infer(self._recipe.labels, evidence)
            moves = one_gradient.moves(evidence.observation) if self._plan.surrogate else {}
            self._victims.append(_Victim(self._predicted(evidence), labels, moves))

    def _predicted(self, evidence: Evidence) -> Observation:
        """The update as what will be predicted: a gradient, or the delta itself where steps are simulated."""
        observation = evidence.observation
        if self._plan.unrolled:
            return dataclasses.replace(observation, update=observation.update.to("cpu"))
        if observation.scenario.training.local_steps == 1:
            one_gradient.check_received(observation, signs=True)
        return dataclasses.replace(observation, update=evidence.gradient)

    def answers(self) -> list[Reconstruction]:
        """Reconstructions in the order of the observations."""
        found = in_parts(
            [victim.observation for victim in self._victims],
            [(len(victim.labels.values),) for victim in self._victims],
            self._recipe.restarts,
            self._match,
            self._progress,
        )
        self._progress(1.0, "done")
        return [self._answer(position, one) for position, one in enumerate(found)]

    def _match(self, members: Sequence[int], told: Progress) -> list[Match]:
        """Match victims with one batch size in one optimisation."""
        victims = [self._victims[position] for position in members]
        observations = [victim.observation for victim in victims]
        scenario, batch = observations[0].scenario, len(victims[0].labels.values)
        labels = torch.stack([victim.labels.values for victim in victims])
        joint = self._recipe.labels == "joint"
        options = {
            "label_starts": torch.stack([self._label_starts(v) for v in victims], 1) if joint else None,
            "unroll": schedule_for(scenario, batch) if self._plan.unrolled else None,
            "moves": [victim.moves for victim in victims] if self._plan.surrogate else None,
            "penalty": self._attack.penalty(observations, labels, self._device),
        }
        starts, settings = torch.stack([self._starts(victim) for victim in victims], 1), self._plan.settings
        task = Task(observations, labels, starts, settings, self._device, told, options, self._seed)
        matches, details = self._attack.search(task)
        self._details |= dict.fromkeys(members, details)
        return matches

    def _starts(self, victim: _Victim) -> Tensor:
        """Starts of one victim, float32 (R, B, C, H, W)."""
        recipe, observation = self._recipe, victim.observation
        channels, height, width = observation.scenario.image_shape
        shape = (recipe.restarts, len(victim.labels.values), channels, height, width)
        generator = torch_rng(self._seed, "matching-start", observation.round, observation.client)
        if recipe.start == "uniform":
            return torch.rand(shape, generator=generator)
        if recipe.start in ("random", "tiled"):
            if recipe.start == "random":
                drawn = torch.randn(shape, generator=generator)
            else:
                quarter = torch.randn(*shape[:3], -(-height // 2), -(-width // 2), generator=generator)
                drawn = quarter.repeat(1, 1, 1, 2, 2)[..., :height, :width]
            return PIXEL_MEAN + PIXEL_DEVIATION * drawn if recipe.standardised else drawn
        one = prior_image(observation) if recipe.start == "mean" else torch.full(shape[2:], 0.5)
        starts = one.expand(shape).clone()
        noise = _RESTART_DEVIATION * torch.randn(shape, generator=generator)
        starts[1:] += noise[1:]
        # Equal images with equal labels have equal gradients and would stay equal for ever.
        seen: set[int] = set()
        for position, label in enumerate(victim.labels.values.tolist()):
            if label in seen or (recipe.labels == "joint" and position):
                starts[0, position] += noise[0, position]
            seen.add(label)
        return starts

    def _label_starts(self, victim: _Victim) -> Tensor:
        """Logits N(0, 1), float32 (R, B, classes)."""
        observation = victim.observation
        generator = torch_rng(self._seed, "matching-labels", observation.round, observation.client)
        classes = observation.scenario.model.classes or 0
        return torch.randn(self._recipe.restarts, len(victim.labels.values), classes, generator=generator)

    def _answer(self, position: int, found: Match) -> Reconstruction:
        victim = self._victims[position]
        recipe, update = self._recipe, victim.observation.update
        if not math.isfinite(found.loss):
            raise PayloadError(
                f"client {victim.observation.client}: no image has a finite loss; the weights that were sent, or the "
                "update, lead to NaN or infinite values"
            )
        values = found.labels if recipe.labels == "joint" else victim.labels.values
        pixels = len(values) * math.prod(victim.observation.scenario.image_shape)
        details: dict[str, Any] = {
            "preset": self._attack.preset,
            "kept": update.kept,
            "kept per pixel": update.kept / pixels,
            "labels": victim.labels.note,
            "start": recipe.start,
            "restart": found.restart,
            "losses of restarts": found.losses,
            "recoveries": found.recoveries,
            "iterations": len(found.history) - 1,
            "compiled": found.compiled,
            **({} if found.point is None else {"point": found.point}),
            "notes": "; ".join([recipe.note, *self._plan.notes]).strip("; "),
            **{f"matching.{name}": value for name, value in dataclasses.asdict(self._plan.settings).items()},
            **self._details[position],
        }
        return Reconstruction(
            found.images.clamp(0, 1).float().cpu(),
            values,
            loss=found.loss,
            label_confidence=victim.labels.confidence,
            method="matching",
            history=found.history,
            floors=floors(victim.observation, values),
            details=details,
        )
