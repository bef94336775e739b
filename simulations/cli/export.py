"""``fedattack export``: a finished run's figures for an experiment tracker."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedattack.errors import ConfigError, RunFailed, unknown_name
from fedattack.reporting.finished import Finished
from fedattack.reporting.tracking import Tracked, tracked
from simulations.progress import tell

MISSING = "--to mlflow needs mlflow, which is not installed; install it with: pip install 'fedattack[mlflow]'"
_MOST = 100
"""Parameters of one call; MLflow takes no more."""


def run_export(
    runs: Sequence[Path], to: str, uri: str | None, experiment: str, pictures: bool, console: Console
) -> None:
    """Export finished runs, each as a run of the tracker; with `pictures` the report and figures too.

    Those show private images; without them nothing of a person leaves the folder.
    """
    if to not in TRACKERS:
        raise unknown_name("tracker", to, TRACKERS)
    found = [Finished.read(run) for run in runs]
    if not found:
        raise ConfigError("export needs a run; none is given")
    for run, told in zip(found, TRACKERS[to](found, uri, experiment, pictures), strict=True):
        tell(console, "exported", run.path, f"as {told}")


def _to_mlflow(runs: Sequence[Finished], uri: str | None, experiment: str, pictures: bool) -> list[str]:
    """Log each run with MLflow's client; what each is called there."""
    # It would tell its makers that it is used; nothing leaves this machine but what was asked for.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a wrong address is told within seconds
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ConfigError(MISSING) from error
    where = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{Path('mlruns').resolve()}"
    if where.startswith("file:"):  # kept, though MLflow advises a database: it needs no other package
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        client = MlflowClient(tracking_uri=where)
        known = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if known is None else known.experiment_id
        return [_log(client, run, number, where, pictures, (Metric, Param)) for run in runs]
    except MlflowException as error:
        raise RunFailed(f"MLflow at {where} refuses: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:
        raise RunFailed(f"cannot reach MLflow at {where}: {error}") from error


def _log(
    client: Any, run: Finished, experiment: str, where: str, pictures: bool, kinds: tuple[Any, Any]
) -> str:
    metric, param = kinds
    told: Tracked = tracked(run)
    made = client.create_run(experiment, run_name=told.name, tags=told.tags)
    key = made.info.run_id
    started = made.info.start_time
    values = [metric(name, value, started, 0) for name, value in told.metrics.items()]
    values += [
        metric(name, value, started, step) for name, held in told.rounds.items() for step, value in held
    ]
    parameters = [param(name, value) for name, value in told.params.items()]
    for start in range(0, max(len(values), len(parameters)), _MOST):
        part = slice(start, start + _MOST)
        client.log_batch(key, metrics=values[part], params=parameters[part])
    client.log_artifact(key, str(run.path / "summary.json"))
    if pictures:
        client.log_artifact(key, str(run.path / "report.html"))
        if (run.path / "figures").is_dir():
            client.log_artifacts(key, str(run.path / "figures"), "figures")
    client.set_terminated(key)
    return f"run {key} of experiment {experiment} at {where}"


TRACKERS: dict[str, Callable[[Sequence[Finished], str | None, str, bool], list[str]]] = {"mlflow": _to_mlflow}
