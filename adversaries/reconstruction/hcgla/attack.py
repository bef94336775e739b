"""HCGLA: data reconstruction from highly compressed gradients."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress, share_of
from adversaries.inversion.evidence import defences, one_gradient
from adversaries.inversion.evidence.evidence import Evidence, Labels
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.evidence.labels import label_strategies
from adversaries.inversion.evidence.priors import GaussianPrior, gaussian_prior
from adversaries.inversion.gradients import Layers
from adversaries.inversion.learning.denoiser import load_denoiser
from adversaries.inversion.learning.generator import load_generator, obtain_generator
from adversaries.inversion.matching import match, pixels
from adversaries.inversion.matching.parts import in_parts
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.hcgla import annealed_gauss_newton, matching, memory, starts
from adversaries.reconstruction.hcgla.annealed_gauss_newton import GaussNewtonResult, GaussNewtonSettings
from adversaries.reconstruction.hcgla.memory import LocalSteps, Remembered
from fedattack.config import Count, Positive, Strength, Weight
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Reconstruction, Scenario

Method = Literal["auto", "gauss-newton", "matching", "generator"]


@dataclass
class HCGLA(ReconstructionAttack):
    """HCGLA: private images from the few gradient entries that a compressed update keeps (Yang et al. 2023).

    Labels are read from the head's entries. The images are then either solved for by a damped Gauss-Newton
    method on what was kept ("gauss-newton"), or found by matching the kept entries of the gradient
    ("matching", the paper's attack; `preset` "published" for its settings). Gauss-Newton sees through
    quantised values and local steps; under error feedback and DGC the rounds are attacked in order, each less
    what its predecessors' answers held back. Declared defences are seen through as well: clipping is
    imitated, noise believed to its size, and nothing is read into entries that were pruned. Where clipping
    hides the gradient's length, matching looks at its direction alone.

    Parameters
    ----------
    method : {"auto", "gauss-newton", "matching", "generator"}
        "auto": Gauss-Newton where it applies and explains the update, else matching. Asking for a preset, a
        start or a denoiser asks for matching. "generator": what the trained generator draws, with no
        optimisation after it.
    preset : {"default", "published"}
        Settings of matching: ours, or the paper's (L-BFGS without line search from N(0, 1), 42 x 20 iterations).
    start : str
        Where matching starts: "auto" (published: "random"; else "ridge", "mean" or "grey", the first that the
        granted data allows), "ridge", "generator", "mean", "grey", "random", "red", "same-label" or "image".
    start_image : str, optional
        Picture for start "image".
    generator : str, optional
        For start or method "generator": the file of a trained one (``fedattack hcgla train-generator``), or
        "train" to train one on the auxiliary images before the attack, which takes minutes.
    denoise_every : int
        Clean the images with `denoiser` after each this many matching iterations; 0: never.
    denoiser : str, optional
        Trained weights of the denoiser (``fedattack hcgla train-denoiser``).
    iterations, tv, learning_rate, optimizer, layers, parametrisation, objective
        Replace a setting of the preset; None keeps it. See
        :func:`adversaries.reconstruction.hcgla.matching.settings_for`.
    restarts : int
        Starts tried for each victim; the one with the lowest matching loss is answered.
    schedule : tuple of float, optional
        Falling noise levels of Gauss-Newton; None: chosen from the number of measurements.
    modes : int, optional
        Modes of the prior for each image in Gauss-Newton; None: all for one image, fewer for batches.

    References
    ----------
    Yang, Ge, Xiang, Li, "Using Highly Compressed Gradients in Federated Learning for Data Reconstruction Attacks",
    IEEE TIFS 18, 2023.
    """

    needs: ClassVar[Needs] = Needs(update="steps", sums="dense", labels="auto", helped=True)

    method: Method = "auto"
    preset: matching.Preset = "default"
    start: starts.Start = "auto"
    start_image: str | None = None
    generator: str | None = None
    denoise_every: Count = 0
    denoiser: str | None = None
    iterations: Positive | None = None
    tv: Weight | None = None
    learning_rate: Strength | None = None
    optimizer: matching.Optimizer | None = None
    layers: Layers | None = None
    parametrisation: pixels.Parametrisation | None = None
    objective: str | None = None
    restarts: Positive = 1
    schedule: tuple[float, ...] | None = None
    modes: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        if self.denoise_every and not self.denoiser:
            raise ConfigError(
                f"setting 'hcgla.denoise_every' = {self.denoise_every} needs 'hcgla.denoiser', the path of trained "
                "weights (fedattack hcgla train-denoiser)"
            )
        if self.denoiser and not self.denoise_every:
            raise ConfigError("setting 'hcgla.denoiser' does nothing without 'hcgla.denoise_every', as 100")
        if self.method == "gauss-newton" and self._asks_for_matching:
            raise ConfigError(
                f"setting 'hcgla.method' = 'gauss-newton': {self._asks_for_matching} belongs to method 'matching'"
            )

    @property
    def _asks_for_matching(self) -> str:
        """The setting that only matching has and that was changed, if any."""
        asked = {
            "preset": self.preset != "default",
            "start": self.start != "auto",
            "denoise_every": self.denoise_every > 0,
        }
        return ", ".join(f"hcgla.{name} = {getattr(self, name)!r}" for name, given in asked.items() if given)

    def needs_now(self, scenario: Scenario) -> Needs:
        """Matching alone reads one gradient; a start that is drawn or regressed needs public images and a chain."""
        trained = self._start == "generator" and self.generator == "train"
        made = trained or self._start in ("ridge", "mean", "same-label")
        return dataclasses.replace(
            self.needs,
            update="gradient" if self._only_matches else "steps",
            fresh=self._start == "generator",
            auxiliary=int(made),
            labelled=self._start == "same-label",
            helped=not made,
            chain=self._start == "ridge",
        )

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse what Gauss-Newton cannot solve, local batches in too many orders, and files that are not there."""
        if self.method == "gauss-newton" or (scenario.training.local_steps > 1 and not self._only_matches):
            annealed_gauss_newton.applies(memory.plain_scenario(scenario))
            GaussNewtonSettings(schedule=self.schedule, modes=self.modes)
        memory.check_orders(scenario, facts.samples)
        starts.check_start(self._start, self.start_image, self.generator)
        self._matching(scenario, max(1, scenario.training.batch_size))
        if self.denoiser:
            load_denoiser(self.denoiser)
        if self._start == "generator" and self.generator and self.generator != "train":
            load_generator(self.generator, scenario)

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack observations of one round, or of several: then a round's answers are used in the next."""
        rounds = sorted({observation.round for observation in observations})
        memories: dict[int, Remembered] = defaultdict(Remembered)
        answers: dict[str, Reconstruction] = {}
        prior = cache(lambda: gaussian_prior(observations[0].auxiliary, observations[0].scenario.image_shape))
        for done, number in enumerate(rounds):
            told = share_of(progress, done / len(rounds), (done + 1) / len(rounds))
            victims = [observation for observation in observations if observation.round == number]
            found = _Run(self, victims, memories, prior, seed, device, told).answers()
            for observation, answer in zip(victims, found, strict=True):
                answers[observation.key] = answer
                if number != rounds[-1]:
                    memories[observation.client].follow(observation, answer.images, answer.labels)
        return [answers[observation.key] for observation in observations]

    def needs_history(self, scenario: Scenario) -> bool:
        """Whether clients keep what they do not send: then later updates hold residuals of earlier ones."""
        return one_gradient.accumulates(scenario)

    @property
    def _only_matches(self) -> bool:
        return self.method in ("matching", "generator") or bool(self._asks_for_matching)

    @property
    def _start(self) -> starts.Start:
        if self.method == "generator":
            return "generator"
        return "random" if self.start == "auto" and self.preset == "published" else self.start

    def _matching(self, scenario: Scenario, batch: int, smooth: bool = False) -> match.Matching:
        objective = self.objective
        if objective is None and defences.clips(scenario):
            objective = "cosine"  # clipping hides the gradient's length
        return matching.settings_for(
            self.preset,
            scenario.model,
            batch,
            smooth=smooth,
            iterations=0 if self.method == "generator" else self.iterations,
            tv=self.tv,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            layers=self.layers,
            parametrisation=self.parametrisation,
            objective=objective,
            transform_every=self.denoise_every,
        )


@dataclass
class _Victim:
    """One update: its evidence, labels and local steps, how it is matched, and what becomes of it."""

    evidence: Evidence
    labels: Labels
    steps: LocalSteps
    observation: Observation
    details: dict[str, Any]
    solved: GaussNewtonResult | None = None

    @cached_property
    def received(self) -> Observation:
        """The update as a mean gradient, with whatever it carries beside one."""
        scenario = memory.plain_scenario(self.evidence.observation.scenario)
        return dataclasses.replace(
            self.evidence.observation, update=self.evidence.rescaled, scenario=scenario
        )

    def answer(self, images: Tensor, **fields: Any) -> Reconstruction:
        """The answer with these images (B, C, H, W)."""
        values = self.labels.values
        return Reconstruction(
            images.clamp(0, 1).float().cpu(),
            values,
            label_confidence=self.labels.confidence,
            floors=floors(self.observation, values),
            **fields,
        )


class _Run:
    """One call: what its victims share is made once, here."""

    def __init__(
        self,
        attack: HCGLA,
        observations: Sequence[Observation],
        memories: Mapping[int, Remembered],
        prior: Callable[[], GaussianPrior],
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._attack, self._device, self._progress, self._prior = attack, device, progress, prior
        self._seed = seed
        attack.check(observations[0].scenario)
        self._victims: list[_Victim] = []
        for observation in observations:
            one_gradient.check_declared(observation)
            like = self._victims[0].evidence if self._victims else None
            followed = memories[observation.client]
            evidence = followed.evidence(defences.known_entries(observation), like)
            labels = label_strategies.infer("sparse-rows", evidence)
            details: dict[str, Any] = {"kept": evidence.gradient.kept, "labels": labels.note}
            if attack.needs_history(observation.scenario):
                details["peeled_rounds"] = list(followed.rounds)  # before this round is followed
            steps = LocalSteps(evidence, labels.values)
            self._victims.append(_Victim(evidence, labels, steps, memory.matchable(evidence), details))

    @cached_property
    def _starts(self) -> starts.Starts:
        attack = self._attack
        generate: Callable[[Observation, Tensor], Tensor] | None = None
        if attack._start == "generator" and attack.generator:
            received = {victim.observation.key: victim.evidence.observation for victim in self._victims}
            first = self._victims[0].evidence.observation
            loaded = obtain_generator(attack.generator, first, self._seed, self._device, self._progress)

            def generate(observation: Observation, values: Tensor) -> Tensor:
                return loaded.start(received[observation.key], values)

        reference = self._victims[0].observation
        return starts.Starts(attack._start, reference, self._seed, attack.start_image, generate)

    def answers(self) -> list[Reconstruction]:
        """Reconstructions in the order of the observations."""
        total = len(self._victims)
        to_solve = [victim for victim in self._victims if self._fits_gauss_newton(victim)]
        for done, victim in enumerate(to_solve):
            prefix = f"Gauss-Newton, victim {done + 1}/{len(to_solve)}: "
            victim.solved = annealed_gauss_newton.solve(
                victim.received,
                victim.labels.values,
                self._prior(),
                GaussNewtonSettings(schedule=self._attack.schedule, modes=self._attack.modes),
                self._device,
                share_of(self._progress, done / total, (done + 1) / total, prefix),
                victim.steps,
            )
        to_match = [victim for victim in self._victims if self._is_matched(victim)]
        begun = len(to_solve) / (len(to_solve) + len(to_match))
        matched = self._match(to_match, share_of(self._progress, begun, 1.0))
        found = {
            id(victim): self._matched(victim, *one) for victim, one in zip(to_match, matched, strict=True)
        }
        self._progress(1.0, "done")
        return [found.get(id(victim)) or self._solved(victim) for victim in self._victims]

    def _fits_gauss_newton(self, victim: _Victim) -> bool:
        """Whether Gauss-Newton applies to a victim; where not, its details say why."""
        attack = self._attack
        if attack._only_matches:
            asked = attack._asks_for_matching or f"method {attack.method}"
            victim.details["why"] = f"{asked} was asked for"
            return False
        received = victim.received
        try:
            annealed_gauss_newton.applies(
                received.scenario,
                received.update,
                num_examples=received.num_examples,
                labels=victim.labels.values,
            )
        except NotApplicable as reason:
            if attack.method == "gauss-newton" or victim.steps.several:
                raise
            victim.details["why"] = str(reason)
            return False
        return True

    def _is_matched(self, victim: _Victim) -> bool:
        """Whether matching answers; it knows nothing of noise: Gauss-Newton's loosest answer is better then."""
        if victim.solved is None:
            return True
        matchable = self._attack.method == "auto" and not (victim.steps.several or victim.evidence.noise)
        return matchable and not victim.solved.explained

    def _match(
        self, victims: Sequence[_Victim], progress: Progress
    ) -> list[tuple[match.Match, match.Matching]]:
        """Match victims, those of one shape and preset together."""
        if not victims:
            return []
        attack, informed = self._attack, self._starts.name in ("ridge", "generator")
        transform = load_denoiser(attack.denoiser) if attack.denoiser else None
        kinds = []
        for victim in victims:
            batch = len(victim.labels.values)
            unknowns = batch * math.prod(victim.observation.scenario.image_shape)
            kinds.append((batch, int(not informed and victim.observation.update.kept < unknowns)))

        def work(members: list[int], told: Progress) -> list[tuple[match.Match, match.Matching]]:
            batch, smooth = kinds[members[0]]
            chosen = [victims[member] for member in members]
            observations = [victim.observation for victim in chosen]
            labels = [victim.labels.values for victim in chosen]
            begin = [
                self._starts.make(o, y, attack.restarts) for o, y in zip(observations, labels, strict=True)
            ]
            settings = attack._matching(observations[0].scenario, batch, bool(smooth))
            matches = match.match(
                observations,
                torch.stack(labels),
                torch.stack(begin, 1),
                settings,
                self._device,
                told,
                transform=transform,
            )
            return [(one, settings) for one in matches]

        observations = [victim.observation for victim in victims]
        return in_parts(observations, kinds, attack.restarts, work, progress)

    def _solved(self, victim: _Victim) -> Reconstruction:
        result = victim.solved
        assert result is not None
        details = victim.details | {"explained": result.explained, **result.details}
        if victim.steps.several:
            details["batches"] = victim.steps.order(result.images)
        return victim.answer(
            result.images,
            loss=result.objective_per_number,
            certificate=result.objective_per_number,
            method="gauss-newton",
            history=result.history,
            details=details,
        )

    def _matched(self, victim: _Victim, found: match.Match, settings: match.Matching) -> Reconstruction:
        details = victim.details | {
            "start": self._starts.name,
            "restart": found.restart,
            "recoveries": found.recoveries,
            "iterations": len(found.history) - 1,
            **{f"matching.{name}": value for name, value in dataclasses.asdict(settings).items()},
        }
        if victim.solved is not None:
            details["why"] = (
                f"Gauss-Newton leaves {victim.solved.objective_per_number:.3g} per measured number unexplained "
                "(about 1 is right)"
            )
        method = "generator" if self._attack.method == "generator" else "matching"
        return victim.answer(
            found.images, loss=found.loss, method=method, history=found.history, details=details
        )
