"""``fedattack compare``: finished runs beside each other."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedattack.errors import ConfigError
from fedattack.files import write_bytes
from fedattack.reporting.compare import Comparison, compare, comparison_page, difference_rows, figure_rows
from simulations.progress import tell


def run_compare(
    runs: Sequence[Path], out: Path | None, as_json: bool, console: Console, command: str
) -> None:
    """Compare runs: a table and a page (`out`, by default compare.html), or JSON as the only output."""
    begun = datetime.datetime.now(datetime.UTC)
    if out is not None and (out.is_dir() or out.suffix.lower() not in (".html", ".htm")):
        raise ConfigError(
            f"--out {str(out)!r}: is no .html file; give the name of the page, for example compare.html"
        )
    found = compare(runs)
    if out is not None or not as_json:
        out = out or Path("compare.html")
        write_bytes(out, comparison_page(found, command, begun).encode())
    if as_json:
        sys.stdout.write(json.dumps(found.document, indent=1, allow_nan=False) + "\n")
        return
    show(found, console)
    tell(console, "page", out)


def show(found: Comparison, console: Console) -> None:
    """Print what differs, as tables."""
    c = found.document
    names = [run["name"] for run in c["runs"]]
    console.print(Text(c["text"], style="bold"))
    settings = [[row["setting"], *row["values"]] for row in c["settings"]]
    _table(console, "settings that differ", ["setting", *names], settings)
    _table(console, "figures", ["attack", "figure", *names], figure_rows(found))
    columns = ["attack", "figure", "of", "less that of", "difference", "95 % interval", "pairs", "reading"]
    _table(console, "differences, of the same victims", columns, difference_rows(found))
    for why in c["unpaired"]:
        console.print(Text(why))


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
