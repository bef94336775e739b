"""The curious server: any Flower strategy, with someone reading the replies before it aggregates them."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedattack.compression import decode
from fedattack.compression.carrier import STYPE, from_array
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, PayloadError, RunFailed, shown, told
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Auxiliary, Observation, Scenario, Update, UpdateKind
from fedattack.rng import numpy_rng
from fedattack.task import tied_names, trained_parameters
from fedattack.training import weight_step
from strategies import messages as wire
from strategies.forgetting import DeletionDesk, parted
from strategies.light_records import HeldArray, LightArrays, LightMetrics, LightRecords, SteppedArray

log = logging.getLogger("fedattack.strategies")

MAX_EXAMPLES = 2**31 - 1
"""More samples than this a client cannot claim to have trained on."""

MAX_STEP = float(np.finfo(np.float32).max) / 2**20
"""No weight can move further in one reply: sums over a million of them stay finite."""


@dataclass(frozen=True)
class RoundReport:
    """What became of one round's replies; clients are ascending, `failed` and `rejected` come with the reason.

    The replies of `clients` were aggregated, the `failed` answered with an error, the `rejected` with something
    that was refused, the `dropped` not at all. Bytes are sums over the first: packed updates, and the BatchNorm
    buffers beside them. `train_loss` is their mean weighted by examples, None without any. Not `aggregated`: the
    weights stayed.
    """

    round: int
    clients: tuple[int, ...]
    failed: tuple[tuple[int, str], ...]
    rejected: tuple[tuple[int, str], ...]
    dropped: tuple[int, ...]
    wire_bytes: int
    buffer_bytes: int
    train_loss: float | None
    aggregated: bool


@dataclass(frozen=True)
class _Reply:
    message: Message
    client: int
    update: Update
    buffers: dict[str, NDArray[Any]]
    num_examples: int
    loss: float
    wire_bytes: int
    buffer_bytes: int


@dataclass(eq=False, repr=False)
class Eavesdropper(Strategy):
    """Makes any Flower strategy curious: reads each reply, hands out observations, then lets it aggregate.

    Replies may be packed updates (:mod:`fedattack.compression`) or the new weights that an ordinary Flower client
    sends. Hostile ones are rejected with a reason and the round goes on. What the wrapped strategy gets to see is
    what it expects: dense new weights, ``weights + delta`` under fedavg and ``weights - server_learning_rate *
    gradient`` under fedsgd, in ascending order of the clients' numbers.

    Where the scenario's defences include secure aggregation, the replies are summed before anything looks at them:
    there is one observation a round, of :data:`~fedattack.observation.EVERYONE`, and the wrapped strategy gets one
    reply, the clients' mean weighted by their examples. That suits strategies that need no more than the mean. The
    observation's `batch_size` is 0: under fedsgd the sum is the gradient over all declared examples in one batch.

    Parameters
    ----------
    strategy
        Any Flower strategy whose clients send one ArrayRecord.
    on_observation
        Called with each observation, before the round is aggregated.
    observe
        ``observe(round, client)`` selects what is observed; None: everything. Under secure aggregation `client` is
        ``EVERYONE``.
    auxiliary
        Public data granted to the adversary; put into every observation.
    seed
        Keys the sampling of clients: Flower draws them with Python's global generator, which is seeded for the draw
        by (seed, "sampling", round) and restored after it.
    first_round
        Number of the first round of :meth:`start`.
    earlier
        Rounds that the wrapped strategy counts before round 1: those of pretraining have numbers up to 0.
    client_of
        Node id -> the client's number. None: what the reply declares as "partition-id", else the node id.
    average_buffers
        Average BatchNorm buffers here, by examples, instead of giving them to the wrapped strategy. For server
        optimisers (FedAdam, ...), whose steps would make variances negative.
    as_sent
        Give the wrapped strategy the replies under the names, and with the metrics, that its clients sent: those of
        an ordinary Flower app may be read by a strategy of its own. Not of a sum.
    desk
        Where deletion requests that come with the replies are taken, whatever becomes of the reply. None: nowhere.
    most_examples
        Client -> the most samples that it may declare, for they weigh its update; None: 2**31 - 1.
    max_norm
        Longest change of the weights (L2 norm) that is taken of a client, more is rejected; None: any.
    """

    strategy: Strategy
    scenario: Scenario
    _: KW_ONLY
    on_observation: Callable[[Observation], None] | None = None
    observe: Callable[[int, int], bool] | None = None
    auxiliary: Auxiliary | None = None
    seed: int = 0
    first_round: int = 1
    earlier: int = 0
    on_round: Callable[[RoundReport], None] | None = None
    client_of: Callable[[int], int] | None = None
    average_buffers: bool = False
    desk: DeletionDesk | None = None
    as_sent: bool = False
    most_examples: Callable[[int], int] | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        module = build_model(self.scenario.model)
        trained = trained_parameters(module)
        self.names = tuple(trained)
        self.shapes = tuple(tuple(parameter.shape) for parameter in trained.values())
        self._buffer_names = {name for name, _ in module.named_buffers()}
        self._tied = tied_names(module)
        self._offsets = np.cumsum([0, *(math.prod(shape) for shape in self.shapes)])
        self._numel = int(self._offsets[-1])
        self.kind: UpdateKind = "gradient" if self.scenario.training.protocol == "fedsgd" else "delta"
        self.aggregated = hides_clients(self.scenario.defense)
        self._claims: dict[int, int] = {}  # client number -> the node that goes by it
        self._sent: dict[str, Tensor] = {}
        self._sent_arrays: dict[str, NDArray[Any]] = {}
        self._float_buffers: list[str] = []
        self._armed = False
        self.aggregates_armed = False
        self.remembers = False
        self._weighted_by: str = getattr(self.strategy, "weighted_by_key", wire.NUM_EXAMPLES)
        self._own: dict[int, dict[str, Tensor]] = {}  # node -> tensors that it was sent instead
        self._scenarios: dict[int, Scenario] = {}

    # ------------------------------------------------------------------ what goes out

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the weights that go out, and let the wrapped strategy draw the clients."""
        round = self._number(server_round)
        self._keep(arrays)
        config[wire.ROUND] = round
        offered = arrays
        if self.average_buffers and self._float_buffers:
            offered = ArrayRecord()
            for name in self.names:
                offered[name] = arrays[name]
        with seeded_sampling(self.seed, round):
            messages = list(self.strategy.configure_train(round + self.earlier, offered, config, grid))
        if self.earlier:  # the strategy has written its own number there
            for message in messages:
                for told in message.content.config_records.values():
                    told[wire.ROUND] = round
        sent = self.outgoing(round, self._sent)
        self._armed = sent is not None and not self.aggregates_armed
        if sent is not None:
            arrays = wire.to_record(sent)
            self._keep(arrays)
        if offered is not arrays:
            _exchange(messages, offered, arrays)
        self._own = self._tailor(messages, sent, arrays) if sent is not None else {}
        return messages

    def _tailor(
        self, messages: list[Message], sent: dict[str, Tensor], arrays: ArrayRecord
    ) -> dict[int, dict[str, Tensor]]:
        """Give each client what is sent to it alone; by node, and by EVERYONE if all got the same, those tensors."""
        own: dict[int, dict[str, Tensor]] = {}
        numbers = {message.metadata.dst_node_id: message for message in messages}
        for place, node in enumerate(sorted(numbers, key=self.client_of or int)):
            changed = self.tailored(sent, place, node)
            if changed:
                own[node] = changed
                _exchange([numbers[node]], arrays, wire.to_record(sent | changed))
        if self.aggregated and len(own) == len(numbers) and _all_equal(list(own.values())):
            own[EVERYONE] = next(iter(own.values()))
        return own

    def outgoing(self, round: int, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """What is sent in this round instead of the global model; None: the global model.

        Such a round is observed, and not aggregated unless `aggregates_armed`.
        """
        return None

    def tailored(self, weights: dict[str, Tensor], place: int, node: int) -> dict[str, Tensor]:
        """Tensors that the client at `node`, the `place`-th of those drawn by number, is sent instead; overridden."""
        return {}

    def seen(self, observation: Observation, node: int) -> None:
        """Told the observations, where :attr:`remembers` is set all, and the node (EVERYONE of a sum); overridden."""

    def _keep(self, arrays: ArrayRecord) -> None:
        missing = [name for name in self.names if name not in arrays]
        if missing:
            raise ConfigError(
                f"the arrays sent out lack {missing[0]!r}, a parameter of model {self.scenario.model.name!r}: "
                "give the Eavesdropper the scenario of the model that is trained"
            )
        self._sent = wire.to_tensors(arrays)
        self._sent_arrays = {name: tensor.numpy() for name, tensor in self._sent.items()}
        buffers = [name for name in self._sent if name in self._buffer_names]
        self._float_buffers = [name for name in buffers if self._sent[name].is_floating_point()]

    # ------------------------------------------------------------------ what comes back

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Read, check and observe the replies, then aggregate them with the wrapped strategy."""
        round = self._number(server_round)
        accepted, failed, rejected, dropped = self._sorted(round, replies)
        visible = [_summed(accepted)] if self.aggregated and accepted else accepted
        self._hand_out(round, visible, self._most_steps(accepted))
        arrays, metrics = (None, None) if self._armed else self._aggregate(round, visible)
        if arrays is None and accepted and not self._armed:
            log.warning("round %d: the strategy did not aggregate; the weights stay as they were", round)
        if not accepted:
            log.warning("round %d: no reply was accepted; the weights stay as they were", round)
        examples = sum(reply.num_examples for reply in accepted)
        loss = sum(reply.loss * reply.num_examples for reply in accepted) / examples if accepted else None
        if self.on_round is not None:
            self.on_round(
                RoundReport(
                    round=round,
                    clients=tuple(reply.client for reply in accepted),
                    failed=tuple(sorted(failed)),
                    rejected=tuple(sorted(rejected)),
                    dropped=tuple(sorted(dropped)),
                    wire_bytes=sum(reply.wire_bytes for reply in accepted),
                    buffer_bytes=sum(reply.buffer_bytes for reply in accepted),
                    train_loss=loss,
                    aggregated=arrays is not None,
                )
            )
        return arrays, metrics

    def show_again(self, round: int, replies: Iterable[Message]) -> None:
        """Look once more at replies of a round that is over; :meth:`configure_train` has been called for it."""
        accepted, *_ = self._sorted(round, replies)
        visible = [_summed(accepted)] if self.aggregated and accepted else accepted
        self._hand_out(round, visible, self._most_steps(accepted))

    def _most_steps(self, replies: list[_Reply]) -> int:
        """The most local steps of any of these clients."""
        return max((self.scenario.training.steps(reply.num_examples) for reply in replies), default=1)

    def recalls(self, round: int) -> bool:
        """Whether what was seen of a round is needed again after a restart; overridden."""
        return False

    def _sorted(
        self, round: int, replies: Iterable[Message]
    ) -> tuple[list[_Reply], list[tuple[int, str]], list[tuple[int, str]], list[int]]:
        """The replies that are accepted, by client; who failed and who is rejected, and why; who dropped out."""
        accepted: list[_Reply] = []
        failed: list[tuple[int, str]] = []
        rejected: list[tuple[int, str]] = []
        dropped: list[int] = []
        answered: set[int] = set()
        for message in replies:
            node = message.metadata.src_node_id
            client = self.client_of(node) if self.client_of else node
            try:
                if message.has_error():
                    reason = wire.reason_of(message)
                    if message.error.code == wire.OVERSIZED:
                        raise PayloadError(reason)
                    if message.error.code == wire.DROPPED_OUT:
                        dropped.append(client)
                        continue
                    log.warning("round %d: client %d failed: %s", round, client, reason)
                    failed.append((client, reason))
                    continue
                self._take_requests(message, client, round)
                reply = self._read(message, round)
                if reply.client in answered:
                    raise PayloadError(f"client {reply.client} has answered already")
            except PayloadError as error:
                reason = told(str(error))
                log.warning("round %d: reply of client %d rejected: %s", round, client, reason)
                rejected.append((client, reason))
                continue
            answered.add(reply.client)
            accepted.append(reply)
        # One fixed order, whatever order the replies came in: float sums depend on it.
        accepted.sort(key=lambda reply: reply.client)
        return accepted, failed, rejected, dropped

    def _take_requests(self, message: Message, client: int, round: int) -> None:
        """Have the desk take the deletion requests out of a reply."""
        rest, asked = parted(message.content)
        if not asked:
            return
        message.content = rest
        if self.desk is not None:
            self.desk.take(round, client, asked)
        else:
            log.warning("round %d: deletion requests of client %d come when none are taken", round, client)

    def _read(self, message: Message, round: int) -> _Reply:
        """A reply as an update; raises PayloadError for everything that an honest client would not send."""
        records = message.content
        arrays, metrics = _only(records, ArrayRecord), _only(records, MetricRecord)
        loss = _loss(metrics)
        client = self._client(message.metadata.src_node_id, metrics.get(wire.PARTITION))
        most = MAX_EXAMPLES if self.most_examples is None else self.most_examples(client)
        examples = _examples(metrics, self._weighted_by, most)
        if wire.PACKED in arrays and arrays[wire.PACKED].stype == STYPE:
            payload = from_array(arrays[wire.PACKED])
            agreed = self.scenario.compression
            update = decode(payload, self.names, self.shapes, self.kind, agreed, round=round)
            others, wire_bytes = set(arrays) - {wire.PACKED}, len(payload)
        else:
            update, wire_bytes = self._difference(arrays, message.metadata.src_node_id)
            others = set(arrays) - set(self.names)
        largest = float(update.values.abs().max()) if update.kept else 0.0
        step = abs(weight_step(self.scenario.training, update.kind))
        if largest * step > MAX_STEP:
            raise PayloadError(f"an entry of {largest:.3g} would leave the range of the weights")
        if self.max_norm is not None:
            norm = step * float(torch.linalg.vector_norm(update.values, dtype=torch.float64))
            if norm > self.max_norm:
                raise PayloadError(
                    f"would change the weights by {norm:.3g} (L2 norm); at most {self.max_norm:g}"
                )
        unknown = others - set(self._sent)
        if unknown:
            raise PayloadError(f"unknown array {shown(min(unknown))}")
        buffers: dict[str, NDArray[Any]] = {}
        buffer_bytes = 0
        for name in self._float_buffers:
            if name not in others:
                raise PayloadError(f"buffer {name!r} is missing")
            sent = self._sent_arrays[name]
            buffers[name] = _labelled(name, arrays, sent)
            buffer_bytes += sent.nbytes
            if name.endswith("running_var") and buffers[name].min(initial=0.0) < 0.0:
                raise PayloadError(f"buffer {name!r} holds a negative variance")
        return _Reply(message, client, update, buffers, examples, loss, wire_bytes, buffer_bytes)

    def _difference(self, arrays: ArrayRecord, node: int) -> tuple[Update, int]:
        """The update behind an ordinary Flower reply, which holds new weights."""
        missing = [name for name in self.names if name not in arrays]
        if missing:
            raise PayloadError(f"neither a packed update nor new weights: {missing[0]!r} is missing")
        own = {name: tensor.numpy() for name, tensor in self._own.get(node, {}).items()}
        sent = self._sent_arrays | own
        parts = [(_labelled(name, arrays, sent[name]) - sent[name]).reshape(-1) for name in self.names]
        values = torch.from_numpy(np.concatenate(parts))
        if not torch.isfinite(values).all():
            raise PayloadError("the new weights are too far from those sent out")
        return Update(self.names, self.shapes, None, values, "delta"), 4 * self._numel

    def _client(self, node: int, declared: object) -> int:
        """The number a reply is recorded under. A node keeps the first number it goes by, and so does the number."""
        if self.client_of is not None:
            return self.client_of(node)
        client = node
        if declared is not None:
            if not _is_count(declared, 0):
                raise PayloadError(f"declares {wire.PARTITION!r} {shown(declared)}")
            client = declared
        if self._claims.setdefault(client, node) != node:
            raise PayloadError(f"claims to be client {client}, which another node is")
        return client

    def _of(self, reply: _Reply) -> Scenario:
        """The scenario of one client's update, one object for all who take as many steps."""
        steps = self.scenario.training.steps(reply.num_examples)
        return self._scenarios.setdefault(steps, self.scenario.of(reply.num_examples))

    def _hand_out(self, round: int, replies: list[_Reply], most: int) -> None:
        """Give out observations; `most`: local steps of the client that took most."""
        for reply in replies:
            chosen = self.observe is None or self.observe(round, reply.client)
            wanted = self.on_observation is not None and chosen
            if not wanted and not self.remembers:
                continue
            node = EVERYONE if self.aggregated else reply.message.metadata.src_node_id
            own = self._own.get(node)
            observation = Observation(
                round=round,
                client=reply.client,
                scenario=_summed_scenario(self.scenario, most) if self.aggregated else self._of(reply),
                weights=self._sent if own is None else self._sent | own,
                update=reply.update,
                num_examples=reply.num_examples,
                wire_bytes=reply.wire_bytes,
                auxiliary=self.auxiliary,
                buffers={name: torch.from_numpy(value.copy()) for name, value in reply.buffers.items()},
            )
            self.seen(observation, node)
            if wanted and self.on_observation is not None:
                self.on_observation(observation)

    # ------------------------------------------------------------------ what it becomes

    def _aggregate(self, round: int, replies: list[_Reply]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not replies:
            return None, None
        for reply in replies:
            reply.message.content = self._content(reply)
        try:
            given = [reply.message for reply in replies]
            arrays, aggregated = self.strategy.aggregate_train(round + self.earlier, given)
        except AppExitException as error:
            name = type(self.strategy).__name__
            raise RunFailed(f"strategy {name} could not aggregate round {round}: {error}") from error
        if arrays is None:
            return None, aggregated
        return self._finished(arrays, replies, round), aggregated

    def _content(self, reply: _Reply) -> RecordDict:
        """What the wrapped strategy gets of a reply."""
        arrays = self._stepped(reply)
        if self.as_sent and not self.aggregated:
            sent = reply.message.content
            return RecordDict({key: arrays if isinstance(r, ArrayRecord) else r for key, r in sent.items()})
        metrics = LightMetrics({self._weighted_by: reply.num_examples, wire.TRAIN_LOSS: reply.loss})
        return LightRecords({wire.UPDATE: arrays, wire.METRICS: metrics})

    def _stepped(self, reply: _Reply) -> ArrayRecord:
        record: dict[str, Array] = {}
        update = reply.update
        values = update.values.numpy()
        scale = weight_step(self.scenario.training, update.kind)
        if update.indices is None:
            cuts, indices = self._offsets, None
        else:
            indices = update.indices.numpy()
            cuts = np.searchsorted(indices, self._offsets)
        for number, name in enumerate(self.names):
            low, high = cuts[number], cuts[number + 1]
            positions = None if indices is None else indices[low:high] - self._offsets[number]
            record[name] = SteppedArray(self._sent_arrays[name], values[low:high], positions, scale)
        if not self.average_buffers:
            for name, buffer in reply.buffers.items():
                record[name] = HeldArray(buffer)
        return LightArrays(record)

    def _finished(self, arrays: ArrayRecord, replies: list[_Reply], round: int) -> ArrayRecord:
        """The next global model: in the model's order and types, whatever the strategy's arithmetic left."""
        total = sum(reply.num_examples for reply in replies)
        result: dict[str, Tensor] = {}
        for name, sent in self._sent.items():
            if name in arrays:
                value = np.asarray(arrays[name].numpy())
                if value.shape != tuple(sent.shape):
                    raise RunFailed(
                        f"strategy {type(self.strategy).__name__} made {name!r} of shape {tuple(sent.shape)} into "
                        f"{value.shape} in round {round}"
                    )
                result[name] = torch.from_numpy(value.astype(self._sent_arrays[name].dtype, copy=True))
            elif name in self._float_buffers:
                mean = sum(reply.buffers[name] * np.float64(reply.num_examples / total) for reply in replies)
                result[name] = torch.from_numpy(np.asarray(mean, dtype=self._sent_arrays[name].dtype))
            else:  # integer buffers (BatchNorm's counter) and frozen parameters are not sent and stay
                result[name] = sent
        result |= {name: result[kept] for name, kept in self._tied.items()}
        broken = [name for name, value in result.items() if not torch.isfinite(value).all()]
        if broken:
            raise RunFailed(
                f"the global model has NaN or infinite values in {broken[0]!r} after round {round}; "
                "lower 'training.learning_rate'"
            )
        return wire.to_record(result)

    # ------------------------------------------------------------------ what is passed through

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Left to the wrapped strategy, with the same care for the random draw."""
        round = self._number(server_round)
        config[wire.ROUND] = round
        with seeded_sampling(self.seed, round, "sampling.evaluate"):
            return list(self.strategy.configure_evaluate(round, arrays, config, grid))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(self._number(server_round), replies)

    def summary(self) -> None:
        self.strategy.summary()

    def _number(self, server_round: int) -> int:
        return server_round + self.first_round - 1


def _summed(replies: list[_Reply]) -> _Reply:
    """What secure aggregation lets through: the mean of the replies, weighted by their examples, as one reply."""
    total = sum(reply.num_examples for reply in replies)
    shares = [np.float32(reply.num_examples / total) for reply in replies]
    return _Reply(
        message=replies[0].message,
        client=EVERYONE,
        update=_summed_update([reply.update for reply in replies], shares),
        buffers={
            name: sum(
                (share * reply.buffers[name] for share, reply in zip(shares, replies, strict=True)),
                np.zeros_like(first),
            )
            for name, first in replies[0].buffers.items()
        },
        num_examples=total,
        loss=sum(reply.loss * reply.num_examples for reply in replies) / total,
        wire_bytes=sum(reply.wire_bytes for reply in replies),
        buffer_bytes=sum(reply.buffer_bytes for reply in replies),
    )


def _summed_scenario(scenario: Scenario, steps: int) -> Scenario:
    """The scenario of a sum: one batch, of everything that was declared, and the most steps that a client took."""
    alone = {"batch_size": 0, "local_steps": steps, "local_epochs": None}
    training = scenario.training.model_copy(update=alone)
    return dataclasses.replace(scenario, training=training)


def _summed_update(updates: list[Update], shares: list[np.float32]) -> Update:
    first = updates[0]
    total = torch.zeros(first.numel)
    for update, share in zip(updates, shares, strict=True):
        if update.indices is None:
            total += float(share) * update.values
        else:
            total[update.indices] += float(share) * update.values
    if any(update.indices is None for update in updates):
        return Update(first.names, first.shapes, None, total, first.kind)
    union = torch.cat([u.indices for u in updates if u.indices is not None]).unique()
    return Update(first.names, first.shapes, union, total[union], first.kind)


@contextmanager
def seeded_sampling(seed: int, round: int, purpose: str = "sampling") -> Iterator[None]:
    """Seed Python's global generator for the block, and put it back as it was."""
    state = random.getstate()
    random.seed(int(numpy_rng(seed, purpose, round).integers(2**63)))
    try:
        yield
    finally:
        random.setstate(state)


def _all_equal(parts: list[dict[str, Tensor]]) -> bool:
    first = parts[0] if parts else {}
    return all(
        part.keys() == first.keys() and all(torch.equal(part[name], first[name]) for name in first)
        for part in parts
    )


def _exchange(messages: list[Message], offered: ArrayRecord, arrays: ArrayRecord) -> None:
    """Put `arrays` in the place of `offered` in all messages; messages that shared their content still do."""
    exchanged: dict[int, RecordDict] = {}
    for message in messages:
        content = message.content
        if id(content) not in exchanged:
            exchanged[id(content)] = RecordDict(
                {key: arrays if record is offered else record for key, record in content.items()}
            )
        message.content = exchanged[id(content)]


def _only(records: RecordDict, kind: type[Any]) -> Any:
    found = [record for record in records.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise PayloadError(f"reply holds {len(found)} {kind.__name__}s, expected one")
    return found[0]


def _labelled(name: str, arrays: ArrayRecord, sent: NDArray[Any]) -> NDArray[Any]:
    try:
        return wire.read_dense(arrays[name], sent.shape, str(sent.dtype))
    except PayloadError as error:
        raise PayloadError(f"{name!r}: {error}") from None


def _is_count(value: object, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_EXAMPLES


def _examples(metrics: MetricRecord, key: str, most: int) -> int:
    value = metrics.get(key)
    if not _is_count(value, 1) or value > most:
        raise PayloadError(f"declares {key!r} {shown(value)}, expected 1 to {most}")
    return value


def _loss(metrics: MetricRecord) -> float:
    value = metrics.get(wire.TRAIN_LOSS, metrics.get("loss", 0.0))
    numeric = isinstance(value, float) or _is_count(value, -MAX_EXAMPLES)
    if not numeric or not math.isfinite(value):
        raise PayloadError(f"declares {wire.TRAIN_LOSS!r} {shown(value)}, expected a finite number")
    return float(value)
