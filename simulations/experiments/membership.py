"""The experiment on membership: who was trained on. The candidates are chosen here, not by the adversary."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from adversaries.membership.base import Figures, MembershipAttack
from adversaries.seats import MaliciousClient, MaliciousServer
from fedattack.audit import AuditResult, audit_membership
from fedattack.config import Config
from fedattack.data import ImageDataset, World
from fedattack.errors import DataError, NotApplicable, RunFailed
from fedattack.models import initial_weights
from fedattack.observation import EVERYONE, Candidates, MembershipScores
from fedattack.rng import adversary_seed, numpy_rng
from simulations.client_app import drops_out, round_batches
from simulations.engine.federation import FederationResult, RoundRecord
from simulations.engine.flower_internals import server_identity
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import choose_device
from strategies import build_strategy
from strategies.eavesdropper import seeded_sampling
from strategies.messages import to_record

log = logging.getLogger("fedattack.seats")

FEW_MEMBERS = 20
"""Below so many members chance alone scores an AUC of 0.32 to 0.68 (95 %), and a warning is due."""

Rounds = Mapping[int, Sequence[int]]
"""Client -> the rounds that it answers in."""


def expected_rounds(config: Config, world: World) -> dict[int, list[int]]:
    """Who will answer when: the strategy's own draw under the run's seed, less those that drop out."""
    strategy = build_strategy(config.federation, config.training.learning_rate)
    arrays = to_record(initial_weights(world.scenario.model, config.seed))
    nodes: Any = SimpleNamespace(get_node_ids=lambda: range(1, 1 + config.federation.clients))  # of a grid
    answering: dict[int, list[int]] = defaultdict(list)
    for number in range(1, config.federation.rounds + 1):
        with server_identity(0), seeded_sampling(config.seed, number):
            messages = list(strategy.configure_train(number, arrays, ConfigRecord(), nodes))
        for client in sorted(message.metadata.dst_node_id - 1 for message in messages):
            if not drops_out(config, number, client):
                answering[client].append(number)
    return answering


@dataclass(frozen=True)
class Question:
    """The one list of candidates of a run, fixed before it starts; which are members is settled by what was seen.

    Members are samples that the target (:data:`EVERYONE`: all but the malicious clients) is to train on, at most
    ``attack.candidates`` of them; as many non-members come from the held-out pool, each with the label and, while
    there are such, the person of its member: else an attack could score by telling classes apart. `members` and
    `nonmembers` are sample ids, int64 (N,), pair by pair; the candidates are both, in the `order` int64 (2N,).
    """

    target: int
    members: NDArray[np.int64]
    nonmembers: NDArray[np.int64]
    order: NDArray[np.int64]

    @property
    def ids(self) -> NDArray[np.int64]:
        """Sample ids of the candidates, (2N,)."""
        return np.concatenate([self.members, self.nonmembers])[self.order]

    def settle(
        self, config: Config, world: World, rounds: Rounds
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Which candidates count, bool (2N,), which of them all are members, bool (2N,), and details.

        A pair counts if its member was trained on by a client in one of its `rounds`. `details`: `members_used`
        (distinct samples that were), `observed_rounds`, and `matched_label`, `matched_group` (shares of the
        non-members with the label, and of the person, of a member).
        """
        used = trained_on(config, world, rounds)
        seen = np.isin(self.members, used)
        members, nonmembers = self.members[seen], self.nonmembers[seen]
        if len(members) < FEW_MEMBERS:
            log.warning(
                "membership: only %d members to ask about (%d samples were trained on in the observed rounds, %d "
                "non-members are held out); chance alone spreads widely over so few",
                *(len(members), len(used), len(world.pools.nonmembers)),
            )
        labels, groups = world.dataset.labels, world.dataset.groups
        matched = _shared(labels, members, nonmembers)
        if matched < 1 and config.data.labels == "natural":
            log.warning(
                "membership: only %.0f %% of the non-members have the label of a member, so a score above chance may "
                "tell classes apart rather than members",
                100 * matched,
            )
        details = {
            "members_used": len(used),
            "observed_rounds": sorted({number for numbers in rounds.values() for number in numbers}),
            "matched_label": matched,
            "matched_group": None if groups is None else _shared(groups, members, nonmembers),
        }
        first = np.arange(len(self.order)) < len(self.members)
        return np.concatenate([seen, seen])[self.order], first[self.order], details


