"""What a person sees while a run goes on: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from fedattack.storage import RunFolder

LINE_SECONDS = 30.0
"""Least seconds between two lines of a stage that goes on, where there is no terminal."""


def tell(console: Console, before: str, name: object = "", after: str = "") -> None:
    """Print a line in which nothing is markup and which is not broken; `name` stands out."""
    parts = [before, (str(name), "bold") if str(name) else "", after]
    console.print(Text(" ").join(Text.assemble(one) for one in parts if one), soft_wrap=True)


class _Shown(Protocol):
    """Where stages are shown."""

    def show(self, stage: str, share: float, text: str) -> None:
        """Show `share` of `stage` as done."""


class Stages:
    """The stages of a run, each shown as done by a share that never falls."""

    def __init__(self, console: Console, shown: _Shown | None) -> None:
        self._console, self._shown = console, shown
        self._shares: dict[str, float] = {}

    def __call__(self, stage: str, share: float, text: str = "") -> None:
        """Show `share` (0 to 1) of `stage` as done; it never goes back."""
        self._shares[stage] = max(self._shares.get(stage, 0.0), min(share, 1.0))
        if self._shown is not None:
            self._shown.show(stage, self._shares[stage], text)

    def say(self, text: str, folder: RunFolder) -> None:
        """Print a line that stays, and write it into the run's log."""
        folder.log(text)
        tell(self._console, text)


class _Bars:
    """One bar a stage; they appear when their stage begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def show(self, stage: str, share: float, text: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=1.0, note="")
        self._bars.update(self._tasks[stage], completed=share, note=text)


class _Lines:
    """A line when a stage begins, when it is done, and at most every :data:`LINE_SECONDS` in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, tuple[float, float]] = {}  # stage -> when the last line was, and when the first
        self._done: set[str] = set()

    def show(self, stage: str, share: float, text: str) -> None:
        now = time.monotonic()
        last, begun = self._told.get(stage, (-math.inf, now))
        over = share >= 1.0 and stage not in self._done
        if not over and (stage in self._done or now - last < LINE_SECONDS):
            return
        self._told[stage] = now, begun
        if over:
            self._done.add(stage)
        left = (
            f", about {clock((now - begun) * (1 - share) / share)} left"
            if 0 < share < 1 and now > begun
            else ""
        )
        line = f"{stage}: {share:.0%} in {clock(now - begun)}{left}{'; ' if text else ''}{text}"
        tell(self._console, line)


class _Left(ProgressColumn):
    """What is left of a stage at its speed so far."""

    def render(self, task: Task) -> Text:
        """``0:12 left`` of a stage that goes on."""
        done, elapsed = task.completed, task.elapsed
        if not done or elapsed is None or task.finished:
            return Text("")
        return Text(f"{clock(elapsed * (1 - done) / done)} left")


def clock(seconds: float) -> str:
    """``0:07``, ``12:40``, ``3:02:15``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


@contextmanager
def stages(console: Console) -> Iterator[Stages]:
    """Progress on `console` for the block: bars where it is a terminal, lines in a file or pipe, else nothing."""
    # A notebook would show moving bars only through a widget package, and a warning without it.
    if console.is_jupyter or console.quiet:
        yield Stages(console, None)
    elif not console.is_terminal:
        yield Stages(console, _Lines(console))
    else:
        columns = (
            TextColumn("{task.description:22}", markup=False),
            BarColumn(28),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console) as bars:
            yield Stages(console, _Bars(bars))
