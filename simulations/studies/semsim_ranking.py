"""The last step of a SemSim benchmark: ratings, correlations with them, and the pairs on which metrics disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from fedattack.annotation.table import COLUMNS, PROXY, SCHEMA_VERSION, pair_name, to_frame, votes, write_table
from fedattack.data.dataset import ImageDataset, as_float
from fedattack.errors import DataError
from fedattack.files import write_bytes
from fedattack.metrics import ImageMetric, wilson
from fedattack.metrics.semsim.evaluation import Evaluation, Figure
from fedattack.metrics.semsim.labeller import Labeller
from fedattack.metrics.semsim.rated import Rated
from fedattack.reading import LARGEST_PICTURE, Unreadable, open_picture, read_bytes
from fedattack.reporting.benchmark import BenchmarkPage, write_page
from fedattack.storage.spreadsheet import csv_bytes
from simulations.studies.classifier import Schedule
from simulations.studies.semsim import BESIDE, RECOGNISED
from simulations.studies.semsim_presets import ATTACK, MODEL, POLICY

_CELL = (MODEL, POLICY, ATTACK)
OVER = {"classifiers": (MODEL, POLICY), "classifiers and attacks": _CELL}
"""What the points of a correlation are -> the facts that tell them apart."""

SHEET = 12
"""Pairs on the page of those on which metrics disagree most, at most one of an original."""

_NO_TIME = "1970-01-01T00:00:00+00:00"
"""Of a classifier's answer: the same ratings are the same file, whenever they were made."""


@dataclass(frozen=True, eq=False)
class Material:
    """What is ranked, and whereby.

    `accuracy`: (model, policy) -> the classifier's on held-out images. `left_out`: metrics and combinations that
    there is nothing of -> why. `table`: ratings, read from `source`; None: those of what `labeller` answers.
    """

    folder: Path
    name: str
    metrics: Mapping[str, ImageMetric]
    accuracy: Mapping[tuple[str, str], Mapping[str, float]]
    schedule: Schedule
    dataset: ImageDataset
    seed: int
    left_out: Mapping[str, str]
    labeller: Callable[[], Labeller]
    table: pd.DataFrame | None = None
    source: str = ""


@dataclass(frozen=True, eq=False)
class Ratings:
    """What was recognised: 1, 0 or missing for each row of the scores; who answered, in words; the proxy's name."""

    recognised: pd.Series[Any]
    told: str
    proxy: str
    notes: tuple[str, ...] = ()


def write_ranking(study: Material, rows: pd.DataFrame, command: str = "") -> Path:
    """Write ``ranking.csv``, ``correlations.csv``, ``disagreements.csv`` and ``index.html``; the page's path."""
    ratings = study_ratings(study, rows)
    known = ratings.recognised.notna()
    rated_rows = rows[known].reset_index(drop=True)
    recognised = ratings.recognised[known].astype(bool).to_numpy()
    rated = as_rated(study.folder, rated_rows, recognised, study.dataset.name, ratings.proxy)
    leak = {
        name: (1 if metric.higher else -1) * rated_rows[name].to_numpy(np.float64)
        for name, metric in study.metrics.items()
    }
    correlations = _correlations(rated, leak, study.seed)
    order = _order(correlations)
    ranking = _ranking(study, rated_rows, recognised)
    disagreements = _disagreements(rows, study, ratings)
    for name, frame in (
        ("ranking", ranking),
        ("correlations", correlations),
        ("disagreements", disagreements),
    ):
        write_bytes(study.folder / f"{name}.csv", csv_bytes(frame))
    headings = {name: study.metrics[name].heading for name in order}
    page = BenchmarkPage(
        name=study.name,
        ratings=ratings.told,
        proxy=ratings.proxy,
        notes=[*ratings.notes, *_notes(study, rows, rated)],
        metrics=headings,
        higher={name: study.metrics[name].higher for name in order},
        digits={name: study.metrics[name].digits for name in order},
        correlations=correlations,
        ranking=ranking,
        facts=(MODEL, POLICY, ATTACK),
        sheet=[_shown(study.folder, row) for row in _one_an_original(disagreements).to_dict("records")],
        left_out=study.left_out,
        command=command or f"fedattack semsim benchmark --preset {study.name}",
    )
    return write_page(study.folder, page)


# ---------------------------------------------------------------------- ratings


