"""Fishing: a head under which one sample of the batch causes the whole body's gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adversaries import ATTACKS
from adversaries.base import Progress, no_progress, share_of
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.labels.label_strategies import infer
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.malicious.base import UNKNOWN_BATCH
from adversaries.reconstruction.malicious.fishing import bisection, isolation
from adversaries.reconstruction.malicious.fishing.isolation import Isolated
from adversaries.seats import MaliciousServer
from fedattack.config import Positive, Share
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Auxiliary, Candidates, Observation, Reconstruction, Scenario
from fedattack.registry import build_plugin
from fedattack.rng import torch_rng

CERTIFIED = 1e-4
"""Relative misfit of features up to which an image that was read off is what was isolated."""

_FEW = 2

_Find = Callable[[Observation], Reconstruction]


@dataclass
class Fishing(MaliciousServer, ReconstructionAttack):
    """Fishing for user data: a malicious server sends a head that all samples of a batch but one leave without error.

    All rows of the head are zero but one, in a random direction of the features, so that only this class' residual
    reaches the body. "class": its bias is low, so that its probability is 0 for every sample, and the residual -1
    for the samples of this class and 0 for the others. "feature": its logit is steep and crosses zero where on
    average one sample of a batch lies, so that its probability is 1 for that sample and 0 for the others. Samples
    of the class itself are caught on the other side, with the opposite sign; a class that the public labels lack is
    taken where there is one. What the body sends is then the gradient of what was isolated, whatever the batch
    size; the head's bias counts it, to the integer, and its weight holds their features, by which the answer is
    checked. The image is read off a linear first layer, or searched for by another attack on the single gradient.

    Each armed round draws its class, direction and threshold anew and catches one sample or none; of "feature" in
    about 37 of 100 rounds it is one. The other places of the answer hold the prior.

    "rounds" keeps one row over all armed rounds and moves each client's threshold by what its earlier counts told.
    It asks for a batch that stays the same (batch_size 0) and catches sample after sample, whatever their labels:
    see :mod:`~adversaries.reconstruction.malicious.fishing.bisection`. The answer of a round holds what the rounds
    up to it isolated; the first finds where nothing is above.

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
    settings : dict
        Settings of that attack.

    References
    ----------
    Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification", ICML 2022. There the threshold is found by bisection over rounds on one batch, within one class,
    and one sample is caught; differences of rounds are ours.
    """

    needs: ClassVar[Needs] = Needs(
        update="gradient",
        entries="all",
        sums="dense",
        fresh=True,
        head="biased",
        batch_norm="refused",
        helped=True,
    )
    adapts: ClassVar[bool] = True

    mode: Literal["auto", "class", "feature", "rounds"] = "auto"
    target: int | None = None
    quantile: Share | None = None
    attack: str = "gauss-newton"
    most: Positive = 4
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        cls = ATTACKS.get(self.attack)
        if not issubclass(cls, ReconstructionAttack) or issubclass(cls, MaliciousServer):
            raise ConfigError(
                f"setting 'fishing.attack' = {self.attack!r}: must be an attack on an honest server's single update, "
                "as 'gauss-newton' or 'ig'"
            )

    def needs_now(self, scenario: Scenario) -> Needs:
        """Mode "rounds" compares rounds on one batch."""
        if self.mode != "rounds":
            return self.needs
        return dataclasses.replace(self.needs, batch="same", values="exact")

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse a target that there is not, and what the attack inside cannot search."""
        classes = scenario.model.classes or 0
        if self.target is not None and not 0 <= self.target < classes:
            raise ConfigError(
                f"setting 'fishing.target' = {self.target}: the head has classes 0 to {classes - 1}"
            )
        if not isolation.is_readable(scenario):
            self._inner().check(isolation.lone_scenario(scenario, 1))

    def needs_history(self, scenario: Scenario) -> bool:
        """Whether rounds are read together."""
        return self.mode == "rounds"

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The global model with its head replaced: one row, and a bias that lets one sample through."""
        head = isolation.name_of_head(scenario)
        generator = torch_rng(seed, "fishing.arm")
        row, bias = torch.zeros_like(weights[f"{head}.weight"]), torch.zeros_like(weights[f"{head}.bias"])
        known = [] if auxiliary is None or auxiliary.labels is None else auxiliary.labels.unique().tolist()
        batch = scenario.training.batch_size or UNKNOWN_BATCH
        mode = self.mode
        if mode == "auto":
            mode = "class" if batch <= _FEW * (len(known) or len(bias)) else "feature"
        target = self._draw(mode, len(bias), generator, known)
        direction = torch.randn(row.shape[1], generator=generator)
        direction /= direction.norm()
        if mode == "class":
            row[target] = direction
            bias[target] = -isolation.SATURATED
        else:
            seen = (
                isolation.features_of(
                    scenario, weights, head, isolation.public_images(scenario, auxiliary, generator)
                )
                @ direction
            )
            share = 1 - 1 / max(batch, 2) if self.quantile is None else self.quantile
            threshold, deviation = torch.quantile(seen, share), seen.std().clamp_min(1e-12)
            steep = (isolation.SATURATED if mode == "feature" else bisection.STEEP) / deviation
            if mode == "rounds":
                threshold = seen.mean() + bisection.BEYOND * deviation
            row[target] = direction * steep
            bias[target] = -threshold * steep
        return dict(weights) | {f"{head}.weight": row, f"{head}.bias": bias}

    def tailor(
        self, scenario: Scenario, weights: dict[str, Tensor], place: int, earlier: Sequence[Observation]
    ) -> dict[str, Tensor]:
        """Under mode "rounds", the earlier rounds' row with the next threshold, while the body stays the same."""
        head = isolation.name_of_head(scenario)
        name = f"{head}.weight"
        if self.mode != "rounds" or not earlier:
            return {}
        before = earlier[-1].weights
        if any(not torch.equal(before[n], t) for n, t in weights.items() if not n.startswith(f"{head}.")):
            return {}
        target = isolation.row_of(earlier[-1], head)
        series = bisection.comparable_rounds(earlier, head)
        steep = before[name][target].norm()
        public = isolation.public_images(scenario, earlier[0].auxiliary, torch_rng(0, "fishing.rounds"))
        scores = isolation.features_of(scenario, before, head, public) @ (before[name][target] / steep)
        known, tried = bisection.threshold_rounds(series, head, target)
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
            told = share_of(progress, number / len(observations), (number + 1) / len(observations))

            def find(single: Observation, told: Progress = told) -> Reconstruction:
                return self._inner().run([single], seed, device, told)[0]

            series = [observation]
            if self.mode == "rounds":
                client, latest = observation.client, observation.round
                up_to = [one for one in observations if one.client == client and one.round <= latest]
                series = sorted(up_to, key=lambda one: one.round)
            answers.append(self._several(series, known, find))
        return answers

    def _several(
        self, series: list[Observation], known: dict[bytes, Reconstruction], find: _Find
    ) -> Reconstruction:
        """One client's rounds up to the one that is answered; searches are kept in `known`."""
        observation, head = series[-1], isolation.name_of_head(series[-1].scenario)
        try:
            target = isolation.row_of(observation, head)
        except NotApplicable as refusal:
            return _answer(observation, None, None, {"status": "failed", "reason": str(refusal)})
        series = bisection.comparable_rounds(series, head)
        if len(series) == 1:
            return self._one(observation, find)
        if not bisection.nothing_above(series[0], head, target):
            reason = "the first of these rounds, whose threshold lies above all samples, is missing"
            return _answer(observation, None, None, {"status": "failed", "reason": reason})
        thresholds, _ = bisection.threshold_rounds(series, head, target)
        figures = {"class": target, "rounds": len(series), "above": [one.above for one in thresholds]}
        found: list[tuple[Reconstruction, Tensor]] = []
        for single in bisection.alone(thresholds):
            key = single.update.values.numpy().tobytes()
            isolated = isolation.read_head(single)
            if key not in known:
                searched = _search(single, isolated, 1, find)
                misfit = isolation.misfit_of(single, isolated, searched.images)
                known[key] = dataclasses.replace(searched, loss=misfit)
            if known[key].method != "read off" or known[key].loss <= CERTIFIED:
                found.append((known[key], isolated.features))
        if not found:
            reason = "no sample lies between two thresholds alone yet; arm more rounds"
            return _answer(observation, None, None, figures | {"status": "failed", "reason": reason})
        return _isolated(series, target, found, figures)

    def _inner(self) -> ReconstructionAttack:
        inner = build_plugin(ATTACKS.get(self.attack), self.attack, self.settings, {})
        assert isinstance(inner, ReconstructionAttack)
        return inner

    def _one(self, observation: Observation, find: _Find) -> Reconstruction:
        try:
            isolated = isolation.read_head(observation)
        except NotApplicable as refusal:
            return _answer(observation, None, None, {"status": "failed", "reason": str(refusal)})
        count = round(isolated.count)
        figures: dict[str, Any] = {
            "class": isolated.target,
            "caught": isolated.count,
            "of the class": isolated.sign < 0,
        }
        reason = self._unusable(isolated, count)
        if reason:
            return _answer(observation, isolated, None, figures | {"status": "failed", "reason": reason})
        found = _search(observation, isolated, count, find)
        misfit = isolation.misfit_of(observation, isolated, found.images)
        if found.method == "read off" and misfit > CERTIFIED:
            reason = "what was read has other features than what was caught: samples of the class and of others mixed"
            return _answer(observation, isolated, None, figures | {"status": "failed", "reason": reason})
        status = "certified" if found.method == "read off" else "approximate"
        figures |= {
            "status": status,
            "solver": found.method,
            "feature misfit": misfit,
            "search": found.details,
        }
        return _answer(observation, isolated, dataclasses.replace(found, loss=misfit), figures)

    def _unusable(self, isolated: Isolated, count: int) -> str:
        """Why what was isolated cannot be used; empty: it can."""
        if abs(isolated.count - count) > bisection.COUNT_ERROR:
            return f"{isolated.count:.3f} samples were caught, no integer: one lies at the threshold"
        if count < 1:
            return "nothing was caught, or as many of the class as of others"
        if count > self.most:
            return f"{count} samples were caught, more than fishing.most = {self.most}"
        return ""


