"""The experiment on unlearning: a client asks for deletions, and the auditor measures what they cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adversaries.base import Progress, no_progress
from fedattack.audit import AuditResult, audit_unlearning
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import DataError, NotApplicable
from fedattack.models import initial_weights
from fedattack.observation import UnlearningRequest
from fedattack.rng import numpy_rng
from fedattack.unlearning import (
    MECHANISMS,
    Deletion,
    Forgotten,
    RetrainFunction,
    ServerMemory,
    Weights,
    validate_request,
)
from simulations.engine.federation import FederationResult, Judge, ask_unlearning, run_federation
from simulations.engine.local_grid import LocalGrid
from simulations.engine.open_grid import open_grid
from simulations.experiments.base import Experiment

MALICIOUS_CLIENT = 0
"""The client that asks for deletions."""


@dataclass(frozen=True)
class UnlearningOutcome:
    """What a deletion request did to the global model, beside what it would have done anyway.

    Every repeat trains three times with the same random draws: without any deletion, without the requested
    samples, and without as many random ones of the same client. The first repeat has the draws of the run
    itself.

    Parameters
    ----------
    request : UnlearningRequest
        As the client put it.
    drops_out : bool
        True when the client has no sample left and leaves the federation.
    mechanism : str
        How the server forgets.
    before, after, random : tuple of float
        Accuracy on the held-out pool in [0, 1], one per repeat: no deletion, the request, random samples.
    losses : dict of str to tuple of float
        Mean cross-entropy on the held-out pool under the same three names.
    test_samples : int
        Size of the held-out pool.
    resumed_after, rounds_trained : int
        The last round that the server kept, and the rounds that forgetting cost it.
    details : dict
        JSON-able: `requested_loss`, the mean cross-entropy of the requested samples "before" and "after"
        (first repeat), and `random_positions`, one list per repeat.
    """

    request: UnlearningRequest
    drops_out: bool
    mechanism: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    random: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    test_samples: int
    resumed_after: int
    rounds_trained: int
    details: dict[str, Any] = field(default_factory=dict)


def unlearning_experiment(
    config: Config,
    world: World,
    result: FederationResult,
    attack: str,
    *,
    repeats: int = 3,
    progress: Progress = no_progress,
) -> UnlearningOutcome:
    """Let the malicious client ask for deletions, grant them, and measure the damage against random deletions.

    The client is asked once, through the federation's own query, with the final global model. What training
    again leaves depends on the draw of every batch, hence the repeats: the damage of one pair of trainings
    says little.

    Parameters
    ----------
    config, world
        The run's.
    result : FederationResult
        What the run left.
    attack : str
        Name of the unlearning attack; its parameters come from `config`.
    repeats : int
        Pairs of trainings, at least 1. Costs ``3 * repeats - 1`` trainings from the checkpoint on.
    progress : Progress

    Raises
    ------
    NotApplicable
        If the malicious client never took part.
    DataError
        If no sample is held out.
    PayloadError
        If the server rejects the request.
    RunFailed
        If a federation or the attack fails.
    """
    client, samples = MALICIOUS_CLIENT, len(world.partitions[MALICIOUS_CLIENT])
    first_rounds = rounds_of_entry(result)
    if client not in first_rounds:
        raise NotApplicable(
            f"{attack}: client {client} took part in none of {len(result.rounds)} rounds, so there is nothing to "
            "forget; raise federation.participation or federation.rounds"
        )
    if not len(world.pools.nonmembers):
        raise DataError(
            f"{attack}: no sample is held out to measure the damage on; raise setting 'data.nonmembers'"
        )
    mechanism = MECHANISMS.get(config.unlearning.mechanism)()
    quiet = config.model_copy(update={"federation": config.federation.model_copy(update={"evaluate": False})})
    judge = Judge(config, world)
    figures: dict[str, list[dict[str, float]]] = {"before": [], "after": [], "random": []}
    floors: list[list[int]] = []
    request: UnlearningRequest | None = None
    for repeat in range(repeats):
        again = quiet.model_copy(update={"seed": _seed(config.seed, repeat)})
        with open_grid(again, world) as grid:
            retrain = _retrainer(again, world, grid)

            def report(step: int, text: str, repeat: int = repeat) -> None:
                progress((3 * repeat + step) / (3 * repeats), f"{attack}: repeat {repeat + 1}, {text}")

            if request is None:
                report(0, "asking the clients")
                request = _ask(grid, result.weights, attack)
                deletion = validate_request(request, client, samples)
                kept = _checkpoint(quiet, world, first_rounds[client], grid)
                before = result.weights
            else:
                report(0, "no deletion")
                ((start, weights),) = kept.items()
                before = retrain({}, weights, start + 1)
            memory = ServerMemory(before, config.federation.rounds, kept, first_rounds)
            report(1, "the request")
            answer = mechanism.forget([deletion], memory, retrain)
            chosen = numpy_rng(config.seed, "unlearning floor", repeat).choice(
                samples, len(deletion.positions), replace=False
            )
            report(2, "random samples")
            floor = mechanism.forget(
                [Deletion(client, frozenset(chosen.tolist()), deletion.drops_out)], memory, retrain
            )
        if repeat == 0:
            outcome: Forgotten = answer
            ids = world.partitions[client][sorted(deletion.positions)]
            requested = {"before": judge(before, ids)["loss"], "after": judge(answer.weights, ids)["loss"]}
        figures["before"].append(judge(before))
        figures["after"].append(judge(answer.weights))
        figures["random"].append(judge(floor.weights))
        floors.append(sorted(chosen.tolist()))
    progress(1.0, f"{attack}: done")
    assert request is not None, "at least one repeat"
    accuracy = {name: tuple(f["accuracy"] for f in rows) for name, rows in figures.items()}
    return UnlearningOutcome(
        request=request,
        drops_out=deletion.drops_out,
        mechanism=config.unlearning.mechanism,
        before=accuracy["before"],
        after=accuracy["after"],
        random=accuracy["random"],
        losses={name: tuple(f["loss"] for f in rows) for name, rows in figures.items()},
        test_samples=len(world.pools.nonmembers),
        resumed_after=outcome.resumed_after,
        rounds_trained=outcome.rounds_trained,
        details={"requested_loss": requested, "random_positions": floors},
    )


def rounds_of_entry(result: FederationResult) -> dict[int, int]:
    """Client -> first round whose aggregate its update went into."""
    entered: dict[int, int] = {}
    for record in result.rounds:
        if record.aggregated:
            for client in record.clients:
                entered.setdefault(client, record.round)
    return entered


def _seed(seed: int, repeat: int) -> int:
    """The run's own seed first, then seeds drawn from it."""
    if repeat == 0:
        return seed
    return int(numpy_rng(seed, "unlearning repeat", repeat).integers(2**31))


