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
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from adversaries import seats
from fedattack.compression import encode
from fedattack.config import Config, FederationConfig
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import EVERYONE, Candidates, Observation, UnlearningRequest
from fedattack.sealed import Identity
from fedattack.task import task_of
from fedattack.training import DIVERGED, HOPELESS_LOSS, batch_positions, evaluate, sample_logits
from fedattack.unlearning import Verdict
from simulations.client_app import Workplace, exclusion_settings
from simulations.engine.flower_grid import PartitionedGrid
from simulations.engine.flower_internals import server_identity
from simulations.engine.journal import Journal, JournaledGrid, State, state_of
from simulations.engine.local_grid import LocalGrid
from simulations.engine.open_grid import open_grid
from simulations.engine.question_grid import QuestionGrid
from simulations.engine.strategy_state import NotCaptured, captured, restore
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
_TOLD_FROM, _LOOKED_THROUGH = 64 << 20, 200_000


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
    answered. `pretraining`: the rounds before round 1, with numbers up to 0.
    """

    weights: dict[str, Tensor]
    rounds: list[RoundRecord]
    rejections: list[tuple[int, int, str]]
    answers: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    pretraining: list[RoundRecord] = field(default_factory=list)

    @property
    def all_rounds(self) -> list[RoundRecord]:
        """All rounds in which clients trained."""
        return [*self.pretraining, *self.rounds]


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
        stack.enter_context(hushed(logging.WARNING))
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
    on_pretrained: Callable[[RoundRecord], None] | None = None,
    on_weights: Callable[[int, dict[str, Tensor]], None] | None = None,
    on_requests: Callable[[DeletionRequests], None] | None = None,
    release: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    arming: seats.MaliciousServer | None = None,
    candidates: Candidates | None = None,
    questions: Mapping[str, Candidates] | None = None,
    weights_again: Callable[[int], bool] | None = None,
    identity: Identity | None = None,
) -> FederationResult:
    """Train a federation on any grid; this process must be the server of its run.

    Where it starts at round 1 and from no given weights, the ``config.federation.pretrain`` rounds before it come
    first. Their numbers are 0 and less, so that nothing drawn for them is drawn again; everybody is honest in them,
    nobody looks at them, and `on_pretrained` alone is told of them.

    Parameters
    ----------
    run_dir
        Journal the rounds in ``run_dir/journal``, and go on from what is journaled there: all rounds are reported
        again, with the figures as they were, and of a round that is over the observations that are still selected,
        for which the replies are kept that were selected when they came.
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
        Further settings of the instructions to train: ``messages.SHARE``, ``OBJECTIVE``, ``FORGETTING``.
    on_round, on_weights
        Called with each round's record; with the round and its weights.
    on_pretrained
        Called with the record of each round of pretraining.
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
    weights_again
        Rounds that are over whose weights are reported again after a restart, beside those of rounds that are
        observed again, the request round and the last; None: of no other.
    identity
        Whose journal it is; None: that of the folder, made from this configuration.

    Raises
    ------
    ConfigError
        If strategy and training settings do not go together.
    RunFailed
        If every client of a round raised an error, the weights or the training before round 1 diverged, a strategy
        could not aggregate, the actors cannot be kept alive, or the journal cannot be written.
    """
    if config.federation.strategy == "fedprox" and config.training.momentum:
        momentum = config.training.momentum
        raise ConfigError(f"setting 'training.momentum' = {momentum}: strategy 'fedprox' needs 0 here")
    if config.engine.deadline is not None and getattr(grid, "deadline", None) is None:
        raise ConfigError(
            f"setting 'engine.deadline' = {config.engine.deadline:g}: this grid has none; use the grid of the "
            "configuration (under `flwr run` there is none), or leave it out"
        )
    if config.federation.max_norm is not None and hides_clients(world.scenario.defense):
        raise ConfigError(
            f"setting 'federation.max_norm' = {config.federation.max_norm:g}: under secure aggregation the server "
            "sees no single update; leave it out, or the defence"
        )
    weights = initial if initial is not None else initial_weights(world.scenario.model, config.seed)
    earlier = config.federation.pretrain if initial is None and first_round == 1 else 0
    first_round -= earlier
    if config.federation.rounds < first_round:
        return FederationResult(dict(weights), [], [])
    served: Grid = grid
    kept: _Kept | None = None
    with hushed(logging.ERROR):  # FedAvg warns of what was asked of it: no evaluation on clients
        aggregator = build_strategy(_asked_of(config, clients), config.training.learning_rate)
    if run_dir is not None:
        kept = _Kept.open(run_dir, identity, grid, config, world, first_round, aggregator)
        served = kept.grid
    if observe is not None:
        observe = partial(_from_round_1, observe)
    elif earlier:
        observe = partial(_from_round_1, _everything)
    early = _told_early(config, world, questions or {})
    if early:
        tagged = {wire.tag_of(config.seed, name): question for name, question in early.items()}
        served = QuestionGrid(served, grid.client_of, tagged, config.attack.malicious_clients)
    if excluded or clients is not None:
        served = ToldGrid(served, grid.client_of, exclusion_settings(excluded or {}), clients)
    reports: list[RoundReport] = []
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
        earlier=earlier,
        on_round=reports.append,
        client_of=grid.client_of,
        average_buffers=averages_buffers(config.federation),
        desk=None if on_requests is None else _desk(world),
        most_examples=partial(_most_examples, config, world, bool(told)),
        max_norm=config.federation.max_norm,
    )
    judge = Judge(config, world)
    if config.federation.evaluate and not len(world.pools.nonmembers):
        log.warning("no held-out samples (setting 'data.nonmembers'): the global model is not evaluated")
    rounds: list[RoundRecord] = []
    pretraining: list[RoundRecord] = []
    clock = time.perf_counter()

    def evaluated(report: RoundReport, weights: dict[str, Tensor]) -> RoundRecord:
        """The record of a round, which is written down."""
        figures = judge(weights) if config.federation.evaluate else {}
        loss, accuracy = figures.get("loss"), figures.get("accuracy")
        seconds = time.perf_counter() - clock
        record = RoundRecord(**vars(report), loss=loss, accuracy=accuracy, seconds=seconds)
        if kept is not None and not kept.lost:
            kept.journal.write_record(record.round, dataclasses.asdict(record))
        return record

    def tell(record: RoundRecord, weights: dict[str, Tensor] | None) -> None:
        """Report a round; `weights` are None of one that is over, where nobody looks at them again."""
        nonlocal clock
        clock = time.perf_counter()
        if record.round < 1:
            _refuse_if_diverged(record, record.loss, earlier, judge.kind)
            pretraining.append(record)
            if on_pretrained is not None:
                on_pretrained(record)
            return
        rounds.append(record)
        if weights is not None:
            if on_weights is not None:
                on_weights(record.round, weights)
            if on_requests is not None and record.round == config.request_round:
                shown = weights if release is None else release(weights)
                on_requests(
                    ask_unlearning(grid, shown, config, world, excluded, through=served, desk=strategy.desk)
                )
        if on_round is not None:
            on_round(record)

    def after_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        nonlocal weights
        if server_round == 0:
            return None
        report = reports[-1]
        if report.round < 1:
            _refuse_if_diverged(report, None, earlier, judge.kind)
        _refuse_if_all_failed(report, earlier)
        weights = wire.to_tensors(arrays)
        known = None
        if kept is not None:
            known = kept.record(report.round) if kept.replays and report.round <= kept.done else None
            kept.write(report, weights)
        record = evaluated(report, weights) if known is None else known
        tell(record, weights)
        if record.loss is None or record.accuracy is None:
            return None
        return MetricRecord({"loss": record.loss, "accuracy": record.accuracy})

    begin = first_round
    if kept is not None:
        kept.look(
            strategy, on_observation and (observe or _everything), weights_again, on_requests is not None
        )
        if not kept.replays and kept.done >= first_round:
            config_record = ConfigRecord(dict(told or {}))
            for number in range(first_round, kept.done + 1):
                found = kept.state(number)
                if number > 0:
                    kept.show_again(number, weights, config_record, served)
                record = kept.record(number) or evaluated(kept.report(number), kept.needed(number).weights)
                if found is not None and number == config.request_round:
                    kept.grid.remember(number)
                tell(record, None if found is None else found.weights)
            weights = kept.restore()
            begin = kept.done + 1
            strategy.first_round = begin
    left = config.federation.rounds - begin + 1
    with _settled_heap():
        if left:
            strategy.start(
                grid=served,
                initial_arrays=wire.to_record(weights),
                num_rounds=left,
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
    return FederationResult(weights, rounds, rejections, answers, pretraining)


def _told_early(config: Config, world: World, questions: Mapping[str, Candidates]) -> dict[str, Candidates]:
    """The questions that malicious clients have before them in every round."""
    seats = Workplace.of(config, world).attackers if questions else {}
    return {name: questions[name] for name, seat in seats.items() if seat.asks_early and name in questions}


@contextmanager
def hushed(level: int) -> Iterator[None]:
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


def kept_bytes(config: Config, world: World, observe: Callable[[int, int], bool]) -> int:
    """What a run's journal may keep of replies that are observed, in bytes; 0 where that is less than 64 MiB."""
    place = Workplace.of(config, world)
    clients, rounds = config.federation.clients, config.federation.rounds
    if hides_clients(world.scenario.defense):
        replies = clients * sum(observe(round, EVERYONE) for round in range(1, rounds + 1))
    else:
        step = 1 + clients * rounds // _LOOKED_THROUGH  # of very many, some stand for all
        some = range(0, clients, step)
        replies = step * sum(observe(round, client) for round in range(1, rounds + 1) for client in some)
    if replies * place.compressor.numel * 4 < _TOLD_FROM:  # no compressor makes it more
        return 0
    drawn = np.random.default_rng(0).normal(size=place.compressor.numel).astype(np.float32)
    packet = place.compressor.pack(drawn, 1, torch.Generator().manual_seed(0))
    size = replies * len(encode(packet))
    return size if size >= _TOLD_FROM else 0


