"""The wire: round trips, exact sizes, and payloads from people who mean harm."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedattack.compression import (
    Dense,
    Memory,
    Quantised,
    QuantisedSparse,
    Signs,
    Sparse,
    build_compressor,
    decode,
    encode,
)
from fedattack.compression.carrier import STYPE, from_array, to_array
from fedattack.compression.coding import (
    pack_fields,
    pack_positions,
    packed_size,
    positions_size,
    unpack_fields,
    unpack_positions,
)
from fedattack.compression.wire import HEADER_BYTES
from fedattack.config import CompressionConfig
from fedattack.errors import PayloadError

NAMES, SHAPES, SIZES = ["w", "b", "v"], [(20, 31), (7,), (11, 5, 5)], [620, 7, 275]
NUMEL = sum(SIZES)
SETTINGS = {
    "none": {"name": "none"},
    "topk": {"name": "topk", "rate": 0.05},
    "topk-one": {"name": "topk", "rate": 1e-9},
    "topk-all": {"name": "topk", "rate": 1.0},
    "topk-layer": {"name": "topk", "rate": 0.05, "scope": "layer"},
    "randomk": {"name": "randomk", "rate": 0.3},
    "sign": {"name": "sign"},
    "qsgd": {"name": "qsgd"},
    "qsgd-l2": {"name": "qsgd", "levels": 5, "norm": "l2"},
    "qsgd-ternary": {"name": "qsgd", "levels": 1},
    "topk-qsgd": {"name": "topk-qsgd", "rate": 0.05},
    "topk-qsgd-layer": {"name": "topk-qsgd", "rate": 0.1, "scope": "layer", "levels": 5, "norm": "l2"},
    "dgc": {"name": "dgc", "rate": 0.01, "warmup_rounds": 3},
}


def sample(key: str, seed: int = 0):
    config = CompressionConfig(**SETTINGS[key])
    compressor = build_compressor(config, NAMES, SHAPES)
    generator = torch.Generator().manual_seed(seed)
    update = {n: torch.randn(s, generator=generator) for n, s in zip(NAMES, SHAPES, strict=True)}
    packet, _ = compressor.compress(update, Memory(), 2, generator)
    return config, packet


def read(payload: bytes, config: CompressionConfig, number: int = 2):
    return decode(payload, NAMES, SHAPES, "gradient", config, number)


def seal(payload: bytes) -> bytes:
    """The payload with a checksum that fits: an attacker can compute it too."""
    crc = zlib.crc32(payload[28:], zlib.crc32(payload[:24]))
    return payload[:24] + struct.pack("<I", crc) + payload[28:]


@pytest.mark.parametrize("key", SETTINGS)
def test_round_trip_is_exact(key):
    config, packet = sample(key)
    payload = encode(packet)
    update = read(payload, config)
    assert update.numel == NUMEL
    assert update.kind == "gradient"
    assert update.values.dtype == torch.float32
    dense = torch.cat([update.dense()[name].reshape(-1) for name in NAMES]).numpy()
    assert dense.tobytes() == packet.dense(SIZES).tobytes()
    if isinstance(packet, Sparse | QuantisedSparse):
        assert update.indices is not None
        np.testing.assert_array_equal(update.indices.numpy(), packet.indices)
    else:
        assert update.indices is None
    assert encode(packet) == payload


@pytest.mark.parametrize("seed", range(60))
def test_positions_round_trip(seed):
    rng = np.random.default_rng(seed)
    numel = int(10 ** rng.uniform(0, 6))
    count = max(1, int(numel * rng.random() ** 3))
    positions = np.sort(rng.choice(numel, count, replace=False)).astype(np.int64)
    if seed % 5 == 0:
        positions = np.arange(count) + (numel - count) * (seed % 2)  # one run, at either end
    data = pack_positions(positions, numel)
    assert len(data) == positions_size(numel, count)
    assert 8 * len(data) <= count * (2 + np.log2(numel / count)) + 8 * 17  # Elias-Fano bound, and the padding
    np.testing.assert_array_equal(unpack_positions(memoryview(data), numel, count), positions)


def test_positions_of_a_universe_beyond_32_bits():
    numel = 2**40 + 3
    positions = np.array([0, 1, 0xAB_CDEF_0123, 2**40 + 2])
    data = pack_positions(positions, numel)
    np.testing.assert_array_equal(unpack_positions(memoryview(data), numel, 4), positions)


@pytest.mark.parametrize(
    ("numel", "count", "size"), [(16, 4, 1 + 2), (17, 4, 2 + 2), (1, 1, 1), (256 * 9, 9, 9 + 3)]
)
def test_bytes_of_positions(numel, count, size):
    """A bitmap of count + ((numel - 1) >> l) + 1 bits, and l bits a position in groups of eight."""
    assert positions_size(numel, count) == size
    assert len(pack_positions(np.arange(count), numel)) == size


@pytest.mark.parametrize("width", range(9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1001])
def test_fields_round_trip(width, count):
    fields = np.random.default_rng(width).integers(0, 2**width, count).astype(np.uint8)
    data = pack_fields(fields, width)
    assert len(data) == packed_size(count, width)
    np.testing.assert_array_equal(unpack_fields(memoryview(data), count, width), fields)


def test_bytes_of_the_published_lenet_at_a_thousandth():
    shapes = [(12, 3, 5, 5), (12,), (12, 12, 5, 5), (12,), (12, 12, 5, 5), (12,), (10_177, 768), (10_177,)]
    names = [str(number) for number in range(8)]
    config = CompressionConfig(name="topk", rate=0.001)
    compressor = build_compressor(config, names, shapes)
    numel, kept = 7_834_249, 7_834
    assert compressor.numel == numel
    assert compressor.quotas(1)[0].kept == kept
    rng = np.random.default_rng(0)
    indices = np.sort(rng.choice(numel, kept, replace=False))
    values = rng.standard_normal(kept).astype(np.float32)
    payload = encode(Sparse(indices, values, numel))
    entropy = (
        numel * (-0.001 * np.log2(0.001) - 0.999 * np.log2(0.999)) / 8
    )  # bytes no position code can beat
    assert 4 * kept + entropy < len(payload) <= 5.5 * kept
    update = decode(payload, names, shapes, "gradient", config, 1)
    np.testing.assert_array_equal(update.indices.numpy(), indices)
    np.testing.assert_array_equal(update.values.numpy(), values)


def test_bytes_of_the_other_codecs():
    assert len(encode(sample("none")[1])) == HEADER_BYTES + 4 * NUMEL
    assert len(encode(sample("sign")[1])) == HEADER_BYTES + 4 * 3 + -(-NUMEL // 8)
    assert len(encode(sample("qsgd")[1])) == HEADER_BYTES + 4 * 3 + 8 * -(-NUMEL // 8)
    positions = positions_size(NUMEL, 45)
    assert len(encode(sample("topk-qsgd")[1])) == HEADER_BYTES + positions + 4 * 3 + 8 * -(-45 // 8)
    assert len(encode(sample("qsgd-ternary")[1])) == HEADER_BYTES + 4 * 3 + 2 * -(-NUMEL // 8)


def header(**changes) -> bytes:
    """Header of a top-k payload with some fields changed, and the body of the honest one."""
    fields = {"magic": b"FAUP", "version": 1, "codec": 1, "levels": 0, "zero": 0, "numel": NUMEL, "count": 45}
    payload = encode(sample("topk")[1])
    start = struct.pack("<4sBBBBQQ", *(fields | changes).values())
    return seal(start + payload[24:])


def test_codecs_keep_their_numbers():
    """Updates on disk are read by later versions."""
    keys = ("none", "topk", "sign", "qsgd", "topk-qsgd")
    assert [encode(sample(key)[1])[:6] for key in keys] == [b"FAUP\1" + bytes([n]) for n in range(5)]


def test_the_header_helper_is_the_honest_header():
    assert header() == encode(sample("topk")[1])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "0 bytes, fewer than the header"),
        (b"FAUP", "4 bytes, fewer"),
        (header()[:27], "27 bytes, fewer than the header's 28"),
        (header()[:28], r"28 bytes, \d+ expected"),
        ("text", "payload is str, expected bytes"),
        (None, "payload is NoneType"),
        (header(magic=b"PK\x03\x04"), "not with b'FAUP' version 1"),
        (header(version=2), "not with b'FAUP' version 1"),
        (header(zero=1), r"starts with b'FAUP\\x01\\x01\\x00\\x01', not with b'FAUP' version 1"),
        (header(codec=0), "codec dense, agreed is sparse"),
        (header(codec=9), "codec number 9, agreed is sparse"),
        (header(numel=NUMEL + 1), "declares 903 entries, the model has 902"),
        (header(numel=2**64 - 1), "the model has 902"),
        (header(count=10**9), "declares 1000000000 entries sent, agreed are 45 of 902"),
        (header(count=44), "declares 44 entries sent, agreed are 45 of 902"),
        (header(count=0), "declares 0 entries sent"),
        (header(levels=1), "declares 1 levels"),
        (header() + b"\0", "bytes, .* expected for 45 of 902"),
        (header()[:-1], "bytes, .* expected for 45 of 902"),
        (header()[:-1] + b"\x7f", "checksum"),
    ],
)
def test_malformed_payloads_are_rejected_with_the_reason(payload, reason):
    with pytest.raises(PayloadError, match=reason):
        read(payload, sample("topk")[0])


def forged(indices, values=None, numel=NUMEL) -> bytes:
    indices = np.asarray(indices)
    values = np.ones(indices.size, np.float32) if values is None else np.asarray(values, np.float32)
    return encode(Sparse(indices, values, numel))


def test_positions_must_increase_and_stay_inside():
    config = CompressionConfig(name="topk", rate=3 / NUMEL)
    assert read(forged([5, 6, 901]), config).kept == 3
    with pytest.raises(PayloadError, match="not strictly increasing"):
        read(forged([5, 5, 900]), config)
    with pytest.raises(PayloadError, match="not strictly increasing"):
        read(forged([6, 5, 900]), config)
    with pytest.raises(PayloadError, match=r"position 902 is out of range for 902 entries"):
        read(forged([5, 6, 902]), config)
    bitmap = bytearray(forged([5, 6, 901]))
    bitmap[-13] |= 0x40  # one more position in the bitmap, before three float32
    with pytest.raises(PayloadError, match="bitmap is malformed: 4 positions set, 3 declared"):
        read(seal(bytes(bitmap)), config)


def test_per_layer_counts_are_checked():
    config, packet = sample("topk-layer")
    indices = packet.indices.copy()
    free = next(i for i in range(620) if i not in indices)
    indices = np.sort(np.append(indices[:-1], free))  # one entry too many in "w", one too few in "v"
    with pytest.raises(PayloadError, match=r"32 entries sent of \[0, 620\), agreed are 31"):
        read(encode(Sparse(indices, packet.values, NUMEL)), config)


def test_a_compressor_may_leave_the_number_open_but_nothing_is_no_update(monkeypatch):
    monkeypatch.setattr("fedattack.compression.compressors.Sparsifier.quotas", lambda self, round: None)
    config = sample("topk")[0]
    for kept in (1, 45, NUMEL):
        assert read(forged(range(kept)), config).kept == kept
    for count in (0, NUMEL + 1):
        with pytest.raises(PayloadError, match=f"declares {count} entries sent"):
            read(header(count=count), config)


def test_warm_up_count_depends_on_the_round():
    config, packet = sample("dgc")
    assert read(encode(packet), config, number=2).kept == packet.values.size
    with pytest.raises(PayloadError, match="agreed are"):
        read(encode(packet), config, number=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_and_scales_must_be_finite(bad):
    with pytest.raises(PayloadError, match="NaN or infinite"):
        read(forged([1], [bad]), CompressionConfig(name="topk", rate=1 / NUMEL))
    values = np.zeros(NUMEL, np.float32)
    values[7] = bad
    with pytest.raises(PayloadError, match="NaN or infinite"):
        read(encode(Dense(values)), CompressionConfig(name="none"))
    scales = np.array([1, bad, 1], np.float32)
    with pytest.raises(PayloadError, match="NaN or infinite"):
        read(encode(Signs(np.ones(NUMEL, bool), scales)), CompressionConfig(name="sign"))
    with pytest.raises(PayloadError, match="NaN or infinite"):
        read(encode(Quantised(np.ones(NUMEL, np.int8), scales, 127)), CompressionConfig(name="qsgd"))


def test_scales_steps_and_levels_are_checked():
    ones, steps = np.ones(NUMEL, bool), np.ones(NUMEL, np.int8)
    with pytest.raises(PayloadError, match="negative scale"):
        read(encode(Signs(ones, np.array([1, -1, 1], np.float32))), CompressionConfig(name="sign"))
    good = np.ones(3, np.float32)
    with pytest.raises(PayloadError, match="declares 100 levels, agreed are 127"):
        read(encode(Quantised(steps, good, 100)), CompressionConfig(name="qsgd"))
    steps[3] = 7  # step + levels = 12 fits into four bits but is beyond 2 * 5
    with pytest.raises(PayloadError, match="step 7, agreed are at most 5"):
        read(encode(Quantised(steps, good, 5)), CompressionConfig(name="qsgd", levels=5))


def test_ten_to_the_nine_declared_entries_allocate_nothing():
    config = CompressionConfig(name="topk", rate=0.001)
    names, shapes = ["w"], [(10**9 // 10, 10)]
    start = struct.pack("<4sBBBBQQ", b"FAUP", 1, 1, 0, 0, 10**9, 10**6)
    for codec, numel, count in [(1, 10**9, 10**6), (1, 10**9, 10**9), (0, 10**9, 10**9)]:
        start = struct.pack("<4sBBBBQQ", b"FAUP", 1, codec, 0, 0, numel, count)
        payload = seal(start + b"\0\0\0\0" + b"body" * 50)
        chosen = config if codec else CompressionConfig(name="none")
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError):
                decode(payload, names, shapes, "gradient", chosen, 1)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100_000


@pytest.mark.parametrize("key", SETTINGS)
def test_fuzz(key):
    """Mutated payloads, with checksums that fit, are rejected or are the canonical form of a valid update."""
    config, packet = sample(key)
    honest = encode(packet)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    rejected = accepted = 0
    tracemalloc.start()
    try:
        for _ in range(250):
            data = bytearray(honest)
            for _ in range(rng.integers(1, 4)):
                kind = rng.integers(5)
                place = int(rng.integers(len(data))) if data else 0
                if kind == 0 and data:
                    data[place] ^= 1 << int(rng.integers(8))
                elif kind == 1 and data:
                    data[place] = int(rng.integers(256))
                elif kind == 2:
                    del data[place : place + int(rng.integers(1, 40))]
                elif kind == 3:
                    data[place:place] = rng.bytes(int(rng.integers(1, 40)))
                else:
                    end = min(len(data), place + int(rng.integers(1, 16)))
                    data[place:end] = rng.bytes(end - place)
            payload = seal(bytes(data)) if rng.random() < 0.9 and len(data) >= 28 else bytes(data)
            try:
                update = read(payload, config)
            except PayloadError:
                rejected += 1
                continue
            accepted += 1
            assert torch.isfinite(update.values).all()
            if update.indices is not None:
                assert (update.indices.diff() > 0).all()
                assert update.indices[0] >= 0
                assert update.indices[-1] < NUMEL
                if isinstance(packet, Sparse):
                    assert encode(Sparse(update.indices.numpy(), update.values.numpy(), NUMEL)) == payload
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rejected > 50
    assert accepted > 0
    assert peak < 64 * NUMEL + 200_000


def test_every_truncation_is_rejected():
    for key in ("topk", "sign", "qsgd-l2", "topk-qsgd"):
        config, packet = sample(key)
        payload = encode(packet)
        for length in range(len(payload)):
            with pytest.raises(PayloadError):
                read(payload[:length], config)


def test_random_bytes_are_rejected():
    rng = np.random.default_rng(0)
    config = sample("topk")[0]
    for length in (0, 1, 27, 28, 29, 100, 1000):
        with pytest.raises(PayloadError):
            read(rng.bytes(length), config)
        with pytest.raises(PayloadError):
            read(b"FAUP" + rng.bytes(length), config)


def test_carrier_round_trip_through_flowers_own_serialisation():
    config, packet = sample("topk")
    record = ArrayRecord({"update": to_array(encode(packet), NUMEL)})
    array = record["update"]
    shipped = Array.inflate(array.deflate(), dict(array.children))
    assert shipped.stype == STYPE
    assert shipped.shape == (NUMEL,)
    assert from_array(shipped) == encode(packet)
    with pytest.raises(TypeError):  # a strategy that forgets to decode cannot average it
        shipped.numpy()
    assert read(from_array(shipped), config).kept == 45


def test_carrier_rejects_other_arrays():
    with pytest.raises(PayloadError, match=r"type 'numpy.ndarray', expected 'fedattack.update'"):
        from_array(Array(np.zeros(3, np.float32)))
    with pytest.raises(PayloadError, match="type 'bytes'"):
        from_array(b"abc")
