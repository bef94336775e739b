"""What forgetting costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace


@dataclass
class Cost:
    """Counted by whoever does the work.

    `rounds`: of the federation; `client_steps`: optimiser steps that clients took; `gradients`: gradients over all of
    the holder's samples, one a forward and backward pass over as many samples; `bytes`: sent by clients;
    `cpu_seconds`: of this process.
    """

    rounds: int = 0
    client_steps: int = 0
    gradients: float = 0.0
    bytes: int = 0
    cpu_seconds: float = 0.0

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """Count the block's seconds."""
        started = time.process_time()
        try:
            yield
        finally:
            self.cpu_seconds += time.process_time() - started

    def since(self, earlier: Cost) -> Cost:
        """What came on top of an `earlier` copy."""
        before = asdict(earlier)
        return Cost(**{name: value - before[name] for name, value in asdict(self).items()})

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        more = asdict(other)
        return Cost(**{name: value + more[name] for name, value in asdict(self).items()})

    def copy(self) -> Cost:
        """As it stands now."""
        return replace(self)