def _everything(round: int, client: int) -> bool:
    """Every client of every round."""
    return True


def _from_round_1(observe: Callable[[int, int], bool], round: int, client: int) -> bool:
    """Those selected by `observe`, none in rounds of pretraining."""
    return round > 0 and observe(round, client)


def _asked_of(config: Config, clients: Collection[int] | None) -> FederationConfig:
    """What is asked of the strategy: where only some clients are there, all of these."""
    federation = config.federation
    if clients is None:
        return federation
    return federation.model_copy(update={"clients": len(clients), "participation": 1.0})


class _Kept:
    """What a run's journal keeps, and what comes back of it when the run goes on.

    `replays`: the strategy's state cannot be written down, so that all replies are kept and put through it again.
    Else the end of the last round is kept, and of earlier ones what somebody looks at again: replies that are
    observed, with the model before and after their round, and the model of the rounds that are asked for.
    """

    def __init__(self, journal: Journal, strategy: Any, first_round: int, request_round: int) -> None:
        self.journal, self._strategy, self._first = journal, strategy, first_round
        self._request_round = request_round
        try:
            captured(strategy)
            self.replays = False
        except NotCaptured as error:
            log.info(
                "the journal keeps all replies, for the strategy's state cannot be written down: %s", error
            )
            self.replays = True
        ended = journal.complete if self.replays else journal.latest
        self.done = max(ended(first_round), first_round - 1)
        if self.done >= first_round:
            log.info("rounds %d to %d come from the journal", first_round, self.done)
        self.grid: JournaledGrid
        self._eavesdropper: Eavesdropper
        self._observe: Callable[[int, int], bool] | None = None
        self._again: Callable[[int], bool] = _never
        self._asks = False
        self._answered: dict[int, tuple[int, ...]] = {}  # round -> whose replies were accepted
        self.lost = False

    @classmethod
    def open(
        cls,
        run_dir: Path,
        identity: Identity | None,
        grid: LocalGrid | PartitionedGrid,
        config: Config,
        world: World,
        first_round: int,
        strategy: Any,
    ) -> _Kept:
        """The journal of a run folder; RunFailed where it is another run's, or cannot be gone on from."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            identity = identity or Identity.of(run_dir, config.result_settings())
        except (OSError, DataError) as error:
            raise RunFailed(f"the run cannot go on in its folder: {error}") from None
        kept = cls(Journal(run_dir / "journal", identity), strategy, first_round, config.request_round)
        stateful = Workplace.of(config, world).stateful
        keeper = grid if isinstance(grid, LocalGrid) else None
        resumed = kept.done >= first_round
        if stateful and keeper is None and resumed:
            raise RunFailed(
                f"the run in {str(kept.journal.folder)!r} cannot go on under `flwr run`: its clients' memories "
                "(error feedback) lie with Flower; use `--engine ray` or `--engine inline`, or start anew elsewhere"
            )
        chosen = None if kept.replays else kept.chosen
        kept.grid = JournaledGrid(grid, kept.journal, kept.done, keeper if stateful else None, chosen)
        if resumed:
            kept.grid.remember(kept.done)
        return kept

    def look(
        self,
        eavesdropper: Eavesdropper,
        observe: Callable[[int, int], bool] | None,
        again: Callable[[int], bool] | None,
        asks: bool,
    ) -> None:
        """Who looks at the rounds, and at which again; `asks`: clients are asked for deletions."""
        self._eavesdropper, self._observe = eavesdropper, observe
        self._again, self._asks = again or _never, asks

    def chosen(self, round: int, replies: Mapping[int, Message]) -> Collection[int]:
        """Whose replies of a round are kept."""
        if self.lost:
            return ()
        if self._eavesdropper.recalls(round) or self._sum_wanted(round):
            return replies
        takes = self._eavesdropper.desk is not None and round <= self._request_round
        return [
            client
            for client, reply in replies.items()
            if not reply.has_error() and (self._wanted(round, client) or (takes and parted(reply.content)[1]))
        ]

    def _wanted(self, round: int, client: int) -> bool:
        return self._observe is not None and self._observe(round, client)

    def _sum_wanted(self, round: int) -> bool:
        return self._eavesdropper.aggregated and self._wanted(round, EVERYONE)

    def write(self, report: RoundReport, weights: dict[str, Tensor]) -> None:
        """Write down the end of a round, and let go of what nobody needs any more."""
        if self.replays or self.lost:
            return
        last = report.round
        self._answered[last] = report.clients
        try:
            self.journal.write_state(last, state_of(self._strategy, weights, report))
        except NotCaptured as error:
            log.warning("a run that is killed will begin anew: %s, which cannot be written down", error)
            self.lost = True
            for what in ("state", "replies", "memories", "round"):
                self.journal.drop(what, _never)
            return
        self.journal.drop("replies", lambda number: number >= last or self._looked_at(number))
        with_replies = {n for n in range(self._first, last + 1) if self.journal.has_replies(n)}
        near = with_replies | {number - 1 for number in with_replies}
        self.journal.drop(
            "state", lambda n: n >= last or n in near or self._again(n) or n == self._request_round
        )
        self.journal.drop("memories", lambda n: n >= last or (self._asks and n == self._request_round))

    def _looked_at(self, round: int) -> bool:
        """Whether somebody looks again at what is kept of a round."""
        if self._eavesdropper.recalls(round) or self._sum_wanted(round):
            return True
        if self._eavesdropper.desk is not None and 0 < round <= self._request_round:
            return True
        return any(self._wanted(round, client) for client in self._clients(round))

    def _clients(self, round: int) -> tuple[int, ...]:
        if round not in self._answered:
            self._answered[round] = (self.record(round) or self.report(round)).clients
        return self._answered[round]

    def record(self, round: int) -> RoundRecord | None:
        """A round's record; None where the run ended before it was written."""
        known = self.journal.read_record(round)
        if known is None and round < self.done:
            raise self.journal.missing("round", round, f"round {self.done} is over")
        return None if known is None else RoundRecord.from_json(known)

    def report(self, round: int) -> RoundReport:
        """A round's report, as it was written with its end."""
        values = self.needed(round).report
        lists = {name: tuple(map(tuple, values[name])) for name in ("failed", "rejected")}
        return RoundReport(**values | lists | {name: tuple(values[name]) for name in ("clients", "dropped")})

    def state(self, round: int) -> State | None:
        """The end of a round, where it is kept."""
        return self.journal.read_state(round) if self.journal.has_state(round) else None

    def needed(self, round: int) -> State:
        """The end of a round that must be there."""
        if (found := self.state(round)) is None:
            raise self.journal.missing("state", round, f"round {self.done} is over")
        return found

    def show_again(self, round: int, initial: dict[str, Tensor], config: ConfigRecord, grid: Grid) -> None:
        """Have observers look again at what is kept of a round and selected still."""
        eavesdropper = self._eavesdropper
        if not self.journal.has_replies(round):
            lost = [client for client in self._clients(round) if self._wanted(round, client)]
            if (
                eavesdropper.recalls(round)
                or self._sum_wanted(round)
                or (lost and not eavesdropper.aggregated)
            ):
                raise self.journal.missing("replies", round, "an attack of this run reads that round")
            return
        if not self._looked_at(round):
            return
        before = initial if round == self._first else self.needed(round - 1).weights
        messages = eavesdropper.configure_train(
            round - eavesdropper.first_round + 1, wire.to_record(before), ConfigRecord(dict(config)), grid
        )
        eavesdropper.show_again(round, self.grid.replayed(list(messages), round))

    def restore(self) -> dict[str, Tensor]:
        """Give the strategy what it kept after the last round that is over; the model after it."""
        last = self.needed(self.done)
        assert last.strategy is not None
        restore(self._strategy, *last.strategy)
        self.grid.remember(self.done)
        return last.weights