def trained_on(config: Config, world: World, rounds: Rounds) -> NDArray[np.int64]:
    """Distinct ids of the samples that clients train on in their rounds, client by client."""
    used: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    for client, numbers in rounds.items():
        partition = world.partitions[client]
        batches = [batch for r in numbers for batch in round_batches(config, len(partition), r, client)]
        if batches:
            used.append(partition[np.unique(np.concatenate(batches))])
    return np.concatenate(used)


def choose_question(config: Config, world: World, target: int, rounds: Rounds) -> Question:
    """The candidates about `target`, members drawn from what its clients train on in their `rounds`."""
    used, pool = trained_on(config, world, rounds), world.pools.nonmembers
    if not len(used):
        raise NotApplicable("membership: no client that is asked about takes part in the rounds asked about")
    if not len(pool):
        raise DataError(
            "membership: no non-member is held out; raise setting 'data.nonmembers' "
            f"(now {config.data.nonmembers}) or use a larger data set"
        )
    count = min(config.attack.candidates, len(used), len(pool))
    rng = numpy_rng(config.seed, "membership candidates", target)
    members, nonmembers = _pairs(rng.permutation(used), rng.permutation(pool), world.dataset, count)
    return Question(target, members, nonmembers, rng.permutation(2 * len(members)))


