"""Where every random number of a run comes from: one stream per (seed, purpose, round, client, ...).

Streams are named, not shared, so that the order in which clients happen to run, the number of actors and the
engine cannot change a single draw.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import torch


def _sequence(seed: int, purpose: str, keys: tuple[int, ...]) -> np.random.SeedSequence:
    # A client's number may be -1 (everyone), which SeedSequence does not take.
    whole = [key if key >= 0 else key + 2**64 for key in keys]
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *whole])


def numpy_rng(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """NumPy generator for `purpose` ("partition", "sampling", ...) and integer keys (round, client)."""
    return np.random.default_rng(_sequence(seed, purpose, keys))


def torch_rng(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """CPU torch generator for `purpose` and integer keys; draw on the CPU, then move to the device."""
    state = int(_sequence(seed, purpose, keys).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % (2**63))


def adversary_seed(seed: int, purpose: str, *keys: int) -> int:
    """Seed in [0, 2**63) of an adversary's own stream: a one-way function, so that it leads back to no client's draw.

    Everything that an adversary is handed as a seed comes from here, and never the run's own `seed`.
    """
    digest = hashlib.blake2b(f"{purpose}:{seed}:{keys}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
