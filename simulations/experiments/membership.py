"""The experiment on membership: who was trained on, asked about every client that is a target."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries.membership.base import Figures, MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from adversaries.seats import MaliciousClient, MaliciousServer
from fedattack.audit import AuditResult, audit_membership
from fedattack.audit.membership import Source
from fedattack.audit.membership_floors import blind_baseline
from fedattack.audit.membership_pool import Scored
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable, RunFailed
from fedattack.metrics import Interval
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Candidates, MembershipScores
from fedattack.rng import adversary_seed
from simulations.engine.federation import FederationResult, RoundRecord
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import choose_device
from simulations.experiments.privacy import weakest_guarantee
from simulations.experiments.question import Question, Rounds, choose_question, expected_rounds


class MembershipExperiment(Experiment):
    """Asks a server's attacks about every target, or about anybody, and a client's about all others.

    Each round's observations are shown to the attacks when it ends, and let go; their figures stay, and are stored.
    """

    attacks: dict[str, MembershipAttack]

    def __init__(self, plan: Plan, attacks: Mapping[str, MembershipAttack]) -> None:
        super().__init__(plan, attacks)
        self._seconds: dict[str, float] = defaultdict(float)
        self._figures: dict[str, dict[int, Figures]] = {
            name: dict(plan.folder.load_rounds(name)) for name in self._serving()
        }
        self._after: dict[str, Tensor] = {}
        self._question = self._choose()
        self._by_pixels: dict[tuple[bytes, ...], Interval | None] = {}
        self._knowledge = Knowledge.of(self._candidates(), plan.world.auxiliary)

    def _choose(self) -> Question:
        """The list, from what the targets train on in the rounds that every attack reads."""
        config = self.plan.config
        asked = range(config.federation.clients) if config.attack.targets is None else config.attack.targets
        if wrong := [client for client in asked if client >= config.federation.clients]:
            raise ConfigError(
                f"setting 'attack.targets' names client {wrong[0]}; accepted: 0 to {config.federation.clients - 1}"
            )
        numbers = {name: set(self._rounds(attack)) for name, attack in self.attacks.items()}
        common = set.intersection(*numbers.values())
        hostile = set()
        if any(isinstance(attack, MaliciousClient) for attack in self.attacks.values()):
            hostile = set(config.attack.malicious_clients)
        targets = [client for client in asked if client not in hostile]
        rounds = {c: [r for r in found if r in common] for c, found in self._expected.items()}
        return choose_question(config, self.plan.world, targets, rounds)

    def _candidates(self) -> Candidates:
        return Candidates(*self.plan.world.dataset.tensors(self._question.ids))

    def _serving(self) -> list[str]:
        """The attacks of a server's seat."""
        return [name for name, attack in self.attacks.items() if not isinstance(attack, MaliciousClient)]

    def _rounds(self, attack: MembershipAttack) -> Sequence[int]:
        """The rounds that an attack reads: one that arms them, and sees them skipped, the armed ones."""
        if isinstance(attack, MaliciousServer) and not attack.aggregates:
            return self.plan.config.attack.rounds
        return range(1, self.plan.config.federation.rounds + 1)

    def _targets(self, attack: MembershipAttack) -> Sequence[int]:
        """Whom an attack is asked about: one client after the other, or anybody."""
        alone = attack.needs_now(self.plan.world.scenario).about == "client"
        hidden = isinstance(attack, MaliciousClient) or hides_clients(self.plan.config.defense)
        return self._question.targets if alone and not hidden else (EVERYONE,)

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
        return any(self._lacks(name, round) for name in self._serving())

    def _lacks(self, name: str, round: int) -> bool:
        return round not in self._figures[name] and round in self._rounds(self.attacks[name])

    def global_model(self, round: int, weights: dict[str, Tensor]) -> None:
        self._after = weights

    def after_round(self, record: RoundRecord) -> None:
        """Show it to the attacks, and let go of it."""
        seen, self.this_round = self.this_round, []
        number, config = record.round, self.plan.config
        if not seen:
            return
        view = RoundView(seen, self._knowledge, choose_device(config.engine.device), self._after)
        for name in self._serving():
            if self._lacks(name, number) and name not in self.failed:
                seed, started = adversary_seed(config.seed, "watch", number), time.perf_counter()
                try:
                    figures = self.attacks[name].watch(view, seed)
                except Exception as error:  # its own; the federation and the other attacks go on
                    self.failed[name] = error
                    continue
                self.plan.folder.save_round(name, number, figures)
                self._figures[name][number] = figures
                self._seconds[name] += time.perf_counter() - started
                self.plan.shown(name, number / config.federation.rounds, f"round {number}")

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Have every attack conclude, and score its answer."""
        audits: dict[str, AuditResult] = {}
        for name, attack in self.attacks.items():
            if name not in self.failed:
                try:
                    audits[name] = self._audit(name, attack, federation)
                except Exception as error:
                    self.failed[name] = error
        return audits

    def _audit(self, name: str, attack: MembershipAttack, federation: FederationResult) -> AuditResult:
        plan, started = self.plan, time.perf_counter()
        answered: dict[int, list[int]] = defaultdict(list)
        for record in federation.rounds:
            # A client learns of the others' data through what was aggregated; the server saw every reply.
            if record.aggregated or not isinstance(attack, MaliciousClient):
                for client in record.clients:
                    answered[client].append(record.round)
        scored: list[Scored] = []
        answers: dict[int, NDArray[np.float64]] = {}
        details: dict[str, dict[str, Any]] = {}
        references: int | None = None
        statistic = name
        for target in self._targets(attack):
            rounds = self._asked_about(attack, target, answered)
            if not any(rounds.values()):
                continue
            asked, details[str(target)] = self._question.settle(plan.config, plan.world, rounds, target)
            known = plan.folder.load_scores(name, target)
            answer = known[0] if known else self._answer(name, attack, target, federation)
            if known is None:
                seconds = self._seconds[name] + time.perf_counter() - started
                plan.folder.save_scores(name, target, answer, seconds)
            statistic, references = answer.statistic, answer.details.get("references")
            answers[target], labels = answer.scores.numpy(), plan.world.dataset.labels
            samples, groups = self._question.ids[asked.places], plan.world.dataset.groups
            scored.append(
                Scored(
                    target,
                    answers[target][asked.places],
                    asked.is_member,
                    samples,
                    asked.others,
                    labels[samples],
                    None if groups is None else groups[samples],
                    sorted({number for numbers in rounds.values() for number in numbers}),
                )
            )
        if not scored:
            raise NotApplicable(f"{name}: no update of a client that it is asked about was observed")
        plan.shown(name, 1.0, f"{len(self._question.ids)} candidates")
        plan.folder.save_part(f"{name}-candidates", details)
        return audit_membership(
            name,
            scored,
            statistic=statistic,
            seconds=self._seconds[name] + time.perf_counter() - started,
            accuracy=next((r.accuracy for r in reversed(federation.rounds) if r.accuracy is not None), None),
            chance_accuracy=plan.commonest_share,
            test_samples=len(plan.world.pools.nonmembers),
            source=self._source(scored, answers),
            blind=self._blind(scored),
            guarantee=weakest_guarantee(plan.config, plan.world, federation.rounds),
            references=references,
            images=self._images,
            warnings=self._warnings(details),
            seed=plan.config.seed,
        )

    def _images(self, ids: NDArray[np.int64]) -> Tensor:
        return self.plan.world.dataset.tensors(ids)[0]

    def _source(self, scored: Sequence[Scored], answers: Mapping[int, NDArray[np.float64]]) -> Source | None:
        """Every target's scores for every target's members; None where there is one target."""
        if len(scored) < 2:
            return None
        place = {sample: index for index, sample in enumerate(self._question.ids.tolist())}
        asked = [np.array([place[i] for i in one.samples[one.is_member].tolist()]) for one in scored]
        owner = np.repeat([one.client for one in scored], [len(places) for places in asked])
        matrix = np.stack([answers[one.client][np.concatenate(asked)] for one in scored])
        return Source(np.array([one.client for one in scored]), matrix, owner)

    def _blind(self, scored: Sequence[Scored]) -> Interval | None:
        """What pixels alone tell of these candidates: the same for all attacks that are asked the same."""
        asked = tuple(part.tobytes() for one in scored for part in (one.samples, one.is_member))
        if asked not in self._by_pixels:
            pixels = lambda ids: self._images(ids).numpy()  # noqa: E731
            self._by_pixels[asked] = blind_baseline(scored, pixels, self.plan.config.seed)
        return self._by_pixels[asked]

    def _warnings(self, details: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What the question and the model call for."""
        found, config = [], self.plan.config
        matched = min(one["matched_label"] for one in details.values())
        if matched < 1 and config.data.labels == "natural":
            found.append(
                f"only {matched:.0%} of the non-members have the label of a member: a score may tell classes apart"
            )
        names = [name for name, _ in build_model(self.plan.world.scenario.model).named_buffers()]
        if any(name.endswith("running_mean") for name in names):
            found.append(
                "candidates are looked at with BatchNorm in evaluation mode, at the statistics that were sent: "
                "unlike the batches that clients trained on"
            )
        return found

    def _answer(
        self, name: str, attack: MembershipAttack, target: int, federation: FederationResult
    ) -> MembershipScores:
        if not isinstance(attack, MaliciousClient):
            return attack.scores(self._figures[name], target, self._knowledge)
        answers = federation.answers.get(name, {})
        if not answers:
            raise RunFailed(f"{name}: no malicious client gave an answer (log.txt)")
        each = [answers[client]["scores"].double() for client in sorted(answers)]
        return MembershipScores(torch.stack(each).mean(0), name, {"asked_clients": sorted(answers)})
