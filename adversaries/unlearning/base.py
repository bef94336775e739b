"""What an attack on unlearning is: a client that chooses what the server must forget."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adversaries.needs import Needs
from adversaries.seats import ClientView, MaliciousClient
from fedattack.observation import UnlearningRequest


@dataclass
class UnlearningAttack(MaliciousClient):
    """A client that chooses what the server must forget: samples of its own, or any others."""

    family = "unlearning"
    needs: ClassVar[Needs] = Needs(held_out=True)

    @abstractmethod
    def request(
        self, view: ClientView, model: nn.Module, images: Tensor, labels: Tensor
    ) -> UnlearningRequest | None:
        """As in :class:`~adversaries.seats.MaliciousClient`."""
