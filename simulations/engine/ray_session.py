"""A Ray session: a local one, or a cluster that is joined."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from fedattack.config import EngineConfig
from fedattack.errors import BadRequest, FedattackError, RunFailed
from simulations.engine import flower_internals as internals

log = logging.getLogger("fedattack.ray")

_CONNECT_SECONDS = 10.0
_WATCH_SECONDS = 0.05
_RAYLET = "Ray's raylet ended"
_RESUME = "start it again with the same settings and run folder, and it goes on"


def _reason(error: BaseException) -> str:
    """One line of a Ray error; of a traceback inside it, the last line."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no reason given"]
    if lines[0].startswith("Version mismatch"):
        return f"{type(cause).__name__}: {' '.join(lines)}"
    return f"{type(cause).__name__}: {lines[-1] if 'error raised in its creation' in lines[0] else lines[0]}"


def _resources(found: Mapping[str, float]) -> str:
    return f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"


@contextmanager
def ray_session(engine: EngineConfig) -> Iterator[None]:
    """A Ray session for the block: the one that is there, the cluster at `ray_address`, or a private local one.

    The private one listens on the loopback interface only, asks nobody else anything, and has logical CPUs for all
    actors and for one attack beside them. Raises BadRequest where there is no cluster at `ray_address`, RunFailed
    where none can be started here, or it fails under what is in the block. Where a process that Ray cannot do without
    ends, this one ends too, as Ray would have it, but at once and with a sentence; its exit code is 1.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if engine.ray_address is not None:
        _join(engine.ray_address)
    else:
        _start(engine)
    over, witness = threading.Event(), _Witness(internals.raylet_pid())
    told = internals.ray_lifelines(), over, witness
    watch = threading.Thread(target=_watch, args=told, name="ray", daemon=True)
    watch.start()
    try:
        with internals.ray_told_to(lambda text: log.info("Ray: %s", text)):
            yield
    except ray.exceptions.RayError as error:
        if isinstance(error, FedattackError):  # what failed in a task is itself, too
            raise
        raise RunFailed(f"Ray failed under the run ({_reason(error)}); {_RESUME}") from error
    finally:
        over.set()
        watch.join()
        witness.dismiss()
        ray.shutdown()


def _start(engine: EngineConfig) -> None:
    """A private Ray."""
    import ray

    cpus = math.ceil(engine.actors * engine.cpus_per_actor) + engine.threads
    try:
        with internals.loopback_ray() as address:
            ray.init(
                address="local",
                num_cpus=max(1, cpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                **address,
            )
    except Exception as error:  # of whatever kind: a file system, a limit, a binary that does not run here
        ray.shutdown()
        hint = "set TMPDIR to a shorter folder, or " if "AF_UNIX" in str(error) else ""
        raise RunFailed(
            f"Ray cannot be started here ({_reason(error)}); {hint}use --engine inline, which needs no Ray"
        ) from error


class _Witness:
    """A process that says that the raylet has ended where Ray ends this one for it, without a word of Python's."""

    _SEES = """
import os, sys
said = sys.stdin.read()
try:
    os.kill(int(sys.argv[1]), 0)
    with open(f"/proc/{sys.argv[1]}/stat") as file:
        ended = file.read().rpartition(")")[2].split()[0] == "Z"
except ProcessLookupError:
    ended = True
except OSError:
    ended = False
if ended and not said:
    print(sys.argv[2], file=sys.stderr)
"""

    def __init__(self, raylet: int | None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if raylet is not None:
            sentence = f"error: {_RAYLET}, and with it the run; {_RESUME}"
            command = [sys.executable, "-I", "-S", "-c", self._SEES, str(raylet), sentence]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def dismiss(self) -> None:
        """Have it say nothing any more."""
        if self._process is not None:
            with suppress(OSError):
                self._process.communicate(b"done")
            self._process = None


def _watch(lifelines: Mapping[str, Callable[[], bool]], over: threading.Event, witness: _Witness) -> None:
    """End this process where one of Ray's has ended, before Ray does: after a minute, and with its own log."""
    while not over.wait(_WATCH_SECONDS):
        for gone, alive in lifelines.items():
            if not alive() and not over.is_set():
                witness.dismiss()
                _end(f"{gone}, and with it the run; {_RESUME}")


def _end(sentence: str) -> None:
    """Say why, end what is left of Ray, and this process: Ray's own threads would, from outside of Python."""
    log.error(sentence)
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    internals.end_ray()
    os._exit(1)


def _join(address: str) -> None:
    """Join the Ray cluster at "host:port", or with "auto" the one that ``ray start`` left on this machine."""
    import ray

    refusal = f"setting 'engine.ray_address' = {address!r}: no Ray cluster could be joined there"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise BadRequest(f"{refusal}; expected HOST:PORT of its head node, or 'auto'")
        try:  # ray.init alone would try for many minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise BadRequest(f"{refusal} ({error})") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        ray.shutdown()
        raise BadRequest(f"{refusal} ({_reason(error)})") from error
