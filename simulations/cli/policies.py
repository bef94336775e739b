"""The body of ``fedattack semsim search``: which augmentation policies leak little and cost little."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from fedattack.config import Config
from fedattack.defenses.ats import LEAST_ACCURACY, Candidate, Search, candidates, ranked
from fedattack.errors import ConfigError, DataError, unknown_name
from fedattack.files import write_bytes
from fedattack.models import build_model, initial_weights
from fedattack.reporting import formats
from fedattack.storage.observations import read_tensors
from fedattack.storage.plain import read_json, write_json
from fedattack.storage.spreadsheet import csv_bytes
from simulations.experiments.executor import choose_device
from simulations.progress import stages, tell
from simulations.studies.classifier import SCHEDULES, lesson, public_parts, train_classifier

_SHOWN = 10
"""Candidates that are printed."""


@dataclass(frozen=True)
class Effort:
    """How much is searched: candidates, images of each class for S_pri, batches of images for S_acc."""

    candidates: int = 1600
    per_class: int = 5
    batches: int = 10
    batch: int = 100
    least_accuracy: float = LEAST_ACCURACY


def run_search(
    config: Config, folder: Path, effort: Effort, schedule: str, share: float, console: Console
) -> None:
    """Train a classifier without a policy, score candidates with it, and write ``candidates.csv``.

    A killed search goes on with the next candidate. The images that candidates are scored on are public ones that the
    classifier was not trained on. Raises DataError where there are too few of them.
    """
    if config.defense.names:
        raise ConfigError(
            f"setting 'defense.names' = {', '.join(config.defense.names)}: a search trains without a defence; leave "
            "it open"
        )
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    torch.set_num_threads(1)
    work = lesson(config, SCHEDULES[schedule], share)
    _, rest = public_parts(work.world, config.seed, share)
    images, labels = work.world.dataset.tensors(rest)
    policies = candidates(effort.candidates, config.seed)
    model = work.world.scenario.model
    trained, untrained = build_model(model).eval(), build_model(model).eval()
    untrained.load_state_dict(initial_weights(model, config.seed))
    sizes = effort.per_class, effort.batches, effort.batch
    search = Search(trained, untrained, images, labels, *sizes, effort.least_accuracy, config.seed)
    place = folder / "classifiers"
    made = train_classifier(work, place, model.name, choose_device(config.engine.device))
    trained.load_state_dict(read_tensors(made.weights))
    path = folder / f"search-{_digest(made.record['digest'], images, effort, config.seed)}.json"
    found = _earlier(path)
    with stages(console) as shown:
        for number, policy in enumerate(policies, 1):
            if policy not in found:
                found[policy] = search.score(policy)
                write_json(path, {"format": 1, "candidates": [asdict(one) for one in found.values()]})
            shown("policies", number / len(policies), f"{number} of {len(policies)}")
    _report(folder, [found[policy] for policy in policies], effort.least_accuracy, console)


def _digest(classifier: str, images: torch.Tensor, effort: Effort, seed: int) -> str:
    """Of what can change a score; how many candidates there are cannot."""
    pixels = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    told = [classifier, pixels, effort.per_class, effort.batches, effort.batch, seed]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _earlier(path: Path) -> dict[str, Candidate]:
    """Policy -> what a killed search found of it."""
    if not path.is_file():
        return {}
    try:
        listed: list[dict[str, Any]] = read_json(path)["candidates"]
        made = [
            Candidate(one["policy"], tuple(one["privacy"]), tuple(one["accuracy"]), int(one["images"]))
            for one in listed
        ]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} does not hold the scores of policies; remove it") from None
    return {one.policy: one for one in made}


def _report(folder: Path, found: list[Candidate], least: float, console: Console) -> None:
    order = {one.policy: (place, score) for place, (one, score) in enumerate(ranked(found, least), 1)}
    rows = [
        {
            "policy": one.policy,
            "place": order.get(one.policy, (None, None))[0],
            "ordered by": order.get(one.policy, (None, None))[1],
            "S_pri mean": one.mean_privacy,
            "S_pri variance": one.variance,
            "S_acc an image": one.accuracy_per_image,
        }
        for one in found
    ]
    frame = pd.DataFrame(rows).sort_values(["place", "S_pri mean"], kind="stable", na_position="last")
    write_bytes(folder / "candidates.csv", csv_bytes(frame))
    table = Table("place", "policy", "S_pri", "variance", "S_acc an image", box=None)
    for row in frame.head(_SHOWN).to_dict("records"):
        place = formats.NONE if pd.isna(row["place"]) else f"{row['place']:.0f}"
        figures = (f"{row['S_pri mean']:.4f}", f"{row['S_pri variance']:.2e}", f"{row['S_acc an image']:.3f}")
        table.add_row(place, row["policy"] or "none", *figures)
    console.print(table)
    if not order:
        best = max(one.accuracy_per_image for one in found)
        tell(
            console,
            f"the best has {best:.3f}: the bound belongs to a network; lower it with --least-accuracy",
        )
    kept = f"{len(order)} of {len(found)} policies have an S_acc of {least:g} an image or more"
    tell(console, f"{kept}; all are in", folder / "candidates.csv")
