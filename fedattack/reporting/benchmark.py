"""The page of a SemSim benchmark: which metric says what was recognised, and where metrics disagree."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedattack.files import write_bytes
from fedattack.reporting import figures, formats
from fedattack.reporting.figures import BLUE, GREY, VERMILLION
from fedattack.reporting.pages import render
from fedattack.reporting.provenance import provenance, told

_STATISTICS = ("spearman", "kendall", "pearson")
_ENDS = 4
"""Metrics at either end of a pair's list that are shown."""


@dataclass(frozen=True, eq=False)
class BenchmarkPage:
    """What the page shows.

    `metrics`: name -> heading, the best first; `higher`: whether more of it is more leaked. `correlations`: a row a
    metric, "statistic" ("auc", "spearman", ...) and "over" (what its points are), with "value", "low", "high",
    "fisher low", "fisher high", "n", "no score". `ranking`: a row a classifier. `facts`: columns that say what a pair
    is of. `sheet`: rows with "original png", "reconstruction png", scores and "place by <metric>". `left_out`: name
    -> why.
    """

    name: str
    ratings: str
    proxy: str
    notes: Sequence[str]
    metrics: Mapping[str, str]
    higher: Mapping[str, bool]
    digits: Mapping[str, int]
    correlations: pd.DataFrame
    ranking: pd.DataFrame
    facts: tuple[str, ...]
    sheet: Sequence[Mapping[str, Any]]
    left_out: Mapping[str, str]
    command: str

    @property
    def rater(self) -> str:
        """Who recognised, as a column's heading."""
        return "recognised by the proxy" if self.proxy else "recognised"


def write_page(folder: Path, page: BenchmarkPage) -> Path:
    """Write ``index.html`` and ``figures/metrics.png``, and say where the page is."""
    drawn = figures.png(metric_figure(page))
    write_bytes(folder / "figures" / "metrics.png", drawn)
    text = render(
        "benchmark",
        page=page,
        headline=_headline(page),
        picture={"data": base64.b64encode(drawn).decode(), "alt": _alt(page), "caption": _caption(page)},
        areas=_area_table(page),
        correlations=[_correlation_table(page, over) for over in _points(page)],
        classifiers=[_classifier_row(page, row) for row in page.ranking.to_dict("records")],
        cards=[_card(page, row) for row in page.sheet],
        run=told(provenance(datetime.datetime.now(datetime.UTC))),
    )  # fmt: skip
    path = folder / "index.html"
    write_bytes(path, text.encode())
    return path


