"""The experiment on membership: who was trained on, asked about every client that is a target."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries.membership.base import MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.release import released
from adversaries.seats import MaliciousClient, MaliciousServer
from fedattack.audit import AuditResult, audit_membership
from fedattack.audit.membership_floors import Blind
from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable, RunFailed
from fedattack.groundtruth import MembershipTruth
from fedattack.models import build_model, initial_weights
from fedattack.observation import EVERYONE, Candidates, MembershipScores, Observation
from fedattack.reporting import formats
from fedattack.rng import adversary_seed
from fedattack.storage import save_observation
from fedattack.storage.membership import save_candidates, save_global_model, save_membership_truth
from fedattack.task import task_of
from simulations.engine.federation import FederationResult, Judge, RoundRecord
from simulations.experiments.answered import Answered
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import choose_device
from simulations.experiments.nearest import nearest_pictures
from simulations.experiments.privacy import weakest_guarantee
from simulations.experiments.question import (
    Question,
    Rounds,
    check_question,
    choose_question,
    expected_rounds,
    per_unit,
)
from simulations.experiments.rounds import Watch
from simulations.experiments.saved_membership import SavedMembership

log = logging.getLogger("fedattack.membership")

LEARNT = 0.1
"""Of an untrained generator's distance to real images, what is left where it makes images like them."""


