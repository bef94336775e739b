"""Scores of images that are there already: of runs, of sweeps, and of folders of pictures paired by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from fedattack.annotation.pairs import Picture, RatedPair, read_pairs
from fedattack.audit import AuditResult
from fedattack.audit.family import get_family
from fedattack.audit.image_scores import ORIGINAL, Victim, check_metrics
from fedattack.audit.reconstruction import audit_images
from fedattack.config import Config, MetricConfig
from fedattack.data import World, build_world
from fedattack.errors import BadRequest, ConfigError, DataError
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import ImageMetric, ready_metrics
from fedattack.observation import EVERYONE, Reconstruction, client_name, observation_name
from fedattack.reading import LARGEST_PICTURE, Unreadable, read_bytes, read_frame
from fedattack.reporting.report import image_png, write_results
from fedattack.reporting.sweep.page import write_sweep
from fedattack.reporting.sweep.table import DONE, CellOutcome, SweepTable, sweep_table
from fedattack.reporting.terminal import print_summary
from fedattack.storage import RunFolder, load_truths
from fedattack.storage.observations import safe_name
from fedattack.storage.plain import plain, read_json, write_json
from simulations.experiments.private import PrivateBatches
from simulations.experiments.reconstruction import held_out_images, other_photographs
from simulations.progress import tell

EIGHT_BIT = "8 bit"
_MARK = "scores.json"
"""In the folder that a scoring wrote, and in none else."""

_OLD_FIELDS = ("k", "k_measuring", "k_per_pixel", "rate", "kept_per_layer", "wire_bytes", "seconds")
"""Columns of a run's records that its images do not tell."""


@dataclass(frozen=True)
class Scored:
    """What scoring a source came to: its results, what must be said of them, and the settings they belong to."""

    results: list[AuditResult]
    notes: list[str]
    config: Config
    summary: dict[str, Any] = field(default_factory=dict)


def score_sources(
    sources: Sequence[Path],
    chosen: MetricConfig,
    out: Path | None,
    *,
    console: Console | None = None,
    command: str = "",
) -> Path:
    """Score a finished run, a sweep, or a folder of originals and one or more of reconstructions; the page's path.

    Records, summary, figures and page go to `out`; None: ``scores`` in the run or sweep, or in the last folder's
    parent.

    Raises
    ------
    BadRequest
        If the sources do not go together or hold nothing to score, or a metric cannot score them; before any work.
    RunFailed
        If the disk is full.
    """
    console = console or Console(quiet=True)
    metrics = ready_metrics(chosen)
    if missing := [source for source in sources if not source.is_dir()]:
        raise DataError(
            f"{str(missing[0])!r}: no such folder; a source is a run, a sweep or a folder of pictures"
        )
    first = sources[0]
    if (first / "config.toml").is_file() or (first / "cells").is_dir():
        if len(sources) > 1:
            raise ConfigError(
                f"{str(sources[1])!r}: one run or sweep is scored at a time, or folders of pictures"
            )
        place = _place(out or first / "scores", sources, chosen)
        if (first / "config.toml").is_file():
            scored = score_run(first, chosen, metrics)
            return _report(place, scored, console, command, f"the images of the run {first}")
        return _score_sweep(first, chosen, metrics, place, console, command)
    place = _place(out or sources[-1].resolve().parent / "scores", sources, chosen)
    scored = score_folders(sources, chosen, metrics)
    told = f"{', '.join(map(str, sources[1:]))} against the originals in {first}"
    return _report(place, scored, console, command, told)


