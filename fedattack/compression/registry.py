"""Compressors by name."""

from __future__ import annotations

from collections.abc import Sequence

from fedattack.compression.base import Compressor
from fedattack.config import CompressionConfig
from fedattack.registry import Registry

COMPRESSORS: Registry[type[Compressor]] = Registry(
    "compressor",
    {
        "none": "fedattack.compression.compressors:Identity",
        "topk": "fedattack.compression.compressors:TopK",
        "randomk": "fedattack.compression.compressors:RandomK",
        "sign": "fedattack.compression.compressors:Sign",
        "qsgd": "fedattack.compression.compressors:QSGD",
        "topk-qsgd": "fedattack.compression.compressors:QuantisedTopK",
        "dgc": "fedattack.compression.compressors:DGC",
    },
    group="fedattack.compressors",
    base="fedattack.compression.base:Compressor",
)


def build_compressor(
    config: CompressionConfig, names: Sequence[str], shapes: Sequence[Sequence[int]]
) -> Compressor:
    """The compressor of a configuration for tensors of these names and shapes."""
    return COMPRESSORS.get(config.name)(config, names, shapes)