def _search(observation: Observation, isolated: Isolated, count: int, find: _Find) -> Reconstruction:
    """The images that were isolated: read off the first layer, or searched for."""
    single = isolation.as_whole_batch(observation, isolated, count)
    if count > 1 or not isolation.is_readable(observation.scenario):
        return find(single)
    label = torch.zeros(1, dtype=torch.int64)
    return Reconstruction(isolation.read_off(single)[None], label, 0.0, method="read off")


def _isolated(
    series: list[Observation],
    target: int,
    found: Sequence[tuple[Reconstruction, Tensor]],
    figures: dict[str, Any],
) -> Reconstruction:
    """The answer to the latest round of a series: what was isolated, with features (F,), and labels for it."""
    observation, head = series[-1], isolation.name_of_head(series[-1].scenario)
    scenario = observation.scenario
    images = isolation.public_images(scenario, observation.auxiliary, torch_rng(0, "fishing.rounds"))
    public = isolation.features_of(scenario, observation.weights, head, images)
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
        answer, labels=torch.cat([own, rest]), label_confidence=int(sure.sum()) / observation.num_examples
    )


def _answer(
    observation: Observation, isolated: Isolated | None, found: Reconstruction | None, figures: dict[str, Any]
) -> Reconstruction:
    """What was isolated first; the other places hold the prior, and the details say so."""
    batch = observation.num_examples
    images = prior_image(observation).expand(batch, -1, -1, -1).clone()
    caught = 0 if found is None else len(found.images)
    labels = infer("auto", Evidence(observation)).values
    known = 0
    if found is not None:
        images[:caught] = found.images.clamp(0, 1).float()
        if isolated is not None and isolated.sign < 0:
            known = caught
            named = torch.full((caught,), isolated.target, dtype=torch.int64)
            labels = torch.cat([named, labels[labels != isolated.target], labels])[:batch]
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
