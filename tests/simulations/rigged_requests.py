"""Clients that ask for deletions in odd ways, and a server that forgets in one, reached by ``module:Class``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.models import build_model
from fedattack.observation import UnlearningRequest
from fedattack.training import batch_gradient
from fedattack.unlearning import Forgotten, Mechanism


@dataclass
class SendsSamples(UnlearningAttack):
    """Asks for its first samples by sending them, with labels moved by `shift`."""

    shift: int = 0

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        first = slice(0, view.requests)
        return UnlearningRequest(view.client, images=images[first], labels=(labels[first] + self.shift) % 10)


@dataclass
class NamesPositions(UnlearningAttack):
    """Asks for the same by position."""

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        return UnlearningRequest(view.client, tuple(range(view.requests)))


@dataclass
class SendsNoise(UnlearningAttack):
    """Brings pixels that are no numbers."""

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        return UnlearningRequest(view.client, images=images * float("nan"), labels=labels)


@dataclass
class Remembers(UnlearningAttack):
    """Asks for as many samples as it has seen rounds."""

    keeps_memory = True

    def see(self, view: ClientView) -> None:
        view.memory["rounds"] = view.memory.get("rounds", torch.zeros(1)) + 1

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        return UnlearningRequest(view.client, tuple(range(int(view.memory["rounds"]))))


@dataclass
class Ascent(Mechanism):
    """Climbs the loss of the samples that it is sent, whoever's they are."""

    by_positions = False
    rate: float = 1.0

    def forget(self, deletions, history, trainer) -> Forgotten:
        model = build_model(history.scenario.model)
        model.load_state_dict(history.weights)
        weights = dict(history.weights)
        for deletion in deletions:
            _, gradient = batch_gradient(model, deletion.images, deletion.labels)
            for (name, parameter), slope in zip(model.named_parameters(), gradient, strict=True):
                weights[name] = parameter.detach() + self.rate * slope
        return Forgotten(weights, {}, history.rounds)
