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

from adversaries.base import Progress, no_progress
from adversaries.unlearning.base import UnlearningAttack
from fedattack.audit import AuditResult, audit_unlearning
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import DataError, NotApplicable
from fedattack.models import initial_weights
from fedattack.observation import Observation, UnlearningRequest
from fedattack.rng import numpy_rng
from fedattack.unlearning import (
    ClientUpdate,
    Deletion,
    History,
    Mechanism,
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


@dataclass(frozen=True)
class UnlearningOutcome:
    """What deletion requests did to the global model, beside what it would have done anyway.

    Every repeat trains three times with the same random draws: without any deletion, without the requested
    samples, and without as many random ones of the same clients. The first repeat has the draws of the run
    itself.

    Parameters
    ----------
    requests : tuple of UnlearningRequest
        As the malicious clients put them.
    drops_out : bool
        True when a client has no sample left and leaves the federation.
    mechanism : str
        How the server forgets.
    before, after, random : tuple of float
        Accuracy on the held-out pool in [0, 1], one per repeat: no deletion, the requests, random samples.
    losses : dict of str to tuple of float
        Mean cross-entropy on the held-out pool under the same three names.
    test_samples : int
        Size of the held-out pool.
    resumed_after, rounds_trained, client_steps : int
        The last round that the server kept, the rounds that forgetting cost it, and the local steps that the clients
        took in them.
    details : dict
        JSON-able: `requested_loss`, the mean cross-entropy of the requested samples "before" and "after"
        (first repeat; where they are the client's own), and `random_positions`, one list per repeat.
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
    """How a mechanism reaches the clients of an open grid; see :class:`fedattack.unlearning.Trainer`.

    Parameters
    ----------
    config, world
        Of `grid`.
    grid : LocalGrid

    Attributes
    ----------
    client_steps : int
        Local steps of all clients so far.
    """

    def __init__(self, config: Config, world: World, grid: LocalGrid) -> None:
        self.config = _quiet(config, config.request_round)
        self._whole = _quiet(config, config.federation.rounds)
        self.world, self.grid = world, grid
        self.client_steps = 0

    def train(
        self,
        excluded: Mapping[int, Collection[int]],
        weights: Weights,
        first_round: int,
        history: History | None = None,
    ) -> Weights:
        """Train the rounds from `first_round` again; `history` keeps of them what it is for."""
        kept: dict[str, Any] = {}
        if history is not None:
            kept = {
                "on_weights": history.keep_weights,
                "on_observation": history.keep_update,
                "observe": lambda round, _: history.wants_updates(round),
                "on_round": lambda record: history.note_round(
                    record.round, record.clients, record.aggregated
                ),
            }
        return self._run(self.config, weights, first_round, excluded, **kept).weights

    def updates(
        self, excluded: Mapping[int, Collection[int]], weights: Weights, round: int, share: float
    ) -> Iterator[ClientUpdate]:
        """What the clients of a round answer to `weights`, each after a share of its steps."""
        steps = max(1, int(share * self.config.training.local_steps + 0.5))
        seen: list[Observation] = []
        self._run(
            _quiet(self.config, round),
            weights,
            round,
            excluded,
            local_steps=steps,
            on_observation=seen.append,
        )
        return map(ClientUpdate.of, seen)

    def go_on(self, excluded: Mapping[int, Collection[int]], weights: Weights) -> Weights:
        """The rounds that follow the request."""
        return self._run(self._whole, weights, self.config.federation.rounds + 1, excluded).weights

    def evaluate(self, weights: Weights, clients: Collection[int]) -> dict[int, dict[str, float]]:
        """The clients' figures of `weights` on their samples."""
        answers = ask(self.grid, "evaluate", weights, clients)
        return {client: dict(reply.content[METRICS]) for client, reply in answers}

    def _run(
        self,
        config: Config,
        weights: Weights,
        first_round: int,
        excluded: Mapping[int, Collection[int]],
        local_steps: int | None = None,
        **how: Any,
    ) -> FederationResult:
        result = run_federation(
            config,
            self.world,
            initial=weights,
            first_round=first_round,
            excluded=excluded,
            local_steps=local_steps,
            grid=self.grid,
            **how,
        )
        taken = local_steps or config.training.local_steps
        self.client_steps += taken * sum(len(record.clients) for record in result.rounds)
        return result


def _quiet(config: Config, rounds: int) -> Config:
    """The same federation, up to a round and not evaluated."""
    federation = config.federation.model_copy(update={"evaluate": False, "rounds": rounds})
    return config.model_copy(update={"federation": federation})


def new_history(config: Config, world: World, mechanism: Mechanism, folder: Path) -> History:
    """An empty history of what `mechanism` needs."""
    return History(folder, world.scenario, mechanism.keeps, config.unlearning.checkpoint_every)


def unlearning_experiment(
    config: Config,
    world: World,
    history: History,
    final: Weights,
    attack: str,
    requests: Sequence[tuple[int, UnlearningRequest]],
    *,
    repeats: int = 3,
    progress: Progress = no_progress,
) -> UnlearningOutcome:
    """Grant the malicious clients their deletions, and measure the damage against random deletions.

    What forgetting leaves depends on the draw of every batch, hence the repeats: the damage of one pair of trainings
    says little.

    Parameters
    ----------
    config, world
        The run's.
    history : History
        What the server kept of the run up to the requests.
    final : dict of str to Tensor
        The run's last global model.
    attack : str
        Name of the unlearning attack.
    requests : sequence of (int, UnlearningRequest)
        Who asked, and for what, after round ``config.request_round``. The rounds after it go on from what is left.
    repeats : int
        Pairs of forgettings, at least 1; all but the first train the federation once more.
    progress : Progress

    Raises
    ------
    NotApplicable
        If nobody asks, or who asks never took part.
    DataError
        If no sample is held out.
    PayloadError
        If the server rejects a request.
    RunFailed
        If a federation fails.
    """
    if not len(world.pools.nonmembers):
        raise DataError(
            f"{attack}: no sample is held out to measure the damage on; raise setting 'data.nonmembers'"
        )
    if not requests:
        raise NotApplicable(f"{attack}: no client asks for a deletion")
    mechanism = build_mechanism(config.unlearning)
    deletions = [_accepted(world, mechanism, sender, request) for sender, request in requests]
    clients = [deletion.client for deletion in deletions]
    start = history.ignorant(clients)
    if start is None:
        who = " and ".join(f"client {client}" for client in clients)
        raise NotApplicable(
            f"{attack}: {who} took part in none of {history.rounds} rounds, so there is nothing to forget; raise "
            "federation.participation or federation.rounds"
        )
    judge = Judge(config, world)
    figures: dict[str, list[dict[str, float]]] = {"before": [], "after": [], "random": []}
    floors: list[list[int]] = []
    for repeat in range(repeats):
        again = config.model_copy(update={"seed": _seed(config.seed, repeat)})

        def report(step: int, text: str, repeat: int = repeat) -> None:
            progress((3 * repeat + step) / (3 * repeats), f"{attack}: repeat {repeat + 1}, {text}")

        with open_grid(again, world) as grid, tempfile.TemporaryDirectory(dir=history.folder) as scratch:
            trainer, memory, before = FederationTrainer(again, world, grid), history, final
            if repeat:
                report(0, "no deletion")
                memory = new_history(config, world, mechanism, Path(scratch))
                memory.first_rounds = dict(history.first_rounds)
                memory.keep_weights(start, history.checkpoint(start))
                trainer.train({}, history.checkpoint(start), start + 1, memory)
                before = trainer.go_on({}, memory.weights)
            spent = trainer.client_steps
            report(1, "the request")
            answer = mechanism.forget(deletions, memory, trainer)
            spent = trainer.client_steps - spent
            chosen = _random_deletions(world, deletions, numpy_rng(config.seed, "unlearning floor", repeat))
            report(2, "random samples")
            floor = mechanism.forget([deletion for deletion, _ in chosen], memory, trainer)
            after, random = (trainer.go_on(left.excluded, left.weights) for left in (answer, floor))
        if repeat == 0:
            outcome, steps = answer, spent
            own = [world.partitions[d.client][sorted(d.positions)] for d in deletions if d.positions]
            ids = np.concatenate([*own, np.empty(0, np.int64)]).astype(np.int64)
            requested = {
                name: judge(weights, ids).get("loss")
                for name, weights in (("before", before), ("after", after))
            }
        figures["before"].append(judge(before))
        figures["after"].append(judge(after))
        figures["random"].append(judge(random))
        floors.append([position for _, positions in chosen for position in positions])
    progress(1.0, f"{attack}: done")
    accuracy = {name: tuple(f["accuracy"] for f in rows) for name, rows in figures.items()}
    return UnlearningOutcome(
        requests=tuple(request for _, request in requests),
        drops_out=any(deletion.drops_out for deletion in deletions),
        mechanism=config.unlearning.mechanism,
        before=accuracy["before"],
        after=accuracy["after"],
        random=accuracy["random"],
        losses={name: tuple(f["loss"] for f in rows) for name, rows in figures.items()},
        test_samples=len(world.pools.nonmembers),
        resumed_after=outcome.resumed_after,
        rounds_trained=outcome.rounds_trained,
        client_steps=steps,
        details={"requested_loss": requested, "random_positions": floors},
    )


def _seed(seed: int, repeat: int) -> int:
    """The run's own seed first, then seeds drawn from it."""
    if repeat == 0:
        return seed
    return int(numpy_rng(seed, "unlearning repeat", repeat).integers(2**31))


def _accepted(world: World, mechanism: Mechanism, sender: int, request: UnlearningRequest) -> Deletion:
    """The request as the server accepts it, in the terms that the mechanism forgets by."""
    partition = world.partitions[sender]
    deletion = validate_request(request, sender, len(partition), world.scenario)
    if deletion.labels is None or not mechanism.by_positions:
        return deletion
    return as_positions(deletion, sample_digests(*world.dataset.tensors(partition)))


def _random_deletions(
    world: World, deletions: Sequence[Deletion], rng: np.random.Generator
) -> list[tuple[Deletion, list[int]]]:
    """As many random samples of the same clients, asked for in the same way, and their positions."""
    chosen: list[tuple[Deletion, list[int]]] = []
    for deletion in deletions:
        partition = world.partitions[deletion.client]
        count = len(deletion.positions) if deletion.labels is None else len(deletion.labels)
        positions = sorted(rng.choice(len(partition), count, replace=False).tolist())
        if deletion.positions:
            other = Deletion(deletion.client, frozenset(positions), deletion.drops_out)
        else:
            images, labels = world.dataset.tensors(partition[positions])
            other = Deletion(deletion.client, images=images, labels=labels)
        chosen.append((other, positions))
    return chosen


class UnlearningExperiment(Experiment):
    """Lets the malicious clients ask for deletions after the last round, and measures what they cost.

    While the federation trains, what the mechanism declares is kept in ``history/`` of the run folder.
    """

    def __init__(self, plan: Plan, attacks: Mapping[str, UnlearningAttack]) -> None:
        super().__init__(plan, attacks)
        self.asked: DeletionRequests = {}
        config, mechanism = plan.config, build_mechanism(plan.config.unlearning)
        self.history = new_history(config, plan.world, mechanism, plan.folder.path / "history")
        self.history.keep_weights(0, initial_weights(plan.world.scenario.model, config.seed))

    @classmethod
    def check(cls, config: Config, world: World) -> None:
        """Refuse a mechanism that lacks what it needs."""
        build_mechanism(config.unlearning).check(config.unlearning.mechanism, world.scenario)

    def wants(self, round: int, client: int) -> bool:
        """The updates that the mechanism needs."""
        del client
        return round <= self.plan.config.request_round and self.history.wants_updates(round)

    def observe(self, observation: Observation) -> None:
        """Keep an update."""
        if self.wants(observation.round, observation.client):
            self.history.keep_update(observation)

    def global_model(self, round: int, weights: Weights) -> None:
        """Keep a checkpoint."""
        if round <= self.plan.config.request_round:
            self.history.keep_weights(round, weights)

    def after_round(self, record: RoundRecord) -> None:
        """Note who took part."""
        if record.round <= self.plan.config.request_round:
            self.history.note_round(record.round, record.clients, record.aggregated)

    def requests(self, requests: DeletionRequests) -> None:
        """Keep what is asked for."""
        self.asked = requests

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Carry out each attack's requests, and score the damage."""
        return {name: self._audit(name, federation.weights) for name in self.attacks}

    def _audit(self, name: str, final: Weights) -> AuditResult:
        plan, started = self.plan, time.perf_counter()
        outcome = unlearning_experiment(
            plan.config,
            plan.world,
            self.history,
            final,
            name,
            self.asked.get(name, []),
            progress=lambda share, text: plan.shown(name, share, text.removeprefix(f"{name}: ")),
        )
        seconds = time.perf_counter() - started
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
            seconds=seconds,
            seed=plan.config.seed,
        )
