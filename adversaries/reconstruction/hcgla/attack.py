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
from adversaries.inversion.evidence import defences, labels
from adversaries.inversion.evidence.labels import Labels
from adversaries.inversion.evidence.priors import GaussianPrior, gaussian_prior
from adversaries.inversion.gradients import Layers
from adversaries.inversion.learning.denoiser import load_denoiser
from adversaries.inversion.learning.generator import load_generator, obtain_generator
from adversaries.inversion.matching import match, pixels
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.hcgla import annealed_gauss_newton, matching, memory, starts
from adversaries.reconstruction.hcgla.annealed_gauss_newton import GaussNewtonSettings
from adversaries.reconstruction.hcgla.memory import LocalSteps, Remembered
from fedattack.config import Count, Positive, Strength, Weight
from fedattack.errors import ConfigError, NotApplicable, PayloadError
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
        memory.check_orders(scenario.training, facts.samples)
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
        return memory.remembers(scenario.compression)

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
        training = observations[0].scenario.training
        agreed = training.batch_size * training.local_steps
        for observation in observations:
            if observation.num_examples < 1 or (agreed and observation.num_examples > agreed):
                raise PayloadError(
                    f"client {observation.client} declares {observation.num_examples} examples; 1 to "
                    f"{agreed or 'all of its own'} were agreed"
                )
        observations = [defences.known_entries(observation) for observation in observations]
        self._received = {observation.key: observation for observation in observations}
        # Memories change when the round is over.
        carries = [memories[o.client].carry(o.scenario.compression) for o in observations]
        self._observations = [
            memory.as_gradient(o, carry) for o, carry in zip(observations, carries, strict=True)
        ]
        self._seed = seed
        first = self._observations[0]
        images = labels.public_images(
            first.auxiliary, first.scenario.image_shape, labels.enough(first.scenario.model)
        )
        expected = labels.expectation(
            first.scenario.model, first.weights, images, batch_norm=first.scenario.training.batch_norm
        )
        self._labels = [
            labels.infer_labels(o, o.update, expected, defences.noise(received))
            for received, o in zip(observations, self._observations, strict=True)
        ]
        self._steps = [
            LocalSteps(o, found.values, carry)
            for o, found, carry in zip(observations, self._labels, carries, strict=True)
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
            received = next(iter(self._received.values()))
            loaded = obtain_generator(attack.generator, received, self._seed, self._device, self._progress)

            def generate(observation: Observation, values: Tensor) -> Tensor:
                return loaded.start(self._received[observation.key], values)

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
            noisy = bool(defences.noise(self._received[self._observations[position].key]))
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
        received = self._received[self._observations[position].key]
        return dataclasses.replace(
            received,
            update=memory.mean_gradient(received).to("cpu"),
            scenario=memory.plain_scenario(received.scenario),
        )

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
        found: Labels = self._labels[position]
        floors = {"prior": self._starts.prior_image.clamp(0, 1).expand(len(found.values), -1, -1, -1).clone()}
        public = self._observations[position].auxiliary
        if public is not None and public.labels is not None:
            # What the label alone gives away: an attacker that learnt nothing else would answer the class's mean.
            means = [public.images[public.labels == label] for label in found.values]
            if all(len(images) > 1 for images in means):
                floors["label alone"] = torch.stack([images.mean(0) for images in means]).clamp(0, 1)
        return Reconstruction(
            images.clamp(0, 1).float().cpu(),
            found.values,
            label_confidence=found.confidence,
            floors=floors,
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
