"""What is shipped: metadata that indices accept, every data file, a source archive from which the demo runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("adversaries", "fedattack", "simulations", "strategies")


def test_classifiers_are_known_and_name_the_versions() -> None:
    known = pytest.importorskip("trove_classifiers").classifiers
    assert [one for one in PROJECT["classifiers"] if one not in known] == []
    assert {"Programming Language :: Python :: 3.11", "Typing :: Typed"} <= set(PROJECT["classifiers"])


def test_the_citation_is_of_this_version() -> None:
    citation = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_every_extra_is_in_the_table() -> None:
    table = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert [
        name for name in PROJECT["optional-dependencies"] if f"| `fedattack[{name}]` |" not in table
    ] == []


@pytest.mark.slow
def test_what_is_built_is_whole_and_the_demo_runs_from_the_source_archive(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    assert files - shipped == set()
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / source.name.removesuffix(".tar.gz")
    # The packages of the environment stand for those that `make` would install.
    # Under a `make` with options of its own, one called from here tells which folder it leaves.
    dry = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "demo"],
        cwd=tree, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    _, *command = shlex.split(dry.strip().splitlines()[-1])
    assert command[0] == "simulations/run.py"
    small = [
        "--engine",
        "inline",
        "--clients",
        "2",
        "--image-size",
        "16",
        "--classes",
        "1000",
        "--run-dir",
        "run",
    ]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command, *small], cwd=tree, env=alone, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tree / "run" / "summary.json").read_text(encoding="utf-8"))["attacks"]["hcgla"]
    assert found["metrics"]["psnr"]["mean"] > found["floors"][found["best_floor"]]["psnr"]["mean"] + 5
    assert (tree / "run" / "report.html").is_file()
