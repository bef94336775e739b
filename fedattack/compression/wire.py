"""Updates as bytes. Decoding trusts nothing: every length follows from what was agreed, and is compared first.

Layout, little-endian: magic ``FAUP``, version, codec, levels, a zero byte, number of entries (u64), number of entries
sent (u64), CRC-32 of all other bytes; then the body:

========= =====================================================================================
dense     float32 values
sparse    positions (Elias-Fano, :mod:`fedattack.compression.coding`), then float32 values
signs     a float32 scale per tensor, then one bit an entry
quantised a float32 scale per tensor, then ``step + levels`` in ``ceil(log2(2 levels + 1))`` bits
========= =====================================================================================

A quantised-sparse body is the positions of a sparse one, then a quantised one of the entries sent.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedattack.compression.coding import (
    pack_fields,
    pack_positions,
    packed_size,
    positions_size,
    unpack_fields,
    unpack_positions,
)
from fedattack.compression.packets import Dense, Packet, Quantised, QuantisedSparse, Signs, Sparse
from fedattack.compression.registry import build_compressor
from fedattack.compression.selection import Quota
from fedattack.config import CompressionConfig
from fedattack.errors import PayloadError
from fedattack.observation import Update, UpdateKind

MAGIC = b"FAUP"
VERSION = 1
CODECS = {"dense": 0, "sparse": 1, "signs": 2, "quantised": 3, "quantised-sparse": 4}
_SPARSE = ("sparse", "quantised-sparse")
_LEVELLED = ("quantised", "quantised-sparse")
_HEADER = struct.Struct("<4sBBBBQQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


def encode(packet: Packet) -> bytes:
    """Bytes of a packet; the same packet always gives the same bytes."""
    match packet:
        case Dense(values):
            codec, count, levels, body = "dense", values.size, 0, [_floats(values)]
        case Sparse(indices, values, numel):
            codec, count, levels = "sparse", indices.size, 0
            body = [pack_positions(indices, numel), _floats(values)]
        case Signs(positive, scales):
            codec, count, levels = "signs", positive.size, 0
            body = [_floats(scales), pack_fields(positive.view(np.uint8), 1)]
        case Quantised(steps, scales, levels):
            codec, count, body = "quantised", steps.size, _steps(steps, scales, levels)
        case QuantisedSparse(indices, steps, scales, levels, numel):
            codec, count = "quantised-sparse", indices.size
            body = [pack_positions(indices, numel), *_steps(steps, scales, levels)]
    header = _HEADER.pack(MAGIC, VERSION, CODECS[codec], levels, 0, packet.numel, count)
    crc = zlib.crc32(header)
    for part in body:
        crc = zlib.crc32(part, crc)
    return b"".join([header, _CRC.pack(crc), *body])


def decode(
    payload: bytes,
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    kind: UpdateKind,
    config: CompressionConfig,
    round: int,
) -> Update:
    """The update in a client's bytes, sparse where it came sparse; values finite, float32, on the CPU.

    `names`, `shapes`, `kind`, `config` and the 1-based `round` are what was agreed: codec, number of entries (in all,
    or in each tensor) and levels must match. Raises PayloadError if anything does not. Nothing is allocated beyond
    the order of the payload's own length and, for dense, sign and quantised updates, the model's.
    """
    compressor = build_compressor(config, names, shapes)
    packet = _parse(payload, compressor.codec, compressor.sizes, compressor.quotas(round), config.levels)
    if isinstance(packet, QuantisedSparse):
        packet = packet.sparse(compressor.sizes)
    if isinstance(packet, Sparse):
        indices, values = torch.from_numpy(packet.indices), packet.values
    else:
        indices, values = None, packet.dense(compressor.sizes)
    return Update(compressor.names, compressor.shapes, indices, torch.from_numpy(values), kind)


def _parse(payload: bytes, codec: str, sizes: list[int], quotas: list[Quota] | None, levels: int) -> Packet:
    if not isinstance(payload, bytes | bytearray):
        raise PayloadError(f"payload is {type(payload).__name__}, expected bytes")
    data = memoryview(payload)
    if len(data) < HEADER_BYTES:
        raise PayloadError(f"payload has {len(data)} bytes, fewer than the header's {HEADER_BYTES}")
    magic, version, code, declared_levels, reserved, numel, count = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or reserved != 0:
        raise PayloadError(f"payload starts with {bytes(data[:8])!r}, not with {MAGIC!r} version {VERSION}")
    if code != CODECS[codec]:
        sent = next((name for name, number in CODECS.items() if number == code), f"number {code}")
        raise PayloadError(f"payload has codec {sent}, agreed is {codec}")
    if numel != sum(sizes):
        raise PayloadError(f"payload declares {numel} entries, the model has {sum(sizes)}")
    if codec not in _SPARSE:
        agreed = numel
    else:
        agreed = count if quotas is None else sum(quota.kept for quota in quotas)
    if count != agreed or not 1 <= count <= numel:
        raise PayloadError(f"payload declares {count} entries sent, agreed are {agreed} of {numel}")
    if declared_levels != (levels if codec in _LEVELLED else 0):
        raise PayloadError(f"payload declares {declared_levels} levels, agreed are {levels}")
    expected = HEADER_BYTES + _body_size(codec, numel, count, len(sizes), levels)
    if len(data) != expected:
        raise PayloadError(
            f"payload has {len(data)} bytes, {expected} expected for {count} of {numel} entries"
        )
    body = data[HEADER_BYTES:]
    crc = zlib.crc32(body, zlib.crc32(data[: _HEADER.size]))
    if crc != _CRC.unpack_from(data, _HEADER.size)[0]:
        raise PayloadError("payload is damaged: its checksum does not match")
    return _read_body(body, codec, sizes, numel, count, quotas, levels)


def _read_body(
    body: memoryview,
    codec: str,
    sizes: list[int],
    numel: int,
    count: int,
    quotas: list[Quota] | None,
    levels: int,
) -> Packet:
    if codec == "dense":
        return Dense(_read_floats(body))
    indices = None
    if codec in _SPARSE:
        middle = positions_size(numel, count)
        indices, body = _read_positions(body[:middle], numel, count, quotas), body[middle:]
        if codec == "sparse":
            return Sparse(indices, _read_floats(body), numel)
    middle = 4 * len(sizes)
    scales = _read_floats(body[:middle])
    if np.signbit(scales).any():
        raise PayloadError("payload holds a negative scale")
    if codec == "signs":
        return Signs(unpack_fields(body[middle:], numel, 1).view(np.bool_), scales)
    fields = unpack_fields(body[middle:], count, _width(levels))
    if fields.max() > 2 * levels:
        raise PayloadError(f"payload holds step {int(fields.max()) - levels}, agreed are at most {levels}")
    steps = (fields.astype(np.int16) - levels).astype(np.int8)
    if indices is None:
        return Quantised(steps, scales, levels)
    return QuantisedSparse(indices, steps, scales, levels, numel)


def _read_positions(
    data: memoryview, numel: int, count: int, quotas: list[Quota] | None
) -> NDArray[np.int64]:
    indices = unpack_positions(data, numel, count)
    for start, stop, agreed in quotas or []:
        low, high = np.searchsorted(indices, [start, stop])
        if high - low != agreed:
            raise PayloadError(f"{high - low} entries sent of [{start}, {stop}), agreed are {agreed}")
    return indices


def _body_size(codec: str, numel: int, count: int, tensors: int, levels: int) -> int:
    if codec == "dense":
        return 4 * numel
    positions = positions_size(numel, count) if codec in _SPARSE else 0
    if codec == "sparse":
        return positions + 4 * count
    return positions + 4 * tensors + packed_size(count, 1 if codec == "signs" else _width(levels))


def _steps(steps: NDArray[np.int8], scales: NDArray[np.float32], levels: int) -> list[bytes]:
    fields = (steps.astype(np.int16) + levels).astype(np.uint8)
    return [_floats(scales), pack_fields(fields, _width(levels))]


def _width(levels: int) -> int:
    return (2 * levels).bit_length()


def _floats(values: NDArray[np.float32]) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _read_floats(data: memoryview) -> NDArray[np.float32]:
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise PayloadError("payload holds NaN or infinite values")
    return values