def score_folders(
    sources: Sequence[Path], chosen: MetricConfig, metrics: Mapping[str, ImageMetric]
) -> Scored:
    """Pictures against the originals of equal names in the first folder; each further folder is an attack."""
    pairs = read_pairs(sources)
    sizes = {(*pair.original.size, len(pair.original.pixels().getbands())) for pair in pairs}
    if len(sizes) > 1:
        one, other = sorted(sizes)[:2]
        shown = " and ".join(f"{w}x{h} pixels, {c} channel{'s' if c > 1 else ''}" for w, h, c in (one, other))
        raise DataError(
            f"{str(sources[0])!r}: pictures of one size and as many channels are scored; found {shown}"
        )
    width, height, channels = next(iter(sizes))
    check_metrics(metrics, (channels, height, width))
    results = []
    for source in sources[1:]:
        name = source.name or str(source)
        mine = [pair for pair in pairs if pair.reconstruction.path.is_relative_to(source)]
        classes = sorted({pair.told.get("class_label", "") for pair in mine})
        victims = [_of_pair(pair, number, channels, classes) for number, pair in enumerate(mine)]
        results.append(audit_images(name, victims, metrics=metrics))
    notes = [
        f"originals and reconstructions are {EIGHT_BIT}: identical pictures need not be identical images"
    ]
    return Scored(results, notes, Config(metric=chosen))


def _of_pair(pair: RatedPair, number: int, channels: int, classes: Sequence[str]) -> Victim:
    original, made = (
        _pixels(one.pixels(), channels, str(one.path)) for one in (pair.original, pair.reconstruction)
    )
    label = classes.index(pair.told.get("class_label", ""))
    truth = GroundTruth(1, number, original[None], torch.tensor([label]), (number,))
    answer = Reconstruction(made[None], torch.zeros(0, dtype=torch.int64), float("nan"))
    return Victim(pair.original.path.name, truth, answer, "", None, {"file": pair.original.path.name})


def _pixels(picture: Any, channels: int, name: str) -> Tensor:
    tensor = _as_tensor(picture)
    if tensor.shape[0] != channels:
        if tensor.shape[0] == 1:
            return tensor.expand(channels, -1, -1).clone()
        raise DataError(
            f"{name!r} has colours and the originals are grey; pairs of as many channels are scored"
        )
    return tensor


def score_run(run: Path, chosen: MetricConfig, metrics: Mapping[str, ImageMetric]) -> Scored:
    """The answers of a finished run, as floats, against its private images, which are kept or drawn again.

    Where the data set is no longer at hand the run's own pictures are scored, and it is said that they are 8 bit.
    """
    config = Config.from_toml(run / "config.toml")
    if not (run / "summary.json").is_file():
        raise DataError(
            f"{str(run)!r} is a run that did not finish (no summary.json); start it again, then score it"
        )
    summary = dict(read_json(run / "summary.json"))
    folder = RunFolder(run, config)
    attacks = answered_images(summary)
    if not attacks:
        raise DataError(f"{str(run)!r}: no attack of this run answered images")
    world, notes = _world(config)
    truths = _Truths(run, config, world)
    granted = None if world is None or world.auxiliary is None else world.auxiliary.images
    public = None if world is None else held_out_images(world)
    old = _old_fields(run)
    results = []
    for name in attacks:
        victims = []
        for key, answered in _keys(run, name):
            found = folder.load_reconstruction(name, key) if answered else None
            place = _who(key)
            truth = truths.of(name, *place)
            answer = None if found is None else found.answer
            reason = (
                ""
                if answered
                else str(read_json(run / "parts" / safe_name(name) / f"{key}.failed.json")["reason"])
            )
            another = {} if world is None else other_photographs(world, [truth], config.seed)
            fields = old.get((name, *place), {})
            victims.append(Victim(key, truth, answer, reason, granted, fields, another.get(key)))
        if not victims:
            raise DataError(f"{str(run)!r}: the answers of {name!r} are gone (parts/ is empty)")
        size = victims[0].truth.images.shape[1:]
        check_metrics(metrics, (int(size[0]), int(size[1]), int(size[2])))
        result = audit_images(name, victims, seed=config.seed, metrics=metrics, public=public)
        told = summary["attacks"][name]
        kept = {key: told[key] for key in told if key not in result.summary}
        threat = kept.pop("threat", {})
        whole = {**kept, **result.summary, "seconds": told["seconds"]}
        results.append(replace(result, summary=whole, threat=threat))
    if truths.eight_bit:
        notes.append(
            f"the originals are {EIGHT_BIT} (the run's pictures), and the reconstructions are floats"
        )
    return Scored(results, notes, config.model_copy(update={"metric": chosen}), summary)


