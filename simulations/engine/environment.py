"""The process environment that Flower, Ray and torch read when they are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SWITCHES = {
    # Flower: no telemetry, no update check, no package installation behind the user's back.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # Ray: no usage statistics; silence the warning about accelerators of actors that ask for none.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # At Ray's niceness of 15 actors starve on a busy machine: a round of seconds took minutes.
    "RAY_worker_niceness": "0",
    "HF_HUB_OFFLINE": "1",
    # Spinning OpenMP threads cost more than they give on small models and shared machines.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}


def prepare_environment() -> None:
    """Set the switches that are not already set. Call before importing flwr, ray or torch."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Have torch compute with `count` CPU threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
