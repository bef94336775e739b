"""Where attacks run: in this process, or as tasks on the Ray cluster that carries the federation.

Whoever makes the jobs says what is computed together, so that no bit of a result depends on the engine or the size of
the cluster.
"""

from __future__ import annotations

import logging
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adversaries.base import Progress
from fedattack.config import EngineConfig
from fedattack.errors import BadRequest, FedattackError
from simulations.engine.environment import cpu_threads

log = logging.getLogger("fedattack.executor")

Shown = Callable[[str, float, str], None]
"""Told (whose work, share of it done, text)."""

_POLL_SECONDS = 0.2
"""Between looks at a cluster's tasks: an answer is handed on sooner than a second after it is ready."""


class Job(ABC):
    """What runs by itself, perhaps in another process.

    `name` is whose progress it tells, `key` what it is about.
    """

    name: str
    key: str

    @abstractmethod
    def run(self, shared: Any, device: torch.device, progress: Progress) -> Any:
        """Carry it out; no fault of an attack or of an update ends it. `shared` is what all jobs are given."""

    @abstractmethod
    def lost(self, why: str) -> Any:
        """What became of it where there is no answer, for this reason."""

    def parts(self) -> Sequence[Job]:
        """Smaller jobs to try in its place where its worker was lost, time and again."""
        return []


Done = Callable[[Any, Any], None]
"""Told what became of a job, as soon as it is known."""


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


def reason(error: BaseException) -> str:
    """An exception in a line; where it is no sentence for a person, with its type and the place it came from."""
    if isinstance(error, FedattackError):
        return str(error)
    text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def _carried_out(job: Job, shared: Any, device: str, threads: int, progress: Progress) -> Any:
    with cpu_threads(threads):
        return job.run(shared, choose_device(device), progress)


class Executor(ABC):
    """Takes jobs, and tells `done` what became of each, at the latest in :meth:`finish`."""

    def __init__(self, engine: EngineConfig, shown: Shown, done: Done) -> None:
        self.engine, self.shown, self.done = engine, shown, done

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start (or do) a job."""

    @abstractmethod
    def later(self, job: Job) -> None:
        """Do a job when nothing else is to be done, at the latest in :meth:`finish`."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for all that was submitted."""

    def close(self) -> None:
        """Wait for nothing any more."""
        return None


class InlineExecutor(Executor):
    """Attacks at once, in this process."""

    def __init__(self, engine: EngineConfig, shown: Shown, done: Done, shared: Any = None) -> None:
        super().__init__(engine, shown, done)
        self._shared = shared
        self._later: list[Job] = []

    def submit(self, job: Job) -> None:
        def progress(share: float, text: str) -> None:
            self.shown(job.name, share, text)

        self.done(job, _carried_out(job, self._shared, self.engine.device, self.engine.threads, progress))

    def later(self, job: Job) -> None:
        self._later.append(job)

    def finish(self) -> None:
        while self._later:
            self.submit(self._later.pop(0))


class RayExecutor(Executor):
    """Attacks as Ray tasks beside the running federation; a thread of the driver hands on what is ready.

    `shared` goes to the object store once. Where `at_most` is given, no more jobs are in flight, and who submits
    another waits: what jobs carry does not pile up.
    """

    def __init__(
        self, engine: EngineConfig, shown: Shown, done: Done, shared: Any = None, at_most: int | None = None
    ) -> None:
        super().__init__(engine, shown, done)
        import ray

        self._ray = ray
        self._board = ray.remote(num_cpus=0)(_Board).remote()
        gpus = engine.gpus_per_actor
        self._task = ray.remote(num_cpus=engine.threads, num_gpus=gpus, max_retries=2)(_ray_task)
        self._shared = ray.put(shared)
        self._at_most = at_most
        self._pending: dict[Any, Job] = {}
        self._later: deque[Job] = deque()
        self._last = threading.Event()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, name="answers", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        while self._at_most is not None and len(self._pending) >= self._at_most and self._error is None:
            self._stop.wait(_POLL_SECONDS / 4)
        if self._error is not None:
            raise self._error
        self._start(job)

    def later(self, job: Job) -> None:
        self._later.append(job)

    def _start(self, job: Job) -> None:
        where = self.engine.device, self.engine.threads
        self._pending[self._task.remote(job, self._shared, *where, self._board)] = job

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
                while self._later and (self._last.is_set() or not self._pending):
                    self._start(self._later.popleft())
                waiting = list(self._pending)
                if not waiting:
                    if self._last.is_set():
                        return
                    self._last.wait(_POLL_SECONDS)
                    continue
                ready, _ = self._ray.wait(waiting, timeout=_POLL_SECONDS)
                for name, share, text in self._ray.get(self._board.latest.remote()):
                    self.shown(name, share, text)
                while ready:  # its observations go with it
                    reference = ready.pop()
                    waiting.clear()
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
                    self._start(part)
                return
            cause = getattr(error, "cause", None)
            found = job.lost(reason(cause) if cause is not None else f"its worker was lost: {reason(error)}")
        self.done(job, found)


def _ray_task(job: Job, shared: Any, device: str, threads: int, board: Any) -> Any:
    def progress(share: float, text: str) -> None:
        board.post.remote(job.name, job.key, share, text)

    return _carried_out(job, shared, device, threads, progress)


class _Board:
    """Ray actor that holds the latest progress of each task."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str], tuple[float, str]] = {}

    def post(self, name: str, key: str, share: float, text: str) -> None:
        self._latest[name, key] = (share, text)

    def latest(self) -> list[tuple[str, float, str]]:
        news, self._latest = self._latest, {}
        return [(name, *shown) for (name, _), shown in news.items()]


def make_executor(
    engine: EngineConfig, shown: Shown, done: Done, shared: Any = None, at_most: int | None = None
) -> Executor:
    """The executor that goes with the engine.

    With `at_most` (:class:`RayExecutor`) the federation waits for jobs, so that a cluster must have room for one
    beside the clients' actors; where it has none, jobs are done in this process, with a line in the log.
    """
    if engine.name == "inline":
        return InlineExecutor(engine, shown, done, shared)
    if at_most is not None and not _room_beside(engine):
        log.warning(
            "the Ray cluster has no room for an attack beside the clients' actors: it runs in the driver"
        )
        return InlineExecutor(engine, shown, done, shared)
    return RayExecutor(engine, shown, done, shared, at_most)


def _room_beside(engine: EngineConfig) -> bool:
    import ray

    found, slack = ray.cluster_resources(), 1e-9
    cpus = engine.actors * engine.cpus_per_actor + engine.threads
    gpus = (engine.actors + 1) * engine.gpus_per_actor
    return bool(found.get("CPU", 0.0) + slack >= cpus and found.get("GPU", 0.0) + slack >= gpus)
