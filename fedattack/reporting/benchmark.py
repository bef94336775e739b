"""The page of a SemSim benchmark: which metric says what was recognised, and where metrics disagree."""

from __future__ import annotations

import base64
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
from fedattack.reporting.report import environment
from fedattack.reporting.template import STYLE
from fedattack.storage.plain import fedattack_version

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
    text = environment().from_string(_PAGE).render(
        style=STYLE,
        page=page,
        headline=_headline(page),
        picture=base64.b64encode(drawn).decode(),
        caption=_caption(page),
        areas=_area_table(page),
        correlations=[_correlation_table(page, over) for over in _points(page)],
        classifiers=[_classifier_row(page, row) for row in page.ranking.to_dict("records")],
        cards=[_card(page, row) for row in page.sheet],
        version=fedattack_version(),
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


_PAGE = """\
{% macro table(shown) %}
<div class="scroll"><table>
<tr><th class="words">metric</th>{% for name in shown.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in shown.rows %}
<tr><td class="words">{{ row.name }}</td>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for row in shown.rows if row.why %}<p class="soft">{{ row.name }}: no score; {{ row.why }}.</p>{% endfor %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fedattack: SemSim benchmark {{ page.name }}</title>
<style>
{{ style|safe }}
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .3rem; padding: .7rem .8rem; background: var(--panel); }
.card p { margin: .3rem 0; font-size: .9rem; }
.pair { display: flex; gap: .6rem; }
.pair figure { margin: 0; flex: 1; }
.pair img { width: 100%; image-rendering: pixelated; }
.card table { width: 100%; margin: .4rem 0 0; font-size: .85rem; }
.card td { padding: .15rem 0 .15rem .5rem; }
.card td:first-child { white-space: normal; }
.card .bar { width: 3.5rem; }
.scroll th, .scroll td { padding: .3rem .5rem; font-size: .85rem; }
td.words { min-width: 10rem; }
.proxy { font-weight: 600; }
</style>
</head>
<body>
<h1>Which metric says what is recognised?</h1>
<p class="soft">SemSim benchmark "{{ page.name }}": metrics of reconstructed images against
<span class="{{ 'proxy' if page.proxy else '' }}">{{ page.ratings }}</span></p>
<p class="top">{{ headline }}</p>
{% for note in page.notes %}
<p class="soft">{{ note[0]|upper }}{{ note[1:] }}.</p>
{% endfor %}

<h2>Metrics, the best first</h2>
<figure><img alt="Image AUC and rank correlation of each metric" src="data:image/png;base64,{{ picture }}">
<figcaption>{{ caption }}</figcaption></figure>
<h3>Single images: was this one recognised?</h3>
{{ table(areas) }}
<p class="soft">↓: lower is more leaked; the AUC is turned so that higher says better what was recognised.</p>
{% for one in correlations %}
<h3>Means over {{ one.over }}: of which was more recognised?</h3>
{{ table(one) }}
{% endfor %}

<h2>Classifiers, the one of which most is recognised first</h2>
<div class="scroll"><table>
<tr><th>rank</th><th class="words">model</th><th class="words">policy</th><th>{{ page.rater }}</th><th>share</th>
<th>accuracy, held out</th>{% for name in page.metrics.values() %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in classifiers %}
<tr><td>{{ row.rank }}</td>{% for label in row.labels %}<td class="words">{{ label }}</td>{% endfor %}
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="soft">Means over pairs; in brackets the rank by that metric, 1: most leaked.</p>

<h2>Where metrics disagree most</h2>
<p class="soft">Pairs whose places among all pairs lie furthest apart (0: the least leaked of all, 100: the most), at
most one of an original; all are in disagreements.csv.</p>
<div class="cards">
{% for card in cards %}
<div class="card">
<div class="pair">
<figure><img alt="original" src="data:image/png;base64,{{ card.original }}"><figcaption>original</figcaption></figure>
<figure><img alt="reconstruction" src="data:image/png;base64,{{ card.reconstruction }}">
<figcaption>reconstruction</figcaption></figure>
</div>
<p><strong>{{ card.class }}</strong>, {{ card.told }}</p>
<p class="soft">{{ card.of }}</p>
<table>
{% for name, value, place in card.shown %}
<tr><td>{{ name }}</td><td>{{ value }}</td><td><span class="bar"><i style="width: {{ (place * 100)|round(1) }}%"></i>
</span></td><td>{{ (place * 100)|round|int }}</td></tr>
{% endfor %}
</table>
{% if card.more %}<p class="soft">{{ card.more }} metrics between these are left out.</p>{% endif %}
</div>
{% endfor %}
</div>

{% if page.left_out %}
<h2>What is left out</h2>
<dl>{% for name, why in page.left_out.items() %}<dt>{{ name }}</dt><dd>{{ why }}</dd>{% endfor %}</dl>
{% endif %}

<h2>How to repeat</h2>
<pre>{{ page.command }}</pre>
<p class="soft">fedattack {{ version }}. Tables: ranking.csv, correlations.csv, disagreements.csv, scores.csv; each
attack's report below attacks. Intervals: 95 %, percentile bootstrap over originals and over the points of a
correlation; beside it Fisher's, by the number of points alone. AUC: the chance that a recognised image has the higher
score than one that was not; 0.5 is chance. A correlation over few points says little, whatever its value.</p>
</body>
</html>
"""
