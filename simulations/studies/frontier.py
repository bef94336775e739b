"""Where a federation leaks its images, and where not: one map over servers, training, batches and compression.

Every cell is an ordinary run of a sweep (:mod:`simulations.studies.sweep`), so that the map goes on where it was
stopped. The trained networks come from a federation of ten other clients, 15 rounds of 5 steps of 16 images each; the
clients of a cell join it then with images that it never saw, unless by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from safetensors.torch import save

from fedattack.config import Config
from fedattack.errors import RunFailed
from fedattack.files import write_bytes
from fedattack.reporting.figures import png
from fedattack.reporting.frontier import frontier_figure, frontier_table
from fedattack.reporting.sweep.table import DONE, REFUSED
from fedattack.storage.plain import read_json, write_json
from fedattack.storage.spreadsheet import csv_bytes
from simulations.pipeline import simulate
from simulations.progress import tell
from simulations.studies.sweep import Sweep, run_sweep

IMAGES = (1, 4, 16, 64)
"""Images that an update holds."""

_CLIENTS = 3
_PUBLIC, _HELD_OUT = 1000, 40
_STEPS = 4
"""Batches that a client's images fill in one pass."""

_RATE = 0.01
_BETWEEN = " | "


@dataclass(frozen=True)
class Seat:
    """Attacks of one seat on one model.

    `budgets`: for updates of so many images at most, the settings, victims included, that keep a cell within its
    minutes; `most`: attack
    -> images of an update above which it is left out of the map, as too slow for it.
    """

    label: str
    model: Mapping[str, Any]
    attacks: tuple[str, ...]
    budgets: Mapping[int, Mapping[str, Any]] = field(default_factory=lambda: {64: {}})
    most: Mapping[str, int] = field(default_factory=dict)

    def settings(self, images: int) -> dict[str, Any]:
        """Model, attacks and budgets for updates of so many images."""
        chosen = [name for name in self.attacks if images <= self.most.get(name, images)]
        budget = next((found for most, found in sorted(self.budgets.items()) if images <= most), {})
        return {"victims": _CLIENTS, **self.model, "attack": chosen, **budget}


_SURROGATE = {"gauss-newton.local_steps": "surrogate"}

CURIOUS = Seat(
    "curious server",
    {"model": "cnn-mcmahan", "activation": "relu"},
    ("spear", "gauss-newton", "ig"),
    {
        1: {**_SURROGATE, "victims": 2, "gauss-newton.products": 100, "ig.iterations": 40, "spear.turns": 4},
        4: {"victims": 1, "ig.iterations": 30, "spear.turns": 4},
        16: {"victims": 1, "ig.iterations": 15, "spear.turns": 2},
        64: {"victims": 1, "ig.iterations": 8},
    },
    {"gauss-newton": 1, "spear": 16},
)
IMPRINT = Seat("malicious: imprint", {"model": "imprint-sparse"}, ("imprint",))
SEATS = (CURIOUS, IMPRINT)
OTHERS = (
    Seat("malicious: cah", {"model": "mlp", "width": 1024, "activation": "relu"}, ("cah",)),
    Seat("malicious: fishing", {"model": "cnn-mcmahan", "activation": "relu"}, ("fishing",)),
    Seat("malicious: tensor", {"model": "two-layer", "width": 2304}, ("tensor",)),
)
"""Further malicious servers, each on the network that it is made for."""


def run_frontier(
    data: Path,
    directory: Path,
    *,
    console: Console | None = None,
    quick: bool = False,
    seed: int = 0,
    engine: str = "inline",
    long: bool = False,
) -> pd.DataFrame:
    """Run what is missing of the map in `directory`, and write ``frontier.csv``, ``.md`` and ``.png`` there.

    Parameters
    ----------
    data : Path
        The folder with the CIFAR-10 cut, or all of CIFAR-10.
    quick
        One image, one gradient, next to no budget: the figures mean nothing.
    engine
        "ray": several cells at once.
    long
        Also :data:`OTHERS`.

    Returns
    -------
    DataFrame
        A row for each cell and attack: "server", "network", "update", "images", "sent", "attack", "psnr", "floor"
        (dB), "level", "seconds", "reason".

    Raises
    ------
    BadRequest
        If the data set is missing, or another process uses the folder.
    """
    console = console or Console(quiet=True)
    common = _common(data, seed)
    cells: list[dict[str, Any]] = []
    untrained: list[dict[str, Any]] = []
    for seat in SEATS[:1] if quick else SEATS + OTHERS * long:
        cells += _cells(seat, "untrained", {}, quick)
        try:
            weights = _trained(seat, common, directory, quick, console)
            cells += _cells(seat, "trained", {"weights": str(weights)}, quick)
        except RunFailed as error:  # a network that cannot be trained is a finding, and no end of the map
            untrained.append({"server": seat.label, "network": "trained", "reason": str(error)})
            tell(console, seat.label, str(error))
    sweep = Sweep.from_mapping({"settings": common, "axes": {"cell": cells}})
    table = run_sweep(
        sweep,
        directory,
        console=console,
        engine=engine,
        command="python -m simulations.bench frontier --data DIR --out DIR",
    )
    frame = pd.DataFrame([*_rows(table.records(), directory / "cells"), *untrained])
    write_bytes(directory / "frontier.csv", csv_bytes(frame))
    write_bytes(directory / "frontier.md", frontier_table(frame).encode())
    write_bytes(directory / "frontier.png", png(frontier_figure(frame)))
    tell(console, "map", directory / "frontier.png")
    return frame


