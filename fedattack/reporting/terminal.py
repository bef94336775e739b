"""What a run found, for the terminal: one headline, one table per family, every verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
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


def _cells(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    table = Table(width=width, box=box.SIMPLE_HEAD, padding=0)
    for index, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if index > 1 else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _table(family: Family, results: Sequence[AuditResult], width: int) -> Table:
    heading: dict[str, Any] = {"title": family.title, "title_justify": "left", "title_style": "bold"}
    table = Table(**heading, width=width, box=box.SIMPLE_HEAD, padding=0)
    columns = family.table_columns([result.summary for result in results])
    for index, name in enumerate([family.subject, *(name for name, _ in columns)]):
        # Headings are broken by hand, so that the columns are as narrow as their figures and nothing folds at 80.
        table.add_column(
            escape(name), justify="right" if index else "left", overflow="fold", no_wrap=index > 0
        )
    for result in results:
        table.add_row(escape(result.attack), *(escape(cell(result.summary)) for _, cell in columns))
    return table
