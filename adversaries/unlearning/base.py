"""What an attack on unlearning is: a client that chooses what the server must forget."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from adversaries.seats import MaliciousClient
from fedattack.observation import (
    UnlearningRequest,
)


@dataclass
class UnlearningAttack(MaliciousClient):
    """A client that chooses which of its own samples the server must forget."""

    family = "unlearning"

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
