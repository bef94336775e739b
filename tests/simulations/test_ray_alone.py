"""A private Ray: nobody outside this machine is asked anything, and what ends it is said in a sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from simulations.engine import flower_internals as internals

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
SMALL = ("--dataset", "digits", "--model", "mlp", "--clients", "4", "--compressor", "none")


def command(run_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "simulations.run",
        *SMALL,
        "--actors",
        "1",
        "--run-dir",
        str(run_dir),
        *more,
    ]


def program(process: psutil.Process) -> str:
    """The name of what a process runs; empty where it has ended."""
    try:
        return os.path.basename((process.cmdline() or [""])[0])
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_address_but_loopback_is_connected_to(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace)]
    attack = ("--rounds", "2", "--attack", "ig", "--set", "ig.iterations=2", "--victims", "1")
    done = subprocess.run(
        [*strace, *command(tmp_path / "run", *attack)],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if "ptrace" in done.stderr and not (tmp_path / "run").exists():
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    text = trace.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', text)
    addresses = {v4 or v6 for v4, v6 in found}
    assert any(address == "127.0.0.1" for address in addresses), "Ray was not traced"
    assert not {
        one for one in addresses if not one.removeprefix("::ffff:").startswith("127.") and one != "::1"
    }


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("process", "words"),
    [("raylet", "Ray's raylet ended"), ("gcs_server", r"Ray's control process \(gcs_server\) ended")],
)
def test_a_killed_ray_ends_the_run_in_a_sentence(process: str, words: str, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    with output.open("w") as stream:
        run = subprocess.Popen(
            command(run_dir, "--rounds", "4000"), cwd=tmp_path, env=ENVIRONMENT, stdout=stream, stderr=stream
        )
        deadline = time.monotonic() + 200
        while len(list(run_dir.glob("journal/*"))) < 3 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        started = psutil.Process(run.pid).children(recursive=True)
        victims = [one for one in started if program(one) == process]
        try:
            assert len(victims) == 1, output.read_text(encoding="utf-8")
            victims[0].kill()
            killed = time.monotonic()
            assert run.wait(30) == 1
            assert time.monotonic() - killed < 10
        finally:
            run.kill()
            run.wait()
    sentence = rf"^error: {words}, and with it the run; start it again with the same settings and run folder"
    deadline = time.monotonic() + 20  # a process that outlives the run may say it
    while not re.search(sentence, output.read_text(encoding="utf-8"), re.M) and time.monotonic() < deadline:
        time.sleep(0.1)
    text = output.read_text(encoding="utf-8")
    assert re.search(sentence, text, re.M), text
    assert len(text.splitlines()) <= 3
    assert "Traceback" not in text
    # They see it within seconds, and where other tests run they wait for their turn.
    gone, alive = psutil.wait_procs(started, timeout=90)
    assert not alive, "what was started with the run has ended with it"
    assert gone


def test_what_a_version_of_ray_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RaySystemError

    from fedattack.config import EngineConfig
    from fedattack.errors import RunFailed
    from simulations.engine.ray_session import ray_session

    services = pytest.importorskip("ray._private.services")
    monkeypatch.delattr(services, "resolve_ip_for_localhost")
    wanted = r"Ray cannot be started here \(RuntimeError: ray 2\.\S+ lacks resolve_ip_for_localhost.*--engine inline"
    with pytest.raises(RunFailed, match=wanted), ray_session(EngineConfig(actors=1)):
        pass
    monkeypatch.undo()
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    wanted = r"Ray failed under the run \(RaySystemError: .*start it again"
    with pytest.raises(RunFailed, match=wanted), ray_session(EngineConfig(actors=1)):
        raise RaySystemError("System error: no store")


def test_what_a_version_of_flower_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedattack.config import Config
    from fedattack.errors import ConfigError
    from simulations.pipeline import simulate

    assert internals.MISSING == []
    monkeypatch.setattr(internals, "MISSING", ["flwr.supercore.run"])
    with pytest.raises(ConfigError, match=r"flwr 1\.\S+ lacks flwr\.supercore\.run, .* use `flwr run \.`"):
        simulate(Config.from_mapping({"engine": "inline"}))


def test_a_cluster_of_another_version_is_said_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedattack.config import EngineConfig
    from fedattack.errors import BadRequest
    from simulations.engine.ray_session import ray_session

    def refuse(**_: object) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.11.9\n"
            "This process on Ray Client was started with:\n    Ray: 2.55.1\n    Python: 3.11.9\n"
        )

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    wanted = (
        r"no Ray cluster could be joined there \(RuntimeError: Version mismatch: .*2\.40\.0.*2\.55\.1.*\)"
    )
    engine = EngineConfig(ray_address="auto")
    with pytest.raises(BadRequest, match=wanted), ray_session(engine):
        pass
