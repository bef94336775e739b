"""Whether ``catalogue.json`` was written from the sources that are here."""

from __future__ import annotations

import hashlib
from pathlib import Path

FILE = Path(__file__).with_name("catalogue.json")
_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("fedattack", "adversaries", "strategies", "simulations/cli", "simulations/experiments")


def sources_hash() -> str:
    """SHA-256 over the sources that the catalogue is worked out from: their paths and contents, line ends aside."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            content = path.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{path.relative_to(_ROOT).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
