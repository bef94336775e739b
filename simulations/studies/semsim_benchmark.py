"""The SemSim benchmark: classifiers are trained and attacked, and metrics ranked by what raters recognise.

Layout of its folder::

    classifiers/   a weights file and a record of each classifier, named by label and configuration
    attacks/       a sweep over classifiers and attacks
    scores/        what every metric says of each cell's pairs
    pairs/         the pairs as PNG files, to be rated
    scores.csv     all scores, a row a pair
    ranking.csv  correlations.csv  disagreements.csv  index.html

Each step finds what an earlier one, or an earlier run of the same step, left: a killed benchmark, started again, ends
in the same tables.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from fedattack.annotation.table import read_table
from fedattack.config import Config, EngineConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError, DataError
from fedattack.files import write_bytes
from fedattack.metrics import METRICS, ImageMetric, Pairs, build_metrics, score
from fedattack.metrics.semsim.labeller import Labeller, load_labeller, save_labeller, train_labeller
from fedattack.observation import observation_name
from fedattack.reporting.report import image_png
from fedattack.storage import RunFolder
from fedattack.storage.lock import in_use
from fedattack.storage.plain import number, read_json, write_json
from fedattack.storage.spreadsheet import csv_bytes
from simulations.experiments.choose import choose_attacks
from simulations.experiments.executor import choose_device
from simulations.experiments.private import PrivateBatches
from simulations.experiments.reconstruction import held_out_images
from simulations.progress import stages, tell
from simulations.studies.classifier import Trained, finished, lesson, public_parts, train_classifier
from simulations.studies.semsim_presets import ATTACK, MODEL, POLICY, Benchmark
from simulations.studies.semsim_ranking import Material, write_ranking
from simulations.studies.sweep import Cell, Sweep, run_sweep

STEPS = ("classifiers", "attacks", "scores", "ranking")
_FORMAT = 1
_CLASSIFIERS, _ATTACKS, _SCORES, _PAIRS = "classifiers", "attacks", "scores", "pairs"
_CELL = (MODEL, POLICY, ATTACK)
_SHOWN = "shown."
"""Before a metric's name: against what the model was shown, where a policy transforms it."""


@dataclass(frozen=True)
class Asked:
    """What is to be done: `step` None for all of :data:`STEPS`.

    `annotations`: a table of ratings, of one `protocol` and of "human" or "proxy" `annotators`, which must be told
    where it holds several; None: a classifier rates. `metrics`: names and parameters as
    settings (``metrics``, ``metric.semsim.checkpoint``); empty: every metric that needs no file.
    """

    step: str | None = None
    annotations: Path | None = None
    protocol: str | None = None
    annotators: str | None = None
    metrics: Mapping[str, Any] | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.step is not None and self.step not in STEPS:
            raise ConfigError(f"setting 'step' = {self.step!r}: {', '.join(STEPS)} are accepted")


