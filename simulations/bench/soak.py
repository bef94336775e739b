"""Whether memory grows with rounds times model size where attacks read every round."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from fedattack.config import Config
from fedattack.data import World
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.pipeline import simulate

_LOSSES = "adversaries.membership.updates.fedmia:FedMIA"
_SETTINGS = {
    "dataset": "cifar10",
    "model": "resnet20",
    "attack": ("fedmia", _LOSSES),
    "FedMIA.statistic": "loss",
    "clients": 100,
    "compressor": "none",
    "batch-size": 4,
    "attack.targets": (0,),
    "candidates": 20,
    "data.auxiliary_size": 0,
    "federation.evaluate": False,
}
_QUICK = {"dataset": "digits", "model": "tiny-cnn", "clients": 8}


def run(
    quick: bool = False, data: Path | None = None, rounds: int = 10, engine: str = "inline"
) -> dict[str, Any]:
    """1,000 dense updates of ResNet-20 under two statistics: the driver's memory after each round.

    ``resident_mib`` after each round, of which ``shared_mib`` lies in Ray's store and is every process's; and
    ``grown_mib``: resident after the last round, less after round 2. `data` holds CIFAR10/, needed unless `quick` (8
    clients on digits). `engine`: inline or ray.
    """
    process, resident, shared = psutil.Process(), [], []

    def federate(config: Config, world: World, **how: Any) -> FederationResult:
        on_round = how.pop("on_round")

        def after(record: RoundRecord) -> None:
            on_round(record)
            gc.collect()
            memory = process.memory_info()
            resident.append(memory.rss / 2**20)
            shared.append(getattr(memory, "shared", 0) / 2**20)

        return run_federation(config, world, on_round=after, **how)

    more: dict[str, Any] = _QUICK if quick else {"data-dir": str(data or "")}
    more |= {"rounds": rounds, "engine": engine}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = Config.from_mapping(_SETTINGS | more | {"run-dir": f"{folder}/run"})
        audit = simulate(config, federate=federate).audits["fedmia"]
    return {
        "grown_mib": resident[-1] - resident[1],
        "resident_mib": [round(value, 1) for value in resident],
        "shared_mib": [round(value, 1) for value in shared],
        "updates": config.federation.clients * config.federation.rounds,
        "candidates": audit.summary["count"],
        "auc": audit.summary["metrics"]["auc"]["mean"],
        "seconds": time.perf_counter() - started,
    }
