"""The experiment on unlearning: clients ask for deletions, and the auditor measures what they cost."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adversaries.seats import MaliciousClient
from adversaries.unlearning.base import UnlearningAttack
from fedattack.audit import AuditResult, audit_unlearning
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import ConfigError, NotApplicable, PayloadError
from fedattack.models import initial_weights
from fedattack.observation import Observation, UnlearningRequest
from fedattack.rng import numpy_rng
from fedattack.storage.records import write_requests
from fedattack.unlearning import (
    Cost,
    Deletion,
    Forgotten,
    History,
    Verdict,
    Weights,
    as_positions,
    build_mechanism,
    validate_request,
)
from fedattack.unlearning.gates import Desk, build_gates, judge_after, judge_before
from fedattack.unlearning.history import check_space
from fedattack.unlearning.mechanism import Excluded, Level, merged
from fedattack.unlearning.requests import REQUEST
from fedattack.unlearning.retrain import Retrain
from simulations.client_app import Workplace
from simulations.engine.federation import (
    DeletionRequests,
    FederationResult,
    Judge,
    RoundRecord,
    ask_unlearning,
)
from simulations.engine.journal import Journal
from simulations.engine.journaled_replies import JournaledReplies
from simulations.engine.open_grid import open_grid
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import reason
from simulations.experiments.trainer import FederationTrainer

log = logging.getLogger("fedattack.unlearning")

ARMS = ("before", "after", "random", "retrained_after", "retrained_random")
"""Trainings of one seed: without any deletion, without what was requested and without as many random samples, as the
mechanism forgets and as a retraining does."""


@dataclass(frozen=True)
class UnlearningOutcome:
    """What deletion requests did to the global model, beside what it would have done anyway.

    Every seed is a whole training of its own, with its own initial weights and draws, and requests chosen against
    its model; the first is the run itself. Its arms are :data:`ARMS`: `accuracy` on the held-out pool in [0, 1] and
    mean `losses`, arm -> one per seed; `right_lost`, of each held-out sample the share of seeds in which it is right
    after random deletion less that after the request; `success`, in [0, 1], of an attack whose goal is not the
    accuracy, else empty.

    `drops_out`: a client has no sample left and leaves; `floorless`: there are not as many other samples of these
    clients, so that the random arms are those of the request. Of the first seed are `requests`, the first of each
    client, `samples`, how many are asked for in all, `resumed_after`, the last round that the server kept, and
    `costs`: "mechanism", "retraining" -> what answering all requests took, and "history_bytes". `curve`: arm -> per
    seed the "accuracy" and "loss" after each answered request, before the federation goes on. `clean`: of an attack
    that plants, "before" and "random" accuracies of a training without any attack. `certificate` and `details` of
    the mechanism's last answer to the request in the first seed; besides `requested_loss`, the mean loss of the
    requested samples "before" and "after" (None where none is known), `random_positions`, one list per seed,
    `verdicts`, all of the server's decisions by seed and arm, `refused`, arm -> per seed the gates because of which
    nothing was forgotten, and `gates`, gate -> arm -> how many requests it refused, and of how many.
    """

    requests: tuple[UnlearningRequest, ...]
    samples: int
    drops_out: bool
    floorless: bool
    mechanism: str
    goal: str
    accuracy: dict[str, tuple[float, ...]]
    losses: dict[str, tuple[float, ...]]
    right_lost: tuple[float, ...]
    success: dict[str, tuple[float, ...]]
    curve: dict[str, tuple[tuple[dict[str, float], ...], ...]]
    clean: dict[str, tuple[float, ...]]
    test_samples: int
    resumed_after: int
    costs: dict[str, Any]
    certificate: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """One seed's whole training: its settings, what its server kept, its end, and what its clients ask for."""

    config: Config
    place: Workplace
    trainer: FederationTrainer
    history: History
    final: Weights
    asked: DeletionRequests
    scratch: Path  # goes when the training has been measured


