"""The two seats beside reconstruction: who was trained on, and who asks to be forgotten.

Both experiments do what the auditor cannot leave to the adversary: choosing the candidates and the controls.
What they give an attack is what its seat sees.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adversaries.base import Attack, MembershipAttack, Progress, no_progress
from fedattack.config import Config
from fedattack.data import ImageDataset, World
from fedattack.defenses import hides_clients
from fedattack.errors import DataError, NotApplicable
from fedattack.models import initial_weights
from fedattack.observation import Candidates, MembershipScores, Observation, UnlearningRequest
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
from simulations.client_app import round_batches
from simulations.federation import FederationResult, Judge, ask_unlearning, run_federation
from simulations.grid import LocalGrid, open_grid
from strategies import drawn

log = logging.getLogger("fedattack.seats")

FEW_MEMBERS = 20
"""Below so many members chance alone scores an AUC of 0.32 to 0.68 (95 %), and a warning is due."""

MALICIOUS_CLIENT = 0
"""The client that asks for deletions."""


@dataclass(frozen=True)
class MembershipOutcome:
    """What a membership attack answered, and the truth that it was not told.

    Parameters
    ----------
    target : int
        The client asked about.
    scores : MembershipScores
        Of the candidates.
    is_member : ndarray
        bool, shape (N,), in the order of the candidates.
    sample_ids : ndarray
        int64, shape (N,): the candidates' positions in the data set, for the record.
    details : dict
        JSON-able: `members_used` (distinct samples of the target that were trained on in the observed
        rounds), `observed_rounds`, and `matched_label`, `matched_group` (shares of the non-members with the
        label, and of the person, of a member).
    """

    target: int
    scores: MembershipScores
    is_member: NDArray[np.bool_]
    sample_ids: NDArray[np.int64]
    details: dict[str, Any] = field(default_factory=dict)


def membership_experiment(
    config: Config,
    world: World,
    observations: Sequence[Observation],
    attack: MembershipAttack,
    *,
    target: int | None = None,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> MembershipOutcome:
    """Ask a membership attack about one client.

    Members are samples that the target really trained on in the observed rounds, at most `attack.candidates`
    of them; as many non-members come from the held-out pool, each with the label and, while there are such,
    the person of a member: else an attack could score by telling classes apart. Members without such a
    partner are asked about only when there would be too few others. The list is drawn and shuffled once from
    the run's seed and stays the same for all rounds.

    Parameters
    ----------
    config, world
        The run's.
    observations : sequence of Observation
        Everything that the seat saw.
    attack : MembershipAttack
    target : int, optional
        The client asked about; None: the one that was observed in most rounds, the lowest number among
        equals.
    device : torch.device, optional
        Where to compute; None: the CPU.
    progress : Progress

    Raises
    ------
    NotApplicable
        If nothing was observed, not of the target, or the attack cannot do with what was.
    DataError
        If no non-member is held out.
    """
    if target is None:
        target = most_observed(observations)
    rounds = sorted({o.round for o in observations if o.client == target})
    if not rounds:
        raise NotApplicable(f"membership: no update of client {target}, the target, was observed")
    ids, is_member, details = choose_candidates(config, world, target, rounds)
    images, labels = world.dataset.tensors(ids)
    scores = attack.run(
        observations,
        target,
        Candidates(images, labels),
        config.seed,
        device or torch.device("cpu"),
        progress,
    )
    return MembershipOutcome(target, scores, is_member, ids, details)


def check_seats(config: Config, world: World, attacks: Mapping[str, Attack]) -> None:
    """Refuse, before the first round, what membership and unlearning attacks cannot do with this federation.

    Parameters
    ----------
    config, world
        The run's.
    attacks : mapping of str to Attack
        Name -> attack; reconstruction attacks are passed over.

    Raises
    ------
    NotApplicable
        If too few clients are drawn each round.
    DataError
        If no sample is held out.
    """
    for name, attack in attacks.items():
        if attack.family == "reconstruction":
            continue
        if not len(world.pools.nonmembers):
            raise DataError(
                f"attack {name!r} needs held-out samples: setting 'data.nonmembers' = {config.data.nonmembers}; "
                "accepted: 1 or more"
            )
        if isinstance(attack, MembershipAttack) and hides_clients(config.defense):
            raise NotApplicable(
                f"attack {name!r} asks about one client, and 'secure-aggregation' shows the server none alone: leave "
                "it out of 'defense.names'"
            )
        if isinstance(attack, MembershipAttack) and drawn(config.federation) < attack.clients_needed:
            raise NotApplicable(
                f"attack {name!r} needs {attack.clients_needed} clients that answer in one round, and "
                f"{drawn(config.federation)} of {config.federation.clients} are drawn: raise 'federation.clients' or "
                "'federation.participation'"
            )


def most_observed(observations: Sequence[Observation]) -> int:
    """The client observed in most rounds, the lowest number among equals.

    Raises
    ------
    NotApplicable
        If nothing was observed.
    """
    seen = Counter(o.client for o in observations)
    if not seen:
        raise NotApplicable("membership: no update was observed")
    return min(seen, key=lambda client: (-seen[client], client))


def choose_candidates(
    config: Config, world: World, target: int, rounds: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, Any]]:
    """The one list of candidates of a run: sample ids (N,), which of them are members (N,), and details."""
    partition = world.partitions[target]
    batches = [batch for r in rounds for batch in round_batches(config, len(partition), r, target)]
    used = partition[np.unique(np.concatenate(batches))]
    pool = world.pools.nonmembers
    if not len(pool):
        raise DataError(
            "membership: no non-member is held out; raise setting 'data.nonmembers' "
            f"(now {config.data.nonmembers}) or use a larger data set"
        )
    count = min(config.attack.candidates, len(used), len(pool))
    rng = numpy_rng(config.seed, "membership candidates", target)
    members, nonmembers = _pairs(rng.permutation(used), rng.permutation(pool), world.dataset, count)
    if len(members) < FEW_MEMBERS:
        log.warning(
            "membership: only %d members to ask about (client %d trained on %d samples in %d observed rounds, %d "
            "non-members are held out); chance alone spreads widely over so few",
            *(len(members), target, len(used), len(rounds), len(pool)),
        )
    order = rng.permutation(2 * len(members))
    ids = np.concatenate([members, nonmembers])[order]
    matched = _shared(world.dataset.labels, members, nonmembers)
    details = {
        "members_used": len(used),
        "observed_rounds": list(rounds),
        "matched_label": matched,
        "matched_group": None
        if world.dataset.groups is None
        else _shared(world.dataset.groups, members, nonmembers),
    }
    if matched < 1 and config.data.labels == "natural":
        log.warning(
            "membership: only %.0f %% of the non-members have the label of a member (client %d), so a score above "
            "chance may tell classes apart rather than members",
            *(100 * matched, target),
        )
    return ids, (np.arange(len(ids)) < len(members))[order], details


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
