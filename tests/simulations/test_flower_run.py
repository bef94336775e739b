"""``flwr run .``: its configuration is the project's, and it reaches what the engines here reach."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tutorial_figures import TUTORIAL, check_tutorial

from fedattack.config import SHORT_NAMES, Config, DataConfig
from fedattack.data import build_world, load_dataset
from fedattack.errors import ConfigError
from simulations.engine.environment import SWITCHES
from simulations.engine.federation import run_federation
from simulations.server_app import REPORT, WEIGHTS, report_folder

ROOT = Path(__file__).resolve().parents[2]
APP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]


def test_run_config_has_every_short_name_with_its_default() -> None:
    assert list(APP["config"]) == list(SHORT_NAMES)
    assert Config.from_mapping(APP["config"]) == Config()


def test_components_can_be_imported() -> None:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedattack.registry import Registry

    apps = Registry("app", APP["components"])
    assert isinstance(apps.get("clientapp"), ClientApp)
    assert isinstance(apps.get("serverapp"), ServerApp)


@pytest.mark.parametrize("run_dir", ["", "runs/mine"])
def test_a_relative_run_folder_is_refused(run_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"'output.run_dir' = .* needs an absolute path"):
        report_folder(Config.from_mapping({"run-dir": run_dir}))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a Flower of its own; what it leaves running is ended by process id."""
    home = str(tmp_path / "flwr")
    http, control = free_ports(2)
    environment = (
        os.environ
        | SWITCHES
        | {
            "FLWR_HOME": home,
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
        }
    )
    try:
        yield environment
    finally:
        end(home)


def end(home: str) -> None:
    """SIGTERM, then SIGKILL, for each process that was started with this FLWR_HOME."""
    ours = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == home:
                ours.append(process)
    for process in ours:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(ours, timeout=15)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=15)


def flwr_run(
    environment: dict[str, str], settings: dict[str, object], supernodes: int, app: Path = ROOT
) -> str:
    """Run it; returns the log. Its exit code says nothing (0 for failed runs too)."""
    override = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
    federation = (
        f"num-supernodes={supernodes} client-resources-num-cpus=1 client-resources-num-gpus=0.0 "
        "init-args-num-cpus=2"
    )
    finished = subprocess.run(
        ["flwr", "run", ".", "--stream", "--federation-config", federation, "-c", override],
        cwd=app,
        env=environment,
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    return finished.stdout + finished.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_flwr_run_reaches_the_result_of_the_engines_here(tmp_path: Path, flower: dict[str, str]) -> None:
    settings: dict[str, object] = {
        "dataset": "digits",
        "limit": 200,
        "model": "tiny-cnn",
        "clients": 5,
        "rounds": 3,
        "pretrain": 2,
        "participation": 0.6,
        "dropout": 0.2,
        "compression": 0.05,
        "error-feedback": True,
        "batch-size": 4,
        "seed": 6,
    }
    run_dir = tmp_path / "run"
    output = flwr_run(flower, settings | {"run-dir": str(run_dir)}, supernodes=6)
    assert (run_dir / REPORT).is_file(), output[-4000:]
    report = json.loads((run_dir / REPORT).read_text(encoding="utf-8"))
    assert report["status"] == "finished", report
    config = Config.from_mapping(settings | {"engine": "inline"})
    expected = run_federation(config, build_world(config))
    assert [r["clients"] for r in report["rounds"]] == [list(r.clients) for r in expected.rounds]
    assert [r["dropped"] for r in report["rounds"]] == [list(r.dropped) for r in expected.rounds]
    assert any(r.dropped for r in expected.rounds)
    assert all(r["failed"] == r["rejected"] == [] for r in report["rounds"])
    assert [r["wire_bytes"] for r in report["rounds"]] == [r.wire_bytes for r in expected.rounds]
    assert "verdict" not in output, "nothing was attacked"
    assert f"report: {run_dir / 'report.html'}" in output
    weights = load_file(run_dir / WEIGHTS)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)

    # The same Flower, too few nodes: the run fails, its exit code does not say so, its report does.
    failed = tmp_path / "failed"
    output = flwr_run(flower, settings | {"run-dir": str(failed), "clients": 9}, supernodes=6)
    assert (failed / REPORT).is_file(), output[-4000:]
    report = json.loads((failed / REPORT).read_text(encoding="utf-8"))
    assert report["status"] == "failed"
    assert "'federation.clients' = 9: Flower's federation has 6 nodes" in report["reason"]
    time.sleep(0.5)


@pytest.fixture
def photographs(shared_dir: Path, tmp_path: Path) -> str:
    """A file of 160 photographs: four clients train on 32 each."""
    archive = shared_dir / "data" / "CIFAR10" / "cifar-10-subset-python.tar.xz"
    dataset = load_dataset(DataConfig(name="cifar10", dir=str(archive), limit=160), seed=0)
    np.savez(tmp_path / "images.npz", images=dataset.images, labels=dataset.labels)
    return str(tmp_path / "images.npz")


@pytest.mark.slow
@pytest.mark.ray
def test_the_tutorials_app_is_attacked_under_flower(
    tmp_path: Path, flower: dict[str, str], photographs: str
) -> None:
    run_dir, app = tmp_path / "run", tmp_path / "app"
    shutil.copytree(TUTORIAL, app)
    environment = flower | {"PYTHONPATH": str(ROOT)}
    settings: dict[str, object] = {"images": photographs, "run-dir": str(run_dir)}
    settings |= {"iterations": 3, "fraction-evaluate": 0.0}
    output = flwr_run(environment, settings, supernodes=4, app=app)
    assert (run_dir / "final_model.pt").is_file(), output[-4000:]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    check_tutorial(summary, victims=4, level="partial")
    assert summary["headline"]["text"] in " ".join(output.split())
