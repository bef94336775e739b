"""Many runs as one: attacks x defences x compression x batch size x rounds, or any other settings.

``fedattack sweep FILE`` reads a TOML file, runs every combination as an ordinary run in a folder of its own, as Ray
tasks or in this process, and writes one table, its figures and a page that links to every run. Started again, it does
what is missing: finished cells are read from disk, a killed cell goes on from its journal.

::

    [settings]                       # of every cell, short or dotted names as on the command line
    dataset = "digits"
    rounds = 3

    [axes]                           # one setting each, every value with every other
    attack = ["hcgla", "ig"]
    batch-size = [1, 4]
    defense = [                      # or several settings under one label
        "none",
        { label = "noise 0.01", defense = "clip-noise", "defense.noise" = 0.01 },
    ]

Parameters of an attack, a defence or a gate that a cell does not use are left out of it.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from adversaries import ATTACKS
from fedattack.config import SHORT_NAMES, Config, EngineConfig
from fedattack.defenses import DEFENSES
from fedattack.errors import BadRequest, ConfigError, RunFailed
from fedattack.files import write_bytes
from fedattack.metrics import METRICS
from fedattack.reading import Unreadable, read_toml
from fedattack.registry import Registry, check_names_of_file, plugin_options
from fedattack.reporting.provenance import provenance
from fedattack.reporting.sweep.page import write_sweep
from fedattack.reporting.sweep.table import DONE, FAILED, REFUSED, CellOutcome, SweepTable, sweep_table
from fedattack.storage.lock import in_use
from fedattack.storage.plain import flat, read_json, write_json
from fedattack.unlearning.gates import GATES
from simulations.engine.ray_session import ray_session
from simulations.pipeline import simulate
from simulations.progress import stages, tell

NONE = "none"
"""On an axis of defences or gates: none of them."""

_LISTED: dict[str, Registry[Any]] = {"defense": DEFENSES, "gates": GATES, "metric": METRICS}
"""Sections whose plug-ins a cell may name, or not."""

_MOST_CELLS = 10_000


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its axes' labels, and what :meth:`fedattack.config.Config.from_mapping` is given.

    `name` is that of its folder: the labels and a digest of the settings that can change its result.
    """

    name: str
    labels: dict[str, str]
    settings: dict[str, Any]

    def config(self, folder: Path, threads: int) -> Config:
        """The cell's configuration; raises ConfigError where its settings do not go together."""
        place = {"engine.name": "inline", "engine.threads": threads, "output.run_dir": str(folder)}
        return Config.from_mapping(self.settings | place)


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file asks for: the engine, and the cells in the order of the axes, the last one fastest."""

    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    engine: EngineConfig

    @classmethod
    def from_toml(cls, path: str | Path) -> Sweep:
        """Read a sweep's file; ConfigError where it is malformed, or asks for no cells, too many or equal ones."""
        try:
            document = read_toml(path)
        except Unreadable as error:
            what = "does not exist" if error.absent else f"is not readable TOML: {error.reason}"
            raise ConfigError(f"sweep file {str(path)!r} {what}") from None
        check_names_of_file(document, f"sweep file {str(path)!r}")
        return cls.from_mapping(document)

    @classmethod
    def from_mapping(cls, document: Mapping[str, Any]) -> Sweep:
        """Build from the content of a sweep's file; see :meth:`from_toml`."""
        unknown = set(document) - {"settings", "axes"}
        if unknown or not isinstance(document.get("axes"), Mapping) or not document["axes"]:
            found = f"found {', '.join(sorted(map(str, document)))}" if document else "it is empty"
            raise ConfigError(
                f"a sweep has the sections 'settings' and 'axes', with one axis or more; {found}"
            )
        common = document.get("settings", {})
        if not isinstance(common, Mapping):
            raise ConfigError(f"section 'settings' of the sweep is no table: {common!r}")
        common = flat(common)
        axes = {name: _values(name, values) for name, values in document["axes"].items()}
        count = math.prod(map(len, axes.values()))
        if count > _MOST_CELLS:
            raise ConfigError(f"the sweep has {count:,} cells; at most {_MOST_CELLS:,} are accepted")
        cells = [_cell(common, axes, chosen) for chosen in itertools.product(*axes.values())]
        seen: dict[str, str] = {}
        for cell in cells:
            other = seen.setdefault(cell.name.rpartition("-")[2], cell.name)
            if other != cell.name:
                raise ConfigError(f"two cells of the sweep have the same settings: {other}, {cell.name}")
        _check_values(cells)
        engine = {key: value for key, value in common.items() if _resolved(key).startswith("engine.")}
        return cls(tuple(axes), tuple(cells), Config.from_mapping(engine).engine)