class MembershipExperiment(Experiment):
    """Asks a server's attacks about every target, or about anybody, and a client's about all others.

    Each round's observations are shown to the attacks when it ends, and let go; their figures stay, and are stored.
    """

    from_saved = SavedMembership
    attacks: dict[str, MembershipAttack]

    def __init__(self, plan: Plan, attacks: Mapping[str, MembershipAttack]) -> None:
        super().__init__(plan, attacks)
        self._after: dict[str, Tensor] = {}
        self._question = self._choose()
        self._blind = Blind(self._images, plan.config.seed)
        serving = {name: attacks[name] for name in self._serving()}
        seat = Knowledge.of(self._candidates(), plan.world.auxiliary), plan.world.auxiliary
        setting = plan.world.scenario, plan.config.federation.rounds
        self._watch = Watch(plan.config, plan.folder, serving, seat, setting, plan.shown)

    @classmethod
    def check(cls, config: Config, world: World) -> None:
        check_question(config, world)

    def _choose(self) -> Question:
        """The list, from what the targets train on in the rounds that the attacks read."""
        config = self.plan.config
        everyone = range(config.federation.clients)
        asked = everyone if config.attack.targets is None else config.attack.targets
        hostile: set[int] = set()
        if any(isinstance(attack, MaliciousClient) for attack in self.attacks.values()):
            hostile = set(config.attack.malicious_clients)
        targets = [client for client in asked if client not in hostile]
        others = [client for client in everyone if client not in {*targets, *hostile}]
        readings = sorted({tuple(self._rounds(attack)) for attack in self.attacks.values()})
        rounds = [
            {c: [r for r in found if r in one] for c, found in self._expected.items()} for one in readings
        ]
        question = choose_question(config, self.plan.world, targets, *rounds, others=others)
        anybody = [
            name for name, attack in self.attacks.items() if EVERYONE in self._targets(attack, question)
        ]
        if anybody and config.attack.negatives != "held-out":
            log.warning(
                "membership: %s: asked about anybody, beside held-out samples alone, for others' members are "
                "members ('attack.negatives' = %r)",
                *(", ".join(anybody), config.attack.negatives),
            )
        return question

    def _candidates(self) -> Candidates:
        return self._question.candidates(self.plan.world)

    def _serving(self) -> list[str]:
        """The attacks of a server's seat."""
        return [name for name, attack in self.attacks.items() if not isinstance(attack, MaliciousClient)]

    def _rounds(self, attack: MembershipAttack) -> Sequence[int]:
        """The rounds that an attack reads: one that arms them, and sees them skipped, the armed ones."""
        if isinstance(attack, MaliciousServer) and not attack.aggregates:
            return self.plan.config.attack.rounds
        return range(1, self.plan.config.federation.rounds + 1)

    def _targets(self, attack: MembershipAttack, question: Question | None = None) -> Sequence[int]:
        """Whom an attack is asked about: one client after the other, or anybody."""
        alone = attack.needs_now(self.plan.world.scenario).about == "client"
        hidden = isinstance(attack, MaliciousClient) or hides_clients(self.plan.config.defense)
        return (question or self._question).targets if alone and not hidden else (EVERYONE,)

    def _asked_about(self, attack: MembershipAttack, target: int, rounds: Rounds) -> Rounds:
        """Of the clients asked about, the rounds asked about."""
        asked = [c for c in rounds if (c in self._question.targets if target == EVERYONE else c == target)]
        return {client: [r for r in rounds[client] if r in self._rounds(attack)] for client in asked}

    @cached_property
    def _expected(self) -> Rounds:
        return expected_rounds(self.plan.config, self.plan.world)

    def questions(self) -> dict[str, Candidates]:
        return dict.fromkeys(self.attacks, self._candidates())

    def wants(self, round: int, client: int) -> bool:
        """Everything of the rounds that an attack of the server has yet to read."""
        return any(self._watch.lacks(name, round) for name in self._reading(round))

    def _reading(self, round: int) -> list[str]:
        """The attacks of the server that are shown a round."""
        shown = {name: self._rounds(self.attacks[name]) for name in self._serving()}
        return [
            n
            for n, found in shown.items()
            if round in found[-1 if self.attacks[n].watches == "last" else 0 :]
        ]

    def global_model(self, round: int, weights: dict[str, Tensor]) -> None:
        self._after = weights

    def weights_again(self, round: int) -> bool:
        """No: it is looked at beside what is observed of its round."""
        return False

    def after_round(self, record: RoundRecord) -> None:
        """Have the attacks look at it, and let go of it."""
        seen, self.this_round = self.this_round, []
        if seen:
            if self.plan.config.output.save_observations:
                self._save(seen)
            self._watch.show(seen, self._after, self._reading(record.round))

    def collect(self) -> None:
        self._watch.collect()
        self.failed |= self._watch.failed

    def close(self) -> None:
        self._watch.close()

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Have every attack conclude, and score its answer."""
        if self.plan.config.output.save_observations:
            self._save_truth(federation)
        audits: dict[str, AuditResult] = {}
        for name, attack in self.attacks.items():
            if name not in self.failed:
                try:
                    audits[name] = self._audit(name, attack, federation)
                except Exception as error:
                    self.failed[name] = error
        return audits

    def _audit(self, name: str, attack: MembershipAttack, federation: FederationResult) -> AuditResult:
        plan = self.plan
        answered: dict[int, list[int]] = defaultdict(list)
        for record in federation.rounds:
            # A client learns of the others' data through what was aggregated; the server saw every reply.
            if record.aggregated or not isinstance(attack, MaliciousClient):
                for client in record.clients:
                    answered[client].append(record.round)
        details: dict[str, dict[str, Any]] = {}
        ids, world = self._question.samples, plan.world
        groups = None if world.dataset.groups is None else world.dataset.groups[ids]
        told = Answered(ids, world.dataset.labels[ids], groups)
        for target in self._targets(attack):
            rounds = self._asked_about(attack, target, answered)
            if not any(rounds.values()):
                continue
            try:
                asked, details[str(target)] = self._question.settle(plan.config, world, rounds, target)
            except NotApplicable as error:  # nothing counts of this one
                self._watch.pass_over(name, target, error)
                continue
            answer = self._watch.scores(name, target, self._answer(name, attack, federation))
            if answer is None:
                continue
            told.add(asked, per_unit(answer, self._question.groups), details[str(target)]["observed_rounds"])
        if not told.scored:
            raise self._watch.fault(name)
        plan.shown(name, 1.0, f"{len(self._question.ids)} candidates")
        plan.folder.save_part(f"{name}-candidates", details)
        result = audit_membership(
            name,
            told.scored,
            statistic=told.statistic,
            seconds=self._watch.seconds[name],
            accuracy=last_accuracy(federation),
            chance_accuracy=plan.commonest_share,
            test_samples=len(plan.world.pools.nonmembers),
            idle=self._idle(federation),
            source=told.source,
            blind=self._blind.of(told.scored),
            guarantee=weakest_guarantee(plan.config, world, federation.all_rounds),
            references=told.references,
            images=self._images,
            warnings=self._warnings(details),
            seed=plan.config.seed,
        )
        if isinstance(attack, SyntheticAttack) and federation.weights:
            device = choose_device(plan.config.engine.device)
            seed = adversary_seed(plan.config.seed, "watch", plan.config.federation.rounds)
            release = released(world.scenario, federation.weights, attack.samples, seed, device)
            result.curves["nearest"] = nearest_pictures(result, release.images, device)
        return result

    def _answer(
        self, name: str, attack: MembershipAttack, federation: FederationResult
    ) -> Callable[[], MembershipScores] | None:
        """What gives the scores of an attack that reads no rounds; None: it reads them."""
        return partial(_answered, name, federation) if isinstance(attack, MaliciousClient) else None

    def _idle(self, federation: FederationResult) -> str:
        """Why a generator says nothing about anybody: it makes nothing like the images yet; else empty."""
        last = next((r.loss for r in reversed(federation.rounds) if r.loss is not None), None)
        if (
            task_of(self.plan.world.scenario).kind != "generate"
            or last is None
            or last < LEARNT * self._untrained
        ):
            return ""
        shown, first = formats.decimal(last, 2), formats.decimal(self._untrained, 2)
        return (
            f"the generator has hardly learnt (energy distance to held-out images {shown}, untrained {first}), "
            "and says nothing either way"
        )

    @cached_property
    def _untrained(self) -> float:
        """What the model that the training began with is measured by."""
        config, world = self.plan.config, self.plan.world
        return Judge(config, world)(initial_weights(world.scenario.model, config.seed))["loss"]

    def _images(self, ids: NDArray[np.int64]) -> Tensor:
        return self.plan.world.dataset.tensors(ids)[0]

    def _warnings(self, details: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What the question and the model call for."""
        found, matched = [], min(one["matched_label"] for one in details.values())
        if matched < self._question.alike and self.plan.config.data.labels == "natural":
            share = formats.percent(matched)
            found.append(
                f"only {share} of the non-members have the label of a member: a score may tell classes apart"
            )
        if any(
            name.endswith("running_mean")
            for name, _ in build_model(self.plan.world.scenario.model).named_buffers()
        ):
            found.append(
                "candidates are looked at with BatchNorm in evaluation mode, at the statistics that were sent: "
                "unlike the batches that clients trained on"
            )
        return found

    def _save(self, seen: Sequence[Observation]) -> None:
        """Keep what was seen, for an attack of another day."""
        for observation in seen:
            save_observation(self.plan.folder.observations, observation, self.plan.folder.identity)
        save_global_model(self.plan.folder.observations, seen[0].round, self._after)
        save_candidates(self.plan.folder.observations, self._candidates())

    def _save_truth(self, federation: FederationResult) -> None:
        """Keep, apart, what counts of each target in the rounds that were saved."""
        world, question = self.plan.world, self._question
        answered: dict[int, list[int]] = defaultdict(list)
        for record in federation.rounds:
            if self._reading(record.round):
                for client in record.clients:
                    answered[client].append(record.round)
        asked = {}
        for target in (*question.targets, EVERYONE):
            whom = question.targets if target == EVERYONE else [target]
            rounds = {client: answered[client] for client in whom if client in answered}
            if rounds:
                with suppress(NotApplicable):  # nothing counts of this one
                    counts, _ = question.settle(self.plan.config, world, rounds, target)
                    asked[target] = {name: t for name, t in vars(counts).items() if isinstance(t, np.ndarray)}
        groups = world.dataset.groups
        save_membership_truth(
            self.plan.folder.truth,
            MembershipTruth(
                question.samples,
                question.owner,
                world.dataset.labels[question.samples],
                None if groups is None else groups[question.samples],
                asked,
                last_accuracy(federation),
                self.plan.commonest_share,
                len(world.pools.nonmembers),
            ),
        )


def _answered(name: str, federation: FederationResult) -> MembershipScores:
    """What the malicious clients said, on average."""
    answers = federation.answers.get(name, {})
    if not answers:
        raise RunFailed(f"{name}: no malicious client gave an answer (log.txt)")
    each = [answers[client]["scores"].double() for client in sorted(answers)]
    return MembershipScores(torch.stack(each).mean(0), name, {"asked_clients": sorted(answers)})


def last_accuracy(federation: FederationResult) -> float | None:
    """Of the last global model that was evaluated."""
    return next((r.accuracy for r in reversed(federation.rounds) if r.accuracy is not None), None)