def answered_images(summary: Mapping[str, Any]) -> list[str]:
    """The attacks of a run that answered images."""
    return [name for name, found in summary["attacks"].items() if get_family(found["family"]).measured]


def _world(config: Config) -> tuple[World | None, list[str]]:
    try:
        return build_world(config), []
    except BadRequest as error:
        return None, [
            f"the data set is not at hand, so that neither public images nor floors of them are: {error}"
        ]


class _Truths:
    """The private batches of a run: from its truth folder, drawn again, or from its pictures."""

    def __init__(self, run: Path, config: Config, world: World | None) -> None:
        self._run, self._config = run, config
        self._private = None if world is None else PrivateBatches(config, world)
        earlier = run / "parts" / "observations.json"
        saved = [run / "truth"]
        if earlier.is_file():
            saved.append(Path(read_json(earlier)["folder"]).parent / "truth")
        folder = next((place for place in saved if place.is_dir()), None)
        self._saved = {} if folder is None else {(t.round, t.client): t for t in load_truths(folder)}
        self._attacks_saved = earlier.is_file()
        self.eight_bit = False

    def of(self, attack: str, round: int, client: int) -> GroundTruth:
        if (found := self._saved.get((round, client))) is not None:
            return found
        if self._private is not None and client != EVERYONE and not self._attacks_saved:
            truth = self._private.truth(round, client)
            self._check(attack, truth)
            return truth
        return self._pictures(attack, round, client)

    def _check(self, attack: str, truth: GroundTruth) -> None:
        """Refuse a data set that is no longer the run's."""
        for index, image in enumerate(truth.images):
            kept = self._file(attack, truth.round, truth.client, index)
            if kept.is_file() and read_bytes(kept, LARGEST_PICTURE) != image_png(image):
                sample = truth.sample_ids[index]
                raise DataError(
                    f"sample {sample} of data set {self._config.data.name!r} is not the image that the run "
                    f"{str(self._run)!r} attacked ({kept.name}): the data have changed since"
                )

    def _pictures(self, attack: str, round: int, client: int) -> GroundTruth:
        files = sorted(
            self._file(attack, round, client, 0).parent.glob(
                f"{observation_name(round, client)}-*-{ORIGINAL}.png"
            ),
            key=lambda path: int(path.name.removeprefix(f"{observation_name(round, client)}-").split("-")[0]),
        )
        if not files:
            raise DataError(
                f"{str(self._run)!r}: the originals of {observation_name(round, client)} are neither kept nor can be "
                "drawn again; keep them with --save-observations"
            )
        self.eight_bit = True
        frame = _records(self._run)
        mine = frame[(frame["attack"] == attack) & (frame["round"] == round) & (frame["client"] == client)]
        pictures = [_as_tensor(Picture.read(path).pixels()) for path in files]
        labels, samples = (mine.sort_values("image")[name].tolist() for name in ("label", "sample"))
        count = len(pictures)
        return GroundTruth(
            round,
            client,
            torch.stack(pictures),
            torch.tensor(labels[:count]),
            tuple(map(int, samples[:count])),
        )

    def _file(self, attack: str, round: int, client: int, index: int) -> Path:
        name = f"{observation_name(round, client)}-{index}-{ORIGINAL}.png"
        return self._run / "images" / safe_name(attack) / name


def _as_tensor(picture: Any) -> Tensor:
    """Float (C, H, W) in [0, 1]."""
    return pil_to_tensor(picture).float() / 255


def _keys(run: Path, attack: str) -> Iterator[tuple[str, bool]]:
    """Observation keys that an attack answered (True) or failed at, in order."""
    place = run / "parts" / safe_name(attack)
    found: dict[str, bool] = {}
    for path in place.glob("*.json"):
        failed = path.name.endswith(".failed.json")
        key = path.name.removesuffix(".failed.json" if failed else ".json")
        if (place / f"{key}.safetensors").is_file() or failed:
            found[key] = (place / f"{key}.json").is_file()
    yield from sorted(found.items())


