"""A federation from its first round to its last: grid, curious strategy, evaluation, journal."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from adversaries import seats
from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import ConfigError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, Observation, UnlearningRequest
from fedattack.task import task_of
from fedattack.training import evaluate, sample_logits
from fedattack.unlearning import Verdict
from simulations.client_app import Workplace, exclusion_settings
from simulations.engine.flower_grid import PartitionedGrid
from simulations.engine.flower_internals import server_identity
from simulations.engine.journal import Journal, JournaledGrid
from simulations.engine.local_grid import LocalGrid
from simulations.engine.open_grid import open_grid
from simulations.engine.question_grid import QuestionGrid
from simulations.engine.told_grid import ToldGrid
from simulations.experiments.executor import choose_device
from strategies import Eavesdropper, MaliciousServer, RoundReport, averages_buffers, build_strategy
from strategies import messages as wire
from strategies.forgetting import DeletionDesk, parted

log = logging.getLogger("fedattack.federation")


class DeletionRequests(dict[str, list[tuple[int, UnlearningRequest]]]):
    """Attack -> who really asked, and what the request says, in the order of arrival.

    `verdicts` are on the records that were rejected, also on those that came too late; `names`: tag -> attack.
    """

    def __init__(self, names: Mapping[str, str] | None = None, verdicts: list[Verdict] | None = None) -> None:
        super().__init__()
        self.names, self.verdicts = dict(names or {}), [] if verdicts is None else verdicts

    def rejected(self, attack: str) -> list[Verdict]:
        """The verdicts on records of an attack."""
        return [verdict for verdict in self.verdicts if self.names.get(verdict.tag) == attack]


_PATIENCE_SECONDS = 30 * 24 * 3600.0
_EVALUATED_AT_ONCE = 4096


@dataclass(frozen=True)
class RoundRecord(RoundReport):
    """A round's report with the global model's figures after it, and its wall time, evaluation included.

    `loss` and `accuracy` are those on the held-out pool, None where it is not evaluated.
    """

    loss: float | None
    accuracy: float | None
    seconds: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RoundRecord:
        """The record that ``dataclasses.asdict`` and JSON made lists of."""
        fixed = dict(values)
        for name in ("failed", "rejected"):
            fixed[name] = tuple((int(client), str(reason)) for client, reason in fixed[name])
        for name in ("clients", "dropped"):
            fixed[name] = tuple(fixed[name])
        return cls(**fixed)


@dataclass(frozen=True)
class FederationResult:
    """What a federation leaves: the last global state dict, on the CPU, and the figures of its rounds.

    `rejections`: (round, client, reason) of every refused reply. `answers`: attack -> malicious client -> what it
    answered.
    """

    weights: dict[str, Tensor]
    rounds: list[RoundRecord]
    rejections: list[tuple[int, int, str]]
    answers: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)


def run_federation(
    config: Config, world: World, *, grid: LocalGrid | None = None, **how: Any
) -> FederationResult:
    """Train a federation on the configured engine; `how` and the errors are those of :func:`serve`.

    An open `grid` of the same configuration and world saves its start; its clients start with empty memories.
    """
    with ExitStack() as stack:
        if grid is None:
            grid = stack.enter_context(open_grid(config, world))
        else:
            grid.reset()
        stack.enter_context(server_identity(grid.run_id))
        stack.enter_context(_hushed(logging.WARNING))
        return serve(grid, config, world, **how)


def serve(
    grid: LocalGrid | PartitionedGrid,
    config: Config,
    world: World,
    *,
    run_dir: Path | None = None,
    on_observation: Callable[[Observation], None] | None = None,
    observe: Callable[[int, int], bool] | None = None,
    initial: dict[str, Tensor] | None = None,
    first_round: int = 1,
    excluded: Mapping[int, Collection[int]] | None = None,
    clients: Collection[int] | None = None,
    told: Mapping[str, Any] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    on_weights: Callable[[int, dict[str, Tensor]], None] | None = None,
    on_requests: Callable[[DeletionRequests], None] | None = None,
    release: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    arming: seats.MaliciousServer | None = None,
    candidates: Candidates | None = None,
    questions: Mapping[str, Candidates] | None = None,
) -> FederationResult:
    """Train a federation on any grid; this process must be the server of its run.

    Parameters
    ----------
    run_dir
        Journal the rounds in ``run_dir/journal``, and go on from what is journaled there. Observations, rounds and
        weights of journaled rounds are reported again, the figures as they were. The caller sees to it that the
        folder belongs to this configuration.
    on_observation
        Called with what the server sees of each client that `observe` selects, in ascending order within a round.
    observe
        ``observe(round, client)``; None: everything.
    initial
        State dict to start from; None: the configured initial weights.
    first_round
        The rounds from here to ``config.federation.rounds`` are run.
    excluded
        Client -> positions of its partition that it no longer trains on.
    clients
        The clients that there are for this; None: all of the grid.
    told
        Further settings of the instructions to train: ``messages.LOCAL_STEPS``, ``OBJECTIVE``, ``FORGETTING``.
    on_round, on_weights
        Called with each round's record; with the round and its weights.
    on_requests
        Called with what the clients want forgotten, as they say beside their replies up to round
        ``config.request_round``, and when they are asked after it. None: nothing of that is taken.
    release
        What the server shows of its model to those who may ask for deletions; None: the model.
    arming, candidates
        The attack whose weights a malicious server sends in ``config.attack.rounds``, and what it will be asked
        about.
    questions
        Attack of the malicious clients -> what they are asked about after the last round; those whose attack
        asks early have it before them in every round.

    Raises
    ------
    ConfigError
        If strategy and training settings do not go together.
    RunFailed
        If every client of a round raised an error, the weights diverged, a strategy could not aggregate, the actors
        cannot be kept alive, or the journal cannot be written.
    """
    if config.federation.strategy == "fedprox" and config.training.momentum:
        momentum = config.training.momentum
        raise ConfigError(f"setting 'training.momentum' = {momentum}: strategy 'fedprox' needs 0 here")
    weights = initial if initial is not None else initial_weights(world.scenario.model, config.seed)
    total = config.federation.rounds - first_round + 1
    if total < 1:
        return FederationResult(dict(weights), [], [])
    served: Grid = grid
    journal: Journal | None = None
    replayed = first_round - 1
    if run_dir is not None:
        journal = Journal(run_dir / "journal")
        served = _journaled(grid, journal, config, world, first_round)
        replayed = served.replayed
        if replayed >= first_round:
            log.info("rounds %d to %d come from the journal", first_round, replayed)
    early = _told_early(config, world, questions or {})
    if early:
        tagged = {wire.tag_of(config.seed, name): question for name, question in early.items()}
        served = QuestionGrid(served, grid.client_of, tagged, config.attack.malicious_clients)
    if excluded or clients is not None:
        served = ToldGrid(served, grid.client_of, exclusion_settings(excluded or {}), clients)
    federation = config.federation
    if clients is not None:
        federation = federation.model_copy(update={"clients": len(clients), "participation": 1.0})
    reports: list[RoundReport] = []
    with _hushed(logging.ERROR):  # FedAvg warns of what was asked of it: no evaluation on clients
        aggregator = build_strategy(federation, config.training.learning_rate)
    seat: Callable[..., Eavesdropper] = Eavesdropper
    if arming is not None:
        seat = partial(MaliciousServer, attack=arming, rounds=config.attack.rounds, candidates=candidates)
    strategy = seat(
        aggregator,
        world.scenario,
        on_observation=on_observation,
        observe=observe,
        auxiliary=world.auxiliary,
        seed=config.seed,
        first_round=first_round,
        on_round=reports.append,
        client_of=grid.client_of,
        average_buffers=averages_buffers(config.federation),
        desk=None if on_requests is None else _desk(world),
    )
    judge = Judge(config, world)
    if config.federation.evaluate and not len(world.pools.nonmembers):
        log.warning("no held-out samples (setting 'data.nonmembers'): the global model is not evaluated")
    rounds: list[RoundRecord] = []
    clock = time.perf_counter()

    def after_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        nonlocal weights, clock
        if server_round == 0:
            return None
        report = reports[-1]
        _refuse_if_all_failed(report)
        weights = wire.to_tensors(arrays)
        known = journal.read_record(report.round) if journal and report.round <= replayed else None
        if known is not None:
            record = RoundRecord.from_json(known)
        else:
            figures = judge(weights) if config.federation.evaluate else {}
            loss, accuracy = figures.get("loss"), figures.get("accuracy")
            seconds = time.perf_counter() - clock
            record = RoundRecord(**vars(report), loss=loss, accuracy=accuracy, seconds=seconds)
            if journal is not None:
                journal.write_record(record.round, dataclasses.asdict(record))
        clock = time.perf_counter()
        rounds.append(record)
        if on_weights is not None:
            on_weights(record.round, weights)
        if on_requests is not None and record.round == config.request_round:
            shown = weights if release is None else release(weights)
            on_requests(
                ask_unlearning(grid, shown, config, world, excluded, through=served, desk=strategy.desk)
            )
        if on_round is not None:
            on_round(record)
        if record.loss is None or record.accuracy is None:
            return None
        return MetricRecord({"loss": record.loss, "accuracy": record.accuracy})

    with _settled_heap():
        strategy.start(
            grid=served,
            initial_arrays=wire.to_record(weights),
            num_rounds=total,
            timeout=_PATIENCE_SECONDS,
            train_config=ConfigRecord(dict(told or {})),
            evaluate_fn=after_round,
        )
    rejections = [(r.round, client, reason) for r in rounds for client, reason in r.rejected]
    answers: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, question in (questions or {}).items():
        settings = {wire.TAG: wire.tag_of(config.seed, name), wire.ROUND: config.federation.rounds}
        records = {wire.QUESTION: wire.to_record({"images": question.images, "labels": question.labels})}
        clients = config.attack.malicious_clients
        said = ask(grid, "query.answer", weights, clients, settings, records, through=served)
        replies = {client: reply.content.array_records[wire.UPDATE] for client, reply in said}
        answers[name] = {client: wire.to_tensors(record) for client, record in replies.items()}
    return FederationResult(weights, rounds, rejections, answers)


def _told_early(config: Config, world: World, questions: Mapping[str, Candidates]) -> dict[str, Candidates]:
    """The questions that malicious clients have before them in every round."""
    seats = Workplace.of(config, world).attackers if questions else {}
    return {name: questions[name] for name, seat in seats.items() if seat.asks_early and name in questions}


@contextmanager
def _hushed(level: int) -> Iterator[None]:
    """Have Flower log nothing below `level` for the block."""
    flower = logging.getLogger("flwr")
    before = flower.level
    flower.setLevel(max(before, level))
    try:
        yield
    finally:
        flower.setLevel(before)


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Keep the collector from walking through all of torch again and again while replies come and go."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _journaled(
    grid: LocalGrid | PartitionedGrid, journal: Journal, config: Config, world: World, first_round: int
) -> JournaledGrid:
    stateful = Workplace.of(config, world).stateful
    keeper = grid if isinstance(grid, LocalGrid) else None
    served = JournaledGrid(grid, journal, first_round, keeper if stateful else None)
    if stateful and keeper is None and served.replayed >= first_round:
        raise RunFailed(
            f"the run in {str(journal.folder)!r} cannot go on under `flwr run`: its clients' memories "
            "(error feedback) lie with Flower; use `--engine ray` or `--engine inline`, or start anew elsewhere"
        )
    return served


def _refuse_if_all_failed(report: RoundReport) -> None:
    """A round in which nothing but errors came back is a fault of the set-up, not an event of the federation."""
    if report.failed and not (report.clients or report.rejected or report.dropped):
        client, reason = report.failed[0]
        which = f"all {len(report.failed)} clients of round {report.round}"
        raise RunFailed(f"{which} failed; client {client}: {reason}")


class Judge:
    """The task's figures of global weights on the held-out pool, or on other samples; ``{}`` where there are none."""

    def __init__(self, config: Config, world: World) -> None:
        self._world = world
        self._model = build_model(world.scenario.model).to(choose_device(config.engine.device))
        self._task = task_of(world.scenario)

    def __call__(
        self, weights: Mapping[str, Tensor], ids: NDArray[np.int64] | None = None
    ) -> dict[str, float]:
        """Means over the samples `ids` of what :attr:`fedattack.task.Task.figures` names; None: the pool."""
        chosen = self._world.pools.nonmembers if ids is None else ids
        total = dict.fromkeys(self._task.figures, 0.0)
        if not len(chosen):
            return {}
        for some in np.array_split(chosen, -(-len(chosen) // _EVALUATED_AT_ONCE)):
            figures = self.of(weights, *self._world.dataset.tensors(some))
            for name in total:
                total[name] += figures[name] * (len(some) / len(chosen))
        return total

    def of(self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, float]:
        """The same over any samples; ``{}`` where there are none."""
        return evaluate(self._model, weights, images, labels, task=self._task) if len(labels) else {}

    def probabilities(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """A classifier's answers, float32 (n, classes)."""
        return sample_logits(self._model.eval(), weights, images).softmax(1)


def ask(
    grid: LocalGrid | PartitionedGrid,
    what: str,
    weights: Mapping[str, Tensor],
    clients: Collection[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    records: Mapping[str, ArrayRecord] | None = None,
    through: Grid | None = None,
    own: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[tuple[int, Message]]:
    """Show clients a model and have them answer: who did, and what; the log says why others could not.

    `what` is the message's type ("evaluate", "query.unlearn", ...), `settings` and `records` are what it carries
    besides, `own` what it tells one client alone; `through` is a grid around `grid` that it goes through. `clients`
    None: all.
    """
    content = RecordDict(
        {wire.ARRAYS: wire.to_record(dict(weights)), wire.CONFIG: ConfigRecord(dict(settings or {}))}
    )
    for name, record in (records or {}).items():
        content[name] = record
    answers: list[tuple[int, Message]] = []
    with ExitStack() as stack:
        if isinstance(grid, LocalGrid):
            stack.enter_context(server_identity(grid.run_id))
        asked = [n for n in grid.get_node_ids() if clients is None or grid.client_of(n) in clients]
        messages = [Message(content, node, what) for node in asked]
        served = ToldGrid(through or grid, grid.client_of, own or {})
        for reply in served.send_and_receive(messages, timeout=_PATIENCE_SECONDS):
            sender = grid.client_of(reply.metadata.src_node_id)
            if reply.has_error():
                log.warning("client %d could not answer %r: %s", sender, what, reply.error.reason)
            else:
                answers.append((sender, reply))
    return answers


def ask_unlearning(
    grid: LocalGrid | PartitionedGrid,
    weights: Mapping[str, Tensor],
    config: Config,
    world: World,
    excluded: Mapping[int, Collection[int]] | None = None,
    through: Grid | None = None,
    times: int = 0,
    desk: DeletionDesk | None = None,
) -> DeletionRequests:
    """Ask all clients alike whether they want anything forgotten, given the global model after the request round.

    And close the `desk`, which has what they asked for by themselves (None: nothing). What cannot be read, or is
    none of the federation's, is rejected with a line in the log and a verdict; what is forgotten already is seen
    when it is served (:func:`fedattack.unlearning.validate_request`). `excluded`: client -> positions that are
    forgotten already; `times`: how many requests have been answered before.
    """
    round, desk = config.request_round, desk or _desk(world)
    settings, own = {wire.ROUND: round, wire.TIMES: times}, exclusion_settings(excluded or {})
    for sender, reply in ask(grid, "query.unlearn", weights, settings=settings, through=through, own=own):
        desk.take(round, sender, parted(reply.content)[1])
    names = {wire.tag_of(config.seed, name): name for name in config.attack.names}
    requests = DeletionRequests(names, desk.verdicts)
    for tag, sender, request in desk.close(round):
        if tag in names:
            requests.setdefault(names[tag], []).append((sender, request))
        else:
            log.warning(
                "deletion request from client %d is of no attack of this run, and is not served", sender
            )
    return requests


def _desk(world: World) -> DeletionDesk:
    """Where the clients' deletion requests are taken."""
    return DeletionDesk(world.scenario, {client: len(ids) for client, ids in enumerate(world.partitions)})
