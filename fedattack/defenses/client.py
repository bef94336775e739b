"""The defences of a run, in their order: built once, applied by each client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fedattack.config import DefenseConfig, ModelConfig
from fedattack.defenses.base import Defense
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Scenario
from fedattack.registry import Registry, build_plugins
from fedattack.rng import torch_rng
from fedattack.task import GradientStep, task_of
from fedattack.training import batch_gradient

DEFENSES: Registry[type[Defense]] = Registry(
    "defence",
    {
        "clip-noise": "fedattack.defenses.clip_noise:ClipNoise",
        "prune": "fedattack.defenses.prune:Prune",
        "soteria": "fedattack.defenses.soteria:Soteria",
        "precode": "fedattack.defenses.precode:Precode",
        "transform": "fedattack.defenses.transform:Transform",
        "secure-aggregation": "fedattack.defenses.secure_aggregation:SecureAggregation",
    },
    group="fedattack.defenses",
    base="fedattack.defenses.base:Defense",
)

_UNUSED = torch.Generator()


def build_defenses(config: DefenseConfig) -> dict[str, Defense]:
    """The configured defences by name, in their order; ConfigError if one would undo what an earlier one did."""
    built = build_plugins(DEFENSES, config.names, config.options, config.shared_options, "defense")
    earlier: list[str] = []
    for name, defense in built.items():
        if defense.replaces_gradient and earlier:
            raise ConfigError(
                f"setting 'defense.names' = {', '.join(built)}: {name} computes the gradient anew and would undo "
                f"{' and '.join(earlier)}; name it first"
            )
        if type(defense).gradient is not Defense.gradient:
            earlier.append(name)
    return built


def defended_model(model: ModelConfig, config: DefenseConfig) -> ModelConfig:
    """The resolved model as the defences change it; public."""
    for defense in build_defenses(config).values():
        model = defense.model(model)
    return model


def hides_clients(config: DefenseConfig) -> bool:
    """Whether the server sees nothing but sums over all clients."""
    return any(defense.aggregates for defense in build_defenses(config).values())


def check_defenses(scenario: Scenario) -> None:
    """Refuse (NotApplicable) a scenario that a configured defence cannot apply to."""
    generating = task_of(scenario).kind == "generate"
    for name, defense in build_defenses(scenario.defense).items():
        if generating and not defense.generates:
            fitting = ", ".join(other for other in DEFENSES if DEFENSES.get(other).generates)
            raise NotApplicable(
                f"setting 'defense.names' = {name!r}: makes no sense where a generator is trained (task "
                f"{scenario.training.task!r}); accepted: {fitting}"
            )
        defense.check(scenario)


class ClientDefenses:
    """What one client does in one round; `step` is how an undefended one computes a batch's loss and gradient.

    `planted` makes of the step below a defence that clips samples the one that it is to clip. A pure function of
    its arguments, so that the auditor can recompute what the model was shown.
    """

    def __init__(
        self,
        defenses: Sequence[Defense],
        seed: int,
        round: int,
        client: int,
        step: GradientStep = batch_gradient,
        planted: Callable[[GradientStep], GradientStep] | None = None,
    ) -> None:
        self._defenses = tuple(defenses)
        self._step = step
        self._planted = planted
        self._generators = [
            torch_rng(seed, "defense", round, client, place) if defense.draws else _UNUSED
            for place, defense in enumerate(self._defenses)
        ]

    @property
    def transforms(self) -> bool:
        """Whether the model sees other images than the private ones."""
        return any(defense.transforms for defense in self._defenses)

    def images(self, images: Tensor) -> Tensor:
        """What the model is shown, float32 (n, C, H, W) in [0, 1]; call it once, before the rest."""
        for defense, generator in zip(self._defenses, self._generators, strict=True):
            images = defense.images(images, generator)
        return images

    @property
    def gradient(self) -> GradientStep:
        """How one batch's loss and gradient are computed."""
        step = self._step
        for defense, generator in zip(self._defenses, self._generators, strict=True):
            if type(defense).gradient is not Defense.gradient:
                below = self._planted(step) if self._planted and defense.clips_samples else step
                step = partial(defense.gradient, inner=below, generator=generator)
        return step

    def update(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is handed to the compressor; call it once, after training."""
        for defense, generator in zip(self._defenses, self._generators, strict=True):
            update = defense.update(update, generator)
        return update
