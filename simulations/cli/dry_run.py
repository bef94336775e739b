"""What a run would be and cost: `--dry-run`. Nothing is written, and one client takes one round of training."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
from rich.text import Text

from adversaries.refusals import words
from fedattack.config import Config
from fedattack.errors import ConfigError
from fedattack.models import build_model
from fedattack.reporting import formats
from fedattack.storage.plain import flat, plain
from simulations.cli.options import Speech, plainly, show_table
from simulations.engine.federation import FederationResult, run_federation
from simulations.experiments.cost import attack_costs
from simulations.pipeline import Resolved, resolve_run
from strategies import drawn

UNKNOWN = "unknown"


def show_plan(config: Config, said: Speech) -> None:
    """Print what the run would be and cost."""
    found = plan_document(config)
    if said.as_json:
        said.document(found)
        return
    if said.quiet:
        return
    default = flat(Config().model_dump(mode="json"))
    chosen = {n: v for n, v in flat(found["settings"]).items() if v != default.get(n)}
    show_table(
        "Settings that differ from the defaults",
        ("setting", "value"),
        [(n, str(v)) for n, v in chosen.items()],
    )
    if found["attacks"] or found["left_out"]:
        told = [(name, f"applies; {text}") for name, text in found["attacks"].items()]
        told += [(name, f"is left out: {text}") for name, text in found["left_out"].items()]
        show_table("Attacks", ("attack", "what becomes of it"), told)
    show_table("Cost", ("what", "estimate"), list(cost_rows(found["cost"])))
    for note in found["notes"]:
        plainly(said.told, note)
    said.told.print(Text("Nothing was written; without --dry-run this would run."))


def plan_document(config: Config) -> dict[str, Any]:
    """The resolved settings, what applies and what is left out, and an estimate of the cost.

    Keys "settings", "data", "attacks" (name -> what it needs and does), "left_out" (name -> why), "notes", "cost"
    (see :func:`costs`). Raises BadRequest as a run would.
    """
    asked = resolve_run(config)
    check_run_folder(config)
    world = asked.world
    settings = config.model_copy(update={"model": world.scenario.model})
    return {
        "settings": plain(settings.model_dump(mode="json")),
        "data": {
            "name": world.dataset.name,
            "images": len(world.dataset),
            "shape": list(world.scenario.image_shape),
            "clients": [len(part) for part in world.partitions],
            "held out": len(world.pools.nonmembers),
            "auxiliary": 0 if world.auxiliary is None else len(world.auxiliary),
        },
        "attacks": {
            n: f"{one.seat}; needs: {', '.join(words(one.needs)) or 'nothing'}"
            for n, one in asked.attacks.items()
        },
        "left_out": asked.left_out,
        "notes": [note for note in asked.notes if " is left out: " not in note],
        "cost": costs(config, asked),
    }


def check_run_folder(config: Config) -> None:
    """Refuse a run folder that a run would refuse, as far as can be seen without making it."""
    if config.output.run_dir is None:
        return
    path = Path(config.output.run_dir)
    if path.is_dir() and any(path.iterdir()) and not (path / "config.toml").is_file():
        raise ConfigError(
            f"setting 'output.run_dir' = {str(path)!r}: is not empty and no run folder (no config.toml); give an "
            "empty or new folder, or one of an earlier run with the same settings"
        )


def costs(config: Config, asked: Resolved) -> dict[str, Any]:
    """What the run takes, as far as one round of one client tells; None where nothing is known beforehand.

    Keys: "parameters"; "clients a round"; "bytes sent out a client", "bytes received a client", "bytes a round";
    "client seconds a round" (the first round of client 0, one after another for all that are drawn), "seconds of all
    rounds" (those before round 1 included; over the actors of the engine, evaluation aside); "memory now", "memory of
    the machine" in bytes; "disk of the journal, at most", "disk free"; "attacks": name -> "iterations" that were
    asked for, "seconds" of all victims, "memory" in bytes and "text"
    (:func:`simulations.experiments.cost.attack_costs`).
    """
    world = asked.world
    model = build_model(world.scenario.model)
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    took, received = _one_client(config, asked)
    count, rounds = drawn(config.federation), config.federation.rounds
    trained = rounds + config.federation.pretrain
    workers = config.engine.actors if config.engine.name == "ray" else 1
    workers = max(1, min(workers, count, os.cpu_count() or 1))
    folder = Path(config.output.run_dir or "runs").absolute()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    memory = psutil.virtual_memory()
    client = None if took is None else took * count
    return {
        "parameters": parameters,
        "clients a round": count,
        "bytes sent out a client": state,
        "bytes received a client": received,
        "bytes a round": None if received is None else count * (state + received),
        "client seconds a round": client,
        "seconds of all rounds": None if client is None else client * trained / workers,
        "memory now": psutil.Process().memory_info().rss,
        "memory of the machine": memory.total,
        "disk of the journal, at most": None if received is None else rounds * (state + count * received),
        "disk free": shutil.disk_usage(existing).free,
        "attacks": {
            one.name: {
                "iterations": getattr(asked.attacks[one.name], "iterations", None),
                "seconds": one.seconds,
                "memory": one.memory,
                "text": one.told,
            }
            for one in attack_costs(config, world, asked.attacks)
        },
    }


def _one_client(config: Config, asked: Resolved) -> tuple[float | None, int | None]:
    """Seconds and bytes of the largest client in round 1; nothing where it has no samples."""
    settings = {
        "federation": config.federation.model_copy(
            update={
                "rounds": 1,
                "pretrain": 0,
                "strategy": "fedavg",
                "strategy_options": {},
                "evaluate": False,
                "dropout": 0.0,
            }
        ),
        "engine": config.engine.model_copy(update={"name": "inline"}),
        "defense": config.defense,
        "attack": config.attack.model_copy(
            update={"names": (), "rounds": (1,), "options": {}, "shared_options": {}}
        ),
    }
    alone = config.model_copy(update=settings)
    client = int(max(range(len(asked.world.partitions)), key=lambda one: len(asked.world.partitions[one])))
    if not len(asked.world.partitions[client]):
        return None, None
    best, result = None, None
    for _ in range(2):  # the first has imports and caches in it
        started = time.perf_counter()
        result = run_federation(alone, asked.world, clients=(client,))
        best = time.perf_counter() - started
    return best, _wire_bytes(result)


def _wire_bytes(result: FederationResult | None) -> int | None:
    return int(result.rounds[0].wire_bytes) if result is not None and result.rounds else None


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """The estimate in words."""
    rows = []
    for name, value in cost.items():
        if name == "attacks":
            rows += [(f"attack {attack}", one["text"]) for attack, one in value.items()]
        elif value is None:
            rows.append((name, UNKNOWN))
        elif "seconds" in name:
            rows.append((name, formats.seconds(value)))
        elif any(word in name for word in ("bytes", "memory", "disk")):
            rows.append((name, formats.size(value)))
        else:
            rows.append((name, f"{value:,}"))
    return rows