@dataclass
class Side:
    """One way to go on from a training: what is forgotten, answer by answer, by the mechanism and by retraining.

    `requested` is what was asked for, `deletions` what the gates let through, by position where the mechanism needs
    that.
    """

    requested: list[list[Deletion]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    deletions: list[list[Deletion]] = field(default_factory=list)
    answers: list[Forgotten] = field(default_factory=list)
    kept: History | None = None  # with what the mechanism wrote for its next answer
    exact: list[Weights] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    exact_cost: Cost = field(default_factory=Cost)


class UnlearningExperiment(Experiment):
    """Lets the malicious clients ask for deletions after a round, and measures what they cost.

    Up to that round, what the mechanism declares is kept in ``history/`` of the run folder.
    """

    def __init__(self, plan: Plan, attacks: Mapping[str, UnlearningAttack]) -> None:
        super().__init__(plan, attacks)
        self.mechanism = build_mechanism(plan.config.unlearning)
        self.gates = build_gates(plan.config.gates)
        self.history = self._history(plan.folder.path / "history")
        journal = Journal(plan.folder.path / "journal", plan.folder.identity)
        self.history.identity = plan.folder.identity
        self.history.replies = JournaledReplies(journal, plan.world.scenario)
        self.history.keep_weights(0, initial_weights(plan.world.scenario.model, plan.config.seed))
        self.asked = DeletionRequests()
        self.changed = False

    def _history(self, folder: Path) -> History:
        every = self.plan.config.unlearning.checkpoint_every
        return History(folder, self.plan.world.scenario, self.mechanism.keeps, every)

    @classmethod
    def check(cls, config: Config, world: World) -> None:
        if config.federation.pretrain:
            raise ConfigError(
                f"setting 'federation.pretrain' = {config.federation.pretrain}: what is to be forgotten was in "
                "these rounds as well, which no mechanism sees; accepted: 0, and more rounds (--rounds)"
            )
        named, mechanism = config.unlearning.mechanism, build_mechanism(config.unlearning)
        mechanism.check(named, world.scenario, len(world.partitions))
        for name, gate in build_gates(config.gates).items():
            gate.check(name, mechanism, world.auxiliary)
        every, rounds = config.unlearning.checkpoint_every, config.request_round
        # The run's own updates lie in the journal; those of one more training at a time lie beside it.
        again = len(world.partitions) if config.unlearning.seeds > 1 else 0
        folder = Path(config.output.run_dir or "runs")
        check_space(folder, world.scenario, mechanism.keeps, every, rounds, again)

    def wants(self, round: int, client: int) -> bool:
        """The updates that the mechanism needs."""
        return round <= self.plan.config.request_round and self.history.wants_updates(round)

    def observe(self, observation: Observation) -> None:
        self.history.keep_update(observation)

    def global_model(self, round: int, weights: Weights) -> None:
        if round <= self.plan.config.request_round:
            self.history.keep_weights(round, weights)

    def weights_again(self, round: int) -> bool:
        """No: what is kept of earlier rounds lies in ``history/``."""
        return False

    def after_round(self, record: RoundRecord) -> None:
        if record.round <= self.plan.config.request_round:
            self.history.note_round(record.round, record.clients, record.aggregated)

    def release(self, weights: Weights) -> Weights:
        trainer = FederationTrainer(self.plan.config, self.plan.world, None)
        self.history.weights = self.mechanism.prepare({}, self.history, trainer)
        self.changed = self.history.weights is not weights
        return self.history.weights

    def requests(self, requests: DeletionRequests) -> None:
        self.asked = requests

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Carry out each attack's requests, seed after seed, and score the damage."""
        started, found = time.perf_counter(), self.measure(federation.weights)
        seconds = (time.perf_counter() - started) / max(1, len(found))
        rows: list[dict[str, Any]] = []
        for one in self.asked.verdicts:
            name = self.asked.names.get(one.tag)
            if name not in found:  # of no attack, or of one that failed
                rows.append({"attack": name, "seed": 0, "arm": "after", **dataclasses.asdict(one)})
        for name, outcome in found.items():
            rows += [{"attack": name, **row} for row in outcome.details["verdicts"]]
        write_requests(self.plan.folder, rows)
        return {name: self._audit(name, outcome, seconds) for name, outcome in found.items()}

    def _audit(self, name: str, outcome: UnlearningOutcome, seconds: float) -> AuditResult:
        plan = self.plan
        plan.folder.save_part(name, dataclasses.asdict(outcome))
        none_left = "all that its client has is asked for, and no other samples can be deleted instead"
        result = audit_unlearning(
            name,
            outcome.accuracy,
            losses=outcome.losses,
            right_lost=outcome.right_lost,
            success=outcome.success,
            goal=outcome.goal,
            curve=outcome.curve,
            clean=outcome.clean,
            costs=outcome.costs,
            requests=outcome.samples,
            mechanism=outcome.mechanism,
            test_samples=outcome.test_samples,
            chance_accuracy=plan.commonest_share,
            idle=none_left if outcome.floorless else "",
            certificate=outcome.certificate,
            details=outcome.details,
            seconds=seconds,
            seed=plan.config.seed,
        )
        told = result.verdict + "".join(f"; {one}" for one in _refusals(outcome))
        return replace(result, verdict=told, summary=result.summary | {"verdict": told})

    def measure(self, final: Weights, seeds: int | None = None) -> dict[str, UnlearningOutcome]:
        """Attack -> what its requests did in each of `seeds` trainings (None: ``unlearning.seeds``).

        `final` is the end of the run itself, the first of them. An attack that fails in the first is in `failed`; a
        later training in which it asks for nothing, or too much, is left out of its figures with a line in the log.
        What is finished is stored, and not measured again.
        """
        count = seeds or self.plan.config.unlearning.seeds
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.attacks}
        for index in range(count):
            stored = {name: self.plan.folder.load_part(f"{name}-seed-{index}") for name in rows}
            for name, row in stored.items():
                if row is not None and name not in self.failed:
                    rows[name].append(row)
            lacking = [name for name, row in stored.items() if row is None and name not in self.failed]
            if not lacking:
                continue
            with self._training(index, final) as training:
                for name in lacking:
                    try:
                        row = self._arms(name, training, index, count)
                    except Exception as error:  # costs the others nothing
                        if index == 0:
                            self.failed[name] = error
                        else:
                            log.warning("%s: seed %d is left out: %s", name, index, reason(error))
                        continue
                    self.plan.folder.save_part(f"{name}-seed-{index}", row)
                    rows[name].append(row)
        return {name: self._outcome(name, found) for name, found in rows.items() if found}

    @contextmanager
    def _training(self, index: int, final: Weights) -> Iterator[Training]:
        """The run itself, or a training with a seed drawn from its own; its clients can be reached in the block."""
        config, world, history = self.plan.config, self.plan.world, self.history
        again = config.model_copy(update={"seed": _seed(config.seed, index)})
        place = Workplace.of(again, world)
        with open_grid(again, world) as grid, tempfile.TemporaryDirectory(dir=history.folder) as scratch:
            trainer = FederationTrainer(again, world, grid, place)
            asked = self.asked
            if index:
                history, told = self._history(Path(scratch)), list[DeletionRequests]()
                history.keep_weights(0, initial_weights(world.scenario.model, again.seed))

                def released(_: Weights) -> Weights:
                    history.weights = self.mechanism.prepare({}, history, trainer)
                    return history.weights

                trainer.train(
                    {}, history.checkpoint(0), 1, history, on_requests=told.append, release=released
                )
                (asked,) = told
            if index or self.changed:
                final = trainer.go_on({}, history.weights)
            yield Training(again, place, trainer, history, final, asked, Path(scratch))

    def _arms(self, name: str, training: Training, index: int, count: int) -> dict[str, Any]:
        """What an attack asks for in one training, granted in every arm; JSON-able.

        NotApplicable if nobody asks, or who asks never took part; PayloadError if the server rejects a request.
        """
        history, trainer, attack = training.history, training.trainer, self.attacks[name]
        asked = Side()
        deletions = self._deletions(training, name, training.asked, {}, asked)
        if history.ignorant([deletion.client for deletion in deletions]) is None:
            who = " and ".join(f"client {deletion.client}" for deletion in deletions)
            raise NotApplicable(
                f"{name}: {who} took part in none of {history.rounds} rounds, so there is nothing to forget; raise "
                "federation.participation or federation.rounds"
                if deletions
                else f"{name}: no client asks for a deletion"
            )

        def shown(part: float, text: str) -> None:
            self.plan.shown(name, (index + part) / count, f"seed {index + 1} of {count}, {text}")

        shown(0.3, "the request")
        self._forget(training, asked, deletions)
        for time_ in range(1, training.config.unlearning.times):
            try:
                more = self._asked_again(name, training, asked, time_)
                if not more:
                    break
                self._forget(training, asked, more)
            except PayloadError as error:
                log.warning("%s: request %d is rejected: %s", name, time_ + 1, error)
                break
        rng = numpy_rng(self.plan.config.seed, "unlearning floor", index)
        others, positions = self._random(training, asked.requested, rng)
        shown(0.6, "random deletions")
        floor = Side() if others is not None else asked
        for some in others or []:
            self._forget(training, floor, some)
        weights = {"before": training.final}
        curve: dict[str, list[dict[str, float]]] = {}
        judge = Judge(training.config, self.plan.world)
        for arm, side in (("after", asked), ("random", floor)):
            if arm == "random" and side is asked:
                weights |= {"random": weights["after"], "retrained_random": weights["retrained_after"]}
                curve |= {"random": curve["after"], "retrained_random": curve["retrained_after"]}
                continue
            excluded = side.answers[-1].excluded
            weights[arm] = trainer.go_on(excluded, side.answers[-1].weights)
            same = isinstance(self.mechanism, Retrain)
            weights[f"retrained_{arm}"] = (
                weights[arm] if same else trainer.go_on(self._exactly(training, side), side.exact[-1])
            )
            curve[arm] = [judge(answer.weights) for answer in side.answers]
            curve[f"retrained_{arm}"] = curve[arm] if same else [judge(one) for one in side.exact]
        figures = {arm: judge(found) for arm, found in weights.items()}
        named = merged({}, [self._known(training, one) for part in asked.requested for one in part])
        samples = [training.place.samples(c, np.asarray(sorted(p), np.int64)) for c, p in named.items() if p]
        wanted = [torch.cat(parts) for parts in zip(*samples, strict=True)] if samples else []
        last = asked.answers[-1]
        images, labels = self.plan.world.dataset.tensors(self.plan.world.pools.nonmembers)
        right = {
            arm: (judge.probabilities(weights[arm], images).argmax(1) == labels).int()
            for arm in ("after", "random")
            if figures[arm].get("accuracy") is not None
        }
        return {
            "right_lost": (right["random"] - right["after"]).tolist() if right else [],
            "accuracy": {arm: figures[arm].get("accuracy", 0.0) for arm in ARMS},
            "losses": {arm: figures[arm]["loss"] for arm in ARMS},
            "success": self._successes(
                name, attack, training, judge, weights, {"after": asked, "random": floor}
            ),
            "curve": curve,
            "clean": self._clean(attack, training, floor.deletions, judge),
            "samples": sum(one.samples for part in asked.requested for one in part),
            "resumed_after": last.resumed_after,
            "costs": {
                "mechanism": dataclasses.asdict(asked.cost),
                "retraining": dataclasses.asdict(asked.exact_cost),
                "history_bytes": history.bytes,
            },
            "certificate": None if last.certificate is None else dict(last.certificate),
            "details": dict(last.details),
            "drops_out": any(deletion.drops_out for part in asked.deletions for deletion in part),
            "floorless": others is None,
            "requested_loss": {
                arm: judge.of(weights[arm], *wanted).get("loss") if wanted else None
                for arm in ("before", "after")
            },
            "random_positions": positions,
            "refused": {"after": _nothing(asked), "random": _nothing(floor)},
            "verdicts": [
                {"arm": arm, **dataclasses.asdict(one)}
                for arm, side in (("after", asked), ("random", floor))
                if arm == "after" or side is not asked
                for one in side.verdicts
            ],
        }

    def _forget(
        self,
        training: Training,
        side: Side,
        deletions: Sequence[Deletion],
        exact: bool = True,
        gated: bool = True,
    ) -> None:
        """Have the gates decide, the mechanism answer, and where `exact` a retraining beside it.

        Where nothing is let through, the model stays. PayloadError if that is because the server rejects all.
        """
        history, trainer = training.history, training.trainer
        earlier = side.answers[-1] if side.answers else None
        now = (side.kept or history).fork(
            Path(tempfile.mkdtemp(dir=training.scratch)),
            earlier.weights if earlier else history.weights,
            earlier.excluded if earlier else history.excluded,
        )
        before = trainer.cost.copy()
        with trainer.cost.clocked():
            granted, answer = self._answer(training, side, deletions, now, gated)
            side.requested.append(list(deletions))
            side.deletions.append(granted)
            side.answers.append(answer)
            side.kept = now if granted else side.kept
        side.cost = side.cost.plus(trainer.cost.since(before))
        if isinstance(self.mechanism, Retrain) or not exact:
            side.exact_cost = side.cost
            return
        if not granted:
            side.exact.append(side.exact[-1] if side.exact else history.weights)
            return
        before = trainer.cost.copy()
        with trainer.cost.clocked():
            excluded = self._exactly(training, side)
            start = history.ignorant(excluded) or 0
            weights = trainer.train(excluded, history.checkpoint(start), start + 1)
            again = history.fork(Path(tempfile.mkdtemp(dir=training.scratch)), weights, excluded)
            side.exact.append(self.mechanism.prepare(excluded, again, trainer))
        side.exact_cost = side.exact_cost.plus(trainer.cost.since(before))

    def _answer(
        self, training: Training, side: Side, deletions: Sequence[Deletion], now: History, gated: bool
    ) -> tuple[list[Deletion], Forgotten]:
        """What is granted of some deletions, by gates too where `gated`, and what the mechanism makes of that."""
        stays = Forgotten(now.weights, now.excluded, now.rounds)
        if not gated:
            done = self.mechanism.forget(deletions, now, training.trainer) if deletions else stays
            return list(deletions), done
        desk = self._desk(training, side, now)
        granted = self._granted(training, side, deletions, desk)
        if not granted:
            return [], stays
        answer = self.mechanism.forget(granted, now, training.trainer)
        said = judge_after(self.gates, granted, answer.weights, desk)
        side.verdicts += said
        return (granted, answer) if all(one.accepted for one in said) else ([], stays)

    def _desk(self, training: Training, side: Side, now: History) -> Desk:
        """What the gates have before them; made before the mechanism touches `now`."""
        model, excluded = now.weights, now.excluded
        spare = now.fork(now.folder / "control", model, excluded) if self.gates else now
        place, trainer, world = training.place, training.trainer, self.plan.world
        sizes = [len(ids) for ids in place.partitions]

        def mean_loss(client: int, positions: Collection[int]) -> float | None:
            if len(positions) == sizes[client]:
                return None
            return trainer.evaluate(model, [client], {client: positions}).get(client, {}).get("loss")

        def control(deletions: Sequence[Deletion]) -> Weights:
            rng = numpy_rng(training.config.seed, "gate control", len(side.answers))
            gone, drawn = {c: set(p) for c, p in excluded.items()}, []
            for one in deletions:
                mine = gone.setdefault(one.client, set())
                free = [p for p in range(sizes[one.client]) if p not in mine]
                chosen = frozenset(rng.choice(free, min(one.samples, len(free)), replace=False).tolist())
                mine |= chosen
                drawn.append(Deletion(one.client, chosen, drops_out=len(mine) == sizes[one.client]))
            return self.mechanism.forget(drawn, spare, trainer).weights

        granted: dict[int, int] = {}
        for part in side.deletions:
            for one in part:
                granted[one.client] = granted.get(one.client, 0) + one.samples
        return Desk(
            training.config.request_round,
            world.scenario,
            model,
            excluded,
            sizes,
            place.registered,
            mean_loss,
            control,
            world.auxiliary,
            granted,
        )

    def _granted(
        self, training: Training, side: Side, deletions: Sequence[Deletion], desk: Desk
    ) -> list[Deletion]:
        """What the gates let through, by position where the mechanism needs that."""
        passed, said = judge_before(self.gates, deletions, desk)
        side.verdicts += said
        gone, located, lost = merged(desk.forgotten, ()), list[Deletion](), list[PayloadError]()
        for one in passed:
            try:
                if self.mechanism.by_positions:
                    one = as_positions(one, desk.registered(one.client), gone.get(one.client, ()))
            except PayloadError as error:
                lost.append(error)
                side.verdicts.append(desk.verdict(one, REQUEST, str(error)))
                continue
            gone = merged(gone, [one])
            located.append(one)
        if lost and len(lost) == len(deletions):
            raise lost[0]
        return located

    def granted(
        self, training: Training, name: str, asked: DeletionRequests, now: History
    ) -> tuple[list[Deletion], Desk]:
        """What the server, and its gates, grant of an attack's first requests; and what the gates have before them.

        PayloadError if the server rejects all of them.
        """
        side = Side()
        deletions = self._deletions(training, name, asked, {}, side)
        desk = self._desk(training, side, now)
        return self._granted(training, side, deletions, desk), desk

    def _exactly(self, training: Training, side: Side) -> dict[int, frozenset[int]]:
        """All positions of a side's deletions; samples that their client does not have are none of them."""
        return merged({}, [self._known(training, one) for part in side.deletions for one in part])

    def _deletions(
        self,
        training: Training,
        name: str,
        asked: DeletionRequests,
        excluded: Excluded,
        side: Side,
    ) -> list[Deletion]:
        """An attack's requests as the server accepts them; a verdict on each goes to `side`.

        PayloadError if it rejects all of them.
        """
        found, unread = list[Deletion](), asked.rejected(name)
        lost = [PayloadError(f"deletion request from client {one.client}: {one.reason}") for one in unread]
        side.verdicts += unread
        gone, round = merged(excluded, ()), training.config.request_round
        for sender, request in asked.get(name, []):
            samples, forgotten = len(training.place.partitions[sender]), gone.get(sender, ())
            try:
                one = validate_request(request, sender, samples, self.plan.world.scenario, forgotten)
                level: Level = "class" if one.label is not None else "client" if one.drops_out else "sample"
                if one.label is not None:
                    one = as_positions(one, training.place.registered(sender), forgotten)
                if level not in self.mechanism.levels:
                    raise PayloadError(
                        f"deletion request from client {sender}: asks for a {level}; mechanism "
                        f"{training.config.unlearning.mechanism!r} forgets {', '.join(sorted(self.mechanism.levels))}"
                    )
            except PayloadError as error:
                lost.append(error)
                side.verdicts.append(Verdict(round, sender, REQUEST, False, str(error)))
                continue
            side.verdicts.append(Verdict(round, sender, REQUEST, True, samples=one.samples))
            gone = merged(gone, [one])
            found.append(one)
        if lost and not found:
            raise lost[0]
        return found

    def _asked_again(self, name: str, training: Training, side: Side, times: int) -> list[Deletion]:
        """What the clients ask for when they see the last answer; PayloadError where the server rejects it."""
        excluded, last = side.answers[-1].excluded, side.answers[-1].weights
        world, config = self.plan.world, training.config
        assert training.trainer.grid is not None
        asked = ask_unlearning(training.trainer.grid, last, config, world, excluded, times=times)
        return self._deletions(training, name, asked, excluded, side)

    def _clean(
        self,
        attack: UnlearningAttack,
        training: Training,
        deletions: Sequence[Sequence[Deletion]],
        judge: Judge,
    ) -> dict[str, float]:
        """What the same random deletions cost where nobody plants anything; nothing where this attack does not."""
        if type(attack).plant is MaliciousClient.plant:
            return {}
        honest = training.config.attack.model_copy(update={"names": ()})
        # In this process: the training's own actors still hold the processors, and the result is the same.
        inline = training.config.engine.model_copy(update={"name": "inline"})
        config = training.config.model_copy(update={"attack": honest, "engine": inline})
        world = self.plan.world
        with (
            open_grid(config, world) as grid,
            tempfile.TemporaryDirectory(dir=training.history.folder) as scratch,
        ):
            trainer = FederationTrainer(config, world, grid)
            history, side = self._history(Path(scratch)), Side()
            history.keep_weights(0, initial_weights(world.scenario.model, config.seed))
            trainer.train({}, history.checkpoint(0), 1, history)
            history.weights = self.mechanism.prepare({}, history, trainer)
            clean = replace(training, config=config, place=trainer.place, trainer=trainer, history=history)
            for some in deletions:
                named = [replace(one, images=None, labels=None) if one.positions else one for one in some]
                self._forget(clean, side, named, exact=False, gated=False)
            last = side.answers[-1]
            ends = {
                "before": trainer.go_on({}, history.weights),
                "random": trainer.go_on(last.excluded, last.weights),
            }
        return {name: judge(weights).get("accuracy", 0.0) for name, weights in ends.items()}

    def _successes(
        self,
        name: str,
        attack: UnlearningAttack,
        training: Training,
        judge: Judge,
        weights: Mapping[str, Weights],
        sides: Mapping[str, Side],
    ) -> dict[str, float]:
        """Arm -> the share of what the attack wanted; none where that is the accuracy lost.

        What it wanted of a certificate happens in no other arms than those of the mechanism.
        """
        client = min(training.config.attack.malicious_clients)
        view = training.place.planting(name, client)
        images, labels = self.plan.world.dataset.tensors(self.plan.world.pools.nonmembers)
        found = {
            arm: attack.success(partial(judge.probabilities, weights[arm]), images, labels, view)
            for arm in ARMS
        }
        for arm, side in sides.items():
            removed = sum(len(d.positions) for part in side.deletions for d in part)
            if (certificate := side.answers[-1].certificate) is not None and removed:
                found |= {arm: attack.spent(certificate, removed)} if found[arm] is None else {}
        told = {arm: float(share) for arm, share in found.items() if share is not None}
        return told if not told else dict.fromkeys(ARMS, 0.0) | told

    def _outcome(self, name: str, rows: Sequence[Mapping[str, Any]]) -> UnlearningOutcome:
        """The seeds together."""
        self.plan.shown(name, 1.0, "done")
        first = rows[0]
        told = all(row["success"] for row in rows)
        return UnlearningOutcome(
            requests=tuple(request for _, request in self.asked.get(name, [])),
            samples=first["samples"],
            drops_out=any(row["drops_out"] for row in rows),
            floorless=any(row["floorless"] for row in rows),
            mechanism=self.plan.config.unlearning.mechanism,
            goal=self.attacks[name].goal,
            accuracy={arm: tuple(row["accuracy"][arm] for row in rows) for arm in ARMS},
            losses={arm: tuple(row["losses"][arm] for row in rows) for arm in ARMS},
            right_lost=tuple(np.mean([row["right_lost"] for row in rows], axis=0).tolist()),
            success={arm: tuple(row["success"][arm] for row in rows) for arm in ARMS} if told else {},
            curve={arm: tuple(tuple(row["curve"][arm]) for row in rows) for arm in ARMS[1:]},
            clean={arm: tuple(row["clean"][arm] for row in rows) for arm in first["clean"]},
            test_samples=len(self.plan.world.pools.nonmembers),
            resumed_after=first["resumed_after"],
            costs=first["costs"],
            certificate=first["certificate"],
            details={
                **first["details"],
                "requested_loss": first["requested_loss"],
                "random_positions": [row["random_positions"] for row in rows],
                "refused": {arm: [row["refused"][arm] for row in rows] for arm in ("after", "random")},
                "gates": _counted([one for row in rows for one in row["verdicts"]]),
                "verdicts": [{"seed": n} | one for n, row in enumerate(rows) for one in row["verdicts"]],
            },
        )

    def _known(self, training: Training, deletion: Deletion) -> Deletion:
        """The deletion by positions, for a retraining; of samples that its client does not have, of nothing."""
        if deletion.labels is None:
            return deletion
        try:
            return as_positions(deletion, training.place.registered(deletion.client))
        except PayloadError:
            return Deletion(deletion.client)

    def _random(
        self, training: Training, asked: Sequence[Sequence[Deletion]], rng: np.random.Generator
    ) -> tuple[list[list[Deletion]] | None, list[int]]:
        """As many random samples of the same clients that nobody asked to forget, asked for in the same way.

        And the positions of all. None where a client has fewer than that.
        """
        taken: dict[int, set[int]] = {}
        for part in asked:
            for deletion in part:
                taken.setdefault(deletion.client, set()).update(self._known(training, deletion).positions)
        others: list[list[Deletion]] = []
        drawn: list[int] = []
        for part in asked:
            some: list[Deletion] = []
            for deletion in part:
                client = deletion.client
                count = deletion.samples
                size = len(training.place.partitions[client])
                free = np.setdiff1d(np.arange(size), sorted(taken[client]))
                if len(free) < count:
                    return None, []
                positions = sorted(rng.choice(free, count, replace=False).tolist())
                taken[client].update(positions)
                if deletion.positions:
                    some.append(Deletion(client, frozenset(positions)))
                else:
                    images, labels = training.place.samples(client, np.asarray(positions, np.int64))
                    some.append(Deletion(client, images=images, labels=labels))
                drawn += positions
            others.append(some)
        return others, drawn


