"""The experiment on unlearning: clients ask for deletions, and the auditor measures what they cost."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adversaries.unlearning.base import UnlearningAttack
from fedattack.audit import AuditResult, audit_unlearning
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import NotApplicable
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
from strategies.messages import METRICS

Excluded = Mapping[int, Collection[int]]


@dataclass(frozen=True)
class UnlearningOutcome:
    """What deletion requests did to the global model, beside what it would have done anyway.

    Every repeat trains three times with the same random draws: without any deletion ("before"), without what was
    requested ("after"), and without as many samples of the same clients drawn at random ("random"). The first
    repeat has the draws of the run itself. These are accuracies on the held-out pool in [0, 1], one per repeat,
    `losses` its mean losses under the same names. `drops_out`: a client has no sample left and leaves.

    `resumed_after`, `rounds_trained` and `client_steps` are the last round that the server kept, the rounds that
    forgetting cost, and the clients' local steps in them. `details`: `requested_loss`, the mean loss of the
    requested samples "before" and "after" (first repeat; None where none is named by position), and
    `random_positions`, one list per repeat.
    """

    requests: tuple[UnlearningRequest, ...]
    drops_out: bool
    mechanism: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    random: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    test_samples: int
    resumed_after: int
    rounds_trained: int
    client_steps: int
    details: dict[str, Any] = field(default_factory=dict)


class FederationTrainer:
    """How a mechanism reaches the clients of an open grid (:class:`fedattack.unlearning.Trainer`); counts steps."""

    def __init__(self, config: Config, world: World, grid: LocalGrid) -> None:
        self.config, self.world, self.grid = config, world, grid
        self.client_steps = 0

    def train(
        self, excluded: Excluded, weights: Weights, first_round: int, history: History | None = None
    ) -> Weights:
        """Train the rounds from `first_round` up to the request; `history` keeps of them what it is for."""
        kept: dict[str, Any] = {}
        if history is not None:
            kept = {"on_weights": history.keep_weights, "on_observation": history.keep_update}
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
        """Carry out each attack's requests, and score the damage."""
        audits: dict[str, AuditResult] = {}
        for name in self.attacks:
            try:
                audits[name] = self._audit(name, federation.weights)
            except Exception as error:  # costs the others nothing
                self.failed[name] = error
        return audits

    def _audit(self, name: str, final: Weights) -> AuditResult:
        plan, started = self.plan, time.perf_counter()
        outcome = self.outcome(name, final)
        plan.folder.save_part(name, dataclasses.asdict(outcome))
        return audit_unlearning(
            name,
            outcome.before,
            outcome.after,
            outcome.random,
            requests=sum(len(r.positions) or len(r.labels or ()) for r in outcome.requests),
            mechanism=outcome.mechanism,
            test_samples=outcome.test_samples,
            chance_accuracy=plan.commonest_share,
            seconds=time.perf_counter() - started,
            seed=plan.config.seed,
        )

    def outcome(self, attack: str, final: Weights, repeats: int = 3) -> UnlearningOutcome:
        """Grant what an attack asked for, and measure the damage against random deletions.

        What forgetting leaves depends on the draw of every batch, hence the `repeats`, of which all but the first
        train the federation once more: the damage of one pair of trainings says little.

        Raises
        ------
        NotApplicable
            If nobody asks, or who asks never took part.
        PayloadError
            If the server rejects a request.
        """
        config, world, history = self.plan.config, self.plan.world, self.history
        requests = tuple(request for _, request in self.asked.get(attack, []))
        deletions = [self._accepted(sender, request) for sender, request in self.asked.get(attack, [])]
        start = history.ignorant([deletion.client for deletion in deletions])
        if start is None:
            who = " and ".join(f"client {deletion.client}" for deletion in deletions)
            raise NotApplicable(
                f"{attack}: {who} took part in none of {history.rounds} rounds, so there is nothing to forget; raise "
                "federation.participation or federation.rounds"
                if deletions
                else f"{attack}: no client asks for a deletion"
            )
        judge = Judge(config, world)
        named = [world.partitions[d.client][sorted(d.positions)] for d in deletions if d.positions]
        ids = np.concatenate([*named, np.empty(0, np.int64)]).astype(np.int64)
        figures: dict[str, list[dict[str, float]]] = {"before": [], "after": [], "random": []}
        floors: list[list[int]] = []
        for repeat in range(repeats):
            again = config.model_copy(update={"seed": _seed(config.seed, repeat)})

            def report(step: int, text: str, repeat: int = repeat) -> None:
                share = (3 * repeat + step) / (3 * repeats)
                self.plan.shown(attack, share, f"repeat {repeat + 1}, {text}")

            with open_grid(again, world) as grid, tempfile.TemporaryDirectory(dir=history.folder) as scratch:
                trainer, kept, before = FederationTrainer(again, world, grid), history, final
                if repeat:
                    report(0, "no deletion")
                    kept = self._history(Path(scratch))
                    kept.first_rounds = dict(history.first_rounds)
                    kept.keep_weights(start, history.checkpoint(start))
                    trainer.train({}, history.checkpoint(start), start + 1, kept)
                    before = trainer.go_on({}, kept.weights)
                spent = trainer.client_steps
                report(1, "the request")
                answer = self.mechanism.forget(deletions, kept, trainer)
                spent = trainer.client_steps - spent
                report(2, "random samples")
                rng = numpy_rng(config.seed, "unlearning floor", repeat)
                others, positions = self._random(deletions, rng)
                floor = self.mechanism.forget(others, kept, trainer)
                after, random = (trainer.go_on(left.excluded, left.weights) for left in (answer, floor))
            if repeat == 0:
                first, client_steps = answer, spent
                requested = {"before": judge(before, ids).get("loss"), "after": judge(after, ids).get("loss")}
            for name, weights in (("before", before), ("after", after), ("random", random)):
                figures[name].append(judge(weights))
            floors.append(positions)
        self.plan.shown(attack, 1.0, "done")
        accuracy: dict[str, Any] = {n: tuple(row["accuracy"] for row in rows) for n, rows in figures.items()}
        return UnlearningOutcome(
            requests=requests,
            drops_out=any(deletion.drops_out for deletion in deletions),
            mechanism=config.unlearning.mechanism,
            **accuracy,
            losses={name: tuple(row["loss"] for row in rows) for name, rows in figures.items()},
            test_samples=len(world.pools.nonmembers),
            resumed_after=first.resumed_after,
            rounds_trained=first.rounds_trained,
            client_steps=client_steps,
            details={"requested_loss": requested, "random_positions": floors},
        )

    def _accepted(self, sender: int, request: UnlearningRequest) -> Deletion:
        """The request as the server accepts it, in the terms that the mechanism forgets by."""
        world, partition = self.plan.world, self.plan.world.partitions[sender]
        deletion = validate_request(request, sender, len(partition), world.scenario)
        if deletion.labels is None or not self.mechanism.by_positions:
            return deletion
        return as_positions(deletion, sample_digests(*world.dataset.tensors(partition)))

    def _random(
        self, deletions: Sequence[Deletion], rng: np.random.Generator
    ) -> tuple[list[Deletion], list[int]]:
        """As many random samples of the same clients, asked for in the same way, and the positions of all."""
        others: list[Deletion] = []
        drawn: list[int] = []
        for deletion in deletions:
            partition = self.plan.world.partitions[deletion.client]
            count = len(deletion.positions) if deletion.labels is None else len(deletion.labels)
            positions = sorted(rng.choice(len(partition), count, replace=False).tolist())
            if deletion.positions:
                others.append(Deletion(deletion.client, frozenset(positions), deletion.drops_out))
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