UPDATES = ("one gradient", "one pass", "five passes")
"""FedSGD; FedAvg with every image in one of four local steps; the same five times over."""


_SENT: Mapping[str, Mapping[str, Any]] = {
    "everything": {"compressor": "none"},
    f"top {_RATE:.0%}": {"compressor": "topk", "compression": _RATE},
}


def _cells(seat: Seat, network: str, weights: Mapping[str, str], quick: bool) -> list[dict[str, Any]]:
    """The cells of one seat and network, called by what they are."""
    found = []
    for kind, images, sent in itertools.product(UPDATES, IMAGES, _SENT):
        label = _BETWEEN.join((seat.label, network, kind, str(images), sent))
        found.append(
            {"label": label, **seat.settings(images), **weights, **_update(kind, images), **_SENT[sent]}
        )
    if quick:
        return [{**found[0], "attack": ["gauss-newton"], "gauss-newton.products": 100}]
    return found


def _update(kind: str, images: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "clients": _CLIENTS,
        "limit": _CLIENTS * images + _PUBLIC + _HELD_OUT,
    }
    if kind == "one gradient":
        return found | {"protocol": "fedsgd", "batch-size": images}
    batch = max(1, images // _STEPS)
    epochs = 1 if kind == "one pass" else 5
    return found | {"protocol": "fedavg", "batch-size": batch, "local-epochs": epochs, "learning-rate": 0.01}


def _common(data: Path, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "dataset": "cifar10",
        "data-dir": str(data),
        "auxiliary-size": _PUBLIC,
        "data.nonmembers": _HELD_OUT,
        "federation.evaluate": False,
        "engine": "inline",
    }


def _trained(seat: Seat, common: Mapping[str, Any], directory: Path, quick: bool, console: Console) -> Path:
    """The file of a seat's network after honest training, made where it is missing; RunFailed where it diverges."""
    name = str(seat.model["model"])
    rounds = 1 if quick else 15
    # A quick map's network, or another seed's, is none for this one.
    place = directory / "trained" / f"{name}-{rounds}-rounds-{common['seed']}"
    path = place.with_suffix(".safetensors")
    if path.is_file():
        return path
    config = Config.from_mapping(
        {
            **common,
            **seat.model,
            "seed": common["seed"] + 1,
            "federation.evaluate": True,
            "clients": 10,
            "rounds": rounds,
            "limit": 10 * 64 + _PUBLIC + _HELD_OUT,
            "protocol": "fedavg",
            "batch-size": 16,
            "local-steps": 5,
            "learning-rate": 0.05,
            "compressor": "none",
            "run-dir": str(place),
        }
    )
    result = simulate(config, console=console)
    assert result.federation is not None
    write_bytes(path, save(dict(result.federation.weights)))
    last = result.federation.rounds[-1]
    write_json(path.with_suffix(".json"), {"rounds": config.federation.rounds, "loss": last.loss})
    return path


def _rows(records: Iterable[Mapping[str, Any]], cells: Path) -> list[dict[str, Any]]:
    """The sweep's rows, as the map names them, and one for each attack that a cell left out."""
    rows = []
    for record in _with_left_out(records, cells):
        server, network, update, images, sent = str(record["axis.cell"]).split(_BETWEEN)
        rows.append(
            {
                "server": server,
                "network": network,
                "update": update,
                "images": int(images),
                "sent": sent,
                "attack": record["attack"],
                "psnr": record.get("psnr"),
                "floor": record.get("floor_psnr"),
                "gain": record.get("gain"),
                "gain_low": record.get("gain_low"),
                "gain_high": record.get("gain_high"),
                "level": record["level"],
                "status": record["status"],
                "seconds": record["seconds"],
                "reason": record["reason"],
            }
        )
    return rows


def _with_left_out(records: Iterable[Mapping[str, Any]], cells: Path) -> Iterator[Mapping[str, Any]]:
    seen = set[str]()
    for record in records:
        yield record
        if record["status"] != DONE or record["cell"] in seen:
            continue
        seen.add(record["cell"])
        for attack, reason in read_json(cells / record["cell"] / "summary.json")["left_out"].items():
            labels = {name: value for name, value in record.items() if name.startswith("axis.")}
            empty = {"level": None, "seconds": None, "status": REFUSED}
            yield labels | empty | {"attack": attack, "reason": reason, "cell": record["cell"]}