def _pairs(
    used: NDArray[np.int64], pool: NDArray[np.int64], dataset: ImageDataset, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At most `count` members, and as many non-members: pair by pair of one label and person, else of one label.

    Unlike pairs are made only to reach :data:`FEW_MEMBERS`: fewer candidates are better than two kinds of them.
    """
    nobody = np.zeros(len(dataset), dtype=np.int64)
    groups = nobody if dataset.groups is None else dataset.groups
    alike = [(dataset.labels, groups), (dataset.labels, nobody)]
    unlike = [(nobody, groups), (nobody, nobody)]
    pairs: dict[int, int] = {}
    for label, group in alike + unlike:
        wanted = count if label is dataset.labels else min(count, FEW_MEMBERS)
        taken = set(pairs.values())
        waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in pool.tolist():
            if i not in taken:
                waiting[int(label[i]), int(group[i])].append(i)
        for member in used.tolist():
            candidates = waiting[int(label[member]), int(group[member])]
            if len(pairs) < wanted and member not in pairs and candidates:
                pairs[member] = candidates.pop()
    return np.array(list(pairs), dtype=np.int64), np.array(list(pairs.values()), dtype=np.int64)


def _shared(key: NDArray[np.int64], members: NDArray[np.int64], nonmembers: NDArray[np.int64]) -> float:
    """Share of the non-members that have the key of a member, each member counted once."""
    common = Counter(key[members].tolist()) & Counter(key[nonmembers].tolist())
    return common.total() / len(nonmembers)


class MembershipExperiment(Experiment):
    """Asks a server's attack about the client that answers most often, and a client's about all others.

    Each round's observations are shown to the attacks when it ends, and let go; their figures stay, and are stored.
    """

    attacks: dict[str, MembershipAttack]

    def __init__(self, plan: Plan, attacks: Mapping[str, MembershipAttack]) -> None:
        super().__init__(plan, attacks)
        self._seconds: dict[str, float] = defaultdict(float)
        self._figures: dict[str, dict[int, Figures]] = {
            name: dict(plan.folder.load_rounds(name)) for name in self._serving()
        }
        self._asked = {name: self._question(attack) for name, attack in attacks.items()}

    def _serving(self) -> list[str]:
        """The attacks of a server's seat."""
        return [name for name, attack in self.attacks.items() if not isinstance(attack, MaliciousClient)]

    def _rounds(self, attack: MembershipAttack) -> Sequence[int]:
        """The rounds that an attack reads: one that arms them, and sees them skipped, the armed ones."""
        if isinstance(attack, MaliciousServer) and not attack.aggregates:
            return self.plan.config.attack.rounds
        return range(1, self.plan.config.federation.rounds + 1)

    def _asked_about(self, attack: MembershipAttack, target: int, rounds: Rounds) -> Rounds:
        """Of the clients asked about, the rounds asked about."""
        hostile = self.plan.config.attack.malicious_clients
        asked = [c for c in rounds if (c not in hostile if target == EVERYONE else c == target)]
        return {client: [r for r in rounds[client] if r in self._rounds(attack)] for client in asked}

    @cached_property
    def _expected(self) -> Rounds:
        return expected_rounds(self.plan.config, self.plan.world)

    def _question(self, attack: MembershipAttack) -> Question:
        target = EVERYONE
        if not isinstance(attack, MaliciousClient):
            each = {c: len(self._asked_about(attack, c, self._expected)[c]) for c in self._expected}
            target = min(each, key=lambda client: (-each[client], client), default=0)
        rounds = self._asked_about(attack, target, self._expected)
        return choose_question(self.plan.config, self.plan.world, target, rounds)

    def questions(self) -> dict[str, Candidates]:
        tensors = self.plan.world.dataset.tensors
        return {name: Candidates(*tensors(asked.ids)) for name, asked in self._asked.items()}

    def wants(self, round: int, client: int) -> bool:
        """Everything of the rounds that an attack of the server has yet to read."""
        return any(self._lacks(name, round) for name in self._serving())

    def _lacks(self, name: str, round: int) -> bool:
        return round not in self._figures[name] and round in self._rounds(self.attacks[name])

    def after_round(self, record: RoundRecord) -> None:
        """Show it to the attacks, and let go of it."""
        seen, self.this_round = self.this_round, []
        number, config = record.round, self.plan.config
        device = choose_device(config.engine.device)
        for name in self._serving():
            attack, asked = self.attacks[name], self._asked[name]
            if seen and self._lacks(name, number) and name not in self.failed:
                candidates = Candidates(*self.plan.world.dataset.tensors(asked.ids))
                seed, started = adversary_seed(config.seed, "watch", number), time.perf_counter()
                try:
                    figures = attack.watch(seen, asked.target, candidates, seed, device)
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
        plan, started, asked = self.plan, time.perf_counter(), self._asked[name]
        answered: dict[int, list[int]] = defaultdict(list)
        for record in federation.rounds:
            # A client learns of the others' data through what was aggregated; the server saw every reply.
            if record.aggregated or not isinstance(attack, MaliciousClient):
                for client in record.clients:
                    answered[client].append(record.round)
        rounds = self._asked_about(attack, asked.target, answered)
        if not any(rounds.values()):
            raise NotApplicable(f"{name}: no update of a client that it is asked about was observed")
        counts, is_member, details = asked.settle(plan.config, plan.world, rounds)
        known = plan.folder.load_scores(name, asked.target)
        if known is None:
            if isinstance(attack, MaliciousClient):
                answers = federation.answers.get(name, {})
                if not answers:
                    raise RunFailed(f"{name}: no malicious client gave an answer (log.txt)")
                each = [answers[client]["scores"].double() for client in sorted(answers)]
                scores = MembershipScores(torch.stack(each).mean(0), name, {"asked_clients": sorted(answers)})
            else:
                scores = attack.scores(self._figures[name], asked.target)
            scores = dataclasses.replace(scores, scores=scores.scores[torch.from_numpy(counts)])
            seconds = self._seconds[name] + time.perf_counter() - started
            plan.folder.save_scores(name, asked.target, scores, seconds)
        else:
            scores, seconds = known
        plan.shown(name, 1.0, f"{int(counts.sum())} candidates")
        plan.folder.save_part(f"{name}-candidates", details)
        return audit_membership(
            name,
            scores,
            is_member[counts],
            clients=[asked.target],
            seconds=seconds,
            accuracy=next((r.accuracy for r in reversed(federation.rounds) if r.accuracy is not None), None),
            chance_accuracy=plan.commonest_share,
            test_samples=len(plan.world.pools.nonmembers),
            seed=plan.config.seed,
        )
