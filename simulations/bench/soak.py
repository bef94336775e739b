"""Whether memory grows with rounds times model size where an attack reads every round."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fedattack.config import Config
from fedattack.data import World
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.pipeline import simulate

_SETTINGS = {
    "dataset": "cifar10",
    "model": "resnet20",
    "attack": "fedmia",
    "clients": 100,
    "rounds": 100,
    "engine": "inline",
    "federation.evaluate": False,
}
_QUICK = {"dataset": "digits", "model": "tiny-cnn", "clients": 8, "rounds": 12}


def run(quick: bool = False, data: Path | None = None, rounds: int = 100) -> dict[str, Any]:
    """10,000 updates of ResNet-20 under `fedmia`: the driver's memory after round 100 beside that after round 10.

    ``resident_mib`` after each round, and ``grown_mib``: after the last one, less after round 10. `data` holds
    CIFAR10/, needed unless `quick` (8 clients on digits, 12 rounds); `rounds` is more than 10.
    """
    process, resident = psutil.Process(), []

    def federate(config: Config, world: World, **how: Any) -> FederationResult:
        on_round = how.pop("on_round")

        def after(record: RoundRecord) -> None:
            on_round(record)
            gc.collect()
            resident.append(process.memory_info().rss / 2**20)

        return run_federation(config, world, on_round=after, **how)

    more: dict[str, Any] = _QUICK if quick else {"rounds": rounds, "data-dir": str(data or "")}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = Config.from_mapping(_SETTINGS | more | {"run-dir": f"{folder}/run"})
        audit = simulate(config, federate=federate).audits["fedmia"]
    return {
        "grown_mib": resident[-1] - resident[9],
        "resident_mib": [round(value, 1) for value in resident],
        "updates": config.federation.clients * config.federation.rounds,
        "auc": audit.summary["metrics"]["auc"]["mean"],
        "seconds": time.perf_counter() - started,
    }
