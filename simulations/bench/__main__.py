"""``python -m simulations.bench CASE --json FILE``: fixed cases, ratios to a reference in the same run."""

from __future__ import annotations

import inspect
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

from fedattack.errors import ConfigError, FedattackError
from fedattack.registry import Registry

CASES: Registry[Callable[..., dict[str, Any]]] = Registry(
    "benchmark case",
    {
        "hcgla-iteration": "simulations.bench.hcgla_iteration:run",
        "clients": "simulations.bench.clients:run",
        "engine-lenet": "simulations.bench.engine:lenet",
        "engine-resnet20": "simulations.bench.engine:resnet20",
        "engine-resnet18": "simulations.bench.engine:resnet18",
        "time-to-quality": "simulations.bench.time_to_quality:run",
        "soak": "simulations.bench.soak:run",
        "tensor": "simulations.bench.tensor:run",
        "tensor-certificates": "simulations.bench.tensor_certificates:run",
        "view": "simulations.bench.view:run",
        "neighbours": "simulations.bench.neighbours:run",
        "canaries": "simulations.bench.canaries:run",
        "foci": "simulations.bench.foci:run",
        "fuzz": "simulations.bench.fuzz:run",
        "forgetting": "simulations.bench.forgetting:run",
        "metrics": "simulations.bench.metrics:run",
        "semsim": "simulations.bench.semsim:run",
        "front-door": "simulations.bench.front_door:run",
        "fuzz-wire": "simulations.bench.fuzz_wire:run",
        "damages": "simulations.bench.damages:run",
        "frontier": "simulations.bench.frontier:run",
        "hidden-features": "simulations.bench.hidden_features:run",
    },
)

console = Console()


def bench(
    case: Annotated[str | None, typer.Argument(help="which case; see --list", show_default=False)] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="show the cases")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke run; its figures mean nothing")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="folder with CIFAR10/, MNIST/, for the cases that use them")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="also the parts of a case that take minutes")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="also other engines that are installed")] = False,
    engine: Annotated[
        str | None, typer.Option(help="ray or inline, for the cases that run on either")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="how many tries, for the cases that try at random")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the cases that leave files, and go on from them")
    ] = None,
) -> None:
    """Run one benchmark case and print its figures."""
    if list_cases or case is None:
        for name in CASES.names():
            console.print(f"[cyan]{name:18}[/]{CASES.summary(name)}")
        return
    figures = CASES.get(case)(
        quick=quick, **_accepted(case, data=data, long=long, peers=peers, engine=engine, count=count, out=out)
    )
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg(), "platform": platform.platform()}
    machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    figures = {"case": case, "quick": quick, "machine": machine, **figures}
    table = Table("figure", "value", title=case, title_justify="left")
    for name, value in figures.items():
        if not isinstance(value, dict | list):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _accepted(case: str, **options: Any) -> dict[str, Any]:
    """The options that were given, all of which the case must know."""
    given = {name: value for name, value in options.items() if value}
    known = inspect.signature(CASES.get(case)).parameters
    for name in given:
        if name not in known:
            raise ConfigError(f"option '--{name}': benchmark case {case!r} has no use for it")
    return given


def main() -> None:
    """Entry point with the same error manners as the main command."""
    try:
        typer.run(bench)
    except FedattackError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
