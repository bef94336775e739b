"""The victims of a reconstruction attack, dealt out in groups that are attacked together.

Groups are fixed (`attack.victims_per_task`). One that fails is taken apart, and each of its victims attacked alone;
whoever fails alone has a reason instead of an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adversaries.base import Progress
from adversaries.inversion.matching.checkpoint import checkpoints_in
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.errors import RunFailed
from fedattack.observation import Observation, Reconstruction
from simulations.experiments.executor import Job, reason


@dataclass(frozen=True)
class Victims(Job):
    """One group of observations for one attack, and where and how often (s) what takes long in it keeps its state."""

    name: str
    attack: ReconstructionAttack
    observations: list[Observation]
    checkpoints: Path
    state_seconds: float
    seed: int

    @property
    def key(self) -> str:  # type: ignore[override]
        return self.observations[0].key

    def parts(self) -> list[Victims]:
        """A job for each client, where there are several."""
        clients = dict.fromkeys(o.client for o in self.observations)
        if len(clients) < 2:
            return []
        parts = [[o for o in self.observations if o.client == client] for client in clients]
        return [replace(self, observations=p, checkpoints=self.checkpoints / p[0].key) for p in parts]

    def run(self, shared: Any, device: torch.device, progress: Progress) -> list[Attacked]:
        started, observations = time.perf_counter(), self.observations
        try:
            with checkpoints_in(self.checkpoints, self.state_seconds):
                answers = self.attack.run(observations, self.seed, device, progress)
            if len(answers) != len(observations):
                raise RunFailed(f"answered {len(answers)} of {len(observations)} observations")
            found = [_checked(o, answer) for o, answer in zip(observations, answers, strict=True)]
        except Exception as error:
            if parts := self.parts():
                return [one for part in parts for one in part.run(shared, device, progress)]
            return self.lost(reason(error), time.perf_counter() - started)
        seconds = (time.perf_counter() - started) / len(observations)
        return [Attacked(o.key, answer, seconds) for o, answer in zip(observations, found, strict=True)]

    def lost(self, why: str, seconds: float = 0.0) -> list[Attacked]:
        return [Attacked(o.key, why, seconds / len(self.observations)) for o in self.observations]


@dataclass(frozen=True)
class Attacked:
    """What became of one observation: an answer, or the reason why there is none; its share of the wall time (s)."""

    key: str
    answer: Reconstruction | str
    seconds: float


def groups(observations: Sequence[Observation], size: int) -> list[list[Observation]]:
    """Cut one round's observations into the groups that are attacked together."""
    return [list(observations[start : start + size]) for start in range(0, len(observations), size)]


def _checked(observation: Observation, answer: Any) -> Reconstruction | str:
    """The answer, or what is wrong with it."""
    if not isinstance(answer, Reconstruction):
        return f"answered a {type(answer).__name__}, which is no Reconstruction"
    wanted = observation.scenario.image_shape
    for name, images in {"images": answer.images, **answer.floors}.items():
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not len(images):
            return f"answered {name} of shape {tuple(images.shape)}; (B, {', '.join(map(str, wanted))}) was asked for"
        if not bool(images.isfinite().all()):
            return f"answered {name} with {int((~images.isfinite()).sum())} values that are NaN or infinite"
    if answer.labels.shape != answer.images.shape[:1]:
        return f"answered labels of shape {tuple(answer.labels.shape)} for {len(answer.images)} images"
    return answer
