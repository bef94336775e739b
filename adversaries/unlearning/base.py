"""What an attack on unlearning is: a client that chooses what the server must forget."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adversaries.base import Attack
from adversaries.needs import Needs
from fedattack.observation import (
    UnlearningRequest,
)


@dataclass
class UnlearningAttack(Attack):
    """A client that chooses which of its own samples the server must forget."""

    family = "unlearning"
    seat = "client"
    needs: ClassVar[Needs] = Needs(held_out=True)

    @abstractmethod
    def choose(
        self, client: int, model: nn.Module, images: Tensor, labels: Tensor, requests: int, seed: int
    ) -> UnlearningRequest:
        """Choose `requests` positions of the client's own samples.

        Parameters
        ----------
        client : int
            The requesting client.
        model : nn.Module
            The current global model, as every client has it.
        images, labels : Tensor
            The client's own partition: float32 (N, C, H, W) in [0, 1] and int64 (N,).
        requests : int
            How many samples to ask for, at most N.
        """
