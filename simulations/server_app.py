"""The ServerApp of ``flwr run .``: the same clients and strategy, on Flower's own engine.

Flower's exit code is 0 even when a run failed, so what became of the run is written to a file:
``flower-run.json`` in `run-dir`.
"""

from __future__ import annotations

from simulations.environment import prepare_environment

prepare_environment()

import dataclasses  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from flwr.app import Context  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fedattack.config import Config  # noqa: E402
from fedattack.data import build_world  # noqa: E402
from fedattack.errors import ConfigError, FedattackError  # noqa: E402
from simulations.federation import FederationResult, serve  # noqa: E402
from simulations.grid import PartitionedGrid  # noqa: E402

REPORT = "flower-run.json"
WEIGHTS = "weights.safetensors"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the federation of the run's configuration and write down what became of it."""
    config = Config.from_mapping(context.run_config)
    run_dir = report_folder(config)
    try:
        world = build_world(config)
        result = serve(PartitionedGrid(grid, config.federation.clients), config, world, run_dir=run_dir)
    except BaseException as error:
        reason = str(error) if isinstance(error, FedattackError) else f"{type(error).__name__}: {error}"
        _write(run_dir, {"status": "failed", "reason": reason})
        raise
    finish(run_dir, result)


def finish(run_dir: Path, result: FederationResult) -> None:
    """Write the final weights and the report of a run that came to its end."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_file(result.weights, run_dir / WEIGHTS)
    rounds = [dataclasses.asdict(record) for record in result.rounds]
    _write(run_dir, {"status": "finished", "rounds": rounds})


def report_folder(config: Config) -> Path:
    """The run folder.

    Raises
    ------
    ConfigError
        If it is not an absolute path: the app runs from a copy that Flower makes of it.
    """
    if config.output.run_dir is None or not os.path.isabs(config.output.run_dir):
        raise ConfigError(
            f"setting 'output.run_dir' = {config.output.run_dir!r}: `flwr run` needs an absolute path, "
            "for example -c 'run-dir=\"/tmp/my-run\"'"
        )
    return Path(config.output.run_dir)


def _write(run_dir: Path, report: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / (REPORT + ".part")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / REPORT)
