"""What an attack on unlearning is: a client that does harm by what the server must forget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from adversaries.needs import Needs
from adversaries.seats import ClientView, MaliciousClient
from fedattack.errors import ConfigError
from fedattack.observation import Scenario, UnlearningRequest


@dataclass
class UnlearningAttack(MaliciousClient):
    """A client that chooses what the server must forget: samples of its own, or any others.

    It may :meth:`plant` samples before training, it must :meth:`ask`, and it may change its :meth:`reply` while the
    server forgets. `goal`: what the auditor measures of it, in words; the accuracy lost, unless :meth:`success`, or
    :meth:`spent`, says otherwise.
    """

    family = "unlearning"
    needs: ClassVar[Needs] = Needs(held_out=True)
    goal: ClassVar[str] = "accuracy lost"

    @abstractmethod
    def ask(
        self, view: ClientView, images: Tensor, labels: Tensor
    ) -> UnlearningRequest | Sequence[UnlearningRequest] | None:
        """As in :class:`~adversaries.seats.MaliciousClient`."""

    def success(
        self, predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, view: ClientView
    ) -> float | None:
        """The share in [0, 1] of what it wanted that a model does; None where that is the accuracy lost.

        `predict`: images (n, C, H, W) -> probabilities (n, classes). `images` and `labels` are held out, of samples
        that nobody trained on. `view` is that of :meth:`plant`, of its first client, whose seed tells what was
        planted.
        """
        return None

    def spent(self, certificate: Mapping[str, Any], removed: int) -> float | None:
        """The same of what the mechanism's certificate says after `removed` samples; of attacks on its cost."""
        return None


def check_class(target: int, scenario: Scenario) -> None:
    """Refuse (ConfigError) a target that is no class of the model."""
    classes = scenario.model.resolved[2]
    if target >= classes:
        raise ConfigError(f"setting 'attack.target' = {target}: accepted: a class, 0 to {classes - 1}")
