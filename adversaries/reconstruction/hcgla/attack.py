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

from adversaries.base import Progress, no_progress
from adversaries.checks import at_least, positive
from adversaries.inversion.evidence import defences, label_strategies, one_gradient
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.evidence.priors import GaussianPrior, gaussian_prior
from adversaries.inversion.gradients import Layers
from adversaries.inversion.learning.denoiser import load_denoiser
from adversaries.inversion.learning.generator import load_generator, obtain_generator
from adversaries.inversion.matching import match, pixels
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.hcgla import annealed_gauss_newton, matching, memory, starts
from adversaries.reconstruction.hcgla.annealed_gauss_newton import GaussNewtonSettings
from adversaries.reconstruction.hcgla.memory import LocalSteps, Remembered
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Reconstruction, Scenario

Method = Literal["auto", "gauss-newton", "matching", "generator"]


@dataclass
class HCGLA(ReconstructionAttack):
    """HCGLA: private images from the few gradient entries that a compressed update keeps (Yang et al. 2023).

    Labels are read from the head's entries. The images are then either solved for by a damped Gauss-Newton method on
    what was kept ("gauss-newton"), or found by matching the kept entries of the gradient ("matching", the paper's
    attack; `preset` "published" for its settings). Gauss-Newton sees through quantised values and local steps; under
    error feedback and DGC the rounds are attacked in order, each less what its predecessors' answers held back.
    Declared defences are seen through as well: clipping is imitated, noise believed to its size, and nothing is read
    into entries that were pruned. Where clipping hides the gradient's length, matching looks at its direction alone.

    Parameters
    ----------
    method : {"auto", "gauss-newton", "matching", "generator"}
        "auto": Gauss-Newton where it applies and explains the update, else matching. Asking for a preset, a start or
        a denoiser asks for matching. "generator": what the trained generator draws, with no optimisation after it.
    preset : {"default", "published"}
        Settings of matching: ours, or the paper's (L-BFGS without line search from N(0, 1), 42 x 20 iterations).
    start : str
        Where matching starts: "auto" (published: "random"; else "ridge", "mean" or "grey", the first that the
        granted data allows), "ridge", "generator", "mean", "grey", "random", "red", "same-label" or "image".
    start_image : str, optional
        Picture for start "image".
    generator : str, optional
        For start or method "generator": the file of a trained one (``fedattack hcgla train-generator``), or "train"
        to train one on the auxiliary images before the attack, which takes minutes.
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

    needs: ClassVar[str] = (
        "one update, compressed or not, of one or a few local steps; public images help much"
    )

    method: Method = "auto"
    preset: matching.Preset = "default"
    start: starts.Start = "auto"
    start_image: str | None = None
    generator: str | None = None
    denoise_every: int = 0
    denoiser: str | None = None
    iterations: int | None = None
    tv: float | None = None
    learning_rate: float | None = None
    optimizer: matching.Optimizer | None = None
    layers: Layers | None = None
    parametrisation: pixels.Parametrisation | None = None
    objective: str | None = None
    restarts: int = 1
    schedule: tuple[float, ...] | None = None
    modes: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        at_least("hcgla", self, restarts=1, denoise_every=0, iterations=1, tv=0)
        positive("hcgla", self, "learning_rate")
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

    def check(self, scenario: Scenario) -> None:
        """Refuse what is not (a multiple of) entries of one gradient, and settings without what they need.

        Raises
        ------
        NotApplicable, ConfigError, DataError
        """
        plain = memory.plain_scenario(scenario)
        several = scenario.training.local_steps > 1
        one_gradient.check_one_gradient(
            scenario if self._only_matches else dataclasses.replace(scenario, training=plain.training)
        )
        if self.method == "gauss-newton" or (several and not self._only_matches):
            annealed_gauss_newton.applies(plain)
            GaussNewtonSettings(schedule=self.schedule, modes=self.modes)
        starts.check_start(self._start, scenario, self.start_image, self.generator)
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
        """Attack the observations of one round, or of several: then what a round's answers say is used in the next.

        See :meth:`ReconstructionAttack.run`.
        """
        rounds = sorted({observation.round for observation in observations})
        memories: dict[int, Remembered] = defaultdict(Remembered)
        answers: dict[str, Reconstruction] = {}
        prior = cache(lambda: gaussian_prior(observations[0].auxiliary, observations[0].scenario.image_shape))
        for done, number in enumerate(rounds):

            def told(share: float, text: str, done: int = done) -> None:
                progress((done + share) / len(rounds), text)

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
        attack.check(observations[0].scenario)
        for observation in observations:
            one_gradient.check_declared(observation)
        # Memories change when the round is over.
        self._evidence: list[Evidence] = []
        for observation in observations:
            like = self._evidence[0] if self._evidence else None
            followed = memories[observation.client]
            self._evidence.append(followed.evidence(defences.known_entries(observation), like))
        self._observations = [memory.matchable(one) for one in self._evidence]
        self._seed = seed
        self._labels = [label_strategies.infer("sparse-rows", one) for one in self._evidence]
        self._steps = [
            LocalSteps(one, found.values) for one, found in zip(self._evidence, self._labels, strict=True)
        ]
        self._details: list[dict[str, Any]] = [
            {"kept": o.update.kept, "labels": found.note}
            for o, found in zip(self._observations, self._labels, strict=True)
        ]
        for o, details in zip(observations, self._details, strict=True):
            if attack.needs_history(o.scenario):
                details["peeled_rounds"] = list(memories[o.client].rounds)

    @cached_property
    def _starts(self) -> starts.Starts:
        attack = self._attack
        generate: Callable[[Observation, Tensor], Tensor] | None = None
        if attack._start == "generator" and attack.generator:
            received = {one.observation.key: one.observation for one in self._evidence}
            first = self._evidence[0].observation
            loaded = obtain_generator(attack.generator, first, self._seed, self._device, self._progress)

            def generate(observation: Observation, values: Tensor) -> Tensor:
                return loaded.start(received[observation.key], values)

        return starts.Starts(attack._start, self._observations[0], self._seed, attack.start_image, generate)

    def answers(self) -> list[Reconstruction]:
        """Reconstructions in the order of the observations."""
        solved: dict[int, annealed_gauss_newton.GaussNewtonResult] = {}
        to_match: list[int] = []
        total = len(self._observations)
        candidates = self._for_gauss_newton(to_match)
        for done, position in enumerate(candidates):

            def told(share: float, text: str, done: int = done) -> None:
                self._progress(
                    (done + share) / total, f"Gauss-Newton, victim {done + 1}/{len(candidates)}: {text}"
                )

            solved[position] = annealed_gauss_newton.solve(
                self._as_received(position),
                self._labels[position].values,
                self._prior(),
                GaussNewtonSettings(schedule=self._attack.schedule, modes=self._attack.modes),
                self._device,
                told,
                self._steps[position],
            )
            noisy = bool(self._evidence[position].noise)
            # Matching knows nothing of noise: Gauss-Newton's answer at its loosest is the better one then.
            matchable = self._attack.method == "auto" and not (self._steps[position].several or noisy)
            if matchable and not solved[position].explained:
                to_match.append(position)
        matched = self._match(sorted(to_match), len(candidates) / (len(candidates) + len(to_match)))
        answers = []
        for position in range(total):
            if position in matched:
                answers.append(self._matched(position, *matched[position], solved.get(position)))
            else:
                answers.append(self._solved(position, solved[position]))
        self._progress(1.0, "done")
        return answers

    def _for_gauss_newton(self, to_match: list[int]) -> list[int]:
        """Victims that Gauss-Newton applies to; under "auto" the others join `to_match`, with the reason."""
        asked = self._attack._asks_for_matching
        if self._attack._only_matches:
            to_match += range(len(self._observations))
            for details in self._details:
                details["why"] = f"{asked or f'method {self._attack.method}'} was asked for"
            return []
        fitting = []
        for position, observation in enumerate(self._observations):
            received = self._as_received(position)
            try:
                annealed_gauss_newton.applies(
                    received.scenario,
                    received.update,
                    num_examples=observation.num_examples,
                    labels=self._labels[position].values,
                )
            except NotApplicable as reason:
                if self._attack.method == "gauss-newton" or self._steps[position].several:
                    raise
                self._details[position]["why"] = str(reason)
                to_match.append(position)
            else:
                fitting.append(position)
        return fitting

    def _as_received(self, position: int) -> Observation:
        """A victim's update as a mean gradient, with whatever it carries beside one."""
        evidence = self._evidence[position]
        scenario = memory.plain_scenario(evidence.observation.scenario)
        return dataclasses.replace(evidence.observation, update=evidence.rescaled, scenario=scenario)

    def _match(
        self, positions: Sequence[int], before: float
    ) -> dict[int, tuple[match.Match, match.Matching]]:
        """Match the victims at `positions`, those of one shape and preset together."""
        transform = load_denoiser(self._attack.denoiser) if self._attack.denoiser else None
        informed = self._starts.name in ("ridge", "generator")
        groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for position in positions:
            batch = len(self._labels[position].values)
            unknowns = batch * math.prod(self._observations[position].scenario.image_shape)
            smooth = not informed and self._observations[position].update.kept < unknowns
            groups[batch, smooth].append(position)
        found: dict[int, tuple[match.Match, match.Matching]] = {}
        for (batch, smooth), members in groups.items():
            observations = [self._observations[position] for position in members]
            values = [self._labels[position].values for position in members]
            settings = self._attack._matching(observations[0].scenario, batch, smooth)
            begin = [
                self._starts.make(o, y, self._attack.restarts)
                for o, y in zip(observations, values, strict=True)
            ]
            done = before + (1 - before) * len(found) / len(positions)
            share = (1 - before) * len(members) / len(positions)

            def told(part: float, text: str, done: float = done, share: float = share) -> None:
                self._progress(done + part * share, text)

            matches = matching.reconstruct(
                observations,
                values,
                begin,
                settings,
                self._device,
                told,
                transform,
            )
            found |= {position: (one, settings) for position, one in zip(members, matches, strict=True)}
        return found

    def _answer(self, position: int, images: Tensor, **fields: Any) -> Reconstruction:
        found = self._labels[position]
        return Reconstruction(
            images.clamp(0, 1).float().cpu(),
            found.values,
            label_confidence=found.confidence,
            floors=floors(self._observations[position], found.values),
            **fields,
        )

    def _solved(self, position: int, result: annealed_gauss_newton.GaussNewtonResult) -> Reconstruction:
        details = self._details[position] | {"explained": result.explained, **result.details}
        if self._steps[position].several:
            details["batches"] = self._steps[position].order(result.images)
        return self._answer(
            position,
            result.images,
            loss=result.objective_per_number,
            certificate=result.objective_per_number,
            method="gauss-newton",
            history=result.history,
            details=details,
        )

    def _matched(
        self,
        position: int,
        found: match.Match,
        settings: match.Matching,
        rejected: annealed_gauss_newton.GaussNewtonResult | None,
    ) -> Reconstruction:
        details = self._details[position] | {
            "start": self._starts.name,
            "restart": found.restart,
            "recoveries": found.recoveries,
            "iterations": len(found.history) - 1,
            **{f"matching.{name}": value for name, value in dataclasses.asdict(settings).items()},
        }
        if rejected is not None:
            details["why"] = (
                f"Gauss-Newton leaves {rejected.objective_per_number:.3g} per measured number unexplained (about 1 "
                "is right)"
            )
        method = "generator" if self._attack.method == "generator" else "matching"
        return self._answer(
            position, found.images, loss=found.loss, method=method, history=found.history, details=details
        )
