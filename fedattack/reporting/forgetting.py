"""Figures of an audit of forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fedattack.audit.family import AuditResult
from fedattack.reporting.figures import BLUE, GREY, ORANGE, VERMILLION

_TESTS = {"U-LiRA": BLUE, "population test": ORANGE}


def roc(results: Sequence[AuditResult]) -> Figure:
    """ROC curves of both tests, a panel for each mechanism, the false-positive rate on a logarithmic axis."""
    figure, panels = _panels(len(results), 3.0)
    for axes, result in zip(panels, results, strict=False):
        for name, colour in _TESTS.items():
            curve = result.curves["tests"][name]
            axes.plot(curve["fpr"], curve["tpr"], color=colour, linewidth=1.6, label=name)
        line = np.geomspace(1e-3, 1, 50)
        axes.plot(line, line, "--", color=GREY, linewidth=1, label="chance")
        axes.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1), xlabel="false-positive rate")
        axes.set_title(result.attack, fontsize=10, loc="left")
        axes.grid(color="#e3e3e3")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("unlearned found")
    panels[0].legend(fontsize=7, loc="upper left")
    return figure


def densities(results: Sequence[AuditResult]) -> Figure:
    """Log-odds of forgotten and of never seen samples, a row for each mechanism, a column for each kind."""
    kinds = list(dict.fromkeys(results[0].curves["scores"]["kind"]))
    figure = Figure(figsize=(3.8 * len(kinds), 1.15 * len(results) + 0.7), layout="constrained")
    grid = figure.subplots(len(results), len(kinds), squeeze=False, sharex=True)
    sides = (("unlearned", "kind", VERMILLION), ("never seen", "kind, never seen", BLUE))
    every = [np.asarray(result.curves["scores"][side]) for result in results for side, _, _ in sides]
    low, high = np.quantile(np.concatenate(every), [0.005, 0.995])
    bins = np.linspace(low, high, 41)
    for row, result in enumerate(results):
        scores = result.curves["scores"]
        grid[row, 0].set_ylabel(result.attack, fontsize=8, rotation=0, ha="right", va="center")
        for column, kind in enumerate(kinds):
            axes = grid[row, column]
            for side, which, colour in sides:
                values = np.asarray(scores[side])[np.asarray(scores[which]) == kind].clip(low, high)
                axes.hist(values, bins, density=True, color=colour, alpha=0.55, label=side)
            axes.set_yticks([])
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(f"targets: {kind}", fontsize=9, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("log-odds of the label", fontsize=8)
    grid[0, 0].legend(fontsize=7)
    return figure


def _panels(count: int, size: float) -> tuple[Figure, list]:
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels
