"""Hostile replies, as real messages through grid and strategy: each rejected with a reason, and the round goes on."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from rigged_clients import rigged

from fedattack.compression import Sparse, decode, encode
from fedattack.compression.carrier import to_array
from fedattack.config import Config
from fedattack.data import World, build_world
from simulations.client_app import Workplace
from simulations.engine.federation import FederationResult, run_federation
from simulations.engine.local_grid import InlineGrid
from strategies.messages import METRICS, NUM_EXAMPLES, PACKED, PARTITION, TRAIN_LOSS, UPDATE

HOSTILE = 2

SETTINGS = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": 4,
    "rounds": 2,
    "compressor": "topk",
    "compression": 0.01,
    "engine": "inline",
    "limit": 120,
}
CONFIG = Config.from_mapping(SETTINGS)
HEADER = struct.Struct("<4sBBBBQQ")


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(CONFIG)


def federation(
    world: World, reply: Callable[[Message, Message], Message], config: Config
) -> FederationResult:
    def meddle(message: Message, honest: Message, client: int, round: int) -> Message:
        return reply(message, honest) if client == HOSTILE else honest

    grid = InlineGrid(Workplace.of(config, world), rigged(meddle))
    try:
        return run_federation(config, world, grid=grid)
    finally:
        grid.close()


@pytest.fixture(scope="module")
def without(world: World) -> FederationResult:
    """The same federation, in which the hostile client does nothing but fail."""
    return federation(world, lambda message, honest: Message(Error(0, "away"), reply_to=message), CONFIG)


def payload_of(honest: Message) -> bytes:
    data: bytes = honest.content[UPDATE][PACKED].data
    return data


def sparse(honest: Message, numel: int) -> Sparse:
    update = decode(payload_of(honest), ["all"], [(numel,)], "gradient", CONFIG.compression, 1)
    assert update.indices is not None
    return Sparse(update.indices.numpy().copy(), update.values.numpy().copy(), numel)


def sealed(payload: bytes) -> bytes:
    """The payload with a checksum that fits."""
    start, end = HEADER.size, HEADER.size + 4
    crc = zlib.crc32(payload[end:], zlib.crc32(payload[:start]))
    return payload[:start] + struct.pack("<I", crc) + payload[end:]


def with_payload(change: Callable[[Message, int], bytes]) -> Callable[[Message, Message], Message]:
    def reply(message: Message, honest: Message) -> Message:
        numel = honest.content[UPDATE][PACKED].shape[0]
        honest.content[UPDATE][PACKED] = to_array(change(honest, numel), numel)
        return honest

    return reply


def values(number: float) -> Callable[[Message, int], bytes]:
    def change(honest: Message, numel: int) -> bytes:
        packet = sparse(honest, numel)
        packet.values[0] = number
        return encode(packet)

    return change


def declared(numel: int | None, count: int | None) -> Callable[[Message, int], bytes]:
    """Other numbers in the header than the body has, under a checksum that fits."""

    def change(honest: Message, own: int) -> bytes:
        payload = payload_of(honest)
        fields = list(HEADER.unpack_from(payload))
        fields[5] = fields[5] if numel is None else numel
        fields[6] = fields[6] if count is None else count
        return sealed(HEADER.pack(*fields) + payload[HEADER.size :])

    return change


def other_model(honest: Message, numel: int) -> bytes:
    packet = sparse(honest, numel)
    return encode(Sparse(packet.indices, packet.values, numel + 1000))


def out_of_range(honest: Message, numel: int) -> bytes:
    """Positions of a larger model, in a body of the right length that claims to be of ours."""
    packet = sparse(honest, numel)
    packet.indices[-1] = numel
    return encode(Sparse(packet.indices, packet.values, numel))


def duplicates(honest: Message, numel: int) -> bytes:
    packet = sparse(honest, numel)
    packet.indices[1] = packet.indices[0]
    return encode(packet)


def metrics(**entries: object) -> Callable[[Message, Message], Message]:
    def reply(message: Message, honest: Message) -> Message:
        record = dict(honest.content[METRICS].items()) | entries
        honest.content[METRICS] = MetricRecord({k: v for k, v in record.items() if v is not None})
        return honest

    return reply


def records(change: Callable[[RecordDict], None]) -> Callable[[Message, Message], Message]:
    def reply(message: Message, honest: Message) -> Message:
        change(honest.content)
        return honest

    return reply


def npy(shape: tuple[int, ...], body: bytes) -> Array:
    """A dense array whose header says `shape` and whose body is `body`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return Array("float32", shape, "numpy.ndarray", stream.getvalue() + body)