class Study:
    """One benchmark in one folder; each step is a method, and looks first for what is there."""

    def __init__(
        self, benchmark: Benchmark, folder: Path, asked: Asked, console: Console | None = None
    ) -> None:
        """Refuse (BadRequest) what can never work, before anything starts."""
        self.benchmark, self.folder, self.asked = benchmark, folder, asked
        self.console = console or Console(quiet=True)
        self.configs = {
            label: Config.from_mapping(benchmark.run_settings(*parts))
            for label, parts in benchmark.classifiers.items()
        }
        first = next(iter(self.configs.values()))
        named = (
            first.engine.name
            if asked.engine is None
            else Config.from_mapping({"engine": asked.engine}).engine.name
        )
        self.engine = first.engine.model_copy(update={"name": named})
        self.lessons = {
            label: lesson(config, benchmark.schedule, benchmark.share)
            for label, config in self.configs.items()
        }
        self.world = self.lessons[next(iter(self.lessons))].world
        self.metrics, self.left_out = chosen_metrics(asked.metrics or {}, self.world.scenario.image_shape)
        # The names of the weights are enough to see whether the attacks' settings go together.
        chosen = {
            cell.labels["attack"]: cell for cell in self.sweep({n: Path(n) for n in self.configs}).cells
        }
        for label, cell in chosen.items():
            attacks = choose_attacks(cell.config(folder, 1))
            if len(attacks) != 1 or next(iter(attacks.values())).family != "reconstruction":
                names = ", ".join(attacks) or "none"
                raise ConfigError(
                    f"attack {label!r} of the benchmark: one that rebuilds images is accepted, not {names}"
                )
        self.table = None if asked.annotations is None else self._ratings(asked.annotations)

    def _ratings(self, path: Path) -> pd.DataFrame:
        table = read_table(path, self.asked.protocol)
        kind = self.asked.annotators
        kept = table if kind is None else table[table["annotator_type"] == kind]
        if kept.empty:
            raise DataError(
                f"{path} holds no rating{'' if kind is None else f' by annotators of type {kind!r}'}"
            )
        if len(kinds := sorted(set(kept["annotator_type"]))) > 1:
            raise DataError(
                f"{path} holds ratings of {' and '.join(kinds)}, never pooled: choose with --annotators"
            )
        return kept

    def run(self, command: str = "") -> Path | None:
        """Carry out the steps; the page, or None where the last one was not asked for."""
        torch.set_num_threads(1)  # sums in other parts have other last bits
        steps = STEPS if self.asked.step is None else (self.asked.step,)
        if "classifiers" in steps:
            self.train()
        if "attacks" in steps:
            self.attack()
        if "scores" in steps:
            self.score()
        if "ranking" not in steps:
            return None
        page = self.rank(command)
        tell(self.console, "page", page)
        return page

    # ------------------------------------------------------------------ classifiers

    def train(self) -> None:
        """Step 1: train what is not trained yet."""
        place = self.folder / _CLASSIFIERS
        device = choose_device(self.engine.device)
        missing = [label for label, work in self.lessons.items() if finished(work, place, label) is None]
        benchmark, total = self.benchmark, len(self.lessons)
        jobs = [
            (label, self.configs[label], benchmark.schedule, benchmark.share, place, str(device))
            for label in missing
        ]
        done = total - len(missing)
        with stages(self.console) as shown:
            shown("classifiers", done / total, f"{done} of {total}")
            for label, found in each(_train_one, jobs, self.engine):
                if not isinstance(found, Trained):
                    raise found
                done += 1
                right = found.record["accuracy"]["held-out"]["mean"]
                shown("classifiers", done / total, f"{done} of {total}: {label}, accuracy {right:.0%}")

    @property
    def trained(self) -> dict[str, Trained]:
        """The finished classifiers; ConfigError where one is missing."""
        found = {
            label: finished(work, self.folder / _CLASSIFIERS, label) for label, work in self.lessons.items()
        }
        for label, one in found.items():
            if one is None:
                raise self._too_early(f"classifier {label!r} is not trained", "classifiers")
        return {label: one for label, one in found.items() if one is not None}

    def _too_early(self, what: str, step: str) -> ConfigError:
        return ConfigError(
            f"setting 'step' = {self.asked.step!r}: {what} in {self.folder}; run --step {step} first, or all steps"
        )

    # ------------------------------------------------------------------ attacks

    def sweep(self, weights: Mapping[str, Path]) -> Sweep:
        return self.benchmark.sweep(weights)

    def attack(self) -> None:
        """Step 2: the attacks, as a sweep, on whatever classifiers step 1 left."""
        weights = {label: one.weights for label, one in self.trained.items()}
        place = self.folder / _ATTACKS
        run_sweep(self.sweep(weights), place, console=self.console, engine=self.engine.name)

    @property
    def cells(self) -> dict[tuple[str, str, str], tuple[Cell, dict[str, Any]]]:
        """(model, policy, attack) -> cell and outcome of the sweep; ConfigError where one was not run."""
        weights = {label: one.weights for label, one in self.trained.items()}
        found = {}
        for cell in self.sweep(weights).cells:
            path = self.folder / _ATTACKS / "cells" / f"{cell.name}.json"
            if not path.is_file():
                raise self._too_early(f"attack {cell.name!r} is not run", "attacks")
            model, policy = self.benchmark.classifiers[cell.labels["classifier"]]
            found[model.label, policy.label, cell.labels["attack"]] = cell, dict(read_json(path))
        return found

    # ------------------------------------------------------------------ scores

    def score(self) -> None:
        """Step 3: every metric of every pair, and the pairs as PNG files."""
        rows: list[dict[str, Any]] = []
        cells = self.cells
        with stages(self.console) as shown:
            for number_of, (key, (cell, outcome)) in enumerate(cells.items(), 1):
                if outcome.get("status") == "done":
                    rows += self._scored(key, cell)
                shown("scores", number_of / len(cells), f"{number_of} of {len(cells)}: {cell.name}")
        if not rows:
            reasons = "; ".join(sorted({str(outcome.get("reason")) for _, outcome in cells.values()}))
            raise DataError(f"no attack of the benchmark left a reconstruction: {reasons}")
        write_bytes(self.folder / "scores.csv", csv_bytes(pd.DataFrame(rows)))

    @property
    def _metrics_record(self) -> dict[str, Any]:
        return {name: {**asdict(one), **one.record()} for name, one in self.metrics.items()}

    def _score_path(self, cell: Cell) -> Path:
        told = {"format": _FORMAT, "cell": cell.name, "metrics": self._metrics_record}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return self.folder / _SCORES / f"{cell.name}-{digest}.json"

    def _scored(self, key: tuple[str, str, str], cell: Cell) -> list[dict[str, Any]]:
        """The rows of one cell, from its file if they were scored before."""
        path = self._score_path(cell)
        if not path.is_file():
            pairs = cell_pairs(self.folder / _ATTACKS / "cells" / cell.name)
            rows = self._score_rows(pairs)
            for row, image, truth in zip(rows, pairs.images, pairs.truth, strict=True):
                row |= self._saved(key, row["sample"], image, truth)
            write_json(path, {"rows": rows})
        facts = dict(zip(_CELL, key, strict=True))
        return [facts | _read_row(row, self.metrics) for row in read_json(path)["rows"]]

    def _score_rows(self, pairs: CellPairs) -> list[dict[str, Any]]:
        gallery = held_out_images(self.world)
        found = score(self.metrics, Pairs(pairs.images, pairs.truth, pairs.labels, pairs.right, gallery))
        if pairs.shown is not None:
            more = score(self.metrics, Pairs(pairs.images, pairs.shown, pairs.labels, pairs.right, gallery))
            found |= {f"{_SHOWN}{name}": values for name, values in more.items()}
        names = self.world.dataset.class_names
        return [
            {"sample": sample, "class": names[int(label)], "label right": right}
            | {name: values[place] for name, values in found.items()}
            for place, (sample, label, right) in enumerate(
                zip(pairs.ids, pairs.labels, pairs.right, strict=True)
            )
        ]

    def _saved(self, key: tuple[str, str, str], sample: int, image: Tensor, truth: Tensor) -> dict[str, str]:
        """Write a pair as PNG files, the original once; their paths in the folder, and hashes."""
        cell = re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join(key))
        told = {}
        for kind, place, one in (
            ("original", Path(_PAIRS, "originals"), truth),
            ("reconstruction", Path(_PAIRS, cell), image),
        ):
            data, path = image_png(one), place / f"{sample:06d}.png"
            write_bytes(self.folder / path, data)
            told[kind] = path.as_posix()
            told[f"{kind} sha256"] = hashlib.sha256(data).hexdigest()
        return told

    # ------------------------------------------------------------------ ranking

    def rank(self, command: str = "") -> Path:
        """Step 4: who is recognised most, which metric says so, and where metrics disagree; the page."""
        rows: list[dict[str, Any]] = []
        reasons = {}
        for key, (cell, outcome) in self.cells.items():
            if outcome.get("status") != "done":
                reasons[", ".join(key)] = str(outcome.get("reason"))
            elif not self._score_path(cell).is_file():
                raise self._too_early(f"attack {cell.name!r} is not scored by these metrics", "scores")
            else:
                rows += self._scored(key, cell)
        if not rows:
            raise DataError(f"no pair to rank metrics by: {'; '.join(reasons.values())}")
        trained = self.trained
        material = Material(
            folder=self.folder,
            name=self.benchmark.name,
            metrics=self.metrics,
            accuracy={
                (model.label, policy.label): trained[label].record["accuracy"]["held-out"]
                for label, (model, policy) in self.benchmark.classifiers.items()
            },
            schedule=self.benchmark.schedule,
            dataset=self.world.dataset,
            seed=next(iter(self.configs.values())).seed,
            left_out=self.left_out | reasons,
            labeller=self.labeller,
            table=self.table,
            source=str(self.asked.annotations),
        )
        return write_ranking(material, pd.DataFrame(rows), command)

    def labeller(self) -> Labeller:
        """The classifier that rates, trained on what the attacked ones were not, or found in the folder."""
        config, size = self.configs[next(iter(self.configs))], self.benchmark.labeller
        _, ids = public_parts(self.world, config.seed, self.benchmark.share)
        images, labels = self.world.dataset.tensors(ids)
        name = f"cnn{size.width}-{self.world.dataset.name}"
        told = {"format": _FORMAT, "seed": config.seed, "name": name, **asdict(size)}
        pixels = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        digest = hashlib.sha256(json.dumps([told, pixels], sort_keys=True).encode()).hexdigest()[:12]
        path = self.folder / f"labeller-{digest}.safetensors"
        if not path.is_file():
            made = train_labeller(
                images, labels, name, config.seed, f"{len(ids)} public images of {self.world.dataset.name}",
                size.width, size.steps, self.world.dataset.class_names, device=choose_device(self.engine.device),
            )  # fmt: skip
            save_labeller(path, made)
        return load_labeller(path)


