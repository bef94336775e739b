"""What of an update is sent, and how it travels.

``compressor.compress`` turns a client's update into a packet, :func:`encode` the packet into bytes, and the server's
:func:`decode` the bytes into an :class:`~fedattack.observation.Update`, checked against what was agreed.
A new compressor is one subclass of :class:`Compressor` (a `codec` and a `pack` method), registered in
:data:`COMPRESSORS`, by the entry-point group ``fedattack.compressors``, or named as ``package.module:Class``.
"""

from __future__ import annotations

from fedattack.compression.base import Compressor, Memory
from fedattack.compression.packets import Dense, Packet, Quantised, QuantisedSparse, Signs, Sparse
from fedattack.compression.registry import COMPRESSORS, build_compressor
from fedattack.compression.selection import Quota, kept_share
from fedattack.compression.wire import decode, encode

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Dense",
    "Memory",
    "Packet",
    "Quantised",
    "QuantisedSparse",
    "Quota",
    "Signs",
    "Sparse",
    "build_compressor",
    "decode",
    "encode",
    "kept_share",
]
