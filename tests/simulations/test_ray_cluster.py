"""A cluster of two raylets with the dashboard, and a run that is submitted to it as a job."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from fedattack.config import Config
from simulations.engine.flower_internals import loopback_ray
from simulations.pipeline import simulate

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "aiohttp",
    "aiohttp_cors",
    "colorful",
    "opencensus",
    "opentelemetry.exporter.prometheus",
    "smart_open",
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_runs_on_two_nodes_and_comes_to_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in NEEDED:
        pytest.importorskip(
            module, reason="the dashboard needs ray[default]: pip install 'fedattack[cluster]'"
        )
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobStatus, JobSubmissionClient

    # Nine processes import half of Ray before the dashboard answers: minutes where the machine is busy.
    monkeypatch.setattr("ray._private.ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S", 240)
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    settings = {"dataset": "digits", "limit": 120, "model": "mlp", "clients": 4, "rounds": 2, "compressor": "none",
                "attack": "ig", "victims": 2, "ig.iterations": 5, "ig.restarts": 1}  # fmt: skip
    expected = simulate(
        Config.from_mapping(settings | {"engine": "inline", "run-dir": str(tmp_path / "here")})
    )
    run_dir, port = tmp_path / "shared" / "run", free_port()
    told = [f"--set {key}={value}" if "." in key else f"--{key} {value}" for key, value in settings.items()]
    entry = f"{sys.executable} -m simulations.run {' '.join(told)} --actors 2 --ray-address auto --run-dir {run_dir}"
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    board = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    with loopback_ray(dashboard=True):
        cluster = Cluster(initialize_head=True, head_node_args=node | {"num_cpus": 2} | board)
        try:
            cluster.add_node(**node)
            client = JobSubmissionClient(f"http://127.0.0.1:{port}")
            job = client.submit_job(entrypoint=entry)
            deadline = time.monotonic() + 240
            while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
                time.sleep(0.5)
            output = client.get_job_logs(job)
            assert client.get_job_status(job) == JobStatus.SUCCEEDED, output[-3000:]
        finally:
            cluster.shutdown()
    assert "report" in output
    found = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    metrics = expected.summary["attacks"]["ig"]["metrics"]
    assert found["attacks"]["ig"]["metrics"]["psnr"] == metrics["psnr"]
    assert found["headline"] == expected.summary["headline"]
