"""What clients do against leakage, by name, in the order in which they are named.

Sign and quantisation, which are called defences too, are compressors here (:mod:`fedattack.compression`: ``sign``,
``qsgd``): they say what is sent. A new defence is one dataclass below :class:`Defense`, registered in
:data:`DEFENSES`, by the entry-point group ``fedattack.defenses``, or named as ``package.module:Class``.
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
