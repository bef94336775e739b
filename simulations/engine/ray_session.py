"""A Ray session: a local one, or a cluster that is joined."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fedattack.config import EngineConfig
from fedattack.errors import BadRequest, RunFailed
from simulations.engine import flower_internals as internals

_CONNECT_SECONDS = 10.0


def _reason(error: BaseException) -> str:
    """One line of a Ray error; of a traceback inside it, the last line."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no reason given"]
    return f"{type(cause).__name__}: {lines[-1] if 'error raised in its creation' in lines[0] else lines[0]}"


def _resources(found: Mapping[str, float]) -> str:
    return f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"


@contextmanager
def ray_session(engine: EngineConfig) -> Iterator[None]:
    """A Ray session for the block: the one that is there, the cluster at `ray_address`, or a private local one.

    The private one listens on the loopback interface only and has logical CPUs for all actors and for one attack
    beside them. Raises BadRequest where there is no cluster at `ray_address`, RunFailed where none can be started
    here.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if engine.ray_address is not None:
        _join(engine.ray_address)
    else:
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
        except (OSError, RuntimeError, ValueError) as error:
            hint = "set TMPDIR to a shorter folder, or " if "AF_UNIX" in str(error) else ""
            raise RunFailed(
                f"Ray cannot be started here ({_reason(error)}); {hint}use --engine inline, which needs no Ray"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise BadRequest(f"{refusal} ({_reason(error)})") from error