def study_ratings(study: Material, rows: pd.DataFrame) -> Ratings:
    """From the table that was given; without one, by a classifier, whose ratings are written as such a table."""
    notes: tuple[str, ...] = ()
    if study.table is None:
        labeller = study.labeller()
        table = proxy_table(study.folder, rows, labeller, study.dataset)
        write_table(study.folder / "proxy-ratings.csv", table)
        notes = (_own_score(study, rows, labeller),)
        source = "proxy-ratings.csv"
    else:
        table, source = study.table, study.source
    counted = votes(table)
    by = ["original_sha256", "reconstruction_sha256"]
    majority = counted.dropna(subset=["majority"]).drop_duplicates(by).set_index(by)["majority"]
    keys = pd.MultiIndex.from_frame(rows[["original sha256", "reconstruction sha256"]])
    found = pd.Series(majority.reindex(keys).to_numpy(), index=rows.index)
    if not found.notna().any():
        raise DataError(
            f"{source} rates no pair of this benchmark (of {len(rows)}, by the images' SHA-256): rate those in "
            f"{study.folder / 'pairs'}"
        )
    kinds = sorted(set(table["annotator_type"]))
    proxy = ", ".join(sorted(set(table["proxy_name"]))) if kinds == [PROXY] else ""
    who = (
        f"the proxy {proxy}, a classifier: no human took part"
        if proxy
        else f"{source}: the majority of annotators"
    )
    protocol = ", ".join(sorted(set(table["protocol"])))
    if missing := int(found.isna().sum()):
        notes += (
            f"{missing} of {len(rows)} pairs have no rating, or as many for as against, and count for nothing",
        )
    return Ratings(found, f"ratings by {who} (protocol {protocol})", proxy, notes)


def proxy_table(folder: Path, rows: pd.DataFrame, labeller: Labeller, dataset: Any) -> pd.DataFrame:
    """A rating of every pair, by the rule of ``semsim label``: whether the original's class has half the probability.

    The labeller sees the reconstruction as it is on disk, 8 bit, and not the original: protocol "recognise".
    """
    names = dataset.class_names
    probable = labeller.probabilities(_images(folder, rows["reconstruction"]))
    best = probable.argmax(1).tolist()
    own = probable[range(len(rows)), [names.index(one) for one in rows["class"]]].tolist()
    told = []
    for place, row in enumerate(rows.to_dict("records")):
        given = {
            "schema_version": SCHEMA_VERSION,
            **{f"{kind}_path": str(folder / row[kind]) for kind in ("original", "reconstruction")},
            **{f"{kind}_sha256": row[f"{kind} sha256"] for kind in ("original", "reconstruction")},
            "dataset": dataset.name,
            "class_label": row["class"],
            "attack": row[ATTACK],
            "model": row[MODEL],
            "defence": row[POLICY],
            "protocol": "recognise",
            "label": str(int(own[place] >= RECOGNISED)),
            "choice": names[best[place]],
            "confidence": f"{own[place]:.6f}",
            "annotator_id": f"proxy {labeller.facts.name}",
            "annotator_type": PROXY,
            "proxy_name": labeller.facts.name,
            "timestamp": _NO_TIME,
            "is_attention_check": "0",
        }
        whole = dict.fromkeys(COLUMNS, "") | given
        told.append(whole | {"pair_id": pair_name(whole)})
    return to_frame(told)


def _own_score(study: Material, rows: pd.DataFrame, labeller: Labeller) -> str:
    """What the labeller makes of the originals themselves."""
    originals = rows.drop_duplicates("original")
    images = _images(study.folder, originals["original"])
    own = labeller.probabilities(images)
    right = [
        float(one[study.dataset.class_names.index(label)]) >= RECOGNISED
        for one, label in zip(own, originals["class"], strict=True)
    ]
    ends = wilson(sum(right), len(right))
    figures = labeller.facts.figures
    return (
        f"the proxy recognises {sum(right)} of {len(right)} originals themselves (95 % interval {ends.low:.0%} to "
        f"{ends.high:.0%}; the class has a probability of {RECOGNISED:g} or more), and is right about "
        f"{figures['accuracy']:.0%} of {figures['held_out']} held-out images: what it does not recognise a person may"
    )


def as_rated(folder: Path, rows: pd.DataFrame, recognised: np.ndarray, dataset: str, proxy: str) -> Rated:
    """The rated pairs with what they are of."""
    distinct, owner = np.unique(rows["original sha256"].to_numpy(str), return_inverse=True)
    first = rows.drop_duplicates("original sha256").set_index("original sha256").loc[distinct]
    facts = {name: rows[name].to_numpy(str) for name in (MODEL, POLICY, ATTACK)}
    return Rated(
        _images(folder, first["original"]),
        _images(folder, rows["reconstruction"]),
        owner.astype(np.int64),
        recognised,
        facts | {"dataset": np.array([dataset] * len(rows))},
        proxy=proxy,
    )


def _images(folder: Path, names: pd.Series[Any]) -> Tensor:
    """PNG files of one size as float32 (n, C, H, W) in [0, 1]."""
    found = []
    for name in names:
        try:
            data = read_bytes(folder / name, LARGEST_PICTURE)
            with open_picture(data, str(name)) as image:
                pixels = np.array(image)
        except Unreadable as error:
            raise DataError(
                f"cannot read the pair's image {folder / name}: {error.reason}; run the scores again"
            ) from None
        found.append(as_float(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)))
    return torch.stack(found)


# ---------------------------------------------------------------------- tables


