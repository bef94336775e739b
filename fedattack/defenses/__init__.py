"""What clients do against leakage, by name, in the order in which they are named.

Sign and quantisation, which are called defences too, are compressors here (:mod:`fedattack.compression`: ``sign``,
``qsgd``): they say what is sent.

A new defence is one dataclass below :class:`Defense`, registered in :data:`DEFENSES`, by the entry-point group
``fedattack.defenses``, or named as ``package.module:Class``.

Examples
--------
>>> import torch
>>> from fedattack.config import DefenseConfig
>>> config = DefenseConfig(names=("prune",), shared_options={"share": 0.5})
>>> client = ClientDefenses(list(build_defenses(config).values()), seed=0, round=1, client=0)
>>> client.update({"w": torch.tensor([1.0, -3.0, 2.0, 0.0])})["w"].tolist()
[0.0, -3.0, 2.0, 0.0]
"""

from __future__ import annotations

from fedattack.defenses.accounting import Privacy
from fedattack.defenses.base import Defense
from fedattack.defenses.client import (
    DEFENSES,
    ClientDefenses,
    build_defenses,
    check_defenses,
    defended_model,
    hides_clients,
)

__all__ = [
    "DEFENSES",
    "ClientDefenses",
    "Defense",
    "Privacy",
    "build_defenses",
    "check_defenses",
    "defended_model",
    "hides_clients",
]
