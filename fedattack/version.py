"""Which version this is; imports nothing."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path


def fedattack_version() -> str:
    """The installed version, or that of the checkout the code runs from."""
    try:
        return installed("fedattack")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        if not project.is_file():
            return "unknown"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]) + " (checkout)"