def run_benchmark(
    benchmark: Benchmark,
    folder: Path,
    asked: Asked,
    *,
    console: Console | None = None,
    command: str = "",
) -> Path | None:
    """Carry out a benchmark, or one step of it, in `folder`; the page where the ranking was among the steps.

    Raises
    ------
    BadRequest
        Before anything starts, where settings, data or a table of ratings are wrong, or an earlier step is missing.
    RunFailed
        If a classifier diverges, or the disk is full.
    """
    study = Study(benchmark, folder, asked, console)
    with in_use(folder, "--out"):
        return study.run(command)


def chosen_metrics(
    settings: Mapping[str, Any], size: tuple[int, int, int]
) -> tuple[dict[str, ImageMetric], dict[str, str]]:
    """Metrics by name for images of that (C, H, W), and why others are left out.

    Where `settings` name none, all that need no files; a named one that does not apply is refused (BadRequest).
    """
    if "metrics" in settings or "metric.names" in settings:
        named = build_metrics(Config.from_mapping(settings).metric)
        for name, metric in named.items():
            if metric.pooled:
                raise ConfigError(
                    f"setting 'metrics': {name!r} has a value of the whole set, and none of an image"
                )
            metric.check(size)
        return named, {}
    found: dict[str, ImageMetric] = {}
    left_out: dict[str, str] = {}
    for name in METRICS:
        kind = METRICS.get(name)
        if kind.pooled or "weights" in kind.needs:
            left_out[name] = (
                "has no value of an image" if kind.pooled else "needs a file; name it with --metrics"
            )
            continue
        own = {k: v for k, v in settings.items() if k.startswith(f"metric.{name}.")}
        try:
            metric = build_metrics(Config.from_mapping({"metrics": name, **own}).metric)[name]
            metric.check(size)
        except (ConfigError, DataError) as error:
            left_out[name] = str(error)
        else:
            found[name] = metric
    unknown = {k for k in settings if not any(k.startswith(f"metric.{name}.") for name in found)}
    if unknown:
        raise ConfigError(
            f"setting {min(unknown)!r}: its metric is not among {', '.join(found)}; name it with --metrics"
        )
    return found, left_out


