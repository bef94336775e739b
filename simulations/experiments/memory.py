"""How much memory a process really held while it did something."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_EVERY = 0.05
"""Seconds between two looks: arrays that last no longer are missed."""


class Peak:
    """The most resident memory that was seen, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self.look()

    def look(self) -> None:
        """See how much it is now."""
        self.bytes = max(self.bytes, int(self._process.memory_info().rss))


@contextmanager
def watched() -> Iterator[Peak]:
    """Watch this process inside the block."""
    peak, over = Peak(), threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            peak.look()

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak.look()
