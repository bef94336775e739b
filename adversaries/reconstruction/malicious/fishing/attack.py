"""Fishing: a head under which one sample of the batch causes the whole body's gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adversaries import ATTACKS
from adversaries.base import Progress, build_attack, no_progress
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import is_complete
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.label_strategies import infer
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.malicious.fishing import bisection
from adversaries.reconstruction.malicious.fishing.bisection import COUNT_ERROR
from adversaries.reconstruction.malicious.fishing.isolation import (
    SATURATED,
    Catch,
    caught_alone,
    features_of,
    haul,
    head_of,
    is_readable,
    lone_scenario,
    misfit_of,
    public_images,
    read_off,
    row_of,
)
from adversaries.seats import MaliciousServer
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Candidates, Observation, Reconstruction, Scenario
from fedattack.rng import torch_rng

CERTIFIED = 1e-4
"""Relative misfit of features up to which an image that was read off is what was caught."""

_UNKNOWN_BATCH = 32
"""Samples expected of a client that trains on all it has, until it declares them."""

_FEW = 2


@dataclass
class Fishing(MaliciousServer, ReconstructionAttack):
    """Fishing for user data: a malicious server sends a head that all samples of a batch but one leave without error.

    All rows of the head are zero but one, in a random direction of the features, so that only this class' residual
    reaches the body. "class": its bias is low, so that its probability is 0 for every sample, and the residual -1 for
    the samples of this class and 0 for the others. "feature": its logit is steep and crosses zero where on average
    one sample of a batch lies, so that its probability is 1 for that sample and 0 for the others. Samples of the
    class itself are caught on the other side, with the opposite sign; a class that the public labels lack is taken
    where there is one. What the body
    sends is then the gradient of what was fished alone, whatever the batch size; the head's bias counts it, to the
    integer, and its weight holds the features of the catch, by which the answer is checked. The image is read off a
    linear first layer, or searched for by another attack on the single gradient.

    Each armed round draws its class, direction and threshold anew and catches one sample or none; of "feature" in
    about 37 of 100 rounds it is one. The other places of the answer hold the prior.

    "rounds" goes on for as many rounds as are armed, with one row and a threshold that is moved by what each client's
    earlier counts told. It asks for a batch that stays the same (batch_size 0) and catches sample after sample,
    whatever their labels: see :mod:`~adversaries.reconstruction.malicious.fishing.bisection`. The answer of
    a round holds what the rounds up to it isolated; the first finds where nothing is above.

    Parameters
    ----------
    mode : {"auto", "class", "feature", "rounds"}
        "auto": "class" where a batch holds at most two samples of a class on average, else "feature".
    target : int, optional
        Class whose row is used; None: drawn.
    quantile : float, optional
        "feature": share of samples below the threshold; None: 1 - 1 / batch size.
    attack : str
        Name of the attack that searches for the image where it cannot be read off; "gauss-newton", "ig", ...
    most : int
        Samples caught at once that are still searched for together.
    options : dict
        Settings of that attack.

    References
    ----------
    Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification", ICML 2022. There the threshold is found by bisection over rounds on one batch, within one class,
    and one sample is caught; differences of rounds are ours.
    """

    needs: ClassVar[str] = "a malicious server: it sends a head of its own; public images place the threshold"
    adapts: ClassVar[bool] = True

    mode: Literal["auto", "class", "feature", "rounds"] = "auto"
    target: int | None = None
    quantile: float | None = None
    attack: str = "gauss-newton"
    most: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ConfigError(f"setting 'fishing.quantile' = {self.quantile}: must be in (0, 1)")
        if self.most < 1:
            raise ConfigError(f"setting 'fishing.most' = {self.most}: must be at least 1")
        cls = ATTACKS.get(self.attack)
        if not issubclass(cls, ReconstructionAttack) or issubclass(cls, MaliciousServer):
            raise ConfigError(
                f"setting 'fishing.attack' = {self.attack!r}: must be an attack on an honest server's single update, "
                "as 'gauss-newton' or 'ig'"
            )

    def check(self, scenario: Scenario) -> None:
        """Refuse heads without bias, batch statistics, and updates that are not one complete gradient.

        Raises
        ------
        NotApplicable
        """
        one_gradient.check_one_gradient(scenario)
        if not is_complete(scenario):
            compression = scenario.compression
            raise NotApplicable(
                f"compression.name = {compression.name!r} at rate {compression.rate:g} drops entries that the catch "
                "is counted and rebuilt by; use compression.name 'none' or 'qsgd'"
            )
        head_of(scenario)
        classes = scenario.model.classes or 0
        if self.target is not None and not 0 <= self.target < classes:
            raise ConfigError(
                f"setting 'fishing.target' = {self.target}: the head has classes 0 to {classes - 1}"
            )
        module = build_model(scenario.model)
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
            raise NotApplicable(
                f"model.name = {scenario.model.name!r} normalises by batch statistics, in which all samples meet "
                "again; use a model without BatchNorm"
            )
        if not is_readable(scenario):
            self._inner().check(lone_scenario(scenario, 1))
        if self.mode == "rounds":
            _check_rounds(scenario)

    def needs_history(self, scenario: Scenario) -> bool:
        """Whether rounds are read together."""
        del scenario
        return self.mode == "rounds"

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
    ) -> dict[str, Tensor]:
        """The global model with its head replaced: one row, and a bias that lets one sample through."""
        head = head_of(scenario)
        generator = torch_rng(seed, "fishing.arm")
        row, bias = torch.zeros_like(weights[f"{head}.weight"]), torch.zeros_like(weights[f"{head}.bias"])
        known = [] if auxiliary is None or auxiliary.labels is None else auxiliary.labels.unique().tolist()
        batch = scenario.training.batch_size or _UNKNOWN_BATCH
        mode = self.mode
        if mode == "auto":
            mode = "class" if batch <= _FEW * (len(known) or len(bias)) else "feature"
        target = self._draw(mode, len(bias), generator, known)
        direction = torch.randn(row.shape[1], generator=generator)
        direction /= direction.norm()
        if mode == "class":
            row[target] = direction
            bias[target] = -SATURATED
        else:
            seen = (
                features_of(scenario, weights, head, public_images(scenario, auxiliary, generator))
                @ direction
            )
            share = 1 - 1 / max(batch, 2) if self.quantile is None else self.quantile
            threshold, deviation = torch.quantile(seen, share), seen.std().clamp_min(1e-12)
            steep = (SATURATED if mode == "feature" else bisection.STEEP) / deviation
            if mode == "rounds":
                threshold = seen.mean() + bisection.BEYOND * deviation
            row[target] = direction * steep
            bias[target] = -threshold * steep
        return dict(weights) | {f"{head}.weight": row, f"{head}.bias": bias}

    def tailor(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        place: int,
        earlier: Sequence[Observation],
    ) -> dict[str, Tensor]:
        """Under mode "rounds", the earlier rounds' row with the next threshold, while the body stays the same."""
        head = head_of(scenario)
        name = f"{head}.weight"
        if self.mode != "rounds" or not earlier:
            return {}
        before = earlier[-1].weights
        if any(not torch.equal(before[n], t) for n, t in weights.items() if not n.startswith(f"{head}.")):
            return {}
        target = row_of(earlier[-1], head)
        series = bisection.comparable_rounds(earlier, head)
        steep = before[name][target].norm()
        public = public_images(scenario, earlier[0].auxiliary, torch_rng(0, "fishing.rounds"))
        scores = features_of(scenario, before, head, public) @ (before[name][target] / steep)
        known, tried = bisection.casts(series, head, target)
        chosen = bisection.next_threshold(known, tried, scores)
        bias = before[f"{head}.bias"].clone()
        if chosen is not None:
            bias[target] = -chosen * steep
        return {name: before[name], f"{head}.bias": bias}

    def _draw(self, mode: str, classes: int, generator: torch.Generator, known: list[int]) -> int:
        if self.target is not None:
            return self.target
        wanted = [label for label in range(classes) if (label in known) == (mode == "class")] or [
            *range(classes)
        ]
        return wanted[int(torch.randint(len(wanted), (1,), generator=generator))]

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        answers = []
        known: dict[bytes, Reconstruction] = {}
        for number, observation in enumerate(observations):
            self.check(observation.scenario)

            def told(share: float, text: str, number: int = number) -> None:
                progress((number + share) / len(observations), text)

            series = [observation]
            if self.mode == "rounds":
                client, latest = observation.client, observation.round
                up_to = [one for one in observations if one.client == client and one.round <= latest]
                series = sorted(up_to, key=lambda one: one.round)
            answers.append(self._several(series, known, seed, device, told))
        return answers

    def _several(
        self,
        series: list[Observation],
        known: dict[bytes, Reconstruction],
        seed: int,
        device: torch.device,
        told: Progress,
    ) -> Reconstruction:
        """One client's rounds up to the one that is answered; searches are kept in `known`."""
        observation, head = series[-1], head_of(series[-1].scenario)
        try:
            target = row_of(observation, head)
        except NotApplicable as refusal:
            return _answer(observation, None, None, {"status": "failed", "reason": str(refusal)})
        series = bisection.comparable_rounds(series, head)
        if len(series) == 1:
            return self._one(observation, seed, device, told)
        if not bisection.nothing_above(series[0], head, target):
            reason = "the first of these rounds, whose threshold lies above all samples, is missing"
            return _answer(observation, None, None, {"status": "failed", "reason": reason})
        casts, _ = bisection.casts(series, head, target)
        figures = {"class": target, "rounds": len(series), "above": [cast.above for cast in casts]}
        found: list[tuple[Reconstruction, Tensor]] = []
        for single in bisection.alone(casts):
            key = single.update.values.numpy().tobytes()
            catch = haul(single)
            if key not in known:
                searched = self._search(single, catch, 1, seed, device, told)
                known[key] = dataclasses.replace(searched, loss=misfit_of(single, catch, searched.images))
            if known[key].method != "read off" or known[key].loss <= CERTIFIED:
                found.append((known[key], catch.features))
        if not found:
            reason = "no sample lies between two thresholds alone yet; arm more rounds"
            return _answer(observation, None, None, figures | {"status": "failed", "reason": reason})
        return _isolated(series, target, found, figures)

    def _inner(self) -> ReconstructionAttack:
        inner = build_attack(ATTACKS.get(self.attack), self.attack, self.options, {})
        assert isinstance(inner, ReconstructionAttack)
        return inner

    def _one(
        self, observation: Observation, seed: int, device: torch.device, told: Progress
    ) -> Reconstruction:
        try:
            catch = haul(observation)
        except NotApplicable as refusal:
            return _answer(observation, None, None, {"status": "failed", "reason": str(refusal)})
        count = round(catch.count)
        figures: dict[str, Any] = {
            "class": catch.target,
            "caught": catch.count,
            "of the class": catch.sign < 0,
        }
        reason = self._spoilt(catch, count)
        if reason:
            return _answer(observation, catch, None, figures | {"status": "failed", "reason": reason})
        found = self._search(observation, catch, count, seed, device, told)
        misfit = misfit_of(observation, catch, found.images)
        if found.method == "read off" and misfit > CERTIFIED:
            reason = "what was read has other features than what was caught: samples of the class and of others mixed"
            return _answer(observation, catch, None, figures | {"status": "failed", "reason": reason})
        status = "certified" if found.method == "read off" else "approximate"
        figures |= {
            "status": status,
            "solver": found.method,
            "feature misfit": misfit,
            "search": found.details,
        }
        return _answer(observation, catch, dataclasses.replace(found, loss=misfit), figures)

    def _search(
        self,
        observation: Observation,
        catch: Catch,
        count: int,
        seed: int,
        device: torch.device,
        told: Progress,
    ) -> Reconstruction:
        """The images that were caught: read off the first layer, or searched for."""
        single = caught_alone(observation, catch, count)
        if count == 1 and is_readable(observation.scenario):
            return Reconstruction(
                read_off(single)[None], torch.zeros(1, dtype=torch.int64), 0.0, method="read off"
            )
        return self._inner().run([single], seed, device, told)[0]

    def _spoilt(self, catch: Catch, count: int) -> str:
        """Why a catch cannot be used; empty: it can."""
        if abs(catch.count - count) > COUNT_ERROR:
            return f"{catch.count:.3f} samples were caught, no integer: one lies at the threshold"
        if count < 1:
            return "nothing was caught, or as many of the class as of others"
        if count > self.most:
            return f"{count} samples were caught, more than fishing.most = {self.most}"
        return ""


