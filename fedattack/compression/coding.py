"""Integers as compact bytes: fixed-width fields, and increasing positions in Elias-Fano form.

The length follows from the declared counts alone: a decoder compares it before it allocates anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedattack.errors import PayloadError


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` packed fields of `width` bits: groups of eight fields, `width` bytes each."""
    return -(-count // 8) * width


def pack_fields(fields: NDArray[np.uint8], width: int) -> bytes:
    """Pack n integers (uint8, each below ``2**width``, `width` 0 to 8) into ``packed_size(n, width)`` bytes.

    The last group is filled up with zeros.
    """
    if width == 0:
        return b""
    padded = np.zeros(-(-fields.size // 8) * 8, np.uint8)
    padded[: fields.size] = fields
    if width == 8:
        return padded.tobytes()
    if width == 1:
        return np.packbits(padded, bitorder="little").tobytes()
    groups = padded.reshape(-1, 8)
    words = np.zeros(groups.shape[0], "<u8")  # eight fields of at most seven bits fit one word
    for column in range(8):
        words |= groups[:, column].astype(np.uint64) << np.uint64(column * width)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def unpack_fields(data: memoryview, count: int, width: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_fields`; raises PayloadError if the padding after the last field is not zero."""
    if width == 0:
        return np.zeros(count, np.uint8)
    packed = np.frombuffer(data, np.uint8)
    if width == 8:
        fields = packed
    elif width == 1:
        fields = np.unpackbits(packed, bitorder="little")
    else:
        groups = np.zeros((packed.size // width, 8), np.uint8)
        groups[:, :width] = packed.reshape(-1, width)
        words = groups.reshape(-1).view("<u8")
        mask = np.uint64((1 << width) - 1)
        fields = np.empty((words.size, 8), np.uint8)
        for column in range(8):
            fields[:, column] = (words >> np.uint64(column * width)) & mask
        fields = fields.reshape(-1)
    if fields[count:].any():
        raise PayloadError("bits after the last field are not zero")
    return fields[:count]


def _low_bits(numel: int, count: int) -> int:
    return (numel // count).bit_length() - 1


def _bitmap_bits(numel: int, count: int) -> int:
    return count + ((numel - 1) >> _low_bits(numel, count)) + 1


def positions_size(numel: int, count: int) -> int:
    """Bytes that :func:`pack_positions` needs for `count` of `numel` positions (1 <= count <= numel)."""
    whole, rest = divmod(_low_bits(numel, count), 8)
    return count * whole + packed_size(count, rest) + -(-_bitmap_bits(numel, count) // 8)


def pack_positions(positions: NDArray[np.int64], numel: int) -> bytes:
    """Elias-Fano code of strictly increasing positions in [0, numel): at most ``2 + log2(numel / count)`` bits each.

    The low ``l = floor(log2(numel / count))`` bits of a position are stored as they are; the high part of position
    number i sets bit ``high + i`` of a bitmap (Elias, "Efficient storage and retrieval by content and address of
    static files", JACM 1974; Vigna, "Quasi-succinct indices", WSDM 2013).
    """
    count = positions.size
    low_bits = _low_bits(numel, count)
    whole, rest = divmod(low_bits, 8)
    parts = [(positions >> (8 * byte)).astype(np.uint8).tobytes() for byte in range(whole)]
    parts.append(pack_fields(((positions >> (8 * whole)) & ((1 << rest) - 1)).astype(np.uint8), rest))
    bitmap = np.zeros(_bitmap_bits(numel, count), np.uint8)
    bitmap[(positions >> low_bits) + np.arange(count)] = 1
    parts.append(np.packbits(bitmap, bitorder="little").tobytes())
    return b"".join(parts)


def unpack_positions(data: memoryview, numel: int, count: int) -> NDArray[np.int64]:
    """Inverse of :func:`pack_positions`, for ``positions_size(numel, count)`` bytes from anywhere.

    Raises PayloadError if a position is repeated, out of order or out of range, or the bitmap is malformed.
    """
    low_bits = _low_bits(numel, count)
    whole, rest = divmod(low_bits, 8)
    positions = np.zeros(count, np.int64)
    for byte in range(whole):
        plane = np.frombuffer(data[byte * count : (byte + 1) * count], np.uint8)
        positions |= plane.astype(np.int64) << (8 * byte)
    start, middle = whole * count, whole * count + packed_size(count, rest)
    positions |= unpack_fields(data[start:middle], count, rest).astype(np.int64) << (8 * whole)
    bits = np.unpackbits(np.frombuffer(data[middle:], np.uint8), bitorder="little")
    ones = np.flatnonzero(bits)
    if ones.size != count:
        raise PayloadError(f"position bitmap is malformed: {ones.size} positions set, {count} declared")
    positions |= (ones - np.arange(count)) << low_bits
    if positions[-1] >= numel:  # a bit in the padding ends up here too
        raise PayloadError(f"position {positions[-1]} is out of range for {numel} entries")
    if not (positions[1:] > positions[:-1]).all():
        raise PayloadError("positions are not strictly increasing (repeated or out of order)")
    return positions
