"""The base of all attacks that search for images whose gradient is the one that was sent.

Such an attack is a table of recipes: named settings of :func:`adversaries.inversion.matching.match.match`, of
the start and of the label strategy, with the published ones as the default. Everything else is here, once:
what the protocol and the compression allow, labels, starts, grouping of victims, floors and the answer."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence import defences, label_strategies, one_gradient
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.labels import Labels
from adversaries.inversion.gradients import Compile, Layers, schedule_for
from adversaries.inversion.matching.match import Match, match
from adversaries.inversion.matching.pixels import PIXEL_DEVIATION, PIXEL_MEAN, Chart
from adversaries.inversion.matching.problem import Penalty
from adversaries.inversion.matching.settings import Matching, Optimiser
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.errors import ConfigError, NotApplicable, PayloadError, unknown_name
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.rng import torch_rng

Start = Literal["random", "uniform", "grey", "mean", "tiled"]
LocalSteps = Literal["unrolled", "ignored"]
LabelStrategy = Literal[
    "auto", "joint", "idlg", "gradinversion", "llg", "llg-star", "llg-plus", "sparse-rows"
]

_RESTART_DEVIATION = 0.1
"""Standard deviation, in pixel values, of what tells repeated labels and further restarts of a fixed start apart."""

_USUAL_RATES = {"lbfgs": 1.0, "adam": 0.1, "sgd": 0.1}
"""Learning rates for an optimiser that replaces the preset's own."""

_IMAGES_TOGETHER = 256
"""Images, over all victims and restarts, that are worth optimising at once."""


@dataclass(frozen=True)
class Recipe:
    """One named setting of an attack.

    Attributes
    ----------
    matching : Matching
        Objective, optimiser and regularisers but total variation.
    tv : float
        Weight of the mean absolute difference of neighbouring pixels, vertical plus horizontal; of standardised
        pixels where these are what the optimiser turns.
    labels : str
        A key of :data:`adversaries.inversion.evidence.label_strategies.STRATEGIES`, or "joint": soft labels are
        optimised beside the images.
    start : str
        "random" (N(0, 1) pixels, or standardised ones), "uniform" (U[0, 1]), "grey" (0.5), "mean" (of the auxiliary
        images) or "tiled" (a random quarter four times).
    restarts : int
        Starts, of which the one with the lowest loss is answered.
    note : str
        Where the settings are from and what differs.
    """

    matching: Matching
    tv: float = 0.0
    labels: LabelStrategy = "auto"
    start: Start = "random"
    restarts: int = 1
    note: str = ""

    @property
    def standardised(self) -> bool:
        """Whether the optimiser turns standardised pixels."""
        return self.matching.parametrisation == "standardised"


