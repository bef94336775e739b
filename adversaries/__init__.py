"""The adversaries: one module per attack, a base class per family, registered here by one line each.

An adversary reads :mod:`fedattack.observation` types and nothing that holds the truth.
"""

from __future__ import annotations

from adversaries.base import Attack
from adversaries.membership.base import MembershipAttack
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.unlearning.base import UnlearningAttack
from fedattack.registry import Registry

ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "hcgla": "adversaries.reconstruction.hcgla:HCGLA",
        "tensor": "adversaries.reconstruction.tensor:TensorAttack",
        "dlg": "adversaries.reconstruction.matching.dlg:DLG",
        "idlg": "adversaries.reconstruction.matching.idlg:IDLG",
        "ig": "adversaries.reconstruction.matching.inverting_gradients:InvertingGradients",
        "sapag": "adversaries.reconstruction.matching.sapag:SAPAG",
        "cpl": "adversaries.reconstruction.matching.cpl:CPL",
        "tag": "adversaries.reconstruction.matching.tag:TAG",
        "gradinversion": "adversaries.reconstruction.matching.gradinversion:GradInversion",
        "gauss-newton": "adversaries.reconstruction.gauss_newton:GaussNewton",
        "imprint": "adversaries.reconstruction.malicious.imprint:Imprint",
        "loki": "adversaries.reconstruction.malicious.loki:Loki",
        "cah": "adversaries.reconstruction.malicious.curious_abandon_honesty:CuriousAbandonHonesty",
        "fishing": "adversaries.reconstruction.malicious.fishing:Fishing",
        "spear": "adversaries.reconstruction.algebra.spear:Spear",
        "analytic": "adversaries.reconstruction.algebra.analytic:Analytic",
        "rgap": "adversaries.reconstruction.algebra.rgap:RGap",
        "lti": "adversaries.reconstruction.learned.learning_to_invert:LearningToInvert",
        "fgla": "adversaries.reconstruction.learned.fgla:FGLA",
        "rog": "adversaries.reconstruction.matching.rog:ROG",
        "ggl": "adversaries.reconstruction.matching.generator_priors:GGL",
        "gifd": "adversaries.reconstruction.matching.generator_priors:GIFD",
        "dip": "adversaries.reconstruction.matching.generator_priors:DeepImagePrior",
        "fedmia": "adversaries.membership.updates.fedmia:FedMIA",
        "avg-cosine": "adversaries.membership.updates.avg_cosine:AvgCosine",
        "grad-cosine": "adversaries.membership.updates.grad_cosine:GradCosine",
        "grad-diff": "adversaries.membership.updates.grad_diff:GradDiff",
        "grad-norm": "adversaries.membership.updates.grad_norm:GradNorm",
        "loss-series": "adversaries.membership.updates.loss_series:LossSeries",
        "loss-drop": "adversaries.membership.updates.loss_drop:LossDrop",
        "source-inference": "adversaries.membership.updates.source_inference:SourceInference",
        "whitened": "adversaries.membership.updates.whitened:Whitened",
        "unmix": "adversaries.membership.updates.unmix:Unmix",
        "loss-threshold": "adversaries.membership.logits.loss_threshold:LossThreshold",
        "correctness": "adversaries.membership.logits.correctness:Correctness",
        "entropy": "adversaries.membership.logits.entropy:Entropy",
        "modified-entropy": "adversaries.membership.logits.modified_entropy:ModifiedEntropy",
        "attack-p": "adversaries.membership.logits.attack_p:AttackP",
        "attack-r": "adversaries.membership.logits.attack_r:AttackR",
        "lira": "adversaries.membership.logits.lira:LiRA",
        "rmia": "adversaries.membership.logits.rmia:RMIA",
        "exponential-family": "adversaries.membership.logits.exponential_family:ExponentialFamily",
        "bavaria": "adversaries.membership.logits.bavaria:BaVarIA",
        "quantile": "adversaries.membership.logits.quantile:Quantile",
        "shadow-models": "adversaries.membership.logits.shadow_models:ShadowModels",
        "loss-series-client": "adversaries.membership.clients.loss_series_client:LossSeriesClient",
        "client-loss": "adversaries.membership.clients.client_loss:ClientLoss",
        "unmix-client": "adversaries.membership.clients.unmix_client:UnmixClient",
        "ascent-client": "adversaries.membership.clients.ascent_client:AscentClient",
        "person-client": "adversaries.membership.people.person_client:PersonClient",
        "person-member": "adversaries.membership.people.person_member:PersonMember",
        "relu-trap": "adversaries.membership.active.relu_trap:ReLUTrap",
        "ascent": "adversaries.membership.active.ascent:Ascent",
        "isolating": "adversaries.membership.active.isolating:Isolating",
        "client-critic": "adversaries.membership.updates.client_critic:ClientCritic",
        "critic-series": "adversaries.membership.updates.critic_series:CriticSeries",
        "critic": "adversaries.membership.synthetic.critic:Critic",
        "full-black-box": "adversaries.membership.synthetic.full_black_box:FullBlackBox",
        "full-black-box-calibrated": "adversaries.membership.synthetic.full_black_box:CalibratedFullBlackBox",
        "partial-black-box": "adversaries.membership.synthetic.partial_black_box:PartialBlackBox",
        "partial-black-box-calibrated": (
            "adversaries.membership.synthetic.partial_black_box:CalibratedPartialBlackBox"
        ),
        "white-box": "adversaries.membership.synthetic.white_box:WhiteBox",
        "white-box-calibrated": "adversaries.membership.synthetic.white_box:CalibratedWhiteBox",
        "monte-carlo": "adversaries.membership.synthetic.monte_carlo:MonteCarlo",
        "domias": "adversaries.membership.synthetic.domias:Domias",
        "unlearn-max-loss": "adversaries.unlearning.orders:MaxLoss",
        "unlearn-max-gradient": "adversaries.unlearning.orders:MaxGradient",
        "unlearn-min-confidence": "adversaries.unlearning.orders:MinConfidence",
        "unlearn-min-margin": "adversaries.unlearning.orders:MinMargin",
        "unlearn-target-class": "adversaries.unlearning.orders:TargetClass",
        "unlearn-surrogate": "adversaries.unlearning.surrogate_loss:SurrogateLoss",
        "unlearn-wrong-label": "adversaries.unlearning.wrong_label:WrongLabel",
        "unlearn-and-burn": "adversaries.unlearning.unlearn_and_burn:UnlearnAndBurn",
        "unlearn-fgsm": "adversaries.unlearning.modified:FastGradientSign",
        "unlearn-pgd": "adversaries.unlearning.modified:ProjectedGradient",
        "unlearn-entropy": "adversaries.unlearning.modified:MaxEntropy",
        "unlearn-slow-down": "adversaries.unlearning.planted.slow_down:SlowDown",
        "unlearn-boundary": "adversaries.unlearning.planted.boundary:Boundary",
        "unlearn-camouflage": "adversaries.unlearning.planted.camouflage:Camouflage",
    },
    group="fedattack.attacks",
    base="adversaries.base:Attack",
)

__all__ = ["ATTACKS", "Attack", "MembershipAttack", "ReconstructionAttack", "UnlearningAttack"]