def dense_reply(change: Callable[[ArrayRecord], None]) -> Callable[[Message, Message], Message]:
    """New weights, as an ordinary Flower client sends them, with one thing wrong."""

    def reply(message: Message, honest: Message) -> Message:
        arrays = ArrayRecord(
            {name: Array(array.numpy()) for name, array in message.content["arrays"].items()}
        )
        change(arrays)
        honest.content[UPDATE] = arrays
        return honest

    return reply


CASES = {
    "NaN": (with_payload(values(float("nan"))), "NaN or infinite"),
    "infinity": (with_payload(values(float("-inf"))), "NaN or infinite"),
    "an entry without measure": (with_payload(values(3e38)), "would leave the range of the weights"),
    "another model's shape": (with_payload(other_model), r"declares \d+ entries, the model has"),
    "index out of range": (with_payload(out_of_range), "position"),
    "duplicate indices": (with_payload(duplicates), "position"),
    "truncated": (with_payload(lambda honest, n: payload_of(honest)[:-7]), "bytes"),
    "truncated in the header": (
        with_payload(lambda honest, n: payload_of(honest)[:9]),
        "fewer than the header",
    ),
    "empty": (with_payload(lambda honest, n: b""), "0 bytes"),
    "a billion entries declared": (with_payload(declared(None, 10**9)), "declares 1000000000 entries"),
    "a billion parameters declared": (with_payload(declared(10**9, None)), "declares 1000000000 entries"),
    "2**64 - 1 of both": (with_payload(declared(2**64 - 1, 2**64 - 1)), "entries"),
    "damaged": (with_payload(lambda h, n: payload_of(h)[:-1] + bytes([payload_of(h)[-1] ^ 1])), "checksum"),
    "too many entries": (
        with_payload(lambda h, n: encode(Sparse(np.arange(n // 2), np.ones(n // 2, np.float32), n))),
        "agreed",
    ),
    "longer than any honest reply": (with_payload(lambda honest, n: bytes(10**8)), "no honest one has more"),
    "text for a number": (metrics(**{NUM_EXAMPLES: [1, 2]}), "declares 'num-examples'"),
    "no examples": (metrics(**{NUM_EXAMPLES: 0}), "declares 'num-examples' 0"),
    "more examples than can be": (metrics(**{NUM_EXAMPLES: 2**40}), "declares 'num-examples'"),
    "more examples than it has": (metrics(**{NUM_EXAMPLES: 2**31 - 1}), "2147483647, expected 1 to "),
    "a number that cannot be written out": (metrics(**{NUM_EXAMPLES: 10**5000}), "a number of 16610 bits"),
    "a loss of a thousand digits": (metrics(**{TRAIN_LOSS: 10**1000}), "a number of 3322 bits"),
    "examples left out": (metrics(**{NUM_EXAMPLES: None}), "declares 'num-examples' None"),
    "NaN loss": (metrics(**{TRAIN_LOSS: float("nan")}), "declares 'train_loss' nan"),
    "no metrics": (records(lambda content: content.pop(METRICS)), "0 MetricRecords"),
    "no arrays": (records(lambda content: content.pop(UPDATE)), "0 ArrayRecords"),
    "two array records": (
        records(lambda content: content.__setitem__("more", ArrayRecord())),
        "2 ArrayRecords",
    ),
    "nothing": (
        lambda message, honest: Message(RecordDict({"x": ConfigRecord()}), reply_to=message),
        "ArrayRecords",
    ),
    "an unknown array": (
        records(lambda content: content[UPDATE].__setitem__("../x", Array(np.zeros(3, np.float32)))),
        "unknown array '../x'",
    ),
    "dense weights with NaN": (
        dense_reply(lambda a: a.__setitem__("head.bias", Array(np.full(10, np.nan, np.float32)))),
        "'head.bias': an array holds NaN",
    ),
    "dense weights of another shape": (
        dense_reply(lambda a: a.__setitem__("head.bias", Array(np.zeros((1, 10), np.float32)))),
        r"'head.bias': an array of shape \(1, 10\)",
    ),
    "dense weights of another type": (
        dense_reply(lambda a: a.__setitem__("head.bias", Array(np.zeros(10, np.float64)))),
        "type float64",
    ),
    "dense weights that need unpickling": (
        dense_reply(
            lambda a: a.__setitem__("head.bias", Array("object", (10,), "numpy.ndarray", pickled_npy()))
        ),
        r"type '\|O'",
    ),
    "a billion dense weights declared": (
        dense_reply(lambda a: a.__setitem__("head.bias", npy((10**9,), b"\0" * 40))),
        r"shape \(1000000000,\)",
    ),
    "a dense body that lacks": (
        dense_reply(lambda a: a.__setitem__("head.bias", npy((10,), b"\0" * 36))),
        "declares 40 bytes and brings 36",
    ),
    "dense weights without a header": (
        dense_reply(
            lambda a: a.__setitem__("head.bias", Array("float32", (10,), "numpy.ndarray", b"x" * 40))
        ),
        "not readable as npy",
    ),
    "a dense weight missing": (dense_reply(lambda a: a.__delitem__("head.bias")), "'head.bias' is missing"),
}


def pickled_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([print] * 10, dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_reply_is_rejected_and_the_round_goes_on(
    case: str, world: World, without: FederationResult, caplog: pytest.LogCaptureFixture
) -> None:
    reply, reason = CASES[case]
    tracemalloc.start()
    try:
        result = federation(world, reply, CONFIG)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (50e6 if case != "longer than any honest reply" else 200e6)
    for record in result.rounds:
        assert record.clients == (0, 1, 3)
        assert [client for client, _ in record.rejected] == [HOSTILE]
        assert record.failed == ()
        assert re.search(reason, record.rejected[0][1]), record.rejected[0][1]
        assert f"round {record.round}: reply of client {HOSTILE} rejected: " in caplog.text
    assert [(r, c) for r, c, _ in result.rejections] == [(1, HOSTILE), (2, HOSTILE)]
    for name, tensor in without.weights.items():
        assert torch.equal(result.weights[name], tensor), name


def all_zero(honest: Message, numel: int) -> bytes:
    packet = sparse(honest, numel)
    return encode(Sparse(packet.indices, np.zeros_like(packet.values), numel))


@pytest.mark.parametrize(
    "reply",
    [with_payload(all_zero), metrics(**{NUM_EXAMPLES: 1}), with_payload(values(1e31))],
    ids=["all zero", "a false count", "an entry that ruins the model"],
)
def test_an_odd_reply_that_is_valid_does_not_end_the_run(
    world: World, reply: Callable[[Message, Message], Message]
) -> None:
    result = federation(world, reply, CONFIG)
    assert [record.round for record in result.rounds] == [1, 2]
    assert HOSTILE in result.rounds[0].clients
    assert all(torch.isfinite(tensor).all() for tensor in result.weights.values())


def test_if_every_reply_is_rejected_the_weights_stay(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def meddle(message: Message, honest: Message, client: int, round: int) -> Message:
        return with_payload(values(float("nan")))(message, honest)

    grid = InlineGrid(Workplace.of(CONFIG, world), rigged(meddle))
    weights: list[dict[str, torch.Tensor]] = []
    result = run_federation(CONFIG, world, grid=grid, on_weights=lambda r, w: weights.append(w))
    grid.close()
    assert [r.aggregated for r in result.rounds] == [False, False]
    assert [r.clients for r in result.rounds] == [(), ()]
    assert [r.train_loss for r in result.rounds] == [None, None]
    assert len(result.rejections) == 8
    assert "no reply was accepted; the weights stay as they were" in caplog.text
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_hostile_batch_norm_buffers_are_rejected() -> None:
    config = Config.from_mapping(SETTINGS | {"model": "rigged_models:batch_norm_net", "rounds": 1})
    world = build_world(config)
    for change, reason in (
        (lambda a: a.__setitem__("1.running_var", Array(np.full(4, -1.0, np.float32))), "negative variance"),
        (lambda a: a.__setitem__("1.running_mean", Array(np.full(4, np.inf, np.float32))), "NaN or infinite"),
        (lambda a: a.__setitem__("1.running_mean", Array(np.zeros(5, np.float32))), "shape"),
        (lambda a: a.__delitem__("1.running_mean"), "'1.running_mean' is missing"),
        (lambda a: a.__setitem__("1.num_batches_tracked", Array(np.ones((), np.int64))), None),
    ):
        result = federation(world, records(lambda content, change=change: change(content[UPDATE])), config)
        rejected = result.rounds[0].rejected
        if reason is None:
            assert rejected == ()
        else:
            assert [client for client, _ in rejected] == [HOSTILE]
            assert reason in rejected[0][1]


def test_what_a_client_says_it_is_counts_for_nothing_here(world: World) -> None:
    """The grid knows whose reply it is; a claim to be client 0 neither hides nor replaces anybody."""
    result = federation(world, metrics(**{PARTITION: 0}), CONFIG)
    assert [r.clients for r in result.rounds] == [(0, 1, 2, 3)] * 2