def _read_row(row: Mapping[str, Any], metrics: Mapping[str, ImageMetric]) -> dict[str, Any]:
    """A row of scores back from JSON, its figures as numbers."""
    scores = {*metrics, *(f"{_SHOWN}{name}" for name in metrics)}
    return {name: number(value) if name in scores else value for name, value in row.items()}


@dataclass(frozen=True, eq=False)
class CellPairs:
    """Reconstructions of a run beside the private images, (n, C, H, W), one image a client.

    `shown`: what the model saw, where a policy transforms it; `right`: whether the label was told.
    """

    images: Tensor
    truth: Tensor
    shown: Tensor | None
    labels: Tensor
    right: tuple[bool, ...]
    ids: tuple[int, ...]


def cell_pairs(folder: Path) -> CellPairs:
    """The pairs of a finished run of one attack on one image a client; its originals are drawn again.

    DataError where nothing was reconstructed, or the run is of another kind.
    """
    config = Config.from_toml(folder / "config.toml")
    if config.training.batch_size != 1 or config.attack.rounds != (1,) or len(config.attack.names) != 1:
        raise DataError(f"{folder}: pairs are read from runs of one attack on one image a client in round 1")
    world, run = build_world(config), RunFolder(folder, config)
    private = PrivateBatches(config, world)
    ids: list[int] = []
    images, truth, shown, labels = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    right: list[bool] = []
    for client in range(config.victims):
        stored = run.load_reconstruction(config.attack.names[0], observation_name(1, client))
        if stored is None:
            continue
        known = private.truth(1, client)
        if known.shown is not None:
            shown.append(known.shown)
        ids += known.sample_ids
        images.append(stored.answer.images.clamp(0, 1))
        truth.append(known.images)
        labels.append(known.labels)
        right.append(bool(torch.equal(stored.answer.labels, known.labels)))
    if not ids:
        raise DataError(f"{folder}: no victim was reconstructed")
    seen = torch.cat(shown) if shown else None
    return CellPairs(torch.cat(images), torch.cat(truth), seen, torch.cat(labels), tuple(right), tuple(ids))


