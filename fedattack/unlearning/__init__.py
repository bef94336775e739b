"""What an honest server does when asked to forget: mechanisms by name, and the check of each request."""

from __future__ import annotations

from fedattack.registry import Registry
from fedattack.unlearning.mechanism import Forgotten, Mechanism, RetrainFunction, ServerMemory, Weights
from fedattack.unlearning.requests import Deletion, validate_request

MECHANISMS: Registry[type[Mechanism]] = Registry(
    "mechanism",
    {"retrain": "fedattack.unlearning.retrain:Retrain"},
    group="fedattack.mechanisms",
    base="fedattack.unlearning.mechanism:Mechanism",
)

__all__ = [
    "MECHANISMS",
    "Deletion",
    "Forgotten",
    "Mechanism",
    "RetrainFunction",
    "ServerMemory",
    "Weights",
    "validate_request",
]
