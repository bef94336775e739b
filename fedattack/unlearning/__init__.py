"""What an honest server does when asked to forget: mechanisms by name, and the check of each request."""

from __future__ import annotations

from fedattack.config import UnlearningConfig
from fedattack.errors import unknown_name
from fedattack.registry import Registry, build_plugin, plugin_options
from fedattack.unlearning.central import Central, Step
from fedattack.unlearning.cost import Cost
from fedattack.unlearning.history import ClientUpdate, History, Weights
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer
from fedattack.unlearning.requests import Deletion, Registered, Verdict, as_positions, validate_request

MECHANISMS: Registry[type[Mechanism]] = Registry(
    "mechanism",
    {
        "retrain": "fedattack.unlearning.retrain:Retrain",
        "federaser": "fedattack.unlearning.federaser:FedEraser",
        "scrub": "fedattack.unlearning.scrub.scrub:Scrub",
        "certified": "fedattack.unlearning.certified:CertifiedRemoval",
        "newton": "fedattack.unlearning.newton:Newton",
        "influence": "fedattack.unlearning.influence:Influence",
        "deltagrad": "fedattack.unlearning.deltagrad:DeltaGrad",
        "amnesiac": "fedattack.unlearning.amnesiac:Amnesiac",
        "unrolling": "fedattack.unlearning.unrolling:Unrolling",
        "fedrecover": "fedattack.unlearning.fedrecover:FedRecover",
        "halimi": "fedattack.unlearning.halimi:ProjectedAscent",
        "liu": "fedattack.unlearning.liu:RapidRetraining",
        "fedosd": "fedattack.unlearning.fedosd:FedOSD",
        "fine-tuning": "fedattack.unlearning.fine_tuning:FineTuning",
        "gradient-ascent": "fedattack.unlearning.ascent:Ascent",
        "neg-grad": "fedattack.unlearning.neg_grad:NegGradPlus",
        "random-labels": "fedattack.unlearning.random_labels:RandomLabels",
        "fisher": "fedattack.unlearning.fisher:Fisher",
        "ntk": "fedattack.unlearning.ntk:Ntk",
        "mcmc": "fedattack.unlearning.mcmc:Mcmc",
        "scrub-distil": "fedattack.unlearning.scrub_distil:ScrubDistil",
        "salun": "fedattack.unlearning.salun:SalUn",
    },
    group="fedattack.mechanisms",
    base="fedattack.unlearning.mechanism:Mechanism",
)


def build_mechanism(config: UnlearningConfig) -> Mechanism:
    """The configured mechanism with its parameters."""
    name, cls = config.mechanism, MECHANISMS.get(config.mechanism)
    for other in config.options.keys() - {name}:
        raise unknown_name("setting", f"unlearning.{other}", [f"unlearning.{name}"])
    for option in config.shared_options.keys() - plugin_options(cls).keys():
        known = [f"unlearning.{field}" for field in ("mechanism", "checkpoint_every", *plugin_options(cls))]
        raise unknown_name("setting", f"unlearning.{option}", known)
    return build_plugin(cls, name, config.options.get(name, {}), config.shared_options, "unlearning.")


__all__ = [
    "MECHANISMS",
    "Central",
    "ClientUpdate",
    "Cost",
    "Deletion",
    "Forgotten",
    "History",
    "Mechanism",
    "Registered",
    "Step",
    "Trainer",
    "Verdict",
    "Weights",
    "as_positions",
    "build_mechanism",
    "validate_request",
]
