"""What the server's side of the wire makes of bytes that no honest client sends: an update, or one reason."""

from __future__ import annotations

import resource
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray

from fedattack.compression import build_compressor, decode, encode
from fedattack.compression.base import Memory
from fedattack.compression.carrier import to_array
from fedattack.compression.compressors import Compressor
from fedattack.config import CompressionConfig
from fedattack.errors import PayloadError
from fedattack.npy import read_header
from strategies.messages import read_dense

SHAPES = ((16, 9), (16,), (10, 16), (10,))
NAMES = ("a.weight", "a.bias", "b.weight", "b.bias")
CODECS = ("none", "topk", "sign", "qsgd", "topk-qsgd")
SLOW_SECONDS = 1.0
_HEADER = struct.Struct("<4sBBBBQQ")
_SPICE = np.frombuffer(b"'\"(),:<>|=L{}[]0123456789 \n\\OUSVfiubc-_", np.uint8)


def run(quick: bool = False, count: int = 1_000_000) -> dict[str, Any]:
    """`count` mutated payloads over all codecs, and a tenth as many npy headers: all read or refused.

    ``faults``: what was raised that is no PayloadError; ``slow``: those that took more than a second;
    ``memory_mib``: how much more memory the process needed at its highest than before the first.
    """
    count = 2_000 if quick else count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    payloads, headers = fuzz_payloads(count), fuzz_headers(max(1, count // 10))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        **{f"payloads_{name}": value for name, value in payloads.items()},
        **{f"headers_{name}": value for name, value in headers.items()},
        "memory_mib": grown,
        "seconds": time.perf_counter() - started,
    }


def fuzz_payloads(count: int, seed: int = 0) -> dict[str, Any]:
    """Mutations of honest payloads of every codec: bytes, lengths, header fields, half of them with a fitting sum."""
    rng = np.random.default_rng(seed)
    honest = [_honest(name) for name in CODECS]
    # The codec is what was agreed, whatever the bytes say: every payload meets every decoder at some time.
    configs = [config for config, _ in honest]

    def one() -> None:
        _, payload = honest[rng.integers(len(honest))]
        config = configs[rng.integers(len(configs))]
        data = _mutated(payload, rng)
        update = decode(data, NAMES, SHAPES, "gradient", config, round=1)
        if update.kept > update.numel or not bool(torch.isfinite(update.values).all()):
            raise AssertionError("an update was read that is none")

    return _tried(one, count)


def fuzz_headers(count: int, seed: int = 0) -> dict[str, Any]:
    """Mutations of dense replies: of the npy header alone, and of its text by grammar."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=SHAPES[0]).astype(np.float32)
    plain = Array(value).data
    begin = read_header(plain).offset

    def one() -> None:
        data = bytearray(plain)
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(data)))  # of which the header is a fifth
            data[place] = _SPICE[rng.integers(len(_SPICE))] if rng.random() < 0.7 else rng.integers(256)
        if rng.random() < 0.2:
            repeats = int(rng.integers(1, 4000))
            place = int(rng.integers(10, begin))
            data[place:place] = bytes([data[place]]) * repeats
            data[8:10] = min(65535, begin - 10 + repeats).to_bytes(2, "little")
        if rng.random() < 0.2:
            data = data[: rng.integers(len(data))]
        read_dense(Array("float32", SHAPES[0], "numpy.ndarray", bytes(data)), SHAPES[0], "float32")

    return _tried(one, count)


def _tried(one: Callable[[], None], count: int) -> dict[str, Any]:
    """What became of `count` tries."""
    read = refused = slow = 0
    faults: list[str] = []
    for _ in range(count):
        since = time.perf_counter()
        try:
            one()
            read += 1
        except PayloadError:
            refused += 1
        except Exception as error:  # what this looks for
            faults.append(f"{type(error).__name__}: {error}"[:200])
        slow += time.perf_counter() - since > SLOW_SECONDS
    return {"read": read, "refused": refused, "faults": len(faults), "slow": slow, "first": faults[:3]}


def _honest(name: str) -> tuple[CompressionConfig, bytes]:
    """A codec's settings and what an honest client sends under it."""
    config = CompressionConfig(name=name, rate=0.1)
    compressor: Compressor = build_compressor(config, NAMES, SHAPES)
    rng = np.random.default_rng(1)
    update = {
        n: torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        for n, shape in zip(NAMES, SHAPES, strict=True)
    }
    packet, _ = compressor.compress(update, Memory(), 1, torch.Generator().manual_seed(0))
    return config, to_array(encode(packet), compressor.numel).data


def _mutated(payload: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(payload)
    kind = rng.integers(5)
    if kind == 0:  # single bits
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # another length
        cut = int(rng.integers(len(data)))
        data = data[:cut] if rng.random() < 0.5 else data + bytes(int(rng.integers(1, 400)))
    elif kind == 2:  # other numbers in the header
        fields = list(_HEADER.unpack_from(data))
        place = int(rng.integers(1, len(fields)))
        most = 2**64 if place >= 5 else 256
        fields[place] = int(rng.integers(0, 2**63)) % most >> int(rng.integers(64 if place >= 5 else 8))
        data[: _HEADER.size] = _HEADER.pack(*fields)
    elif kind == 3:  # random bytes in a stretch
        start = int(rng.integers(len(data)))
        stretch: NDArray[np.uint8] = rng.integers(0, 256, int(rng.integers(1, 64)), dtype=np.uint8)
        data[start : start + len(stretch)] = stretch.tobytes()
    else:  # stretches copied over others
        start, to = (int(one) for one in rng.integers(len(data), size=2))
        data[to : to + 16] = data[start : start + 16]
    if (
        rng.random() < 0.5 and len(data) >= _HEADER.size + 4
    ):  # a sum that fits, so that what is behind it is met
        crc = zlib.crc32(data[_HEADER.size + 4 :], zlib.crc32(data[: _HEADER.size]))
        data[_HEADER.size : _HEADER.size + 4] = struct.pack("<I", crc)
    return bytes(data)
