"""Where attacks run: in this process, or as tasks on the Ray cluster that carries the federation.

Victims are dealt out in fixed groups (`attack.victims_per_task`), so that what is computed together, and with it
every bit of the result, does not depend on the engine or the size of the cluster. A group that fails is taken apart,
and each of its victims attacked alone; whoever fails alone has a reason instead of an answer.
"""

from __future__ import annotations

import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adversaries.base import Progress
from adversaries.inversion.matching.checkpoint import checkpoints_in
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.config import EngineConfig
from fedattack.errors import BadRequest, FedattackError, RunFailed
from fedattack.observation import Observation, Reconstruction
from fedattack.rng import adversary_seed
from simulations.engine.environment import cpu_threads

Shown = Callable[[str, float, str], None]
"""Told (attack name, share done of all its submitted work, text)."""

_POLL_SECONDS = 0.2
"""Between looks at a cluster's tasks: an answer is handed on sooner than a second after it is ready."""


@dataclass(frozen=True)
class Job:
    """One group of observations for one attack, and where and how often (s) what takes long in it keeps its state."""

    name: str
    attack: ReconstructionAttack
    observations: list[Observation]
    checkpoints: Path
    state_seconds: float

    def parts(self) -> list[Job]:
        """A job for each client, where there are several."""
        clients = dict.fromkeys(o.client for o in self.observations)
        if len(clients) < 2:
            return []
        parts = [[o for o in self.observations if o.client == client] for client in clients]
        return [replace(self, observations=p, checkpoints=self.checkpoints / p[0].key) for p in parts]


@dataclass(frozen=True)
class Attacked:
    """What became of one observation: an answer, or the reason why there is none; its share of the wall time (s)."""

    key: str
    answer: Reconstruction | str
    seconds: float


Done = Callable[[Job, list[Attacked]], None]
"""Told what became of a group's observations, as soon as it is known."""


def choose_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:N" or "mps"; BadRequest where it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def attacked(job: Job, seed: int, device: str, threads: int, progress: Progress) -> list[Attacked]:
    """Carry out one job; no fault of the attack or of an update ends it."""
    with cpu_threads(threads):
        return _tried(job, seed, choose_device(device), progress)


def _tried(job: Job, seed: int, device: torch.device, progress: Progress) -> list[Attacked]:
    started, observations = time.perf_counter(), job.observations
    try:
        with checkpoints_in(job.checkpoints, job.state_seconds):
            answers = job.attack.run(observations, seed, device, progress)
        if len(answers) != len(observations):
            raise RunFailed(f"answered {len(answers)} of {len(observations)} observations")
        found = [_checked(o, answer) for o, answer in zip(observations, answers, strict=True)]
    except Exception as error:
        if parts := job.parts():
            return [one for part in parts for one in _tried(part, seed, device, progress)]
        found = [reason(error)] * len(observations)
    seconds = (time.perf_counter() - started) / len(observations)
    return [Attacked(o.key, answer, seconds) for o, answer in zip(observations, found, strict=True)]


def reason(error: BaseException) -> str:
    """An exception in a line; where it is no sentence for a person, with its type and the place it came from."""
    if isinstance(error, FedattackError):
        return str(error)
    text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


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


class Executor(ABC):
    """Takes jobs, and tells `done` what became of each, at the latest in :meth:`finish`; `seed` is the run's."""

    def __init__(self, engine: EngineConfig, seed: int, shown: Shown, done: Done) -> None:
        self.engine, self.shown, self.done = engine, shown, done
        self.seed = adversary_seed(seed, "attack")

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start (or do) a job."""

    def finish(self) -> None:
        """Wait for all that was submitted."""
        return None

    def close(self) -> None:
        """Wait for nothing any more."""
        return None


class InlineExecutor(Executor):
    """Attacks at once, in this process."""

    def submit(self, job: Job) -> None:
        def progress(share: float, text: str) -> None:
            self.shown(job.name, share, text)

        self.done(job, attacked(job, self.seed, self.engine.device, self.engine.threads, progress))


class RayExecutor(Executor):
    """Attacks as Ray tasks beside the running federation; a thread of the driver hands on what is ready."""

    def __init__(self, engine: EngineConfig, seed: int, shown: Shown, done: Done) -> None:
        super().__init__(engine, seed, shown, done)
        import ray

        self._ray = ray
        self._board = ray.remote(num_cpus=0)(_Board).remote()
        gpus = engine.gpus_per_actor
        self._task = ray.remote(num_cpus=engine.threads, num_gpus=gpus, max_retries=2)(_ray_attack)
        self._pending: dict[Any, Job] = {}
        self._last = threading.Event()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, name="answers", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        if self._error is not None:
            raise self._error
        where = self.engine.device, self.engine.threads
        self._pending[self._task.remote(job, self.seed, *where, self._board)] = job

    def finish(self) -> None:
        self._last.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _collect(self) -> None:
        try:
            while not self._stop.is_set():
                waiting = list(self._pending)
                if not waiting:
                    if self._last.is_set():
                        return
                    self._last.wait(_POLL_SECONDS)
                    continue
                ready, _ = self._ray.wait(waiting, timeout=_POLL_SECONDS)
                for name, share, text in self._ray.get(self._board.latest.remote()):
                    self.shown(name, share, text)
                for reference in ready:
                    self._take(reference, self._pending[reference])
                    del self._pending[reference]
        except BaseException as error:
            self._error = error

    def _take(self, reference: Any, job: Job) -> None:
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # its worker was lost, time and again
            if parts := job.parts():
                for part in parts:
                    self.submit(part)
                return
            cause = getattr(error, "cause", None)
            why = reason(cause) if cause is not None else f"its worker was lost: {reason(error)}"
            found = [Attacked(o.key, why, 0.0) for o in job.observations]
        self.done(job, found)


def _ray_attack(job: Job, seed: int, device: str, threads: int, board: Any) -> list[Attacked]:
    def progress(share: float, text: str) -> None:
        board.post.remote(job.name, job.observations[0].key, share, text)

    return attacked(job, seed, device, threads, progress)


class _Board:
    """Ray actor that holds the latest progress of each task."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str], tuple[float, str]] = {}

    def post(self, name: str, key: str, share: float, text: str) -> None:
        self._latest[name, key] = (share, text)

    def latest(self) -> list[tuple[str, float, str]]:
        news, self._latest = self._latest, {}
        return [(name, *shown) for (name, _), shown in news.items()]


def make_executor(engine: EngineConfig, seed: int, shown: Shown, done: Done) -> Executor:
    """The executor that goes with the engine."""
    return (RayExecutor if engine.name == "ray" else InlineExecutor)(engine, seed, shown, done)
