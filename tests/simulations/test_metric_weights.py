"""Metrics with weight files in a run: refused before anything starts, or named in what the run leaves behind."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedattack.metrics.weights import sha256
from simulations.run import main

SMALL = [
    "--attack", "analytic", "--dataset", "digits", "--image-size", "32", "--model", "mlp", "--compression", "1",
    "--clients", "2", "--victims", "2", "--engine", "inline", "--threads", "1",
]  # fmt: skip


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to open a connection, none of which succeeds."""
    tried: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedattack", *SMALL, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--metrics", "psnr,lpips"], "'squeezenet1_1-b8a52dc0.pth' is needed, and neither setting"),
        (["--metrics", "lpips", "--set", "metric.lpips.net=vgg"], "'vgg16-397923af.pth' is needed"),
        (["--metrics", "dists", "--set", "metric.weights_dir=there"], "'vgg16-397923af.pth' is not in there"),
        (
            ["--metrics", "frechet", "--set", "metric.frechet.model=resnet20"],
            "'metric.frechet.weights' is not set",
        ),
        (["--metrics", "feature-distance", "--set", "metric.model=nowhere:Net"], "cannot load embedding"),
    ],
)
def test_a_missing_weight_file_is_refused_before_anything_starts(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connections: list[Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDATTACK_WEIGHTS", raising=False)
    monkeypatch.setenv("COLUMNS", "300")

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a refused request trained or attacked")

    monkeypatch.setattr("simulations.pipeline.run_federation", start)
    assert command(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert part in told
    assert len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert not connections


@pytest.mark.slow
def test_a_run_says_by_which_weights_it_scored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connections: list[Any],
) -> None:
    pytest.importorskip("lpips", reason="the extra 'perceptual' is not installed")
    from torchvision.models import squeezenet1_1

    torch.manual_seed(3)
    trunk = tmp_path / "weights" / "squeezenet1_1-b8a52dc0.pth"
    trunk.parent.mkdir()
    torch.save(squeezenet1_1(weights=None).state_dict(), trunk)
    monkeypatch.setenv("FEDATTACK_WEIGHTS", str(trunk.parent))
    folder = tmp_path / "run"
    names = "psnr,lpips,lite-features,feature-distance,frechet"
    assert command(monkeypatch, "--metrics", names, "--run-dir", str(folder)) == 0
    table = capsys.readouterr().out
    assert "[sque" in table  # shown, not taken for markup
    assert "[lite" in table
    told = json.loads((folder / "summary.json").read_text())["attacks"]["analytic"]
    for name in names.split(","):
        assert told["metrics"][name]["mean"] is not None, name
    assert told["metrics"]["lpips"]["mean"] < told["floors"]["flat grey"]["lpips"]["mean"]
    assert told["metrics"]["lite-features"]["mean"] < told["floors"]["flat grey"]["lite-features"]["mean"]
    text = (folder / "summary.json").read_text()
    assert sha256(trunk) in text
    assert "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db" in text
    page = (folder / "report.html").read_text()
    for heading in (
        "LPIPS[squeeze, other weights]",
        "feature distance[lite-features]",
        "frechet[lite-features]",
    ):
        assert heading in page
    assert not [address for address in connections if not isinstance(address, str)]
