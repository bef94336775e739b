"""The ServerApp of ``flwr run .``: the same clients, strategy, attacks and report, on Flower's own engine.

The attacks run in the ServerApp's process. Flower's exit code is 0 even when a run failed, so what became of the run
is written to a file: ``flower-run.json`` in `run-dir`.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from safetensors.torch import save_file

from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import ConfigError, FedattackError
from fedattack.storage.plain import write_json
from simulations.engine.federation import FederationResult, serve
from simulations.engine.flower_grid import PartitionedGrid
from simulations.pipeline import simulate

REPORT = "flower-run.json"
WEIGHTS = "weights.safetensors"

log = logging.getLogger("flwr")
"""Flower's, whose lines ``flwr run --stream`` and ``flwr log`` show."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run's configuration, attacks and report included, and write down what became of it."""
    asked = Config.from_mapping(context.run_config)
    if asked.preset is not None:
        raise ConfigError(
            f"setting 'preset' = {asked.preset!r}: fills settings that are left open, and Flower's run-config leaves "
            f"none open; use `fedattack --preset {asked.preset}`, or give the settings of `fedattack settings "
            f"{asked.preset}` one by one"
        )
    run_dir = report_folder(asked)
    config = asked.model_copy(update={"engine": asked.engine.model_copy(update={"name": "inline"})})
    (run_dir / REPORT).unlink(missing_ok=True)

    def federate(config: Config, world: World, **how: Any) -> FederationResult:
        return serve(PartitionedGrid(grid, config.federation.clients), config, world, **how)

    try:
        run = simulate(config, console=Console(), command="flwr run .", federate=federate)
        result = run.federation
        assert result is not None
    except BaseException as error:
        reason = str(error) if isinstance(error, FedattackError) else f"{type(error).__name__}: {error}"
        write_json(run_dir / REPORT, {"status": "failed", "reason": reason})
        raise
    finish(run_dir, result)
    if headline := run.summary["headline"]:
        log.info("verdict: %s", headline["text"])
    log.info("report: %s", run_dir / "report.html")


def finish(run_dir: Path, result: FederationResult) -> None:
    """Write the final weights and the report of a run that came to its end."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_file(result.weights, run_dir / WEIGHTS)
    rounds = [dataclasses.asdict(record) for record in result.rounds]
    write_json(run_dir / REPORT, {"status": "finished", "rounds": rounds})


def report_folder(config: Config) -> Path:
    """The run folder, which must be an absolute path: the app runs from a copy that Flower makes of it."""
    if config.output.run_dir is None or not Path(config.output.run_dir).is_absolute():
        raise ConfigError(
            f"setting 'output.run_dir' = {config.output.run_dir!r}: `flwr run` needs an absolute path, "
            "for example -c 'run-dir=\"/tmp/my-run\"'"
        )
    return Path(config.output.run_dir)
