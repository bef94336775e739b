"""Where a federation leaks its images: honest and malicious servers, training, batches, compression, on one map."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from fedattack.errors import ConfigError
from fedattack.reporting.frontier import worst_cells
from simulations.studies.frontier import run_frontier


def run(
    data: Path | None = None,
    quick: bool = False,
    out: Path | None = None,
    engine: str | None = None,
    long: bool = False,
) -> dict[str, Any]:
    """PSNR beside the floor of every applicable attack in every cell, as a table and a picture in ``--out``.

    CIFAR-10 (``--data`` FOLDER/CIFAR10). Started again with the same folder it does what is missing;
    ``--engine ray``: two cells at a time; ``--long``: further malicious servers.
    """
    if data is None or not data.is_dir():
        raise ConfigError("case 'frontier' needs CIFAR-10; give its folder, or the one above it, as --data")
    folder = data / "CIFAR10" if (data / "CIFAR10").is_dir() else data
    place = out or Path("runs") / "frontier"
    started = time.perf_counter()
    frame = run_frontier(
        folder, place, console=Console(stderr=True), quick=quick, engine=engine or "inline", long=long
    )
    cells = worst_cells(frame)
    above = [cell for cell in cells if cell.attack and cell.psnr > cell.floor]
    return {
        "cells": len(cells),
        "cells that leak by their verdict": sum(cell.level == "leak" for cell in cells),
        "cells above their floor": len(above),
        "cells where no attack applies": sum(not cell.attack for cell in cells),
        "seconds of this run": time.perf_counter() - started,
        "picture": str(place / "frontier.png"),
        "rows": frame.to_dict("records"),
    }
