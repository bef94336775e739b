"""The sub-commands of `fedattack hcgla`: collecting pairs, training and testing the generator and the denoiser."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adversaries.inversion.learning import denoiser as denoisers
from adversaries.inversion.learning import generator as generators
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import DataError
from fedattack.models import initial_weights
from fedattack.observation import Auxiliary
from fedattack.rng import adversary_seed
from fedattack.storage.plain import flat
from simulations.experiments.executor import choose_device
from simulations.progress import stages, tell

MOST_PAIRS = 112
"""Pairs that are collected where nobody says how many, or as many as there are images."""


def run_collect_pairs(
    config: Config, out: Path, count: int | None, iterations: int, console: Console
) -> None:
    """Write (intermediate reconstruction, truth) pairs of public images to `out`; `count` None: what there is."""
    world, auxiliary = _public(config)
    if count is None:
        batch = max(1, config.training.batch_size)
        count = min(MOST_PAIRS, len(auxiliary)) // batch * batch
    with stages(console) as shown:
        denoisers.collect_pairs(
            world.scenario,
            initial_weights(world.scenario.model, config.seed),
            auxiliary,
            count,
            iterations,
            out,
            adversary_seed(config.seed, "pairs"),
            device=choose_device(config.engine.device),
            progress=partial(shown, "collecting pairs"),
        )
    tell(console, f"{count} pairs of {auxiliary.source} written to", out)


def run_train_denoiser(pairs: Path, out: Path, epochs: int | None, seed: int, console: Console) -> None:
    """Train the DnCNN filter on `pairs` and write it to `out`."""
    with stages(console) as shown:
        _, figures = denoisers.train_denoiser(
            pairs,
            out,
            adversary_seed(seed, "denoiser"),
            epochs=epochs,
            progress=partial(shown, "training denoiser"),
        )
    _show(console, f"denoiser written to {out}", figures)


def run_test_denoiser(pairs: Path, weights: Path, console: Console) -> None:
    """Print the filter's figures on the pairs that its training left out."""
    _show(console, "denoiser on held-out pairs", denoisers.test_denoiser(weights, pairs))


def run_train_generator(config: Config, out: Path, epochs: int | None, console: Console) -> None:
    """Train the generator for the configured model, seed and compressor on public images and write it to `out`."""
    world, auxiliary = _public(config)
    with stages(console) as shown:
        _, figures = generators.train_generator(
            world.scenario,
            initial_weights(world.scenario.model, config.seed),
            auxiliary,
            out,
            adversary_seed(config.seed, "generator"),
            epochs=epochs,
            device=choose_device(config.engine.device),
            progress=partial(shown, "training generator"),
        )
    _show(console, f"generator written to {out}", figures)


def run_test_generator(config: Config, generator: Path, console: Console) -> None:
    """Print the generator's figures, and their floor, on the held-out pool: nobody in it is in the public images."""
    world = build_world(config)
    images, labels = world.dataset.tensors(world.pools.nonmembers)
    held_out = Auxiliary(images, labels, f"held-out pool of {world.dataset.name}")
    figures = generators.test_generator(
        generator,
        world.scenario,
        initial_weights(world.scenario.model, config.seed),
        held_out,
        adversary_seed(config.seed, "generator test"),
        device=choose_device(config.engine.device),
    )
    _show(console, "generator on the held-out pool", {n: v for n, v in figures.items() if n != "per_image"})


def _public(config: Config) -> tuple[World, Auxiliary]:
    """The configured world and the auxiliary images in it."""
    world = build_world(config)
    if world.auxiliary is None or not len(world.auxiliary):
        raise DataError(
            "there are no auxiliary images to learn from; set 'data.auxiliary' or 'data.auxiliary_size'"
        )
    return world, world.auxiliary


def _show(console: Console, title: str, figures: dict[str, Any]) -> None:
    table = Table("figure", "value", title=title, title_justify="left")
    for name, value in flat(figures, ", ").items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
