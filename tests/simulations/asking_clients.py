"""Clients that ask for deletions by themselves and in bulk, reached by ``module:Class``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest


@dataclass
class Early(UnlearningAttack):
    """Asks by itself in rounds 1 and 3, for positions and for a sample each time, and once more when invited."""

    def asks_in(self, view: ClientView) -> bool:
        return view.round in (1, 3) and not view.forgetting

    def ask(
        self, view: ClientView, images: Tensor, labels: Tensor
    ) -> UnlearningRequest | list[UnlearningRequest]:
        if view.invited:
            return UnlearningRequest(view.client, (0,), "invited")
        first = 4 * view.round
        sample = slice(first + 2, first + 3)
        return [
            UnlearningRequest(view.client, (first, first + 1), f"round {view.round}"),
            UnlearningRequest(view.client, (), "a sample", images[sample], labels[sample]),
        ]


@dataclass
class Late(UnlearningAttack):
    """Asks by itself in the last round alone, when it is too late, and for its first sample when invited."""

    def asks_in(self, view: ClientView) -> bool:
        return view.round == 4

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        return UnlearningRequest(view.client, (0,))


@dataclass
class OnlyEarly(UnlearningAttack):
    """Asks by itself in round 1, for two samples, and never again."""

    def asks_in(self, view: ClientView) -> bool:
        return view.round == 1

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest | None:
        return None if view.invited else UnlearningRequest(view.client, (0, 1))


@dataclass
class AsksFor(UnlearningAttack):
    """Asks for one of several things, or for the same twice.

    Parameters
    ----------
    kind
        "positions", "class", "all", "twice", "wrong label", "noise": samples that nobody has, "mixed": one good and
        one bad request.
    which
        Positions, with spaces between; the class, in front.
    """

    kind: str = "positions"
    which: str = "0 1 2 3"

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> list[UnlearningRequest]:
        which = [int(one) for one in self.which.split()]
        positions = UnlearningRequest(view.client, tuple(which))
        if self.kind == "class":
            return [UnlearningRequest(view.client, label=which[0])]
        if self.kind == "all":
            return [UnlearningRequest(view.client, everything=True)]
        if self.kind == "wrong label":
            return [UnlearningRequest(view.client, images=images[which], labels=(labels[which] + 1) % 10)]
        noise = torch.rand(4, *images.shape[1:], generator=torch.Generator().manual_seed(view.seed))
        foreign = UnlearningRequest(view.client, images=noise, labels=labels[:4])
        return {
            "positions": [positions],
            "twice": [positions, positions],
            "noise": [foreign],
            "mixed": [foreign, positions],
        }[self.kind]


@dataclass
class Silent(UnlearningAttack):
    """Asks for nothing."""

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> None:
        return None