def _retrainer(config: Config, world: World, grid: LocalGrid) -> RetrainFunction:
    """What a mechanism calls to train the federation again."""

    def retrain(excluded: Mapping[int, frozenset[int]], weights: Weights, first_round: int) -> Weights:
        return run_federation(
            config, world, initial=weights, first_round=first_round, excluded=excluded, grid=grid
        ).weights

    return retrain


def _ask(grid: LocalGrid, weights: Weights, attack: str) -> UnlearningRequest:
    """The malicious client's request, through the federation's query."""
    for sender, request in ask_unlearning(grid, weights, attack, MALICIOUS_CLIENT):
        if sender == MALICIOUS_CLIENT:
            return request
    raise NotApplicable(f"{attack}: client {MALICIOUS_CLIENT} asks for no deletion")


def _checkpoint(config: Config, world: World, entry: int, grid: LocalGrid) -> dict[int, Weights]:
    """The server's last checkpoint before round `entry`: round -> weights.

    It is trained again rather than kept through the run: with the run's seed that gives the same bits.
    """
    every = config.unlearning.checkpoint_every
    start = (entry - 1) // every * every
    if start == 0:
        return {0: initial_weights(world.scenario.model, config.seed)}
    rounds = config.federation.model_copy(update={"rounds": start})
    return {start: run_federation(config.model_copy(update={"federation": rounds}), world, grid=grid).weights}


class UnlearningExperiment(Experiment):
    """Lets the malicious client ask for deletions after the last round, and measures what they cost."""

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Carry out each attack's request, and score the damage."""
        return {name: self._audit(name, federation) for name in self.attacks}

    def _audit(self, name: str, federation: FederationResult) -> AuditResult:
        plan, started = self.plan, time.perf_counter()
        outcome = unlearning_experiment(
            plan.config,
            plan.world,
            federation,
            name,
            progress=lambda share, text: plan.shown(name, share, text.removeprefix(f"{name}: ")),
        )
        seconds = time.perf_counter() - started
        plan.folder.save_part(name, dataclasses.asdict(outcome))
        return audit_unlearning(
            name,
            outcome.before,
            outcome.after,
            outcome.random,
            requests=len(outcome.request.positions),
            mechanism=outcome.mechanism,
            test_samples=outcome.test_samples,
            seconds=seconds,
            seed=plan.config.seed,
        )
