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


@dataclass
class Sleeper(UnlearningAttack):
    """Plants black squares of class 0 and asks, one after the other, for its first samples; measured by class 0."""

    goal = "black squares called 0"

    def plant(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = images.clone(), labels.clone()
        images[:20], labels[:20] = 0.0, 0
        return images, labels

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        assert bool((labels[0] == 0) & (images[0] == 0).all())
        return UnlearningRequest(view.client, (view.times,))

    def success(self, predict, images: Tensor, labels: Tensor, view: ClientView) -> float:
        return float((predict(torch.zeros_like(images)).argmax(1) == 0).float().mean())


@dataclass
class Questioner(UnlearningAttack):
    """Asks for the samples whose class the model is least sure of, told by its answers alone."""

    access = "queries"
    limit: int = 40

    def query_limit(self) -> int:
        return self.limit

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        assert not view.weights
        assert view.model is None
        assert view.oracle is not None
        sure = view.oracle(images[:40]).max(1).values
        return UnlearningRequest(view.client, tuple(sure.argsort()[: view.requests].tolist()))


@dataclass
class Halved(Mechanism):
    """Releases half of the weights, and forgets nothing else."""

    runs = "central"

    def prepare(self, excluded, history, trainer):
        assert len(trainer.central().retained(excluded.get(0, ()))) > 0
        return {name: tensor / 2 for name, tensor in history.weights.items()}

    def forget(self, deletions, history, trainer) -> Forgotten:
        found = {
            0: frozenset().union(*(d.positions for d in deletions)) | history.excluded.get(0, frozenset())
        }
        weights = {name: tensor + 1 for name, tensor in history.weights.items()}
        return Forgotten(weights, found, history.rounds, {"promise": 1.5}, {"warning": "all weights moved"})
