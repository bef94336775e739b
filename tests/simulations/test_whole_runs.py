"""Whole runs: killed and resumed, on Ray, from a wheel, and HCGLA's learned parts from the shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--dataset",
    "digits",
    "--image-size",
    "16",
    "--classes",
    "1000",
    "--clients",
    "4",
    "--attack",
    "hcgla",
]


def arguments(*more: str) -> list[str]:
    return [sys.executable, "-m", "simulations.run", *more]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)} | more


def run(*more: str, cwd: Path = ROOT, **variables: str) -> str:
    done = subprocess.run(
        arguments(*more), cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figures(folder: Path) -> dict[str, Any]:
    """What a run found, without what it took."""
    attack = json.loads((folder / "summary.json").read_text())["attacks"]["hcgla"]
    return {name: attack[name] for name in ("metrics", "floors", "k", "verdict")}


@pytest.mark.slow
@pytest.mark.ray
def test_every_engine_and_a_killed_run_find_the_same(tmp_path: Path) -> None:
    plain = [*SMALL, "--rounds", "3", "--attack-rounds", "1,3", "--set", "attack.victims_per_task=1"]
    run(*plain, "--engine", "inline", "--run-dir", str(tmp_path / "inline"))
    expected = figures(tmp_path / "inline")
    run(*plain, "--engine", "ray", "--actors", "2", "--run-dir", str(tmp_path / "ray"))
    assert figures(tmp_path / "ray") == expected
    # Killed after the first finished victim, then started again with the same command.
    folder = tmp_path / "killed"
    command = arguments(*plain, "--engine", "inline", "--run-dir", str(folder))
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list(folder.glob("parts/hcgla/*.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "summary.json").exists(), "the run must have been killed before its end"
    run(*plain, "--engine", "inline", "--run-dir", str(folder))
    assert figures(folder) == expected
    assert "resumed" in (folder / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_rounds_that_are_attacked_together_are_the_same_on_ray(tmp_path: Path) -> None:
    """Under error feedback a client's rounds are peeled one after the other, and travel together."""
    rounds = [*SMALL, "--rounds", "3", "--attack-rounds", "1,3", "--error-feedback", "--compressor", "topk",
              "--set", "hcgla.method=gauss-newton"]  # fmt: skip
    run(*rounds, "--engine", "inline", "--run-dir", str(tmp_path / "inline"))
    run(*rounds, "--engine", "ray", "--actors", "2", "--run-dir", str(tmp_path / "ray"))
    found = figures(tmp_path / "inline")
    assert figures(tmp_path / "ray") == found
    assert found["metrics"]["psnr"]["mean"] > 40


@pytest.mark.slow
def test_wheel_installs_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True)
    run(*SMALL, "--engine", "inline", "--run-dir", str(tmp_path / "run"), cwd=tmp_path, PYTHONPATH=str(place))
    assert "data:image/png" in (tmp_path / "run" / "report.html").read_text()
    shown = subprocess.run(
        [sys.executable, "-c", "import fedattack; print(fedattack.__file__)"],
        cwd=tmp_path, env=environment(PYTHONPATH=str(place)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(place) in shown.stdout


@pytest.mark.slow
def test_learned_parts_from_the_shell(tmp_path: Path) -> None:
    scene = ["--dataset", "digits", "--image-size", "16", "--classes", "1000", "--limit", "800"]
    pairs, denoiser, generator = (
        str(tmp_path / f"{n}.safetensors") for n in ("pairs", "denoiser", "generator")
    )
    run("hcgla", "collect-pairs", "--out", pairs, "--count", "48", "--iterations", "20", *scene)
    run("hcgla", "train-denoiser", pairs, "--out", denoiser, "--epochs", "20")
    assert "psnr" in run("hcgla", "test-denoiser", pairs, denoiser)
    run("hcgla", "train-generator", "--out", generator, "--epochs", "1", *scene)
    assert "psnr" in run("hcgla", "test-generator", generator, *scene)
    folder = tmp_path / "run"
    run(
        "--attack", "hcgla", "--engine", "inline", *scene, "--clients", "8", "--run-dir", str(folder),
        "--set", "hcgla.method=generator", "--set", f"hcgla.generator={generator}",
    )  # fmt: skip
    found = json.loads((folder / "summary.json").read_text())["attacks"]["hcgla"]
    # Through the same compressor, on people it never saw: better than the mean of what it was trained on.
    assert found["metrics"]["psnr"]["mean"] > found["floors"]["auxiliary mean"]["psnr"]["mean"] + 1
    folder = tmp_path / "start"
    run(
        "--attack", "hcgla", "--engine", "inline", *scene, "--clients", "8", "--run-dir", str(folder),
        "--set", "hcgla.method=matching", "--set", "hcgla.start=generator", "--set", f"hcgla.generator={generator}",
        "--set", f"hcgla.denoiser={denoiser}", "--set", "hcgla.denoise_every=20", "--set", "hcgla.iterations=60",
    )  # fmt: skip
    started = json.loads((folder / "summary.json").read_text())["attacks"]["hcgla"]
    assert started["metrics"]["psnr"]["mean"] > found["floors"]["auxiliary mean"]["psnr"]["mean"] + 1
    # A generator for another rate is refused.
    other = subprocess.run(
        arguments("--attack", "hcgla", "--engine", "inline", *scene, "--compression", "0.5",
                  "--set", "hcgla.method=generator", "--set", f"hcgla.generator={generator}",
                  "--run-dir", str(tmp_path / "x")),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert other.returncode == 2
    assert not (tmp_path / "x").exists()
