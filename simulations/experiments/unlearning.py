"""The experiment on unlearning: clients ask for deletions, and the auditor measures what they cost."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adversaries.unlearning.base import UnlearningAttack
from fedattack.audit import AuditResult, audit_unlearning
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import NotApplicable, PayloadError
from fedattack.models import initial_weights
from fedattack.observation import Observation, UnlearningRequest
from fedattack.rng import numpy_rng
from fedattack.unlearning import (
    ClientUpdate,
    Deletion,
    History,
    Weights,
    as_positions,
    build_mechanism,
    sample_digests,
    validate_request,
)
from fedattack.unlearning.retrain import Retrain
from simulations.engine.federation import (
    DeletionRequests,
    FederationResult,
    Judge,
    RoundRecord,
    ask,
    run_federation,
)
from simulations.engine.local_grid import LocalGrid
from simulations.engine.open_grid import open_grid
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import reason
from strategies.messages import METRICS

log = logging.getLogger("fedattack.unlearning")

Excluded = Mapping[int, Collection[int]]


ARMS = ("before", "after", "random", "retrained_after", "retrained_random")
"""Trainings of one seed: without any deletion, without what was requested and without as many random samples, as the
mechanism forgets and as a retraining does."""


@dataclass(frozen=True)
class UnlearningOutcome:
    """What deletion requests did to the global model, beside what it would have done anyway.

    Every seed is a whole training of its own, with its own initial weights and draws, and a request chosen against
    its model; the first is the run itself. Its arms are :data:`ARMS`, accuracies on the held-out pool in [0, 1], one
    per seed; `losses`: mean losses under the same names.

    `drops_out`: a client has no sample left and leaves; `floorless`: there are not as many other samples of these
    clients, so that the random arms are those of the request. `requests`, `resumed_after`, `rounds_trained` and
    `client_steps` are of the first seed: the last round that the server kept, the rounds that forgetting cost, and
    the clients' local steps in them. `details`: `requested_loss`, the mean loss of the requested samples "before" and
    "after" (first seed; None where none is named by position), and `random_positions`, one list per seed.
    """

    requests: tuple[UnlearningRequest, ...]
    drops_out: bool
    floorless: bool
    mechanism: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    random: tuple[float, ...]
    retrained_after: tuple[float, ...]
    retrained_random: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    test_samples: int
    resumed_after: int
    rounds_trained: int
    client_steps: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """One seed's whole training: its settings, what its server kept, its end, and what its clients ask for."""

    config: Config
    trainer: FederationTrainer
    history: History
    final: Weights
    asked: DeletionRequests


class FederationTrainer:
    """How a mechanism reaches the clients of an open grid (:class:`fedattack.unlearning.Trainer`); counts steps."""

    def __init__(self, config: Config, world: World, grid: LocalGrid) -> None:
        self.config, self.world, self.grid = config, world, grid
        self.client_steps = 0

    def train(
        self,
        excluded: Excluded,
        weights: Weights,
        first_round: int,
        history: History | None = None,
        on_requests: Callable[[DeletionRequests], None] | None = None,
    ) -> Weights:
        """Train the rounds from `first_round` up to the request; `history` keeps of them what it is for."""
        kept: dict[str, Any] = {"on_requests": on_requests}
        if history is not None:
            kept |= {"on_weights": history.keep_weights, "on_observation": history.keep_update}
            kept["observe"] = lambda round, _: history.wants_updates(round)
            kept["on_round"] = lambda r: history.note_round(r.round, r.clients, r.aggregated)
        return self._run(excluded, weights, first_round, self.config.request_round, **kept)

    def go_on(self, excluded: Excluded, weights: Weights) -> Weights:
        """The rounds that follow the request."""
        last = self.config.federation.rounds
        return self._run(excluded, weights, self.config.request_round + 1, last)

    def updates(
        self, excluded: Excluded, weights: Weights, round: int, share: float
    ) -> Iterator[ClientUpdate]:
        """What the clients of a round answer to `weights`, each after a share of its steps."""
        seen: list[Observation] = []
        steps = max(1, int(share * self.config.training.local_steps + 0.5))
        self._run(excluded, weights, round, round, steps, on_observation=seen.append)
        return map(ClientUpdate.of, seen)

    def evaluate(self, weights: Weights, clients: Collection[int]) -> dict[int, dict[str, float]]:
        """The clients' figures of `weights` on their samples."""
        answers = ask(self.grid, "evaluate", weights, clients)
        return {client: dict(reply.content[METRICS]) for client, reply in answers}

    def _run(
        self,
        excluded: Excluded,
        weights: Weights,
        first: int,
        last: int,
        steps: int | None = None,
        **how: Any,
    ) -> Weights:
        federation = self.config.federation.model_copy(update={"evaluate": False, "rounds": last})
        result = run_federation(
            self.config.model_copy(update={"federation": federation}),
            self.world,
            initial=weights,
            first_round=first,
            excluded=excluded,
            local_steps=steps,
            grid=self.grid,
            **how,
        )
        taken = steps or self.config.training.local_steps
        self.client_steps += taken * sum(len(record.clients) for record in result.rounds)
        return result.weights


