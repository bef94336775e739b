"""What it costs a federation to forget a client, and what is left of the model: mechanisms beside retraining."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.models import initial_weights
from fedattack.unlearning import Deletion, History, Weights, build_mechanism
from simulations.engine.federation import Judge
from simulations.engine.open_grid import open_grid
from simulations.experiments.trainer import FederationTrainer

MECHANISMS = ("retrain", "federaser", "fedrecover", "halimi", "liu", "fedosd")
PARTITIONS = ("iid", "shards")
_SETTINGS: dict[str, Any] = {
    "dataset": "mnist",
    "limit": 6000,
    "data.nonmembers": 2000,
    "data.auxiliary_size": 0,
    "model": "mlp",
    "clients": 10,
    "rounds": 20,
    "protocol": "fedavg",
    "local-steps": 25,
    "batch-size": 32,
    "learning-rate": 0.05,
    "compressor": "none",
    "engine": "inline",
    "federation.evaluate": False,
    "unlearning.federaser.calibration": 0.25,
}


@dataclass(frozen=True)
class Scene:
    """A trained federation whose client 0 leaves."""

    config: Config
    world: World
    trainer: FederationTrainer
    history: History


def run(data: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Client 0 of 10 leaves: accuracy, its own accuracy, client steps and bytes of each mechanism, over three seeds.

    4,000 MNIST images (``--data`` FOLDER/MNIST), 400 a client, IID and of two shards each; a perceptron, 20 rounds of
    25 steps. Accuracies on 2,000 held-out images and on the images of the client that left. A pass is one gradient
    over all images of all clients, MB what they sent. `quick`: digits, one seed, 4 rounds.
    """
    figures: dict[str, Any] = {"rows": []}
    for partition in PARTITIONS:
        rows: list[dict[str, Any]] = []
        for seed in (0,) if quick else (0, 1, 2):
            with scene(seed, partition, data, quick) as one:
                rows += [measured(one, name) | {"seed": seed, "partition": partition} for name in MECHANISMS]
        figures["rows"] += rows
        for name in ("before", *MECHANISMS):
            figures |= {f"{partition}: {name}": _line(rows, name)}
    return figures


@contextmanager
def scene(
    seed: int, partition: str, data: Path | None = None, quick: bool = False, **more: Any
) -> Iterator[Scene]:
    """Train the federation, with all that any mechanism needs kept."""
    settings = _SETTINGS | {"seed": seed, "partition": partition} | more
    if quick:
        settings |= {"dataset": "digits", "limit": 1000, "data.nonmembers": 300, "rounds": 4}
    elif data is not None:
        settings |= {"data-dir": str(data / "MNIST")}
    config = Config.from_mapping(settings)
    world = build_world(config)
    with tempfile.TemporaryDirectory() as folder, open_grid(config, world) as grid:
        history = History(Path(folder), world.scenario, {"checkpoints", "updates"})
        first = initial_weights(world.scenario.model, seed)
        history.keep_weights(0, first)
        trainer = FederationTrainer(config, world, grid)
        trainer.train({}, first, 1, history)
        yield Scene(config, world, trainer, history)


def measured(one: Scene, name: str, **settings: Any) -> dict[str, Any]:
    """What mechanism `name` makes of client 0's leaving."""
    options = {**one.config.unlearning.options.get(name, {}), **settings}
    update = {"mechanism": name, "options": {name: options} if options else {}}
    mechanism = build_mechanism(one.config.unlearning.model_copy(update=update))
    whole = Deletion(0, frozenset(range(len(one.world.partitions[0]))), drops_out=True)
    before = one.trainer.cost.copy()
    with one.trainer.cost.clocked():
        answer = mechanism.forget([whole], one.history, one.trainer)
    cost = one.trainer.cost.since(before)
    return {
        "mechanism": name,
        "before": accuracies(one, one.history.weights),
        "after": accuracies(one, answer.weights),
        "rounds": cost.rounds,
        "client_steps": cost.client_steps,
        "gradients": cost.gradients,
        "bytes": cost.bytes,
        "cpu_seconds": cost.cpu_seconds,
        "details": dict(answer.details),
    }


def accuracies(one: Scene, weights: Weights) -> tuple[float, float]:
    """On the held-out images, and on those of the client that left."""
    judge = Judge(one.config, one.world)
    return judge(weights)["accuracy"], judge(weights, one.world.partitions[0])["accuracy"]


def _line(rows: list[dict[str, Any]], name: str) -> str:
    """A mechanism's means over the seeds, as a line of the table."""
    arm = "before" if name == "before" else "after"
    chosen = [row for row in rows if row["mechanism"] == ("retrain" if name == "before" else name)]
    mean = {k: statistics.fmean(row[arm][k] for row in chosen) for k in (0, 1)}
    text = f"{mean[0]:6.1%} (leaver {mean[1]:6.1%})"
    if name == "before":
        return text
    steps: Mapping[str, float] = {
        one: statistics.fmean(row["client_steps"] for row in rows if row["mechanism"] == one)
        for one in ("retrain", name)
    }
    passes = statistics.fmean(row["gradients"] for row in chosen)
    sent = statistics.fmean(row["bytes"] for row in chosen) / 1e6
    seconds = statistics.fmean(row["cpu_seconds"] for row in chosen)
    fewer = steps["retrain"] / max(1.0, steps[name])
    counted = f"{steps[name]:6.0f} client steps ({fewer:4.1f}x fewer), {passes:4.1f} passes"
    return f"{text}, {counted}, {sent:5.1f} MB, {seconds:4.1f} s"
