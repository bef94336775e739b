"""What a defence is: a small object with its parameters as dataclass fields, and the hooks it acts through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, nn

from fedattack.config import ModelConfig, TrainingConfig
from fedattack.defenses.accounting import Privacy
from fedattack.observation import Scenario
from fedattack.task import GradientStep, LossAndGradient


@dataclass
class Defense:
    """Base of every defence; a subclass overrides the hooks it needs.

    Name and parameters are public, so that the server knows them (``Scenario.defense``). Random draws come from the
    given generator, which is keyed by seed, round, client and place in the list, and stay with the client. The
    defences of a run act in the listed order, each hook for itself.
    """

    draws: ClassVar[bool] = False  # whether a hook draws; where it does not, no generator is seeded
    transforms: ClassVar[bool] = False  # whether the model sees other images than the private ones
    replaces_gradient: ClassVar[bool] = False  # `gradient` passes over what comes before it in the list
    generates: ClassVar[bool] = True  # whether it makes sense where a generator is trained
    aggregates: ClassVar[bool] = False  # the server sees nothing but the round's sum over all clients

    @property
    def clips_samples(self) -> bool:
        """Whether `gradient` asks its `inner` step for one sample at a time, and bounds what it adds."""
        return False

    def check(self, scenario: Scenario) -> None:
        """Refuse (NotApplicable) a scenario this defence cannot apply to, before anything starts."""

    def model(self, model: ModelConfig) -> ModelConfig:
        """The resolved model, as this defence changes it for everybody."""
        return model

    def images(self, images: Tensor, generator: Generator) -> Tensor:
        """What the model is shown in this round in the place of `images`, float32 (n, C, H, W) in [0, 1]."""
        return images

    def gradient(
        self, model: nn.Module, images: Tensor, labels: Tensor, inner: GradientStep, generator: Generator
    ) -> LossAndGradient:
        """One batch's loss and gradient, from that of the defences before it (`inner`)."""
        return inner(model, images, labels)

    def update(self, update: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """What is sent, before compression, in the place of `update` (name -> tensor; not to be modified)."""
        return update

    def privacy(
        self, training: TrainingConfig, samples: int, rounds: int, statistics_sent: bool
    ) -> Privacy | None:
        """What is guaranteed to a client of so many samples, used in so many rounds; None: nothing is meant to be.

        `statistics_sent`: BatchNorm statistics travel beside the update, unprotected.
        """
        return None
