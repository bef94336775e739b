"""What it costs to run a thousand clients: the engines against a bare training loop, and Flower's own dispatch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.models import initial_weights
from fedattack.rng import numpy_rng
from fedattack.training import local_update
from simulations.client_app import Workplace
from simulations.engine.environment import cpu_threads
from simulations.engine.federation import run_federation
from simulations.engine.local_grid import InlineGrid, LocalGrid
from simulations.engine.ray_grid import RayGrid
from simulations.engine.ray_session import ray_session

_SAMPLES = 16
_ACTORS = 2
_FLOWER_SECONDS = 1200.0

_SETTINGS = {
    "dataset": "digits",
    "image-size": 28,
    "model": "tiny-cnn",
    "protocol": "fedavg",
    "local-steps": 1,
    "batch-size": 0,
    "learning-rate": 0.05,
    "compressor": "none",
    "engine": "inline",
    "actors": _ACTORS,
    "threads": 1,
}


def run(quick: bool = False) -> dict[str, Any]:
    """1,000 clients a round: CPU-seconds of the process tree, own grids and Flower's, over a bare loop.

    A 9,098-parameter CNN, 16 digits a client, one SGD step, dense replies, no evaluation. All in one run, turn by
    turn, so that a busy machine is busy for all. Counted are user and system time of this process and of all that
    descend from it (Ray's daemons and actors included), between the ends of two rounds, after one round to warm up;
    starting Ray is not counted. The bare loop trains the same clients by the same function and averages the dense
    updates, without messages. `quick`: 50 clients, one round.

    CPU-seconds a round, their ratios to the bare loop, wall seconds, and all single rounds.
    """
    clients, rounds = (50, 1) if quick else (1000, 5)
    config, world = crowd(clients)
    place = Workplace.of(config, world)
    figures: dict[str, list[tuple[float, float]]] = {"bare": [], "inline": [], "ray": []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_threads(1))
        stack.enter_context(ray_session(config.engine))
        grids: dict[str, LocalGrid] = {"inline": InlineGrid(place), "ray": RayGrid(place)}
        for grid in grids.values():
            stack.callback(grid.close)
        for number in range(rounds + 1):
            turn: dict[str, tuple[float, float]] = {"bare": _timed(lambda: bare_round(place))}
            for name, grid in grids.items():
                turn[name] = _timed(lambda grid=grid: run_federation(config, world, grid=grid))  # type: ignore[misc]
            if number > 0:  # the first round warms up
                for name, figure in turn.items():
                    figures[name].append(figure)
    figures["flower"] = _flower(clients)
    return _table(figures) | {
        "clients": clients,
        "rounds": rounds,
        "parameters": sum(p.numel() for p in place.model.parameters()),
        "samples_per_client": _SAMPLES,
        "actors": _ACTORS,
        "single_rounds": {name: [list(figure) for figure in turns] for name, turns in figures.items()},
    }


def crowd(clients: int) -> tuple[Config, World]:
    """Settings and world of `clients` clients with 16 digits each; a digit may belong to several."""
    config = Config.from_mapping(_SETTINGS | {"clients": clients, "federation.evaluate": False})
    small = config.model_copy(update={"federation": config.federation.model_copy(update={"clients": 2})})
    world = build_world(small)
    rng = numpy_rng(0, "bench.clients")
    partitions = tuple(rng.choice(world.pools.clients, _SAMPLES, replace=False) for _ in range(clients))
    return config, dataclasses.replace(world, partitions=partitions)


def bare_round(place: Workplace) -> dict[str, torch.Tensor]:
    """One round without a framework: train every client, average the dense updates."""
    weights = initial_weights(place.scenario.model, place.config.seed)
    total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    count = 0
    everything = [np.arange(_SAMPLES)]
    for client in range(len(place.partitions)):
        images, labels = place.samples(client, everything[0])
        result = local_update(place.model, weights, images, labels, everything, place.scenario.training)
        count += result.num_examples
        for name, tensor in result.update.items():
            total[name].add_(tensor, alpha=result.num_examples)
    return {name: weights[name] + tensor / count for name, tensor in total.items()}


def tree_cpu_seconds() -> float:
    """User and system time of this process and all that descend from it."""
    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU-seconds of the process tree and wall seconds of `work`."""
    cpu, wall = tree_cpu_seconds(), time.perf_counter()
    work()
    return tree_cpu_seconds() - cpu, time.perf_counter() - wall


def _table(figures: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    middle = {name: statistics.median(cpu for cpu, _ in turns) for name, turns in figures.items()}
    table: dict[str, Any] = {f"{name}_cpu_s": value for name, value in middle.items()}
    table |= {f"{name}_over_bare": middle[name] / middle["bare"] for name in middle if name != "bare"}
    for name, turns in figures.items():
        table[f"{name}_wall_s"] = statistics.median(wall for _, wall in turns)
    return table


def _flower(clients: int) -> list[tuple[float, float]]:
    """Flower's own simulation, in a process of its own: it shuts Ray down when it ends."""
    finished = subprocess.run(
        [sys.executable, "-m", "simulations.bench.flower_native", str(clients), str(_ACTORS)],
        capture_output=True,
        text=True,
        timeout=_FLOWER_SECONDS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    for line in finished.stdout.splitlines():
        if line.startswith("{"):
            return [(figure["cpu_s"], figure["wall_s"]) for figure in [json.loads(line)]]
    raise RuntimeError(f"Flower's simulation gave no figures:\n{finished.stderr[-2000:]}")
