"""What a run that trains a generator leaves of it: files, sheets of its images, whether it collapsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedattack.config import Config
from fedattack.data import World
from fedattack.generative import GanSettings, save_gan
from fedattack.generative.diversity import Diversity, diversity
from fedattack.generative.nets import Gan
from fedattack.models import build_model
from fedattack.rng import torch_rng
from fedattack.storage import RunFolder
from fedattack.task import task_of
from fedattack.training import load_weights

SHEET, STRIP = 128, 16
"""Images of the last generator that are shown, and of each earlier one."""

_SAMPLES = 1000
"""Images by which its diversity is judged."""

FILE = "generator.safetensors"


@dataclass(frozen=True)
class Generated:
    """The last generator's file, its diversity (None with fewer than two held-out images), and images by round."""

    path: Path
    diversity: Diversity | None
    images: dict[
        int, Tensor
    ]  # round -> float32 (n, C, S, S) in [0, 1], of the same latents; the last has most


@dataclass
class Generators:
    """Looks at each round's generator; the latents are the same in all rounds, so that progress is seen."""

    config: Config
    world: World
    folder: RunFolder
    _images: dict[int, Tensor] = field(default_factory=dict, init=False)
    _last: tuple[int, Mapping[str, Tensor]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        total = self.config.federation.rounds
        self._shown = {max(1, total >> halvings) for halvings in range(1, 6)} - {total}

    @property
    def watches(self) -> bool:
        """Whether the run trains a generator."""
        return task_of(self.world.scenario).kind == "generate"

    def again(self, round: int) -> bool:
        """Whether a round's generator is needed again after a restart."""
        return self.watches and round in self._shown

    def after_round(self, round: int, weights: Mapping[str, Tensor]) -> None:
        """Keep what will be shown of it, and its file where one is asked for."""
        if not self.watches:
            return
        self._last = round, weights
        every = self.config.output.checkpoint_every
        if every and round % every == 0:
            self._save(self.folder.path / "generators" / f"round-{round:05d}.safetensors", "")
        if round in self._shown:
            self._images[round] = self._samples(weights, SHEET)[:STRIP]

    def finish(self, privacy: str) -> Generated | None:
        """Write the last generator there was; None where none is trained. `privacy`: what is guaranteed, in words."""
        if self._last is None:
            return None
        round, weights = self._last
        path = self.folder.path / FILE
        self._save(path, privacy)
        made = self._samples(weights, _SAMPLES)
        held_out = self.world.pools.nonmembers[:_SAMPLES]
        found = diversity(made, self.world.dataset.tensors(held_out)[0]) if len(held_out) > 1 else None
        return Generated(path, found, {**self._images, round: made[:SHEET]})

    def _save(self, path: Path, privacy: str) -> None:
        assert self._last is not None
        round, weights = self._last
        scenario = self.world.scenario
        task = scenario.training.task
        settings = GanSettings(
            model=scenario.model, gan=scenario.gan, task=task, rounds=round, privacy=privacy
        )
        save_gan(path, weights, settings)

    @torch.no_grad()
    def _samples(self, weights: Mapping[str, Tensor], count: int) -> Tensor:
        model = build_model(self.world.scenario.model)
        assert isinstance(model, Gan)
        load_weights(model, weights)
        return model.eval().sample(count, torch_rng(self.config.seed, "sample sheet"))
