"""PRECODE: a variational bottleneck before the head, whose draws only the client knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Generator, Tensor, nn

from fedattack.config import ModelConfig
from fedattack.defenses.base import Defense
from fedattack.models import build_model
from fedattack.models.classifiers.precode import Bottlenecked
from fedattack.observation import Scenario
from fedattack.task import GradientStep, LossAndGradient


@dataclass
class Precode(Defense):
    """Train with a variational bottleneck before the head, whose draws stay with the client.

    The model changes for everybody (``model.bottleneck``); all but the client use the code's mean.

    Parameters
    ----------
    width : int
        Numbers in the code.
    beta : float
        Weight of its divergence from N(0, 1) in the client's loss.

    References
    ----------
    Scheliga, Mäder and Seeland, PRECODE, 2022: width 256 and beta 0.001 in section 4.
    """

    draws: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    width: Annotated[int, Field(ge=1)] = 256
    beta: Annotated[float, Field(ge=0)] = 1e-3

    def check(self, scenario: Scenario) -> None:
        """Refuse models without features below a linear head."""
        build_model(scenario.model)

    def model(self, model: ModelConfig) -> ModelConfig:
        """The model with the bottleneck."""
        return model.model_copy(update={"bottleneck": self.width})

    def gradient(
        self, model: nn.Module, images: Tensor, labels: Tensor, inner: GradientStep, generator: Generator
    ) -> LossAndGradient:
        """`inner` with the code drawn, and its divergence in the loss."""
        assert isinstance(model, Bottlenecked)
        model.generator, model.beta = generator, self.beta
        try:
            return inner(model, images, labels)
        finally:
            model.generator = None
