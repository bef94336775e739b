"""The adversaries: one module per attack, a base class per family, registered here by one line each.

An adversary reads :mod:`fedattack.observation` types and nothing that holds the truth.
"""

from __future__ import annotations

from adversaries.base import Attack, MembershipAttack, ReconstructionAttack, UnlearningAttack, build_attack
from fedattack.registry import Registry

ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "hcgla": "adversaries.reconstruction.hcgla:HCGLA",
        "tensor": "adversaries.reconstruction.tensor:TensorAttack",
        "fedmia": "adversaries.membership.fedmia:FedMIA",
        "unlearn-max-loss": "adversaries.unlearning.max_loss:MaxLoss",
    },
    group="fedattack.attacks",
)

__all__ = [
    "ATTACKS",
    "Attack",
    "MembershipAttack",
    "ReconstructionAttack",
    "UnlearningAttack",
    "build_attack",
]