@dataclass
class OptimisationAttack(ReconstructionAttack):
    """Base of the attacks over the matching engine; a subclass brings :attr:`recipes`.

    A setting that is None keeps the preset's.

    Parameters
    ----------
    preset : str
        A key of :attr:`recipes`: "published" or another by name.
    iterations : int, optional
        Evaluations of objective and gradient.
    learning_rate : float, optional
        Step size; None under another `optimizer`: its usual one.
    tv : float, optional
        Weight of total variation. See :class:`Recipe`.
    restarts : int, optional
        Starts, of which the one with the lowest loss is answered.
    start : str, optional
        "random", "uniform", "grey", "mean" or "tiled". See :class:`Recipe`.
    labels : str, optional
        How labels are inferred: "auto", "joint" (optimised beside the images) or a strategy by name. See
        :class:`Recipe`.
    objective : str, optional
        Distance of gradients. A key of :data:`adversaries.inversion.matching.objectives.OBJECTIVES`; None: the
        preset's, but the cosine where declared clipping hides the gradient's length.
    optimizer : str, optional
        lbfgs, adam, signed-adam or sgd.
    layers : str, optional
        Which layers' gradients are matched. See :class:`adversaries.inversion.matching.settings.Matching`, as for the
        next two.
    batch_norm : {"train", "eval"}, optional
        Whose statistics BatchNorm uses: the batch's own, or the running ones; None: as declared.
    patience : int, optional
        Iterations without a better loss after which a victim is left; 0: never.
    compile : {"auto", "always", "never"}, optional
        Whether the network's passes are compiled; "auto": in long runs. See
        :class:`adversaries.inversion.matching.settings.Matching`.
    local_steps : {"unrolled", "ignored"}
        What is done with a weight delta of several local steps: the steps are simulated and differentiated through,
        or the delta is taken for a multiple of one gradient.
    """

    needs: ClassVar[str] = "one client's update; labels are inferred from it"
    recipes: ClassVar[Mapping[str, Recipe]] = {}

    preset: str = "published"
    iterations: int | None = None
    learning_rate: float | None = None
    tv: float | None = None
    restarts: int | None = None
    start: Start | None = None
    labels: LabelStrategy | None = None
    objective: str | None = None
    optimizer: Optimiser | None = None
    layers: Layers | None = None
    batch_norm: Literal["train", "eval"] | None = None
    patience: int | None = None
    compile: Compile | None = None
    local_steps: LocalSteps = "unrolled"

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        if self.preset not in self.recipes:
            raise unknown_name("preset", self.preset, self.recipes)
        for name, least in (("iterations", 1), ("restarts", 1), ("patience", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"setting {name!r} = {value}: must be at least {least}")
        for name, low in (("learning_rate", 0.0), ("tv", -math.ulp(0.0))):
            value = getattr(self, name)
            if value is not None and not low < value < math.inf:
                raise ConfigError(f"setting {name!r} = {value}: must be positive")
        if self.start is not None and self.start not in get_args(Start):
            raise unknown_name("start", self.start, get_args(Start))
        if self.local_steps not in get_args(LocalSteps):
            raise unknown_name("local_steps", self.local_steps, get_args(LocalSteps))
        self.recipe()

    def recipe(self) -> Recipe:
        """The preset with this attack's own settings in it."""
        base = self.recipes[self.preset]
        wanted = {
            "iterations": self.iterations,
            "learning_rate": self.learning_rate,
            "objective": self.objective,
            "optimiser": self.optimizer,
            "layers": self.layers,
            "batch_norm": self.batch_norm,
            "patience": self.patience,
            "compile": self.compile,
        }
        changes: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        if self.optimizer is not None and self.optimizer != base.matching.optimiser:
            kind = self.optimizer.removeprefix("signed-")
            changes = {"learning_rate": _USUAL_RATES[kind], "momentum": 0.0, "block": 0} | changes
        outer = {"tv": self.tv, "restarts": self.restarts, "start": self.start, "labels": self.labels}
        replaced: dict[str, Any] = {name: value for name, value in outer.items() if value is not None}
        matching = dataclasses.replace(base.matching, **changes)
        recipe = dataclasses.replace(base, matching=matching, **replaced)
        if recipe.labels != "joint" and recipe.labels not in label_strategies.STRATEGIES:
            raise unknown_name("label strategy", recipe.labels, ["joint", *label_strategies.STRATEGIES])
        return recipe

    def check(self, scenario: Scenario) -> None:
        """Refuse what the engine cannot match under this scenario.

        Raises
        ------
        NotApplicable
        """
        plan(self, scenario)

    def penalty(
        self, observations: Sequence[Observation], labels: Tensor, device: torch.device
    ) -> Penalty | None:
        """A term of the attack's own, for victims with one batch size; None: there is none.

        Parameters
        ----------
        observations : sequence of Observation
            V victims.
        labels : Tensor
            int64 (V, B): the inferred labels.
        device : torch.device
        """
        del observations, labels, device
        return None

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Match a group of victims; an attack that turns other things than pixels does that here.

        Parameters
        ----------
        task : Task

        Returns
        -------
        list of Match
            In the order of `task.observations`.
        dict
            JSON-able, for the record of each of them.
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
    """Victims with one batch size, ready to be matched.

    Attributes
    ----------
    observations : list of Observation
        V victims; their updates are what is matched.
    labels : Tensor
        int64 (V, B).
    starts : Tensor
        float32 (R, V, B, C, H, W), of the recipe.
    settings : Matching
    device : torch.device
    progress : Progress
    options : dict
        Further arguments of :func:`adversaries.inversion.matching.match.match`.
    seed : int
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
    """What an attack does under one scenario.

    Attributes
    ----------
    recipe : Recipe
    settings : Matching
        The recipe's, as the scenario needs them.
    unrolled : bool
        Whether local steps are simulated.
    notes : list of str
        What was changed and assumed, for the record.
    """

    recipe: Recipe
    settings: Matching
    unrolled: bool
    notes: list[str] = field(default_factory=list)


def plan(attack: OptimisationAttack, scenario: Scenario) -> Plan:
    """Settle protocol and compression.

    Raises
    ------
    NotApplicable
        If the update cannot be matched.
    """
    recipe, notes = attack.recipe(), []
    settings, training = recipe.matching, scenario.training
    several = training.local_steps > 1
    unrolled = several and attack.local_steps == "unrolled"
    if several and not unrolled:
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
    if (
        defences.clips(scenario)
        and attack.objective is None
        and settings.objective not in defences.DIRECTIONS
    ):
        notes.append(
            f"objective 'cosine' instead of {settings.objective!r}: clipping hides the gradient's length"
        )
        settings = dataclasses.replace(settings, objective="cosine")
    one_gradient.check_sum(scenario)
    if not several:
        one_gradient.check_one_gradient(scenario, signs=True)
    label_strategies.check_strategy(recipe.labels, scenario, 0 if several else training.batch_size)
    if recipe.tv:
        unit = PIXEL_DEVIATION if recipe.standardised else 1.0
        regularisers = settings.regularisers | {"tv1": recipe.tv / unit}
        settings = dataclasses.replace(settings, regularisers=regularisers)
    if recipe.labels == "joint":
        settings = dataclasses.replace(settings, labels="joint")
    return Plan(recipe, settings, unrolled, notes)


@dataclass(frozen=True)
class _Victim:
    """One observation as it is matched: the update to match, its labels, notes."""

    observation: Observation
    labels: Labels
    notes: list[str]


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
        shared = None
        if scenario.training.local_steps == 1 and self._recipe.labels in ("auto", "llg-plus", "sparse-rows"):
            shared = label_strategies.expect(observations[0])
        self._details: dict[int, dict[str, Any]] = {}
        self._victims = []
        for observation in observations:
            _check_declared(observation)
            if self._recipe.labels == "joint":
                nothing = torch.zeros(observation.num_examples, dtype=torch.int64)
                labels = Labels(nothing, 1.0, "optimised beside the images")
            else:
                labels = label_strategies.infer(self._recipe.labels, observation, shared)
            self._victims.append(self._prepared(observation, labels))

    def _prepared(self, observation: Observation, labels: Labels) -> _Victim:
        """The update as what will be predicted: a gradient, or the delta itself where steps are simulated."""
        notes = list(self._plan.notes)
        if self._plan.unrolled:
            update = observation.update
        elif observation.scenario.training.local_steps > 1:
            update = one_gradient.mean_gradient(observation)
        else:
            update = one_gradient.as_gradient(observation, signs=True)
        return _Victim(dataclasses.replace(observation, update=update.to("cpu")), labels, notes)

    def answers(self) -> list[Reconstruction]:
        """Reconstructions in the order of the observations."""
        groups: dict[int, list[int]] = defaultdict(list)
        for position, victim in enumerate(self._victims):
            groups[len(victim.labels.values)].append(position)
        found: dict[int, Match] = {}
        for batch, members in groups.items():
            together = max(1, _IMAGES_TOGETHER // (batch * self._recipe.restarts))
            for first in range(0, len(members), together):
                part = members[first : first + together]
                found |= dict(zip(part, self._match(part, len(found)), strict=True))
        self._progress(1.0, "done")
        return [self._answer(position, found[position]) for position in range(len(self._victims))]

    def _match(self, members: Sequence[int], done: int) -> list[Match]:
        """Match victims with one batch size in one optimisation."""
        victims = [self._victims[position] for position in members]
        observations = [victim.observation for victim in victims]
        scenario, batch = observations[0].scenario, len(victims[0].labels.values)
        total = len(self._victims)

        def told(share: float, text: str) -> None:
            self._progress((done + share * len(members)) / total, text)

        labels = torch.stack([victim.labels.values for victim in victims])
        joint = self._recipe.labels == "joint"
        options = {
            "label_starts": torch.stack([self._label_starts(v) for v in victims], 1) if joint else None,
            "unroll": schedule_for(scenario, batch) if self._plan.unrolled else None,
            "penalty": self._attack.penalty(observations, labels, self._device),
        }
        starts = torch.stack([self._starts(victim) for victim in victims], 1)
        task = Task(
            observations, labels, starts, self._plan.settings, self._device, told, options, self._seed
        )
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
        shape = (self._recipe.restarts, len(victim.labels.values), observation.scenario.model.classes)
        return torch.randn(*(int(size or 0) for size in shape), generator=generator)

    def _answer(self, position: int, found: Match) -> Reconstruction:
        victim = self._victims[position]
        recipe, update = self._recipe, victim.observation.update
        if not math.isfinite(found.loss):
            raise PayloadError(
                f"client {victim.observation.client}: no image has a finite loss; the weights that were sent, or the "
                "update, lead to NaN or infinite values"
            )
        joint = recipe.labels == "joint"
        values = found.labels if joint else victim.labels.values
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
            "notes": "; ".join([recipe.note, *victim.notes]).strip("; "),
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


def _check_declared(observation: Observation) -> None:
    """Refuse a client that declares more examples than were agreed.

    Raises
    ------
    PayloadError
    """
    training = observation.scenario.training
    most = training.batch_size * training.local_steps
    if observation.num_examples < 1 or (most and observation.num_examples > most):
        raise PayloadError(
            f"client {observation.client} declares {observation.num_examples} examples; 1 to "
            f"{most or 'all of its own'} were agreed"
        )