Job = tuple[Any, ...]


def _train_one(
    label: str, config: Config, schedule: Any, share: float, place: Path, device: str
) -> Trained | Exception:
    """One classifier; what went wrong as a value, so that it comes whole from another process."""
    torch.set_num_threads(1)
    try:
        return train_classifier(lesson(config, schedule, share), place, label, torch.device(device))
    except Exception as error:
        return error


def each(
    function: Callable[..., Any], jobs: Sequence[Job], engine: EngineConfig
) -> Iterator[tuple[str, Any]]:
    """(first argument, answer) of each job as it is done: in this process, or as Ray tasks under engine "ray"."""
    if engine.name == "inline" or len(jobs) < 2:
        for job in jobs:
            yield job[0], function(*job)
        return
    import ray

    from simulations.engine.ray_session import ray_session

    with ray_session(engine.model_copy(update={"cpus_per_actor": float(engine.threads)})):
        task = ray.remote(num_cpus=engine.threads, num_gpus=engine.gpus_per_actor, max_retries=1)(function)
        waiting, pending = list(jobs), dict[Any, str]()
        while waiting or pending:
            while waiting and len(pending) < engine.actors:
                job = waiting.pop(0)
                pending[task.remote(*job)] = job[0]
            ready, _ = ray.wait(list(pending), num_returns=1)
            for reference in ready:
                yield pending.pop(reference), ray.get(reference)