def _who(key: str) -> tuple[int, int]:
    """Round and client of an observation's key."""
    number, client = key.removeprefix("round-").split("-", 1)
    everyone = client == client_name(EVERYONE)
    return int(number), EVERYONE if everyone else int(client.removeprefix("client-"))


def _records(run: Path) -> pd.DataFrame:
    try:
        return read_frame(run / "records.parquet")
    except Unreadable as error:
        raise DataError(f"cannot read {run / 'records.parquet'}: {error.reason}") from None


def _old_fields(run: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """(attack, round, client) -> what a run's records know besides."""
    frame = _records(run)
    names = [name for name in _OLD_FIELDS if name in frame]
    found = {}
    for row in frame.drop_duplicates(["attack", "round", "client"]).to_dict("records"):
        if not pd.isna(row["round"]):
            who = str(row["attack"]), int(row["round"]), int(row["client"])
            found[who] = {str(name): row[name] for name in names if not pd.isna(row[name])}
    return found


def _place(out: Path, sources: Sequence[Path], chosen: MetricConfig) -> Path:
    """The folder to write to: new, empty, or an earlier scoring's."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise ConfigError(f"--out {str(out)!r}: is not empty, and holds no scores; give a new folder")
    told = {"format": 1, "sources": [str(s) for s in sources], "metrics": chosen.model_dump(mode="json")}
    write_json(out / _MARK, told)
    return out


def _report(place: Path, scored: Scored, console: Console, command: str, about: str) -> Path:
    folder = RunFolder(place, scored.config)
    federation = scored.summary.get("federation") or None
    heading = "How much of the private images do these show?"
    more: dict[str, Any] = {"notes": scored.notes, "about": about, "heading": heading}
    page = write_results(folder, scored.results, federation, command=command, **more)
    print_summary(console, scored.results, federation)
    for note in scored.notes:
        console.print(note, highlight=False, markup=False)
    tell(console, "report", page)
    return page


def _score_sweep(
    sweep: Path,
    chosen: MetricConfig,
    metrics: Mapping[str, ImageMetric],
    place: Path,
    console: Console,
    command: str,
) -> Path:
    """Every finished cell of a sweep, and its table again."""
    outcomes = list(_cells(sweep))
    told = []
    for outcome in outcomes:
        if outcome.status != DONE:
            told.append(outcome)
            continue
        run = sweep / "cells" / outcome.name
        if not answered_images(summary := dict(read_json(run / "summary.json"))):
            told.append(replace(outcome, summary=summary))
            continue
        scored = score_run(run, chosen, metrics)
        folder = RunFolder(place / "cells" / outcome.name, scored.config)
        federation = scored.summary.get("federation") or None
        about = f"the images of the run {run}"
        write_results(folder, scored.results, federation, notes=scored.notes, about=about, command=command)
        summary["attacks"] = summary["attacks"] | {one.attack: plain(one.summary) for one in scored.results}
        told.append(CellOutcome(outcome.name, outcome.labels, DONE, "", outcome.seconds, summary))
        console.print(f"scored {outcome.name}", highlight=False, markup=False)
    if not any(outcome.status == DONE for outcome in told):
        raise DataError(f"{str(sweep)!r}: no run of this sweep is finished")
    table: SweepTable = sweep_table(list(told[0].labels), told)
    page = write_sweep(place, table, command=command)
    tell(console, "page", page)
    return page


def _cells(sweep: Path) -> Iterator[CellOutcome]:
    """The cells of a sweep as its table has them."""
    try:
        frame = read_frame(sweep / "cells.parquet")
    except Unreadable as error:
        raise DataError(
            f"{str(sweep)!r} is no finished sweep: cannot read cells.parquet ({error.reason})"
        ) from None
    axes = [str(name) for name in frame.columns if str(name).startswith("axis.")]
    for name, rows in frame.groupby("cell", sort=False):
        first = rows.iloc[0]
        labels = {
            axis.removeprefix("axis."): "" if pd.isna(first[axis]) else str(first[axis]) for axis in axes
        }
        seconds = float(np.nansum(rows["seconds"].to_numpy(dtype=float)))
        yield CellOutcome(str(name), labels, str(first["status"]), str(first["reason"]), seconds, None)
