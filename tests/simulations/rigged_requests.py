"""Clients that ask for deletions in odd ways, reached by ``module:Class``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest


@dataclass
class SendsSamples(UnlearningAttack):
    """Asks for its first samples by sending them, with labels moved by `shift`."""

    shift: int = 0

    def request(
        self, view: ClientView, model: nn.Module, images: Tensor, labels: Tensor
    ) -> UnlearningRequest:
        first = slice(0, view.requests)
        return UnlearningRequest(view.client, images=images[first], labels=(labels[first] + self.shift) % 10)


@dataclass
class NamesPositions(UnlearningAttack):
    """Asks for the same by position."""

    def request(
        self, view: ClientView, model: nn.Module, images: Tensor, labels: Tensor
    ) -> UnlearningRequest:
        return UnlearningRequest(view.client, tuple(range(view.requests)))


@dataclass
class SendsNoise(UnlearningAttack):
    """Brings pixels that are no numbers."""

    def request(
        self, view: ClientView, model: nn.Module, images: Tensor, labels: Tensor
    ) -> UnlearningRequest:
        return UnlearningRequest(view.client, images=images * float("nan"), labels=labels)


@dataclass
class Remembers(UnlearningAttack):
    """Asks for as many samples as it has seen rounds."""

    keeps_memory = True

    def see(self, view: ClientView) -> None:
        view.memory["rounds"] = view.memory.get("rounds", torch.zeros(1)) + 1

    def request(
        self, view: ClientView, model: nn.Module, images: Tensor, labels: Tensor
    ) -> UnlearningRequest:
        return UnlearningRequest(view.client, tuple(range(int(view.memory["rounds"]))))
