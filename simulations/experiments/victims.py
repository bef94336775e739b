"""The victims of a reconstruction attack, dealt out in groups that are attacked together.

Groups are fixed (`attack.victims_per_task`). One that fails is taken apart, and each of its victims attacked alone;
whoever fails alone has a reason instead of an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from adversaries.base import Progress
from adversaries.inversion.matching.checkpoint import checkpoints_in
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.errors import RunFailed
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.reporting import formats
from simulations.experiments.executor import Job, reason
from simulations.experiments.memory import watched

SHOWN_FROM = 2_000_000_000
"""Bytes of memory from which on progress tells of them."""

T = TypeVar("T")


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

        def told(share: float, text: str) -> None:
            progress(
                share, text if peak.bytes < SHOWN_FROM else f"{text}, {formats.size(peak.bytes)} of memory"
            )

        try:
            with watched() as peak, checkpoints_in(self.checkpoints, self.state_seconds):
                answers = self.attack.run(observations, self.seed, device, told)
            if len(answers) != len(observations):
                raise RunFailed(f"answered {len(answers)} of {len(observations)} observations")
            found = [_checked(o, answer) for o, answer in zip(observations, answers, strict=True)]
        except Exception as error:
            if parts := self.parts():
                return [one for part in parts for one in part.run(shared, device, progress)]
            return self.lost(reason(error), time.perf_counter() - started)
        seconds = (time.perf_counter() - started) / len(observations)
        pairs = zip(observations, found, strict=True)
        return [Attacked(o.key, answer, seconds, peak.bytes) for o, answer in pairs]

    def lost(self, why: str, seconds: float = 0.0) -> list[Attacked]:
        return [Attacked(o.key, why, seconds / len(self.observations)) for o in self.observations]


@dataclass(frozen=True)
class Attacked:
    """What became of one observation.

    An answer, or the reason why there is none; its share of the wall time (s), and the most memory that the process
    held meanwhile (bytes; 0: not known).
    """

    key: str
    answer: Reconstruction | str
    seconds: float
    memory: int = 0


def groups(observations: Sequence[Observation], size: int) -> list[list[Observation]]:
    """Cut one round's observations into the groups that are attacked together: of one scenario each."""
    alike = by_scenario(observations, [observation.scenario for observation in observations])
    return [same[start : start + size] for same in alike for start in range(0, len(same), size)]


def by_scenario(things: Sequence[T], scenarios: Sequence[Scenario]) -> list[list[T]]:
    """The things of each scenario, in the order in which they come; local steps may be each client's own."""
    kinds: list[Scenario] = []
    found: list[list[T]] = []
    for thing, scenario in zip(things, scenarios, strict=True):
        if scenario not in kinds:
            kinds.append(scenario)
            found.append([])
        found[kinds.index(scenario)].append(thing)
    return found


def _checked(observation: Observation, answer: Any) -> Reconstruction | str:
    """The answer, or what is wrong with it."""
    if not isinstance(answer, Reconstruction):
        return f"answered a {type(answer).__name__}, which is no Reconstruction"
    if not len(answer.images) and answer.details.get("reason"):
        return str(answer.details["reason"])
    wanted = observation.scenario.image_shape
    for name, images in {"images": answer.images, **answer.floors}.items():
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not len(images):
            return f"answered {name} of shape {tuple(images.shape)}; (B, {', '.join(map(str, wanted))}) was asked for"
        if not bool(images.isfinite().all()):
            return f"answered {name} with {int((~images.isfinite()).sum())} values that are NaN or infinite"
    if answer.labels.shape != answer.images.shape[:1]:
        return f"answered labels of shape {tuple(answer.labels.shape)} for {len(answer.images)} images"
    return answer