def _never(round: int) -> bool:
    return False


def _most_examples(config: Config, world: World, told: bool, client: int) -> int:
    """What a client can have trained on: what it registered, and no more than the agreed steps take.

    `told`: clients may be told to take all of their samples instead.
    """
    registered = len(world.partitions[client]) if 0 <= client < len(world.partitions) else 0
    steps = (
        [] if told or not registered else batch_positions(registered, world.scenario.training, 0, 1, client)
    )
    most = min(registered, sum(map(len, steps))) if steps else registered
    return min(most, config.federation.max_examples or most)


def _refuse_if_all_failed(report: RoundReport, earlier: int) -> None:
    """A round in which nothing but errors came back is a fault of the set-up, not an event of the federation."""
    if report.failed and not (report.clients or report.rejected or report.dropped):
        client, reason = report.failed[0]
        which = f"all {len(report.failed)} clients of {_named(report.round, earlier)}"
        raise RunFailed(f"{which} failed; client {client}: {reason}")


def _named(round: int, earlier: int) -> str:
    """A round as people count it: `earlier` are before round 1."""
    return f"round {round}" if round > 0 else f"round {round + earlier} of {earlier} before round 1"


def _refuse_if_diverged(report: RoundReport, loss: float | None, earlier: int, kind: str) -> None:
    """No model that is worth attacking comes of a training that diverged before round 1; `loss`: after the round."""
    where = _named(report.round, earlier)
    advice = "lower 'training.learning_rate', or choose another model or initialisation"
    for client, reason in report.failed:
        if DIVERGED in reason:
            raise RunFailed(f"{where}, client {client}: {reason.partition('; ')[0]}; {advice}")
    if report.rejected and not report.clients:
        client, reason = report.rejected[0]
        raise RunFailed(f"{where}: no reply could be used; client {client}: {reason}; {advice}")
    if kind == "classify" and loss is not None and not loss < HOPELESS_LOSS:
        raise RunFailed(f"{where}: training diverged, the global model's loss is {loss:.3g}; {advice}")


class Judge:
    """The task's figures of global weights on the held-out pool, or on other samples; ``{}`` where there are none."""

    def __init__(self, config: Config, world: World) -> None:
        self._world = world
        self._model = build_model(world.scenario.model).to(choose_device(config.engine.device))
        self._task = task_of(world.scenario)
        self.kind = self._task.kind

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
                log.warning("client %d could not answer %r: %s", sender, what, wire.reason_of(reply))
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
