"""Where attacks run: in this process, or as tasks on the Ray cluster that carries the federation.

Victims are dealt out in fixed groups (`attack.victims_per_task`), so that what is computed together, and with it
every bit of the result, does not depend on the engine or the size of the cluster.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.config import EngineConfig
from fedattack.errors import BadRequest, RunFailed
from fedattack.observation import Observation, Reconstruction
from fedattack.rng import adversary_seed
from simulations.engine.environment import cpu_threads

Shown = Callable[[str, float, str], None]
"""Told (attack name, share done of all its submitted work, text)."""


@dataclass(frozen=True)
class Attacked:
    """One finished reconstruction: the attack, what it attacked, its answer, its share of the wall time (s)."""

    attack: str
    observation: Observation
    reconstruction: Reconstruction
    seconds: float


def choose_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises
    ------
    BadRequest
        If the device does not exist on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise BadRequest(f"setting 'engine.device' = {name!r}: not available here ({reason})") from None
    return device


def groups(observations: Sequence[Observation], size: int) -> list[list[Observation]]:
    """Cut one round's observations into the groups that are attacked together."""
    return [list(observations[start : start + size]) for start in range(0, len(observations), size)]


def _attack(
    attack: ReconstructionAttack,
    observations: list[Observation],
    seed: int,
    device: str,
    threads: int,
    progress: Callable[[float, str], None],
) -> tuple[list[Reconstruction], float]:
    started = time.perf_counter()
    with cpu_threads(threads):
        answers = attack.run(observations, seed, choose_device(device), progress)
    if len(answers) != len(observations):
        raise RunFailed(
            f"attack {type(attack).__name__} answered {len(answers)} of {len(observations)} observations"
        )
    return answers, (time.perf_counter() - started) / len(observations)


class Executor(ABC):
    """Takes groups of observations and gives back finished reconstructions; `seed` is the run's."""

    def __init__(self, engine: EngineConfig, seed: int, shown: Shown) -> None:
        self.engine = engine
        self.seed = adversary_seed(seed, "attack")
        self.shown = shown

    @abstractmethod
    def submit(self, name: str, attack: ReconstructionAttack, observations: list[Observation]) -> None:
        """Start (or do) the attack on one group."""

    @abstractmethod
    def results(self) -> Iterator[Attacked]:
        """Yield what is finished, in the order of completion, until all that was submitted is."""


class InlineExecutor(Executor):
    """Attacks at once, in this process."""

    def __init__(self, engine: EngineConfig, seed: int, shown: Shown) -> None:
        super().__init__(engine, seed, shown)
        self._done: list[Attacked] = []

    def submit(self, name: str, attack: ReconstructionAttack, observations: list[Observation]) -> None:
        def progress(share: float, text: str) -> None:
            self.shown(name, share, text)

        answers, seconds = _attack(
            attack, observations, self.seed, self.engine.device, self.engine.threads, progress
        )
        self._done += [Attacked(name, o, a, seconds) for o, a in zip(observations, answers, strict=True)]

    def results(self) -> Iterator[Attacked]:
        while self._done:
            yield self._done.pop(0)


class RayExecutor(Executor):
    """Attacks as Ray tasks beside the running federation; the driver only collects.

    The Ray session must be up (see :mod:`simulations.engine.local_grid`).
    """

    def __init__(self, engine: EngineConfig, seed: int, shown: Shown) -> None:
        super().__init__(engine, seed, shown)
        import ray

        self._ray = ray
        self._board = ray.remote(num_cpus=0)(_Board).remote()
        gpus = engine.gpus_per_actor
        self._task = ray.remote(num_cpus=engine.threads, num_gpus=gpus, max_retries=2)(_ray_attack)
        self._pending: dict[Any, tuple[str, list[Observation]]] = {}

    def submit(self, name: str, attack: ReconstructionAttack, observations: list[Observation]) -> None:
        number = len(self._pending)
        reference = self._task.remote(
            attack, observations, self.seed, self.engine.device, self.engine.threads, self._board, number
        )
        self._pending[reference] = (name, observations)

    def results(self) -> Iterator[Attacked]:
        while self._pending:
            ready, _ = self._ray.wait(list(self._pending), timeout=0.5)
            for share, text in self._ray.get(self._board.latest.remote()):
                name = next(iter(self._pending.values()))[0]
                self.shown(name, share, text)
            for reference in ready:
                name, observations = self._pending.pop(reference)
                try:
                    answers, seconds = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    if isinstance(cause, BadRequest):
                        raise cause from None
                    raise RunFailed(f"attack {name!r} failed on the cluster: {cause!r}") from error
                for observation, answer in zip(observations, answers, strict=True):
                    yield Attacked(name, observation, answer, seconds)


def _ray_attack(
    attack: ReconstructionAttack,
    observations: list[Observation],
    seed: int,
    device: str,
    threads: int,
    board: Any,
    number: int,
) -> tuple[list[Reconstruction], float]:
    def progress(share: float, text: str) -> None:
        board.post.remote(number, share, text)

    return _attack(attack, observations, seed, device, threads, progress)


class _Board:
    """Ray actor that holds the latest progress of each task."""

    def __init__(self) -> None:
        self._latest: dict[int, tuple[float, str]] = {}

    def post(self, number: int, share: float, text: str) -> None:
        self._latest[number] = (share, text)

    def latest(self) -> list[tuple[float, str]]:
        news, self._latest = list(self._latest.values()), {}
        return news


def make_executor(engine: EngineConfig, seed: int, shown: Shown) -> Executor:
    """The executor that goes with the engine."""
    return (RayExecutor if engine.name == "ray" else InlineExecutor)(engine, seed, shown)
