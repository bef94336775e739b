"""See through Gradients (GradInversion): BatchNorm statistics and agreement between seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from adversaries.reconstruction.optimisation import OptimisationAttack, Recipe
from adversaries.reconstruction.settings import Matching
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario


def _recipe(iterations: int, seeds: int) -> Recipe:
    settings: dict[str, Any] = {
        "objective": "cosine",
        "parametrisation": "standardised",
        "optimiser": "adam",
        "learning_rate": 0.1,
        "clamp": True,
        "noise": 0.01,
        "units": "absolute",
        "iterations": iterations,
        "regularisers": {"l2": 1e-6, "batch-norm": 1e-2, "group": 0.01},
    }
    return Recipe(Matching(**settings), tv=1e-4, labels="gradinversion", restarts=seeds)


@dataclass
class GradInversion(OptimisationAttack):
    """GradInversion: matching with BatchNorm statistics, smoothness and group consistency (Yin et al. 2021).

    Labels are the classes whose rows of the last layer's gradient reach lowest. Several seeds are optimised side by
    side, by Adam with a little noise in each step, and pulled towards their mean; the one of lowest loss is answered.
    The statistics aimed at are the batch's own where the client sent its BatchNorm buffers, else the running ones.

    Presets
    -------
    small
        2,000 iterations, 4 seeds: minutes for a small network on a CPU.
    published
        20,000 iterations, 8 seeds.

    Deviations: the cosine replaces the squared distance, whose published weight holds for one network's gradient
    norms; the learning rate falls in steps rather than by a cosine, without warm-up; noise is 0.01 of the learning
    rate rather than 0.2; seeds are compared without the registration of the paper, whose code is not public.

    References
    ----------
    Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, "See through Gradients: Image Batch Recovery via GradInversion",
    CVPR 2021.
    """

    needs: ClassVar[str] = "one client's update of a model with BatchNorm, distinct labels"
    recipes: ClassVar[Mapping[str, Recipe]] = {"small": _recipe(2000, 4), "published": _recipe(20_000, 8)}

    preset: str = "small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe().restarts < 2:
            raise ConfigError(
                f"setting 'restarts' = {self.restarts}: GradInversion compares its seeds; use 2 or more"
            )

    def check(self, scenario: Scenario) -> None:
        """Refuse models without BatchNorm, and what :meth:`OptimisationAttack.check` refuses."""
        super().check(scenario)
        layers = build_model(scenario.model).modules()
        if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers):
            raise NotApplicable(
                f"model.name = {scenario.model.name!r} has no BatchNorm, whose statistics GradInversion aims at; use "
                "a ResNet, or the attack 'ig'"
            )