def _check_rounds(scenario: Scenario) -> None:
    """Refuse batches that change from round to round, and rounded updates, whose differences are noise.

    Raises
    ------
    NotApplicable
    """
    if scenario.training.batch_size:
        raise NotApplicable(
            f"training.batch_size = {scenario.training.batch_size}: clients draw another batch in every round, and "
            "'fishing.mode' = 'rounds' compares rounds on one batch; use --batch-size 0, or mode 'feature'"
        )
    if scenario.compression.name == "qsgd":
        raise NotApplicable(
            "compression.name = 'qsgd' rounds at random, and 'fishing.mode' = 'rounds' reads differences of rounds; "
            "use compression.name 'none', or mode 'feature'"
        )


def _isolated(
    series: list[Observation],
    target: int,
    found: Sequence[tuple[Reconstruction, Tensor]],
    figures: dict[str, Any],
) -> Reconstruction:
    """The answer to the latest round of a series: what was isolated, with features (F,), and labels for it."""
    observation, head = series[-1], head_of(series[-1].scenario)
    scenario = observation.scenario
    images = public_images(scenario, observation.auxiliary, torch_rng(0, "fishing.rounds"))
    public = features_of(scenario, observation.weights, head, images)
    together = Reconstruction(
        images=torch.cat([one.images for one, _ in found]),
        labels=torch.zeros(len(found), dtype=torch.int64),
        loss=max(one.loss for one, _ in found),
    )
    read = all(one.method == "read off" for one, _ in found)
    figures = figures | {
        "status": "certified" if read else "approximate",
        "solver": found[0][0].method,
        "feature misfit": [one.loss for one, _ in found],
    }
    answer = _answer(observation, None, together, figures)
    classes = bisection.Classes.of(series[0], head, target, public.double().mean(0))
    if int(classes.counts.sum()) != observation.num_examples:
        return answer
    own, sure = classes.assign(torch.stack([features for _, features in found]), public)
    others = (classes.counts - torch.bincount(own, minlength=len(classes.counts))).clamp(min=0)
    rest = torch.repeat_interleave(torch.arange(len(others)), others)
    return dataclasses.replace(
        answer,
        labels=torch.cat([own, rest]),
        label_confidence=int(sure.sum()) / observation.num_examples,
    )


def _answer(
    observation: Observation, catch: Catch | None, found: Reconstruction | None, figures: dict[str, Any]
) -> Reconstruction:
    """The catch first; the other places hold the prior, and the details say so."""
    batch = observation.num_examples
    images = prior_image(observation).expand(batch, -1, -1, -1).clone()
    caught = 0 if found is None else len(found.images)
    labels = infer("auto", observation).values
    known = 0
    if found is not None:
        images[:caught] = found.images.clamp(0, 1).float()
        if catch is not None and catch.sign < 0:
            known = caught
            named = torch.full((caught,), catch.target, dtype=torch.int64)
            labels = torch.cat([named, labels[labels != catch.target], labels])[:batch]
    notes = [f"{batch - caught} of {batch} places hold the prior: fishing answers for its catch alone"]
    return Reconstruction(
        images=images,
        labels=labels,
        loss=math.inf if found is None else found.loss,
        label_confidence=max(known, 1) / batch,
        method="fishing",
        history=[] if found is None else found.history,
        floors=floors(observation, labels),
        details={
            "k": observation.update.kept,
            "recovered": caught,
            "batch": batch,
            "notes": notes,
            **figures,
        },
    )
