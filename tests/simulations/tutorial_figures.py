"""The app of Flower's PyTorch tutorial, its data, and what an attack on it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TUTORIAL = Path(__file__).parent / "tutorial"


def check_tutorial(summary: dict[str, Any], victims: int, level: str) -> None:
    """One step on 32 images: all labels are read, no image; from some victims on that is a partial leakage."""
    found = summary["attacks"]["ig"]
    assert (found["count"], found["images"], found["failed"]) == (victims, 32 * victims, [])
    assert found["metrics"]["label_right"]["mean"] >= 0.9
    assert found["metrics"]["psnr"]["mean"] < found["floors"]["flat grey"]["psnr"]["mean"]
    assert summary["headline"]["level"] == level
    assert "batch 32, 1 local step" in summary["headline"]["assumptions"]
