"""Keeping an optimisation's state in a file, so that a killed attack goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from fedattack.errors import DataError, RunFailed
from fedattack.reading import parsed_json
from fedattack.sealed import read_sealed, write_sealed

log = logging.getLogger("fedattack.checkpoint")

FORMAT = "fedattack matching 1"

SECONDS = 10.0
"""Time between two states where none is asked for: one costs more than many iterations of a small network."""

SHARE = 0.01
"""Of the time that passes, at most so much is spent on writing states."""


_FILES: ContextVar[tuple[Iterator[Path], float] | None] = ContextVar("checkpoints", default=None)
"""Where the next optimisations of one attack keep their states."""


@contextmanager
def checkpoints_in(folder: Path | None, seconds: float = SECONDS) -> Iterator[None]:
    """Let every optimisation in the block keep its state below `folder`, and go on from what it finds there.

    At least `seconds` pass between two states of one.

    What is kept leads to the same bits as an unbroken block only if the block asks the same again, in the same order.
    None: nothing is kept.
    """
    paths = None if folder is None else (folder / f"{number:04d}.safetensors" for number in count(1))
    token = _FILES.set(None if paths is None else (paths, seconds))
    try:
        yield
    finally:
        _FILES.reset(token)


def open_checkpoint(problem: Callable[[], str]) -> Checkpoint | None:
    """The next checkpoint in the folder of :func:`checkpoints_in`; None outside such a block."""
    if (found := _FILES.get()) is None:
        return None
    paths, seconds = found
    return Checkpoint(next(paths), problem, seconds)


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

    What cannot be read, belongs to something else or cannot be written is passed over with a warning: the
    answer is the same without. `problem` gives the :func:`digest` of what is solved; asked at the first
    state, for it costs a while.
    """

    def __init__(self, path: Path, problem: Callable[[], str], seconds: float) -> None:
        self.path, self._problem = path, cache(problem)
        self._last = self._asked = time.monotonic()
        self._pause = seconds

    def due(self) -> bool:
        """Whether it is time for another state; then the time that it takes to make and write it counts from here."""
        self._asked = time.monotonic()
        return self._asked - self._last >= self._pause

    def load(self, device: torch.device) -> dict[str, Tensor] | None:
        """The state that was kept, on `device`; None where there is none of use."""
        if not self.path.exists():
            return None
        try:
            held, told = read_sealed(self.path, self.path.stem)
            header = parsed_json(told.get("fedattack", "{}"))
        except (DataError, ValueError) as error:
            log.warning("an attack begins afresh: its state %s cannot be read (%s)", self.path, error)
            return None
        if (
            not isinstance(header, dict)
            or header.get("format") != FORMAT
            or header.get("problem") != self._problem()
        ):
            log.warning("an attack begins afresh: the state %s is of another problem", self.path)
            return None
        log.info("an attack goes on from its state after %d iterations", int(held["iteration"]))
        return {name: tensor.to(device) for name, tensor in held.items()}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state, whole or not at all."""
        header = {"fedattack": json.dumps({"format": FORMAT, "problem": self._problem()})}
        try:
            write_sealed(self.path, tensors, self.path.stem, metadata=header)
        except RunFailed as error:
            log.warning("no state of an attack is kept from here on: %s", error)
            self._pause = math.inf
        self._last = time.monotonic()
        self._pause = max(self._pause, (self._last - self._asked) / SHARE)
