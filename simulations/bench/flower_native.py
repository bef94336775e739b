"""The same clients and the same strategy on Flower's own simulation engine, for comparison with the grids here.

``python -m simulations.bench.flower_native CLIENTS ACTORS`` prints one JSON line: CPU-seconds of the process tree and
wall seconds of the second of two rounds.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from functools import lru_cache

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedattack.models import initial_weights
from simulations.bench.clients import crowd, tree_cpu_seconds
from simulations.client_app import Workplace, open_workplace, train
from strategies import Eavesdropper, RoundReport, build_strategy
from strategies.messages import to_record

_CLIENTS = "FEDATTACK_BENCH_CLIENTS"
_ROUNDS = 2

client_app = ClientApp()
server_app = ServerApp()


@lru_cache(maxsize=1)
def _open(run_id: int) -> None:
    torch.set_num_threads(1)
    open_workplace(run_id, Workplace.of(*crowd(int(os.environ[_CLIENTS]))))


@client_app.train()
def train_here(message: Message, context: Context) -> Message:
    """The project's client, in a process that Flower started."""
    _open(context.run_id)
    return train(message, context)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Two rounds, of which the second is measured."""
    config, world = crowd(int(os.environ[_CLIENTS]))
    marks: list[tuple[float, float]] = []

    def on_round(report: RoundReport) -> None:
        if len(report.clients) != config.federation.clients:
            raise RuntimeError(f"{len(report.clients)} of {config.federation.clients} clients were accepted")
        marks.append((tree_cpu_seconds(), time.perf_counter()))

    strategy = Eavesdropper(
        build_strategy(config.federation, config.training.learning_rate), world.scenario, on_round=on_round
    )
    weights = initial_weights(world.scenario.model, config.seed)
    strategy.start(grid, to_record(weights), num_rounds=_ROUNDS, timeout=3600.0)
    (cpu, wall), (cpu_after, wall_after) = marks[-2:]
    print(json.dumps({"cpu_s": cpu_after - cpu, "wall_s": wall_after - wall}), flush=True)


def run_here(clients: int, actors: int) -> None:
    """The comparison in this process; by name, so that Flower's pickling does not carry this module's globals."""
    os.environ[_CLIENTS] = str(clients)
    from flwr.simulation import run_simulation

    from simulations.bench import flower_native as importable

    logging.getLogger("flwr").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run_simulation(
            server_app=importable.server_app,
            client_app=importable.client_app,
            num_supernodes=clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": actors, "include_dashboard": False, "address": "local"},
            },
        )


if __name__ == "__main__":
    run_here(int(sys.argv[1]), int(sys.argv[2]))
