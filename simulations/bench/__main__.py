"""``python -m simulations.bench CASE --json FILE``: fixed cases, ratios to a reference in the same run."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fedattack.errors import FedattackError
from fedattack.registry import Registry

CASES: Registry[Callable[..., dict[str, Any]]] = Registry(
    "benchmark case",
    {
        "hcgla-iteration": "simulations.bench.hcgla_iteration:run",
        "clients": "simulations.bench.clients:run",
    },
)

console = Console()


def bench(
    case: Annotated[str | None, typer.Argument(help="which case; see --list", show_default=False)] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="show the cases")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke run; its figures mean nothing")] = False,
) -> None:
    """Run one benchmark case and print its figures."""
    if list_cases or case is None:
        for name in CASES.names():
            console.print(f"[cyan]{name:18}[/]{CASES.summary(name)}")
        return
    figures = CASES.get(case)(quick=quick)
    figures = {
        "case": case,
        "quick": quick,
        "machine": {
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        **figures,
    }
    table = Table("figure", "value", title=case, title_justify="left")
    for name, value in figures.items():
        if not isinstance(value, dict | list):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point with the same error manners as the main command."""
    try:
        typer.run(bench)
    except FedattackError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
