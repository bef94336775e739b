"""What a person sees while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedattack.storage import RunFolder


class Stages:
    """One progress bar per stage; bars appear when their stage begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, share: float, text: str = "") -> None:
        """Show `share` (0 to 1) of `stage` as done; a bar never goes back."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=1.0, note="")
        task = self._bars.tasks[self._bars.task_ids.index(self._tasks[stage])]
        self._bars.update(self._tasks[stage], completed=max(task.completed, min(share, 1.0)), note=text)

    def say(self, text: str, folder: RunFolder) -> None:
        """Print a line that stays, and write it into the run's log."""
        folder.log(text)
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def stages(console: Console) -> Iterator[Stages]:
    """Progress bars on `console` for the block."""
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(28),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # A notebook would show moving bars only through a widget package, and a warning without it.
    with Progress(*columns, console=console, disable=console.is_jupyter) as bars:
        yield Stages(bars)
