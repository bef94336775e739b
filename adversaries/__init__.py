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
        "dlg": "adversaries.reconstruction.dlg:DLG",
        "idlg": "adversaries.reconstruction.idlg:IDLG",
        "ig": "adversaries.reconstruction.inverting_gradients:InvertingGradients",
        "sapag": "adversaries.reconstruction.sapag:SAPAG",
        "cpl": "adversaries.reconstruction.cpl:CPL",
        "tag": "adversaries.reconstruction.tag:TAG",
        "gradinversion": "adversaries.reconstruction.gradinversion:GradInversion",
        "gauss-newton": "adversaries.reconstruction.gauss_newton:GaussNewton",
        "imprint": "adversaries.reconstruction.imprint:Imprint",
        "loki": "adversaries.reconstruction.loki:Loki",
        "cah": "adversaries.reconstruction.curious_abandon_honesty:CuriousAbandonHonesty",
        "fishing": "adversaries.reconstruction.fishing:Fishing",
        "spear": "adversaries.reconstruction.spear:Spear",
        "analytic": "adversaries.reconstruction.analytic:Analytic",
        "rgap": "adversaries.reconstruction.rgap:RGap",
        "lti": "adversaries.reconstruction.learning_to_invert:LearningToInvert",
        "fgla": "adversaries.reconstruction.fgla:FGLA",
        "rog": "adversaries.reconstruction.rog:ROG",
        "ggl": "adversaries.reconstruction.generative:GGL",
        "gifd": "adversaries.reconstruction.generative:GIFD",
        "dip": "adversaries.reconstruction.generative:DeepImagePrior",
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
