"""A sweep's figures: how much leaks in each combination, and what protection costs."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from fedattack.audit.family import Leakage, get_family
from fedattack.reporting import formats
from fedattack.reporting.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from fedattack.reporting.sweep.table import DONE, FAILED, SweepTable

_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PANELS = 12
_AVERAGED = "seed"
_NOTHING = "#d8e8f5"
_NARROWEST = 12.0
"""Points of accuracy that the picture spans at least, so that chance does not look like a price."""

_FITS = 12
"""Letters that a column has room for."""


def heat_map(table: SweepTable, family: str) -> Figure:
    """How much leaks in each cell; defences from left to right, attacks from top to bottom, other axes as panels.

    Seeds are averaged. Pale blue is at or below the floor, whatever the distance. The redder, the more lies above it.
    Framed in red is what leaks all the same by its verdict: by labels, say, or because the images are recognised.
    Cells without a figure say why.
    """
    leakage = get_family(family).leakage
    nothing = leakage.nothing
    frame = table.family(family)
    across, down, others = _layout(table, family)
    panels = list(itertools.product(*(_values(table, frame, axis) for axis in others)))
    shown = panels[:_PANELS]
    wide = min(len(shown), 3 if len(_values(table, frame, across)) <= 4 else 2)
    high = -(-len(shown) // wide)
    columns, rows = _values(table, frame, across), _values(table, frame, down)
    size = (1.15 * len(columns) * wide + 2.9, (0.62 * len(rows) + 1.15) * high + 0.9)
    figure = Figure(figsize=(max(5.4, size[0]), max(2.6, size[1])), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False)
    found = frame[leakage.column].to_numpy(dtype=float)
    reach = max([leakage.span, *(found[np.isfinite(found)] - nothing)])
    norm = Normalize(nothing, nothing + reach)
    drawn: Any = None
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for place, (axes, values) in enumerate(zip(grid.flat, shown, strict=False)):
        part = frame
        for axis, value in zip(others, values, strict=True):
            part = part[part[f"axis.{axis}"] == value]
        drawn = _heat_panel(axes, part, (across, columns), (down, rows), leakage, norm)
        axes.set_title(", ".join(f"{a} {v}" for a, v in zip(others, values, strict=True)), fontsize=9)
        if place % wide:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel(down, fontsize=9)
        if place + wide >= len(shown):
            axes.set_xlabel(across, fontsize=9)
    figure.colorbar(drawn, ax=grid, label=leakage.label, shrink=0.9, extend="min")
    more = f"; first {len(shown)} of {len(panels)} panels" if len(shown) < len(panels) else ""
    seeds = table.axes.get(_AVERAGED, [])
    mean = f"; mean of {len(seeds)} seeds" if len(seeds) > 1 else ""
    letters = int(12 * figure.get_figwidth())  # of this size so many fit on an inch
    figure.suptitle(textwrap.fill(f"{leakage.title}{mean}{more}", letters), fontsize=10)
    return figure


def _heat_panel(
    axes: Axes,
    frame: pd.DataFrame,
    across: tuple[str, Sequence[str]],
    down: tuple[str, Sequence[str]],
    leakage: Leakage,
    norm: Normalize,
) -> Any:
    (x_axis, columns), (y_axis, rows) = across, down
    means = np.full((len(rows), len(columns)), np.nan)
    for (y, row), (x, value) in itertools.product(enumerate(rows), enumerate(columns)):
        chosen = frame[(frame[f"axis.{x_axis}"] == value) & (frame[f"axis.{y_axis}"] == row)]
        figures = chosen[leakage.column].to_numpy(dtype=float)
        figures = figures[np.isfinite(figures)]
        if len(figures):
            means[y, x] = figures.mean()
            dark = norm(means[y, x]) > 0.6
            hidden = means[y, x] <= leakage.nothing and _leaks(chosen)
            if hidden:
                inset = Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, ec=VERMILLION, lw=2.5)
                axes.add_patch(inset)
            axes.text(x, y, _figure(means[y, x], leakage) + ("\nbut leaks" if hidden else ""), ha="center",
                      va="center", fontsize=9, color="white" if dark else "#222222")  # fmt: skip
            continue
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc="#f0f0f0", ec="#c4c4c4", hatch="///", lw=0))
        axes.text(x, y, _why(chosen), ha="center", va="center", fontsize=7, color="#444444",
                  bbox={"fc": "#f0f0f0", "ec": "none", "pad": 1.5})  # fmt: skip
    shades = colormaps["OrRd"].with_extremes(under=_NOTHING)
    drawn = axes.imshow(means, cmap=shades, norm=norm, aspect="auto")
    long = max(len(value) for value in columns) > _FITS
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=30 if long else 0,
                    ha="right" if long else "center", rotation_mode="anchor" if long else "default")  # fmt: skip
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(length=0)
    return drawn


def utility_leakage(table: SweepTable, family: str) -> Figure:
    """What protection costs: accuracy against leakage, a point per cell with 95 % intervals."""
    leakage = get_family(family).leakage
    column, nothing = leakage.column, leakage.nothing
    frame = table.family(family)
    frame = frame[(frame["status"] == DONE) & frame[column].notna() & frame["accuracy"].notna()]
    coloured, marked, _ = _layout(table, family)
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(_values(table, frame, coloured), itertools.cycle(_COLOURS), strict=False))
    markers = dict(zip(_values(table, frame, marked), itertools.cycle(_MARKERS), strict=False))
    # Equal points are seen as rings within one another.
    sizes = dict(zip(colours, np.linspace(11, 6, max(1, len(colours))), strict=False))
    for row in frame.to_dict("records"):
        x, y = row["accuracy"] * 100, row[column]
        across = _bars(x, row["accuracy_low"] * 100, row["accuracy_high"] * 100)
        upright = _bars(y, row[f"{column}_low"], row[f"{column}_high"])
        told, marker = row[f"axis.{coloured}"], markers[row[f"axis.{marked}"]]
        look: dict[str, Any] = {"fmt": marker, "color": colours[told], "ms": sizes[told], "mec": "white"}
        axes.errorbar(x, y, xerr=across, yerr=upright, elinewidth=0.8, alpha=0.9, **look)
        if y <= nothing and row["level"] in LEAKING:
            axes.plot(x, y, "o", ms=17, mfc="none", mec=VERMILLION, mew=2)
    axes.axhline(nothing, color=GREY, linewidth=1.2, linestyle="--")
    axes.annotate("the floor", (1.0, nothing), xycoords=("axes fraction", "data"), ha="right",
                  va="bottom", fontsize=8, color="#555555", xytext=(-3, 2), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("test accuracy of the federation, %  (right: more useful)")
    axes.set_ylabel(f"{leakage.label}\n(down: more private)")
    left, right = axes.get_xlim()
    spare = max(0.0, _NARROWEST - (right - left)) / 2
    axes.set_xlim(left - spare, right + spare)
    axes.grid(color="#e3e3e3")
    axes.set_axisbelow(True)
    axes.set_title("What protection costs: a point per run, 95 % intervals", fontsize=10, loc="left")
    entries = [Line2D([], [], color=c, marker="o", ls="", ms=7, label=v) for v, c in colours.items()]
    style: dict[str, Any] = {"fontsize": 8, "title_fontsize": 8, "frameon": False}
    figure.legend(handles=entries, title=coloured, loc="outside right upper", **style)
    if marked != coloured and len(markers) > 1:
        entries = [Line2D([], [], color=GREY, marker=m, ls="", ms=7, label=v) for v, m in markers.items()]
        figure.legend(handles=entries, title=marked, loc="outside right lower", **style)
    return figure


LEAKING = ("leak", "partial")
"""Levels that say that something leaked, whatever the figure is."""


def _leaks(rows: pd.DataFrame) -> bool:
    return bool(rows["level"].isin(LEAKING).any())


def _layout(table: SweepTable, family: str) -> tuple[str, str, list[str]]:
    """Axis across, axis down, and the rest; the attack counts as an axis."""
    frame = table.family(family)
    names = [name.removeprefix("axis.") for name in frame.columns if name.startswith("axis.")]
    free = [name for name in names if name != _AVERAGED and len(_values(table, frame, name)) > 1]
    ranked = sorted(free, key=lambda name: (name != "defense", name == "attack"))
    across = ranked[0] if ranked else (names[0] if names else _AVERAGED)
    rest = [name for name in free if name != across]
    down = "attack" if "attack" in rest or not rest else rest[0]
    return across, down, [name for name in rest if name != down]


def _values(table: SweepTable, frame: pd.DataFrame, axis: str) -> list[str]:
    """The axis' values in the sweep's order, of those that this family's rows hold."""
    present = list(dict.fromkeys(frame[f"axis.{axis}"].dropna()))
    order = table.axes.get(axis, [])
    return sorted(present, key=lambda value: order.index(value) if value in order else len(order))


def _figure(value: float, leakage: Leakage) -> str:
    """Signed where nothing is 0; otherwise a figure of its own."""
    if leakage.nothing:
        return formats.decimal(value, max(1, leakage.digits - 1))
    return formats.signed(value, leakage.digits)


def _why(rows: pd.DataFrame) -> str:
    states = set(rows["status"]) if len(rows) else set()
    if FAILED in states or DONE in states:
        return "failed"
    return "not\napplicable" if states else "not run"


def _bars(value: float, low: float, high: float) -> list[list[float]] | None:
    if math.isnan(low) or math.isnan(high):
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]
