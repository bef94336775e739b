"""Figures, drawn without a display. Colours are Okabe and Ito's, told apart by every kind of colour vision."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fedattack.audit.canaries import CanaryAudit
from fedattack.audit.family import AuditResult, Metric
from fedattack.audit.image_scores import AUXILIARY_FLOOR, GREY_FLOOR, ORIGINAL, REBUILT, SHOWN
from fedattack.audit.image_scores import figure as figure_of
from fedattack.audit.reconstruction_verdict import COUNTED_DB, RECOVERED_PSNR
from fedattack.metrics import clopper_pearson
from fedattack.observation import EVERYONE
from fedattack.reporting import formats

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#767676"
_SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_FLOOR_MARKS = (("s", ORANGE), ("D", GREEN), ("^", PURPLE), ("v", SKY), ("P", VERMILLION))
_DPI = 130

FEWEST_NEGATIVES = 50
"""Non-members below which the left end of a ROC curve is one or two of them, and is not drawn."""
FEWEST_OF_ROC = 10
"""Members, and non-members, below which a ROC curve is a staircase of chance, and is not drawn."""

_MOST_PANELS = 4
"""Metrics that are drawn for each image, at most."""
_NOTE: dict[str, Any] = {"fontsize": 8, "color": "#555555"}


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def reconstruction_sheet(result: AuditResult, limit: int = 8) -> Figure:
    """Originals, reconstructions and floors below one another, the first score under each, pixels unsmoothed.

    The first `limit` images in the order of clients are shown, never chosen by quality.
    """
    total = len(result.records)
    shown = min(limit, total)
    best = result.summary.get("best_floor")
    known = (ORIGINAL, REBUILT, GREY_FLOOR, AUXILIARY_FLOOR, SHOWN, best)
    others = [name for name in result.images if name not in known]
    lead = _image_metrics(result)[0]
    seen_row = [SHOWN] if SHOWN in result.images else []
    names = [ORIGINAL, *seen_row, REBUILT, *([best] if best in result.images else [])]
    for name in others:  # a prior that is flat grey, say, need not be shown twice
        if not any(torch.equal(result.images[name], result.images[seen]) for seen in names):
            names.append(name)
    figure = Figure(figsize=(1.45 * shown + 1.5, 1.62 * len(names) + 0.75), layout="constrained")
    grid = figure.subplots(len(names), shown, squeeze=False)
    for row, name in enumerate(names):
        for column in range(shown):
            axes, record = grid[row, column], result.records[column]
            _image(axes, result.images[name][column])
            if row == 0:
                several = result.summary["batch"] != [1]
                place = formats.seat(record["client"]) + (f", image {record['image']}" if several else "")
                axes.set_title(f"{place}\nround {record['round']}", fontsize=8)
            elif name != SHOWN:
                key = lead.key if name == REBUILT else f"floor.{name}.{lead.key}"
                shown_score = f"{lead.shown(record.get(key))} {lead.unit}".strip()
                axes.set_xlabel(shown_score, fontsize=9, labelpad=2)
        label = name if name in (ORIGINAL, SHOWN, REBUILT) else f"floor:\n{name}"
        label = label.replace(SHOWN, SHOWN.replace(" to", "\nto"))
        grid[row, 0].set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    s = result.summary
    caption = result.attack
    if "k" in s:
        caption += (
            f": rebuilt from k = {formats.count(s['k'])} of {s['parameters']:,} numbers "
            f"({formats.rate(s['rate'])} kept, {formats.compact(s['k_per_pixel'])} per pixel)"
        )
    whole = "the only image" if total == 1 else f"all {total} images"
    which = f"the first {shown} of {total} images, by client" if shown < total else whole
    caption = textwrap.fill(caption, int(13 * figure.get_figwidth()))
    figure.suptitle(f"{caption}\n{which}", fontsize=10)
    return figure


def score_dots(result: AuditResult, limit: int = 40) -> Figure | None:
    """Every image's score beside its floors and the shuffled control, a panel for each of the first metrics.

    Of more than `limit` images their spread; None of one image, which the table tells whole.
    """
    if len(result.records) < 2:
        return None
    if len(result.records) > limit:
        return _score_spread(result)
    metrics = lead, *_ = _image_metrics(result)[:_MOST_PANELS]
    records = result.records
    wide = max(6.0, min(12.0, 0.42 * len(records) + 3.4))
    heights = [3.4, *([1.8] * (len(metrics) - 1))]
    figure = Figure(figsize=(wide, sum(heights)), layout="constrained")
    panels = figure.subplots(len(metrics), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        _dots(axes, metric, records, result.summary["floors"], metric is lead)
    title = f"{result.attack}: each image beside what could be guessed"
    panels[0].set_title(title, fontsize=10, loc="left")
    several_rounds = len({row["round"] for row in records}) > 1
    seats = [formats.seat(row["client"]).removeprefix("client ").removesuffix(" clients") for row in records]
    if several_rounds:
        seats = [f"{row['round']}/{who}" for row, who in zip(records, seats, strict=True)]
    for axes in panels:
        axes.set_xticks(range(len(records)), seats, fontsize=8, rotation=90 if len(records) > 20 else 0)
    panels[-1].set_xlabel("round/client" if several_rounds else "client")
    _legend_right(panels[0])
    return figure


def _score_spread(result: AuditResult) -> Figure:
    """Median, middle half and 5 to 95 % of the images' scores, of the floors' and of the control's."""
    metrics = lead, *_ = _image_metrics(result)[:_MOST_PANELS]
    floors = list(result.summary["floors"])
    sides = [(REBUILT, "{}", BLUE), *((f"floor: {name}", f"floor.{name}.{{}}", ORANGE) for name in floors)]
    sides.append(("control: against other victims", "control_{}", GREY))
    figure = Figure(figsize=(8.4, len(metrics) * (0.32 * len(sides) + 0.9) + 0.5), layout="constrained")
    panels = figure.subplots(len(metrics), squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        shown = []
        for name, key, colour in sides:
            found = np.array([_finite(row.get(key.format(metric.key))) for row in result.records])
            counted = [row.get(key.format(metric.key)) for row in result.records]
            found = np.array(
                [COUNTED_DB if v == math.inf else f for v, f in zip(counted, found, strict=True)]
            )
            if (found := found[~np.isnan(found)]).size:
                shown.append((name, np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95]), colour))
        for place, (_, (lowest, low, middle, high, highest), colour) in enumerate(shown):
            axes.plot([lowest, highest], [place, place], color=colour, linewidth=1.6, alpha=0.7)
            axes.plot(
                [low, high], [place, place], color=colour, linewidth=7, alpha=0.55, solid_capstyle="butt"
            )
            axes.plot(middle, place, "o", color=colour, mec="white", ms=7)
        axes.set_yticks(range(len(shown)), [name for name, _, _ in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        side = "higher" if metric.worst == "min" else "lower"
        axes.set_xlabel(f"{metric.heading} ({side}: more leaked)", fontsize=9)
        axes.grid(axis="x", color="#e3e3e3")
        axes.set_axisbelow(True)
        if metric is lead:
            axes.axvline(RECOVERED_PSNR, color=GREY, linewidth=1, linestyle=":")
    title = f"{result.attack}: {len(result.records):,} images beside what could be guessed"
    panels[0].set_title(f"{title}; median, middle half, 5 to 95 %", fontsize=10, loc="left")
    return figure


def _image_metrics(result: AuditResult) -> list[Metric]:
    """The metrics that score each image, the leading one first."""
    told = result.summary["scored_by"].items()
    return [figure_of(name, one) for name, one in told if not one["pooled"]]


def _dots(axes: Axes, metric: Metric, records: Any, floors: Any, lead: bool) -> None:
    key, x = metric.key, np.arange(len(records))
    ours = [math.nan if row.get(key) is None else min(row[key], COUNTED_DB) for row in records]
    guesses = [[_finite(row.get(f"floor.{name}.{key}")) for row in records] for name in floors]
    known = [column for column in guesses if not np.isnan(column).all()]
    if known:
        nearest = np.nanmax(known, axis=0) if metric.worst == "min" else np.nanmin(known, axis=0)
        axes.vlines(x, nearest, ours, color="#c4c4c4", linewidth=1.5, zorder=1)
    for (marker, colour), name, values in zip(itertools.cycle(_FLOOR_MARKS), floors, guesses, strict=False):
        axes.plot(x, values, marker, color=colour, mfc="none", ms=6, label=f"floor: {name}")
    control = [_finite(row.get(f"control_{key}")) for row in records]
    if not np.isnan(control).all():
        axes.plot(x, control, "x", color=GREY, ms=6, label="control: against other victims")
    exact = any(value == COUNTED_DB for value in ours)
    name = f"{REBUILT}{' (identical: drawn at 100)' if exact else ''}"
    axes.plot(x, ours, "o", color=BLUE, ms=7, label=name)
    side = "higher" if metric.worst == "min" else "lower"
    axes.set_ylabel(textwrap.fill(f"{metric.heading} ({side}: more leaked)", 34 if lead else 24), fontsize=9)
    axes.grid(axis="y", color="#e3e3e3")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.7, len(records) - 0.3)
    if lead:
        axes.axhline(RECOVERED_PSNR, color=GREY, linewidth=1, linestyle=":")
        text, ends = f"recovered from {RECOVERED_PSNR:.0f} dB", ("axes fraction", "data")
        axes.annotate(text, (0.995, RECOVERED_PSNR), xycoords=ends, ha="right", va="bottom", **_NOTE)
        drawn = [value for value in [*ours, *control] if np.isfinite(value)]
        axes.set_ylim(min(0.0, *drawn, 0.0), 1.08 * max(RECOVERED_PSNR, *drawn, 0.0))


def loss_history(result: AuditResult, limit: int = 8) -> Figure | None:
    """The attack's own objective per iteration, lower the better the update is explained; None of a single point.

    One line per victim; of more than `limit` victims the median and the bands that hold half and 90 % of them.
    """
    told = result.curves.get("histories") or {}
    histories = {label: list(values) for label, values in told.items() if np.isfinite(values).sum() > 1}
    if not histories:
        return None
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes = figure.subplots()
    values = [value for history in histories.values() for value in history if np.isfinite(value)]
    if len(histories) > limit:
        _bands(axes, list(histories.values()))
        title = f"{result.attack}: the attack's own objective, {len(histories)} victims"
    else:
        for index, (label, history) in enumerate(histories.items()):
            colour, style = _SERIES[index % len(_SERIES)], ("-", "--", ":")[index // len(_SERIES) % 3]
            look: dict[str, Any] = {
                "color": colour,
                "marker": "o" if len(history) < 40 else None,
                "label": label,
            }
            axes.plot(np.arange(1, len(history) + 1), history, style, ms=3.5, lw=1.4, **look)
        title = f"{result.attack}: the attack's own objective"
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("objective (lower: explained better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#e3e3e3")
    _legend_right(axes)
    return figure


def _bands(axes: Axes, histories: Sequence[Sequence[float]]) -> None:
    """Median and bands over the victims; one that ended keeps its last objective."""
    longest = max(map(len, histories))
    table = np.array([[*history, *[history[-1]] * (longest - len(history))] for history in histories], float)
    table[~np.isfinite(table)] = np.nan
    x = np.arange(1, longest + 1)
    low, first, middle, third, high = np.nanquantile(table, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    axes.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0, label="90 % of the victims")
    axes.fill_between(x, first, third, color=BLUE, alpha=0.3, linewidth=0, label="half of them")
    axes.plot(x, middle, color=BLUE, linewidth=1.8, label="median")


def roc(results: Sequence[AuditResult]) -> Figure | None:
    """ROC curves of membership attacks, with exact pointwise 95 % bands and chance; log-log too from 50 negatives.

    Attacks with fewer than `FEWEST_OF_ROC` members or non-members are left out; None where that leaves none.
    """
    curves = [(result.attack, result.curves["roc"]) for result in results]
    curves = [(name, c) for name, c in curves if min(c["members"], c["nonmembers"]) >= FEWEST_OF_ROC]
    if not curves:
        return None
    fewest = min(curve["nonmembers"] for _, curve in curves)
    deep = fewest >= FEWEST_NEGATIVES
    figure = Figure(figsize=(9.4 if deep else 5.2, 4.3), layout="constrained")
    linear, *log = figure.subplots(1, 2 if deep else 1, squeeze=False)[0]
    low = min(0.1, 10.0 ** np.floor(np.log10(1 / fewest)))
    for index, (label, curve) in enumerate(curves):
        colour, style = _SERIES[index % len(_SERIES)], ("-", "--", ":")[index // len(_SERIES) % 3]
        fpr, tpr, members = np.asarray(curve["fpr"]), np.asarray(curve["tpr"]), curve["members"]
        bands = {hits: clopper_pearson(int(hits), members) for hits in np.unique(np.rint(tpr * members))}
        ends = [(bands[h].low, bands[h].high) for h in np.rint(tpr * members)]
        bottom, top = np.array(ends).T
        for axes in (linear, *log):
            axes.plot(fpr, tpr, style, color=colour, linewidth=1.8, label=label)
            axes.fill_between(fpr, bottom, top, color=colour, alpha=0.15, linewidth=0)
    line = np.geomspace(low, 1, 50)
    for axes in (linear, *log):
        axes.plot([0, *line], [0, *line], color=GREY, linestyle="--", linewidth=1.2, label="chance")
        axes.set_xlabel("false-positive rate: non-members called members")
        axes.grid(color="#e3e3e3")
        axes.set_axisbelow(True)
        axes.set_aspect("equal")
    linear.set(xlim=(0, 1), ylim=(0, 1), ylabel="true-positive rate: members found")
    linear.set_title("linear", fontsize=10, loc="left")
    linear.legend(fontsize=8, loc="lower right")
    for axes in log:
        axes.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1))
        axes.axvline(0.01, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            "1 %", (0.01, low * 1.15), ha="left", xytext=(3, 0), textcoords="offset points", **_NOTE
        )
        axes.set_title("log-log: what a cautious attacker finds", fontsize=10, loc="left")
    return figure


def exposed(results: Sequence[AuditResult], limit: int = 3) -> Figure | None:
    """The candidates of the highest scores, members above non-members, of the attacks of the highest AUC.

    None where no result has images.
    """
    shown = [result for result in results if result.curves.get("exposed")]
    shown = sorted(shown, key=lambda result: -result.summary["metrics"]["auc"]["mean"])[:limit]
    if not shown:
        return None
    rows = [(r.attack, name, kind) for r in shown for name, kind in r.curves["exposed"].items()]
    columns = max(len(kind["rows"]) for _, _, kind in rows)
    figure = Figure(figsize=(1.25 * columns + 1.6, 1.7 * len(rows) + 0.2), layout="constrained")
    axes = figure.subplots()  # one for all: an axes for each image takes most of a report's time
    axes.set(xlim=(-0.05, columns), ylim=(len(rows), -0.02), aspect=1.3)
    axes.axis("off")
    for row, (attack, name, kind) in enumerate(rows):
        axes.text(-0.08, row + 0.5, f"{attack}:\n{name}", ha="right", va="center", fontsize=9)
        for column, (told, image) in enumerate(zip(kind["rows"], kind["images"], strict=True)):
            ends = (column + 0.04, column + 0.96, row + 0.86, row + 0.14)
            axes.imshow(enlarged(image, 1), interpolation="nearest", extent=ends, aspect="auto")
            known = [] if told["client"] == EVERYONE else [formats.seat(told["client"])]
            whose = ", ".join([*known, *([f"person {told['group']}"] if "group" in told else [])])
            label = f"label {told['label']}, " if "label" in told else ""
            place: dict[str, Any] = {"ha": "center", "fontsize": 7}
            axes.text(column + 0.5, row + 0.12, whose, va="bottom", **place)
            axes.text(column + 0.5, row + 0.88, f"{label}{formats.compact(told['score'])}", va="top", **place)
    return figure


def exposed_people(results: Sequence[AuditResult], limit: int = 12) -> Figure | None:
    """Share of each person's samples that are called members, those trained on beside others, the highest first.

    Of the attack of the highest AUC; None where no result has people.
    """
    shown = [result for result in results if result.curves.get("people")]
    if not shown:
        return None
    best = max(shown, key=lambda result: result.summary["metrics"]["auc"]["mean"])
    sides = best.curves["people"]
    count = max(len(rows[:limit]) for rows in sides.values())
    figure = Figure(figsize=(8.4, 0.26 * count + 1.3), layout="constrained")
    titles = {"members": "trained on", "non-members": "nobody trained on"}
    for axes, (name, rows), colour in zip(figure.subplots(1, 2), sides.items(), (BLUE, ORANGE), strict=True):
        for place, row in enumerate(rows[:limit]):
            axes.barh(place, 100 * row["found"] / row["of"], color=colour, height=0.7)
            axes.text(101, place, f"{row['found']} of {row['of']}", va="center", fontsize=7)
        names = [f"person {row['group']}" for row in rows[:limit]]
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(xlim=(0, 100), ylim=(count - 0.4, -0.6), xlabel="called members, %")
        axes.axvline(10, color="black", linestyle=":", linewidth=1)
        axes.set_title(f"{titles[name]}: the highest of {len(rows)} people", fontsize=9, loc="left")
    figure.suptitle(f"{best.attack}, at 10 % false positives (dotted)", fontsize=10)
    return figure


def nearest(results: Sequence[AuditResult]) -> Figure | None:
    """The highest scores' candidates above the synthetic images most like them, of the attack of the highest AUC.

    None where no result has such.
    """
    shown = [result for result in results if result.curves.get("nearest")]
    if not shown:
        return None
    best = max(shown, key=lambda result: result.summary["metrics"]["auc"]["mean"])
    return nearest_sheet(best.attack, best.curves["nearest"])


def sheet(images: Tensor, columns: int = 16) -> Tensor:
    """Images (n, C, S, S) in rows, as one image (3, H, W), black where the last row ends."""
    from torchvision.utils import make_grid  # a second to import, which no refusal should wait for

    return make_grid(images, nrow=columns, padding=0)


def samples(results: Sequence[AuditResult]) -> Figure | None:
    """Synthetic images as they lie in their file; None where no result has them (a run shows its generator's)."""
    made = next((result.curves["samples"] for result in results if "samples" in result.curves), None)
    if made is None:
        return None
    page = sheet(made)
    figure = Figure(figsize=(9.0, 0.3 + 9.0 * page.shape[1] / page.shape[2]), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.imshow(enlarged(page, 1), interpolation="nearest")
    axes.set_title(f"the first {len(made)} synthetic images", fontsize=10, loc="left")
    return figure


def nearest_sheet(attack: str, kinds: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Kind of candidate -> "images" (n, C, H, W), "synthetic" and "distances", below one another; n: 8 or so."""
    columns = max(len(kind["distances"]) for kind in kinds.values())
    figure = Figure(figsize=(1.25 * columns + 1.1, 2.9 * len(kinds) + 0.35), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.05, columns), ylim=(2.3 * len(kinds), -0.02))
    axes.axis("off")
    for row, (name, kind) in enumerate(kinds.items()):
        for below, (label, images) in enumerate(
            ((name, kind["images"]), ("nearest\nsynthetic", kind["synthetic"]))
        ):
            top = 2.3 * row + below
            axes.text(-0.08, top + 0.5, label, ha="right", va="center", fontsize=9)
            for column, image in enumerate(images):
                ends = (column + 0.04, column + 0.96, top + 0.96, top + 0.04)
                axes.imshow(enlarged(image, 1), interpolation="nearest", extent=ends, aspect="auto")
        for column, distance in enumerate(kind["distances"]):
            place: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8}
            axes.text(column + 0.5, 2.3 * row + 2.0, formats.decimal(distance, 2), **place)
    axes.set_title(
        f"{attack}: the highest scores, and the distance to what is nearest", fontsize=10, loc="left"
    )
    return figure


def unlearning_bars(results: Sequence[AuditResult]) -> Figure:
    """Accuracy, and what the attacks wanted, before and after the request, beside as many random deletions."""
    reached = [r for r in results if "success" in r.summary["metrics"]]
    wide = max(5.6, 2.0 * len(results) + 3.0)
    figure = Figure(figsize=(wide, 3.8 + 3.2 * bool(reached)), layout="constrained")
    panels = figure.subplots(1 + bool(reached), 1, squeeze=False)[:, 0]
    _arm_bars(panels[0], results, "accuracy", "test accuracy, %")
    panels[0].set_title("What a deletion request costs", fontsize=10, loc="left")
    if reached:
        _arm_bars(panels[1], reached, "success", "what it wanted, %")
        goals = "; ".join(dict.fromkeys(f"{r.attack}: {r.summary['goal']}" for r in reached))
        panels[1].set_title(textwrap.fill(goals, int(11 * wide)), fontsize=10, loc="left")
    _legend_right(panels[0])
    return figure


def _arm_bars(axes: Axes, results: Sequence[AuditResult], what: str, label: str) -> None:
    """Before, after random deletion and after the request; outlined what a retraining gives."""
    x = np.arange(len(results))
    named = (
        ("before", "before", GREY, ""),
        ("random", "after random deletion (floor)", ORANGE, "//"),
        ("after", "after the request", BLUE, ""),
    )
    for offset, (arm, name, colour, hatch) in zip((-0.27, 0.0, 0.27), named, strict=True):
        described = [_arm(r, arm, what) for r in results]
        heights = [100 * d["mean"] for d in described]
        bars = axes.bar(x + offset, heights, 0.25, color=colour, hatch=hatch, edgecolor="white", label=name)
        for place, height, d in zip(x + offset, heights, described, strict=True):
            ends = [[height - 100 * d["low"]], [100 * d["high"] - height]]
            if d["low"] < d["high"]:
                axes.errorbar(place, height, yerr=np.maximum(ends, 0), color="black", capsize=3, linewidth=1)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
        axes.bar_label(bars, fmt="%.1f", label_type="center", fontsize=9, bbox=box)
        exact = [
            (place, 100 * _arm(r, f"retrained_{arm}", what)["mean"])
            for place, r in zip(x + offset, results, strict=True)
            if arm != "before" and r.summary["mechanism"] != "retrain"
        ]
        told = "the same, forgotten by training again" if arm == "after" else None
        for number, (place, height) in enumerate(exact):
            shown = told if number == 0 else None
            axes.bar(place, height, 0.25, fill=False, edgecolor="black", linestyle="--", label=shown)
    names = [f"{r.attack}\n({r.summary['mechanism']}, {r.summary['count']} samples)" for r in results]
    axes.set_xticks(x, names, fontsize=9)
    axes.set_ylabel(label)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color="#e3e3e3")
    axes.set_axisbelow(True)


def _arm(result: AuditResult, arm: str, what: str) -> dict[str, float]:
    """Mean and range over the seeds of an arm at the federation's end."""
    rows = [r[what] for r in result.records if r["arm"] == arm and r["request"] is None]
    return {"mean": float(np.mean(rows)), "low": min(rows), "high": max(rows)}


def unlearning_curve(result: AuditResult) -> Figure | None:
    """Accuracy over the answered requests, of the mechanism and of retraining; None of a single request."""
    curve = result.summary["curve"]
    answered = min((len(seed) for seeds in curve.values() for seed in seeds), default=0)
    if answered < 2:
        return None
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    mechanism = result.summary["mechanism"]
    looks = {
        "after": (f"the request, {mechanism}", BLUE, "-"),
        "random": (f"random deletion, {mechanism}", ORANGE, "-"),
        "retrained_after": ("the request, training again", BLUE, "--"),
        "retrained_random": ("random deletion, training again", ORANGE, "--"),
    }
    if mechanism == "retrain":
        looks = {arm: looks[arm] for arm in ("after", "random")}
    before = float(100 * np.mean(_values(result, "before")))
    x = np.arange(answered + 1)
    for arm, (name, colour, line) in looks.items():
        found = 100 * np.array([[point["accuracy"] for point in seed[:answered]] for seed in curve[arm]])
        found = np.hstack([100 * np.array(_values(result, "before"))[:, None], found])
        axes.plot(x, found.mean(0), line, color=colour, label=name, marker="o", markersize=3)
        axes.fill_between(x, found.min(0), found.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.axhline(before, color=GREY, linewidth=1, linestyle=":")
    axes.set_xlabel("answered requests")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e3e3e3")
    axes.set_title(f"{result.attack}: accuracy over the requests", fontsize=10, loc="left")
    _legend_right(axes)
    return figure


def _values(result: AuditResult, arm: str) -> list[float]:
    return [r["accuracy"] for r in result.records if r["arm"] == arm and r["request"] is None]


def canary_scores(found: CanaryAudit) -> Figure:
    """Histograms of the scores of present and absent canaries, on the scale of the noise agreed on."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    even = found.scores / np.sqrt(found.inclusions_of) / found.noise
    edges = np.histogram_bin_edges(even, bins=min(40, max(10, round(2 * math.sqrt(found.count)))))
    for there, colour, hatch, name in ((False, ORANGE, "//", "absent"), (True, BLUE, "", "present")):
        side = even[found.of_present == there]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "alpha": 0.7}
        axes.hist(side, edges.tolist(), label=f"{name} ({len(side):,})", **look)
    usual = math.sqrt(found.inclusions) / found.noise
    place, expected = np.linspace(-3.5, usual + 3.5, 300), found.count / 2 * (edges[1] - edges[0])
    for shift in () if found.through else (0.0, usual):
        density = np.exp(-0.5 * np.square(place - shift)) / math.sqrt(2 * math.pi)
        agreed = "under the agreed noise" if shift else None
        axes.plot(place, expected * density, color="black", linewidth=1.2, linestyle="--", label=agreed)
    axes.set_xlabel("score, in standard deviations of the agreed noise")
    axes.set_ylabel("canaries")
    measured = found.least
    estimate = "" if found.estimate is None else f", estimated {formats.decimal(found.estimate.epsilon, 2)}"
    axes.set_title(
        f"epsilon: measured at least {formats.decimal(measured, 2)}{estimate}; "
        f"accounted {formats.decimal(found.account.epsilon, 2)}",
        fontsize=10,
        loc="left",
    )
    axes.legend(fontsize=8)
    return figure


def accuracy_over_rounds(
    rounds: Sequence[Mapping[str, Any]], called: Mapping[str, str] | None = None
) -> Figure:
    """Test accuracy and losses of the global model over the rounds; without accuracy each loss has its own axes.

    `called`: names of "loss" and "train_loss".
    """
    called = {"loss": "test loss", "train_loss": "training loss"} | dict(called or {})
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [row["round"] for row in rounds]
    marker = "o" if len(x) < 40 else None
    accuracies = [_finite(row.get("accuracy")) * 100 for row in rounds]
    unlike = bool(np.isnan(accuracies).all())
    if not unlike:
        left.plot(x, accuracies, color=BLUE, marker=marker, ms=4)
        left.set(ylabel="test accuracy, %", ylim=(0, 100))
    for key, axes, colour, style in (("loss", left, BLUE, "-"), ("train_loss", right, ORANGE, "--")):
        values = [_finite(row.get(key)) for row in rounds]
        if not np.isnan(values).all():
            place, name = (axes, None) if unlike else (right, called[key])
            place.plot(x, values, style, color=colour, marker=marker, ms=4, label=name)
            place.set(ylabel=called[key] if unlike else "loss")
    if right.lines and not unlike:
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e3e3e3")
    return figure


def sample_sheet(generated: Mapping[int, Tensor], columns: int = 16) -> Figure:
    """Images (n, C, S, S) in [0, 1] of the generator of each round: a row of the earlier ones, all of the last's."""
    last = max(generated)
    strips = [(f"round {number}", generated[number][:columns]) for number in sorted(generated)[:-1]]
    rows = generated[last].split(columns)
    strips += [(f"round {last}" if index == 0 else "", row) for index, row in enumerate(rows)]
    side = enlarged(rows[0][0], 64).shape[0]
    cell, apart = side + 4, 24  # pixels; the last round's sheet stands apart
    tops = [
        index * cell + (apart if index > len(strips) - len(rows) - 1 else 0) for index in range(len(strips))
    ]
    page = np.full((tops[-1] + side, columns * cell - 4, 3), 255, np.uint8)
    for top, (_, images) in zip(tops, strips, strict=True):
        for place, image in enumerate(images):
            page[top : top + side, place * cell : place * cell + side] = enlarged(image, 64)
    figure = Figure(figsize=(9.8, 8.9 * page.shape[0] / page.shape[1] + 0.1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(page, interpolation="nearest")
    named = [(top + side / 2, name) for top, (name, _) in zip(tops, strips, strict=True) if name]
    axes.set_yticks([place for place, _ in named], [name for _, name in named], fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    return figure


def label_histogram(counts: Mapping[int, Mapping[int, int]], limit: int = 40) -> Figure:
    """Samples of each label at each client (client -> label -> samples); the first clients, the commonest labels."""
    clients = sorted(counts)[:limit]
    totals: Counter[int] = Counter()
    for client in clients:
        totals.update(counts[client])
    labels = sorted(sorted(totals, key=lambda label: (-totals[label], label))[:limit])
    table = np.array([[counts[client].get(label, 0) for label in labels] for client in clients], dtype=float)
    size = min(11.0, 2.6 + 0.32 * len(labels)), min(8.0, 1.5 + 0.26 * len(clients))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(table, cmap="Blues", aspect="auto", vmin=0)
    if table.size <= 400:
        for row, column in zip(*np.nonzero(table), strict=True):
            number = table[row, column]
            colour = "white" if number > 0.55 * table.max() else "#333333"
            axes.text(column, row, f"{number:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(
        range(len(labels)), list(map(str, labels)), fontsize=8, rotation=90 if len(labels) > 12 else 0
    )
    axes.set_yticks(range(len(clients)), list(map(str, clients)), fontsize=8)
    some = f" ({len(labels)} commonest of {len(totals)})" if len(labels) < len(totals) else ""
    axes.set_xlabel(f"label{some}")
    some = f" (first {len(clients)} of {len(counts)})" if len(clients) < len(counts) else ""
    axes.set_ylabel(f"client{some}")
    figure.colorbar(drawn, ax=axes, label="samples")
    return figure


def enlarged(image: Tensor, side: int = 128) -> np.ndarray:
    """One image (C, H, W) in [0, 1] as uint8 (H', W', 3), enlarged by whole pixels to at least `side`."""
    factor = max(1, -(-side // image.shape[-1]))
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
    return np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1)


def _image(axes: Axes, image: Tensor) -> None:
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    if torch.isnan(image).any():
        axes.set(xlim=(0, 1), ylim=(0, 1), facecolor="#f0f0f0")
        axes.set_aspect("equal")
        axes.text(0.5, 0.5, "none", ha="center", va="center", fontsize=9, color="#555555")
        return
    axes.imshow(enlarged(image), interpolation="nearest")


def _finite(value: Any) -> float:
    return float(value) if value is not None and np.isfinite(value) else float("nan")


def _legend_right(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