def _nothing(side: Side) -> list[str]:
    """The gates that refused, where nothing of what was asked for was forgotten."""
    if any(part for part in side.deletions):
        return []
    return sorted({one.gate for one in side.verdicts if not one.accepted and one.gate != REQUEST})


def _counted(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Gate -> arm -> how many requests it refused, and of how many."""
    found: dict[str, dict[str, list[int]]] = {}
    for one in verdicts:
        counts = found.setdefault(one["gate"], {}).setdefault(one["arm"], [0, 0])
        counts[0] += not one["accepted"]
        counts[1] += 1
    return found


def _refusals(outcome: UnlearningOutcome) -> Iterator[str]:
    """What the gates refused altogether, of the request and of as many random samples, in words."""
    for arm, what in (("after", "the request is"), ("random", "as many random samples are")):
        gates = outcome.details["refused"][arm]
        if any(gates):
            names = sorted({gate for seed in gates for gate in seed})
            where = f" in {sum(map(bool, gates))} of {len(gates)} seeds" if not all(gates) else ""
            yield f"{what} refused by gate{'s' if len(names) > 1 else ''} {' and '.join(names)}{where}"


def _seed(seed: int, repeat: int) -> int:
    """The run's own seed first, then seeds drawn from it."""
    if repeat == 0:
        return seed
    return int(numpy_rng(seed, "unlearning repeat", repeat).integers(2**31))