def _check_values(cells: Sequence[Cell]) -> None:
    """Refuse a value of an axis with which no cell makes a configuration; what does not go together is a cell's."""
    refused: dict[int, str] = {}
    for number, cell in enumerate(cells):
        try:
            cell.config(Path("cells"), 1)
        except ConfigError as error:
            refused[number] = str(error)
    for axis in cells[0].labels:
        for value in dict.fromkeys(cell.labels[axis] for cell in cells):
            having = [number for number, cell in enumerate(cells) if cell.labels[axis] == value]
            if all(number in refused for number in having):
                raise ConfigError(f"axis {axis!r}, value {value!r}: {refused[having[0]]}")


def _values(axis: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of each value of an axis."""
    if not isinstance(values, list) or not values:
        raise ConfigError(f"axis {axis!r} = {values!r}: expected a list of one or more values")
    result: list[tuple[str, dict[str, Any]]] = []
    for value in values:
        if isinstance(value, Mapping):
            settings = flat({key: inner for key, inner in value.items() if key != "label"})
            label = str(value.get("label", ", ".join(f"{key} {_shown(v)}" for key, v in settings.items())))
        else:
            settings, label = {axis: value}, _shown(value)
        result.append((label, settings))
    labels = [label for label, _ in result]
    if len(set(labels)) != len(labels):
        same = ", ".join(labels)
        raise ConfigError(f"axis {axis!r}: two values are called the same: {same}; give them labels")
    return result


def _cell(
    common: Mapping[str, Any], axes: Mapping[str, Any], chosen: Sequence[tuple[str, dict[str, Any]]]
) -> Cell:
    labels = {axis: label for axis, (label, _) in zip(axes, chosen, strict=True)}
    settings = dict(common)
    for _, more in chosen:
        settings |= more
    settings = _applicable(settings)
    told = {key: value for key, value in settings.items() if not _outer(key)}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(labels.values())).strip("-.")[:60]
    return Cell(f"{words}-{digest}", labels, settings)


def _applicable(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` without the parameters of attacks, defences and gates that they do not name."""
    attacks = _named(settings, *_keys("attack"))
    listed = {
        section: [name for name in _named(settings, *_keys(section)) if name != NONE] for section in _LISTED
    }
    kinds: dict[str, Any] = {"attack": (attacks, ATTACKS)}
    kinds |= {section: (names, _LISTED[section]) for section, names in listed.items()}
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        parts = key.split(".")
        section, _, leaf = _resolved(key).partition(".")
        if section in listed and leaf == "names":
            kept[key] = ",".join(listed[section])
        elif len(parts) == 2 and parts[0] in ATTACKS and parts[0] not in Config.model_fields:
            if parts[0] in attacks:
                kept[key] = value
        elif len(parts) == 3 and parts[0] in listed:
            if parts[1] in listed[parts[0]]:
                kept[key] = value
        elif len(parts) != 2 or parts[0] not in kinds or not _foreign(parts[1], parts[0], *kinds[parts[0]]):
            kept[key] = value
    return kept


def _foreign(option: str, section: str, chosen: Sequence[str], registry: Registry[Any]) -> bool:
    """Whether a shared parameter belongs to plug-ins of this kind, but to none of the chosen ones."""
    option = option.replace("-", "_")
    fields = Config.model_fields[section].annotation
    assert fields is not None
    if option in fields.model_fields:
        return False
    if any(option in plugin_options(registry.get(name)) for name in chosen if name in registry):
        return False
    return any(option in plugin_options(registry.get(name)) for name in registry.names())


def _keys(section: str) -> list[str]:
    """What the names of a section's plug-ins may be given as."""
    dotted = f"{section}.names"
    return [*(short for short, name in SHORT_NAMES.items() if name == dotted), dotted]


def _named(settings: Mapping[str, Any], *keys: str) -> list[str]:
    value = next((settings[key] for key in keys if key in settings), _by_default(keys[-1]))
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _by_default(dotted: str) -> list[str]:
    section, _, leaf = dotted.partition(".")
    return list(getattr(getattr(Config(), section), leaf))


def _resolved(key: str) -> str:
    return SHORT_NAMES.get(key, key.replace("-", "_"))


def _outer(key: str) -> bool:
    return _resolved(key).partition(".")[0] in ("engine", "output")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NONE
    return str(value) if value != "" else NONE


# ---------------------------------------------------------------------- running it


def run_sweep(
    sweep: Sweep,
    directory: Path,
    *,
    console: Console | None = None,
    engine: str | None = None,
    command: str = "",
) -> SweepTable:
    """Run what is missing of a sweep, and write its table, figures and page.

    Cells that an earlier sweep in `directory` finished are not run again; the table has failed and refused ones
    too. `engine` None: the file's. `command` is the command line, for the page. `console` None: nowhere.

    Raises
    ------
    BadRequest
        If every cell is refused, Ray cannot be started, or another process uses the folder.
    RunFailed
        If the disk is full.
    """
    console = console or Console(quiet=True)
    with in_use(directory, "--out"):
        return _run_sweep(sweep, directory, console, engine, command)


def _run_sweep(
    sweep: Sweep, directory: Path, console: Console, engine: str | None, command: str
) -> SweepTable:
    begun = datetime.datetime.now(datetime.UTC)
    place = directory / "cells"
    outcomes = {cell.name: _earlier(cell, place) for cell in sweep.cells}
    missing = [cell for cell in sweep.cells if outcomes[cell.name] is None]
    total, done = len(sweep.cells), len(sweep.cells) - len(missing)
    tell(console, "sweep", directory, f"{total} cells, {done} finished before")
    named = Config.from_mapping({"engine": engine}).engine.name if engine else sweep.engine.name
    chosen = sweep.engine.model_copy(update={"name": named})
    run = _on_ray if chosen.name == "ray" else _inline
    with stages(console) as shown:
        shown("cells", done / total, f"{done} of {total}")
        for cell, outcome in run(missing, place, chosen):
            done += 1
            outcomes[cell.name] = outcome
            write_json(place / f"{cell.name}.json", {"format": 1, **outcome})
            shown("cells", done / total, f"{done} of {total}: {cell.name} {outcome['status']}")
    found = [outcome for outcome in outcomes.values() if outcome is not None]
    if all(outcome["status"] == REFUSED for outcome in found):
        raise ConfigError(f"no cell of the sweep can be run: {found[0]['reason']}")
    told = [_outcome(cell, outcomes[cell.name], place) for cell in sweep.cells]
    table = sweep_table(sweep.axes, told)
    page = write_sweep(directory, table, command=command, run=provenance(begun))
    states = Counter(outcome.status for outcome in told)
    tell(console, "; ".join(f"{number} {status}" for status, number in states.items()))
    tell(console, "page", page)
    return table


def _earlier(cell: Cell, place: Path) -> dict[str, Any] | None:
    """The outcome of a cell that an earlier sweep finished; failed and refused ones are tried again."""
    path = place / f"{cell.name}.json"
    if not path.is_file() or not (place / cell.name / "summary.json").is_file():
        return None
    outcome = dict(read_json(path))
    return outcome if outcome.get("status") == DONE else None


def _outcome(cell: Cell, outcome: Mapping[str, Any] | None, place: Path) -> CellOutcome:
    assert outcome is not None
    summary = read_json(place / cell.name / "summary.json") if outcome["status"] == DONE else None
    status, reason, seconds = (outcome[name] for name in ("status", "reason", "seconds"))
    return CellOutcome(cell.name, cell.labels, status, reason, seconds, summary)


def run_cell(cell: Cell, place: str, engine: EngineConfig) -> dict[str, Any]:
    """One cell from its settings to its folder; its outcome, whatever happens.

    "status" ("done", "failed", "not applicable"), "reason" and "seconds".
    """
    started = time.perf_counter()
    status, reason = DONE, ""
    torch.set_num_threads(1)
    folder = Path(place) / cell.name
    try:
        config = cell.config(folder, engine.threads)
        result = simulate(config, command=f"fedattack --config {folder / 'config.toml'}")
        faults = [(one.summary.get("failed", []), one.summary["count"]) for one in result.audits.values()]
        if faults and all(len(lost) == count for lost, count in faults):
            status, reason = FAILED, faults[0][0][0]["reason"]
    except BadRequest as error:
        status, reason = REFUSED, str(error)
    except RunFailed as error:
        status, reason = FAILED, str(error)
    except Exception as error:  # one cell's fault must not end the others
        status, reason = FAILED, f"{type(error).__name__}: {error}"
        write_bytes(Path(place) / f"{cell.name}.error.txt", traceback.format_exc().encode())
    return {"status": status, "reason": reason, "seconds": time.perf_counter() - started}


Outcomes = Iterator[tuple[Cell, dict[str, Any]]]


def _inline(cells: Sequence[Cell], place: Path, engine: EngineConfig) -> Outcomes:
    for cell in cells:
        yield cell, run_cell(cell, str(place), engine)


def _on_ray(cells: Sequence[Cell], place: Path, engine: EngineConfig) -> Outcomes:
    """Cells as Ray tasks, `engine.actors` at a time, each in process within its task."""
    if not cells:
        return
    import ray

    # The session gives each actor its CPUs; here an actor is a cell.
    with ray_session(engine.model_copy(update={"cpus_per_actor": float(engine.threads)})):
        task = ray.remote(num_cpus=engine.threads, num_gpus=engine.gpus_per_actor, max_retries=1)(run_cell)
        waiting = list(cells)
        pending: dict[Any, Cell] = {}
        while waiting or pending:
            while waiting and len(pending) < engine.actors:
                cell = waiting.pop(0)
                pending[task.remote(cell, str(place.resolve()), engine)] = cell
            ready, _ = ray.wait(list(pending), num_returns=1)
            for reference in ready:
                cell = pending.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    reason = f"its worker was lost: {str(error).partition(chr(10))[0]}"
                    outcome = {"status": FAILED, "reason": reason, "seconds": 0.0}
                yield cell, outcome