def metric_figure(page: BenchmarkPage) -> Figure:
    """Image AUC of each metric, and its Spearman correlation with the shares recognised, with 95 % intervals."""
    names = list(page.metrics)[::-1]
    over = _points(page)
    figure = Figure(figsize=(9.4, 0.36 * len(names) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    for axes, statistic, kind, middle in ((left, "auc", "pairs", 0.5), (right, "spearman", over[-1], 0.0)):
        for place, name in zip(places, names, strict=True):
            row = _row(page, name, statistic, kind)
            if row is None or math.isnan(row["value"]):
                axes.text(middle, place, "  no score", fontsize=8, va="center", color=GREY)
                continue
            if not math.isnan(row["low"]):
                axes.plot([row["low"], row["high"]], [place, place], color=GREY, linewidth=1.4)
            above = not math.isnan(row["low"]) and row["low"] > middle
            axes.plot(
                row["value"], place, "o", color=BLUE if above else VERMILLION, mfc=None if above else "white"
            )
        axes.axvline(middle, color=GREY, linewidth=1, linestyle=":")
        axes.grid(axis="x", color="#e3e3e3")
        axes.set_axisbelow(True)
    left.set_yticks(places, [page.metrics[name] for name in names], fontsize=9)
    left.set_xlim(0, 1)
    right.set_xlim(-1.05, 1.05)
    right.set_xticks([-1, -0.5, 0, 0.5, 1])
    left.set_title("single images: AUC", fontsize=10)
    right.set_title(f"Spearman over {over[-1]}", fontsize=10)
    return figure


def _row(page: BenchmarkPage, name: str, statistic: str, over: str) -> dict[str, Any] | None:
    table = page.correlations
    found = table[(table["metric"] == name) & (table["statistic"] == statistic) & (table["over"] == over)]
    return None if found.empty else {str(key): value for key, value in found.iloc[0].items()}


def _points(page: BenchmarkPage) -> list[str]:
    """What correlations are over, in the table's order."""
    return [over for over in dict.fromkeys(page.correlations["over"]) if over != "pairs"]


def _headline(page: BenchmarkPage) -> str:
    """The best metric by image AUC, as far as its interval carries."""
    name = next(iter(page.metrics))
    row = _row(page, name, "auc", "pairs")
    assert row is not None
    if math.isnan(row["value"]):
        return f"No metric can be ranked: {row['no score']}."
    best = f"{page.metrics[name]} has the highest image AUC, {_figure(row)}"
    if not row["low"] > 0.5:
        return f"{best}: not told apart from chance, 0.5, by {row['n']} pairs."
    behind = [_row(page, name, f"auc - {other}", "pairs") for other in page.metrics if other != name]
    clear = [one for one in behind if one is not None and one["low"] > 0]
    told = [str(one["statistic"]).removeprefix("auc - ") for one in clear]
    if told:
        return f"{best}; clear of {' and '.join(page.metrics[one] for one in told)}."
    return f"{best}, above chance; not clear of the metrics that it is compared with."


def _alt(page: BenchmarkPage) -> str:
    """Which metric is best, which worst, and by how much."""
    rows = [(name, _row(page, name, "auc", "pairs")) for name in page.metrics]
    known = [(name, row) for name, row in rows if row is not None and not math.isnan(row["value"])]
    ends = [f"{page.metrics[name]} {_figure(row)}" for name, row in (known[0], known[-1])] if known else []
    told_of = f": from {ends[0]} down to {ends[1]}" if len(known) > 1 else ""
    return f"Image AUC and rank correlation of {len(page.metrics)} metrics{told_of}."


def _caption(page: BenchmarkPage) -> str:
    return (
        "Right: says better what was recognised. Filled: its 95 % interval lies above chance (dotted). Bootstrap "
        f"over originals and over {_points(page)[0]}."
    )


def _figure(row: Mapping[str, Any], digits: int = 2) -> str:
    """``0.71 [0.62, 0.80]``, or a dash."""
    if math.isnan(row["value"]):
        return formats.NONE
    ends = "" if math.isnan(row["low"]) else " " + formats.interval(row, digits)
    return formats.decimal(row["value"], digits) + ends


def _area_table(page: BenchmarkPage) -> dict[str, Any]:
    """Image AUC of each metric, and by how much it is above others'."""
    table = page.correlations
    others = [one for one in dict.fromkeys(table["statistic"]) if one.startswith("auc - ")]
    rows = []
    for name in page.metrics:
        area = _row(page, name, "auc", "pairs")
        assert area is not None
        less = [_row(page, name, other, "pairs") for other in others]
        cells = [
            _figure(area),
            str(area["n"]),
            *(formats.NONE if one is None else _figure(one) for one in less),
        ]
        rows.append({"name": _named(page, name), "cells": cells, "why": area["no score"]})
    headings = [page.metrics[other.removeprefix("auc - ")] for other in others]
    return {"columns": ["AUC", "pairs", *(f"less {heading}'s" for heading in headings)], "rows": rows}


def _correlation_table(page: BenchmarkPage, over: str) -> dict[str, Any]:
    """Of each metric's means with the shares recognised."""
    rows = []
    for name in page.metrics:
        found = [_row(page, name, statistic, over) for statistic in _STATISTICS]
        told = [one for one in found if one is not None]
        cells = []
        for one in told:
            ends = {"low": one["fisher low"], "high": one["fisher high"]}
            cells += [_figure(one), formats.NONE if math.isnan(ends["low"]) else formats.interval(ends, 2)]
        rows.append(
            {"name": _named(page, name), "cells": [*cells, str(told[0]["n"])], "why": told[0]["no score"]}
        )
    columns = [text for name in _STATISTICS for text in (name.capitalize(), "Fisher's interval")]
    return {"over": over, "columns": [*columns, "points"], "rows": rows}


def _named(page: BenchmarkPage, name: str) -> str:
    return page.metrics[name] + ("" if page.higher[name] else " ↓")


def _classifier_row(page: BenchmarkPage, row: Mapping[Any, Any]) -> dict[str, Any]:
    ends = f"[{row['low']:.0%}, {row['high']:.0%}]"
    cells = [f"{row['recognised']} of {row['rated']}", f"{row['share']:.0%} {ends}", f"{row['accuracy']:.0%}"]
    for name in page.metrics:
        rank = row[f"rank by {name}"]
        place = "" if math.isnan(rank) else f" ({rank:.0f})"
        cells.append(f"{formats.decimal(row[name], page.digits[name])}{place}")
    return {"rank": f"{row['rank']:.0f}", "labels": [row[name] for name in page.facts[:2]], "cells": cells}


def _card(page: BenchmarkPage, row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair: its two pictures, what it is of, and each metric's value and place."""
    scored = [
        (page.metrics[name], formats.decimal(row[name], page.digits[name]), row[f"place by {name}"])
        for name in page.metrics
    ]
    known = sorted((one for one in scored if not math.isnan(one[2])), key=lambda one: -one[2])
    shown = known if len(known) <= 2 * _ENDS else [*known[:_ENDS], *known[-_ENDS:]]
    told = row["recognised"]
    return {
        "original": base64.b64encode(row["original png"]).decode(),
        "reconstruction": base64.b64encode(row["reconstruction png"]).decode(),
        "of": ", ".join(str(row[name]) for name in page.facts),
        "class": row["class"],
        "told": "not rated" if pd.isna(told) else page.rater if told else f"not {page.rater}",
        "shown": shown,
        "more": len(known) - len(shown),
    }