class UnlearningExperiment(Experiment):
    """Lets the malicious clients ask for deletions after a round, and measures what they cost.

    Up to that round, what the mechanism declares is kept in ``history/`` of the run folder.
    """

    def __init__(self, plan: Plan, attacks: Mapping[str, UnlearningAttack]) -> None:
        super().__init__(plan, attacks)
        self.mechanism = build_mechanism(plan.config.unlearning)
        self.history = self._history(plan.folder.path / "history")
        self.history.keep_weights(0, initial_weights(plan.world.scenario.model, plan.config.seed))
        self.asked: DeletionRequests = {}

    def _history(self, folder: Path) -> History:
        every = self.plan.config.unlearning.checkpoint_every
        return History(folder, self.plan.world.scenario, self.mechanism.keeps, every)

    @classmethod
    def check(cls, config: Config, world: World) -> None:
        build_mechanism(config.unlearning).check(config.unlearning.mechanism, world.scenario)

    def wants(self, round: int, client: int) -> bool:
        """The updates that the mechanism needs."""
        return round <= self.plan.config.request_round and self.history.wants_updates(round)

    def observe(self, observation: Observation) -> None:
        self.history.keep_update(observation)

    def global_model(self, round: int, weights: Weights) -> None:
        if round <= self.plan.config.request_round:
            self.history.keep_weights(round, weights)

    def after_round(self, record: RoundRecord) -> None:
        if record.round <= self.plan.config.request_round:
            self.history.note_round(record.round, record.clients, record.aggregated)

    def requests(self, requests: DeletionRequests) -> None:
        self.asked = requests

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Carry out each attack's requests, seed after seed, and score the damage."""
        started, found = time.perf_counter(), self.measure(federation.weights)
        seconds = (time.perf_counter() - started) / max(1, len(found))
        return {name: self._audit(name, outcome, seconds) for name, outcome in found.items()}

    def _audit(self, name: str, outcome: UnlearningOutcome, seconds: float) -> AuditResult:
        plan = self.plan
        plan.folder.save_part(name, dataclasses.asdict(outcome))
        none_left = "all that its client has is asked for, and no other samples can be deleted instead"
        return audit_unlearning(
            name,
            outcome.before,
            outcome.after,
            outcome.random,
            retrained=(outcome.retrained_after, outcome.retrained_random),
            requests=sum(len(r.positions) or len(r.labels or ()) for r in outcome.requests),
            mechanism=outcome.mechanism,
            test_samples=outcome.test_samples,
            chance_accuracy=plan.commonest_share,
            idle=none_left if outcome.floorless else "",
            seconds=seconds,
            seed=plan.config.seed,
        )

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
        with open_grid(again, world) as grid, tempfile.TemporaryDirectory(dir=history.folder) as scratch:
            trainer = FederationTrainer(again, world, grid)
            if index == 0:
                yield Training(again, trainer, history, final, self.asked)
                return
            kept, asked = self._history(Path(scratch)), DeletionRequests()
            kept.keep_weights(0, initial_weights(world.scenario.model, again.seed))
            trainer.train({}, kept.checkpoint(0), 1, kept, asked.update)
            yield Training(again, trainer, kept, trainer.go_on({}, kept.weights), asked)

    def _arms(self, name: str, training: Training, index: int, count: int) -> dict[str, Any]:
        """What an attack asks for in one training, granted in every arm; JSON-able.

        NotApplicable if nobody asks, or who asks never took part; PayloadError if the server rejects a request.
        """
        world, history, trainer = self.plan.world, training.history, training.trainer
        asked = training.asked.get(name, [])
        deletions = [self._accepted(sender, request) for sender, request in asked]
        if history.ignorant([deletion.client for deletion in deletions]) is None:
            who = " and ".join(f"client {deletion.client}" for deletion in deletions)
            raise NotApplicable(
                f"{name}: {who} took part in none of {history.rounds} rounds, so there is nothing to forget; raise "
                "federation.participation or federation.rounds"
                if deletions
                else f"{name}: no client asks for a deletion"
            )
        rng = numpy_rng(self.plan.config.seed, "unlearning floor", index)
        others, positions = self._random(deletions, rng)
        weights = {"before": training.final}
        sides = {"after": deletions} | ({"random": others} if others is not None else {})
        cost: dict[str, int] = {}
        for number, (side, forgotten) in enumerate(sides.items()):
            self.plan.shown(name, (index + (1 + number) / 3) / count, f"seed {index + 1} of {count}, {side}")
            before = trainer.client_steps
            answer = self.mechanism.forget(forgotten, history, trainer)
            cost = cost or {
                "resumed_after": answer.resumed_after,
                "rounds_trained": answer.rounds_trained,
                "client_steps": trainer.client_steps - before,
            }
            weights[side] = trainer.go_on(answer.excluded, answer.weights)
            exact = weights[side]
            if not isinstance(self.mechanism, Retrain):
                control = Retrain().forget([self._known(one) for one in forgotten], history, trainer)
                exact = trainer.go_on(control.excluded, control.weights)
            weights[f"retrained_{side}"] = exact
        judge = Judge(training.config, world)
        figures = {arm: judge(found) for arm, found in weights.items()}
        for arm in ("random", "retrained_random"):
            figures.setdefault(arm, figures[arm.replace("random", "after")])
        named = [world.partitions[d.client][sorted(d.positions)] for d in deletions if d.positions]
        ids = np.concatenate([*named, np.empty(0, np.int64)]).astype(np.int64)
        return {
            "accuracy": {arm: figures[arm]["accuracy"] for arm in ARMS},
            "losses": {arm: figures[arm]["loss"] for arm in ARMS},
            **cost,
            "drops_out": any(deletion.drops_out for deletion in deletions),
            "floorless": others is None,
            "requested_loss": {arm: judge(weights[arm], ids).get("loss") for arm in ("before", "after")},
            "random_positions": positions,
        }

    def _outcome(self, name: str, rows: Sequence[Mapping[str, Any]]) -> UnlearningOutcome:
        """The seeds together."""
        self.plan.shown(name, 1.0, "done")
        first = rows[0]
        accuracy: dict[str, Any] = {arm: tuple(row["accuracy"][arm] for row in rows) for arm in ARMS}
        return UnlearningOutcome(
            requests=tuple(request for _, request in self.asked.get(name, [])),
            drops_out=any(row["drops_out"] for row in rows),
            floorless=any(row["floorless"] for row in rows),
            mechanism=self.plan.config.unlearning.mechanism,
            **accuracy,
            losses={arm: tuple(row["losses"][arm] for row in rows) for arm in ARMS},
            test_samples=len(self.plan.world.pools.nonmembers),
            resumed_after=first["resumed_after"],
            rounds_trained=first["rounds_trained"],
            client_steps=first["client_steps"],
            details={
                "requested_loss": first["requested_loss"],
                "random_positions": [row["random_positions"] for row in rows],
            },
        )

    def _accepted(self, sender: int, request: UnlearningRequest) -> Deletion:
        """The request as the server accepts it, in the terms that the mechanism forgets by."""
        world, partition = self.plan.world, self.plan.world.partitions[sender]
        deletion = validate_request(request, sender, len(partition), world.scenario)
        if deletion.labels is None or not self.mechanism.by_positions:
            return deletion
        return as_positions(deletion, sample_digests(*world.dataset.tensors(partition)))

    def _known(self, deletion: Deletion) -> Deletion:
        """The deletion by positions, for a retraining; of samples that its client does not have, of nothing."""
        if deletion.labels is None:
            return deletion
        partition = self.plan.world.partitions[deletion.client]
        try:
            return as_positions(deletion, sample_digests(*self.plan.world.dataset.tensors(partition)))
        except PayloadError:
            return Deletion(deletion.client)

    def _random(
        self, deletions: Sequence[Deletion], rng: np.random.Generator
    ) -> tuple[list[Deletion] | None, list[int]]:
        """As many random samples of the same clients that nobody asked to forget, asked for in the same way.

        And the positions of all. None where a client has fewer than that.
        """
        others: list[Deletion] = []
        drawn: list[int] = []
        for deletion in deletions:
            partition = self.plan.world.partitions[deletion.client]
            count = len(deletion.positions) if deletion.labels is None else len(deletion.labels)
            free = np.setdiff1d(np.arange(len(partition)), sorted(deletion.positions))
            if len(free) < count:
                return None, []
            positions = sorted(rng.choice(free, count, replace=False).tolist())
            if deletion.positions:
                others.append(Deletion(deletion.client, frozenset(positions)))
            else:
                images, labels = self.plan.world.dataset.tensors(partition[positions])
                others.append(Deletion(deletion.client, images=images, labels=labels))
            drawn += positions
        return others, drawn


def _seed(seed: int, repeat: int) -> int:
    """The run's own seed first, then seeds drawn from it."""
    if repeat == 0:
        return seed
    return int(numpy_rng(seed, "unlearning repeat", repeat).integers(2**31))