def _correlations(rated: Rated, leak: Mapping[str, np.ndarray], seed: int) -> pd.DataFrame:
    """A row a metric, statistic and kind of point; differences to other metrics as statistics "auc - psnr's"."""
    rows = []

    def add(name: str, over: str, statistic: str, found: Figure) -> None:
        fisher = found.fisher or (math.nan, math.nan)
        rows.append(
            {
                "metric": name, "over": over, "statistic": statistic, "value": found.value, "low": found.low,
                "high": found.high, "fisher low": fisher[0], "fisher high": fisher[1], "n": found.count,
                "no score": found.why,
            }
        )  # fmt: skip

    for over, by in OVER.items():
        if len(by) == len(_CELL) and len(np.unique(rated.facts[ATTACK])) == 1:
            continue  # the same points once more
        evaluation = Evaluation(rated, leak, by, seed)
        for name in leak:
            figures = evaluation.figures(name)
            for statistic, found in figures.items():
                if statistic != "auc":
                    add(name, over, statistic, found)
                elif over == next(iter(OVER)):
                    add(name, "pairs", "auc", found)
        if over == next(iter(OVER)):
            for name in leak:
                for other in (one for one in BESIDE if one in leak and one != name):
                    add(name, "pairs", f"auc - {other}", evaluation.difference(name, other)["auc"])
    return pd.DataFrame(rows)


def _order(correlations: pd.DataFrame) -> list[str]:
    """Metrics by image AUC, the best first; those without last."""
    areas = correlations[correlations["statistic"] == "auc"].set_index("metric")["value"]
    return list(areas.sort_values(ascending=False, kind="stable", na_position="last").index)


def _ranking(study: Material, rows: pd.DataFrame, recognised: np.ndarray) -> pd.DataFrame:
    """A row a classifier, the one of which most was recognised first, with each metric's mean and rank."""
    told = []
    rated = rows.assign(_recognised=recognised)
    for (model, policy), right in study.accuracy.items():
        part = rated[(rated[MODEL] == model) & (rated[POLICY] == policy)]
        if part.empty:
            continue
        count, yes = len(part), int(part["_recognised"].sum())
        ends = wilson(yes, count)
        row = {
            MODEL: model, POLICY: policy, "recognised": yes, "rated": count, "share": yes / count, "low": ends.low,
            "high": ends.high,
            "accuracy": right["mean"], "accuracy low": right["low"], "accuracy high": right["high"],
        }  # fmt: skip
        for name in study.metrics:
            values = part[name].to_numpy(np.float64)
            finite = values[np.isfinite(values)]
            row[name] = float(finite.mean()) if len(finite) else math.nan
        told.append(row)
    frame = pd.DataFrame(told)
    frame["rank"] = rankdata(-frame["share"], method="min")
    for name, metric in study.metrics.items():
        values = frame[name].to_numpy(np.float64)
        frame[f"rank by {name}"] = rankdata(
            -values if metric.higher else values, method="min", nan_policy="omit"
        )
    return frame.sort_values(["rank", MODEL, POLICY], kind="stable").reset_index(drop=True)


def _disagreements(rows: pd.DataFrame, study: Material, ratings: Ratings) -> pd.DataFrame:
    """Every pair with its place by each metric, 0 (least leaked of all) to 1, the widest spread of places first."""
    places = {}
    for name, metric in study.metrics.items():
        values = rows[name].to_numpy(np.float64) * (1 if metric.higher else -1)
        known = ~np.isnan(values)
        found = np.full(len(values), np.nan)
        if (
            known.sum() > 1 and np.ptp(values[known]) > 0
        ):  # a metric that says the same of all disagrees with none
            found[known] = (rankdata(values[known]) - 1) / (known.sum() - 1)
        places[name] = found
    table = np.array(list(places.values()))
    there = (~np.isnan(table)).sum(0) > 1
    spread = np.full(len(rows), np.nan)
    spread[there] = np.nanmax(table[:, there], axis=0) - np.nanmin(table[:, there], axis=0)
    frame = rows.assign(recognised=ratings.recognised, spread=spread)
    for name, values in places.items():
        frame[f"place by {name}"] = values
    kept = frame.dropna(subset=["spread"])
    return kept.sort_values(
        ["spread", MODEL, POLICY, ATTACK, "sample"], ascending=[False, *[True] * 4], kind="stable"
    )


def _one_an_original(disagreements: pd.DataFrame) -> pd.DataFrame:
    return disagreements.drop_duplicates("original sha256").head(SHEET)


def _shown(folder: Path, row: Mapping[Any, Any]) -> dict[str, Any]:
    """A pair for the page, with the PNG files' bytes."""
    told: dict[str, Any] = {str(name): value for name, value in row.items()}
    return told | {
        f"{kind} png": read_bytes(folder / row[kind], LARGEST_PICTURE)
        for kind in ("original", "reconstruction")
    }


def _notes(study: Material, rows: pd.DataFrame, rated: Rated) -> list[str]:
    """What to know before reading a figure."""
    classifiers, cells = (len({tuple(one) for one in rows[list(by)].to_numpy()}) for by in OVER.values())
    schedule = study.schedule
    notes = [
        f"{len(rated)} rated pairs of {len(rated.originals)} originals; {classifiers} classifiers, {cells} "
        "combinations with an attack",
        f"classifiers: {schedule.epochs} epochs, and a loss of {schedule.loss_weight:g} times the cross-entropy",
    ]
    if study.dataset.note:
        notes.append(f"data set {study.dataset.name}: {study.dataset.note}")
    return notes
