"""Keeping an optimisation's state in a file, so that a killed attack goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedattack.errors import ConfigError, DataError
from fedattack.files import write_tensors

FORMAT = "fedattack matching 1"

SECONDS = 30.0
"""Least time between two states: writing one costs more than many iterations of a small network."""


def digest(words: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """SHA-256 of what makes a problem: texts, and the bytes and shapes of tensors."""
    found = hashlib.sha256()
    for word in words:
        found.update(word.encode() + b"\0")
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Checkpoint:
    """One file with the tensors of one optimisation, replaced as a whole.

    Parameters
    ----------
    path : str or Path
    problem : str
        :func:`digest` of what is solved.
    """

    def __init__(self, path: str | Path, problem: str) -> None:
        self.path = Path(path)
        self._problem = problem
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another state."""
        return time.monotonic() - self._last >= SECONDS

    def load(self, device: torch.device) -> dict[str, Tensor] | None:
        """The state that was kept, on `device`; None where there is no file.

        Raises
        ------
        DataError
            If the file cannot be read.
        ConfigError
            If it belongs to another problem.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("fedattack", "{}"))
                # Cloned, because kernels may round differently where memory is not aligned as they like it.
                tensors = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(
                f"checkpoint {str(self.path)!r} cannot be read ({error}): delete it to begin afresh"
            ) from None
        if header.get("format") != FORMAT or header.get("problem") != self._problem:
            raise ConfigError(
                f"checkpoint {str(self.path)!r} belongs to other updates, settings, starts or another device: delete "
                "it to begin afresh, or name another file"
            )
        return tensors

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state, whole or not at all.

        Raises
        ------
        RunFailed
            If it cannot be written; the previous one is kept.
        """
        header = {"fedattack": json.dumps({"format": FORMAT, "problem": self._problem})}
        write_tensors(self.path, tensors, header)
        self._last = time.monotonic()
