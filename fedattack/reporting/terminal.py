"""What a run found, for the terminal: one headline, one table per family, every verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedattack.audit.family import AuditResult, Family, by_family, get_family, headline, told_together

STYLES = {"leak": "bold red", "partial": "bold yellow", "none": "bold green"}
STYLES |= {"undecided": "bold", "failed": "bold"}
WIDTH = 100


def print_summary(
    console: Console, results: Sequence[AuditResult], federation: Mapping[str, Any] | None = None
) -> None:
    """Print the headline, a table per family with each score beside its floor, and every verdict below."""
    width = min(WIDTH, console.width)
    if top := headline(results, federation):
        console.print(Text(top["text"], style=STYLES[top["level"]]), width=width)
    for family, chosen in by_family(results):
        console.print(_table(family, chosen, width))
        if (more := family.beyond(chosen)) is not None:
            console.print(_cells(*more, width))
    for result in results:
        words, separator, rest = result.verdict.partition(":")
        style = STYLES[result.level]
        line = Text.from_markup(f"[bold]{escape(result.attack)}[/]  [{style}]{escape(words)}[/]{separator}")
        line.append(rest)
        console.print(line, width=width)
        if result.threat.get("letters"):
            letters = ", ".join(result.threat["letters"])
            console.print(Text(f"  seen as {result.threat.get('seat', '')}: {letters}"))
        for sentence in get_family(result.family).beside(result):
            console.print(Padding(Text(sentence), (0, 0, 0, 2)), width=width)
    for figures in told_together(results).values():
        console.print(Text(figures["text"], style="bold"), width=width)


def print_answers(console: Console, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Print (attack, observation, certificate, labels) of reconstructions that nobody scored."""
    if rows:
        console.print(
            _cells(("attack", "observation", "certificate", "labels"), rows, min(WIDTH, console.width))
        )


def _cells(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """A table whose later columns fold where it is narrow; what the first holds is never broken."""
    named = max(map(cell_len, (columns[0], *(row[0] for row in rows))))
    if width - named < _LEAST * (len(columns) - 1):
        return _stacked(columns, rows)
    table = Table(width=width, box=box.SIMPLE_HEAD, padding=0)
    for index, name in enumerate(columns):
        kept: dict[str, Any] = {"no_wrap": True} if not index else {"overflow": "fold"}
        table.add_column(escape(name), justify="right" if index > 1 else "left", **kept)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


_LEAST = 8
"""Characters of a column that folds, at least."""


def _stacked(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """What is too wide for a table: of each row its name, and a line for every other column."""
    grid = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, *cells in rows:
        grid.add_row(Text(name, style="bold"), "")
        for column, cell in zip(columns[1:], cells, strict=True):
            grid.add_row(Text(f"  {' '.join(column.split())}"), Text(" ".join(cell.split("\n"))))
    return grid


def _table(family: Family, results: Sequence[AuditResult], width: int) -> RenderableType:
    columns = family.table_columns([result.summary for result in results])
    heads = [family.subject, *(name for name, _ in columns)]
    rows = [[result.attack, *(cell(result.summary) for _, cell in columns)] for result in results]
    widths = [
        max(cell_len(part) for text in column for part in text.split("\n"))
        for column in zip(heads, *rows, strict=True)
    ]
    if sum(widths) + len(widths) > width:
        return Group(Text(family.title, style="bold"), "", _stacked(heads, rows), "")
    heading: dict[str, Any] = {"title": family.title, "title_justify": "left", "title_style": "bold"}
    table = Table(**heading, width=width, box=box.SIMPLE_HEAD, padding=0)
    for index, name in enumerate(heads):
        # Headings are broken by hand, so that the columns are as narrow as their figures and nothing folds at 80.
        table.add_column(escape(name), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
