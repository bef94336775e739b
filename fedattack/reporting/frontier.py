"""The map of where a federation leaks its images: one table and one picture, every cell with its floor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedattack.audit.family import SEVERITY
from fedattack.reporting.sweep.table import DONE

_NOTHING = "#d8e8f5"
_NONE = "#f2f2f2"
_SPAN = 30.0
"""Gain in dB at which the colour is full."""


@dataclass(frozen=True)
class Cell:
    """The worst that any attack of one seat found; without figures where none applies or all failed to answer."""

    update: str
    images: int
    server: str
    network: str
    sent: str
    attack: str = ""
    psnr: float = np.nan
    floor: float = np.nan
    level: str = ""
    tried: int = 0

    @property
    def column(self) -> tuple[str, str, str]:
        """Where it stands from left to right."""
        return self.server, self.network, self.sent

    @property
    def text(self) -> str:
        """PSNR, floor and attack, or why there is none."""
        if not self.attack:
            return "none applies" if not self.tried else "no answer"
        return f"{self.psnr:.1f} / {self.floor:.1f}"


def worst_cells(frame: pd.DataFrame) -> list[Cell]:
    """For each update, seat, network and sending the attack that the auditor judged worst, then of highest gain.

    `frame` as :func:`simulations.studies.frontier.run_frontier` returns it; all malicious servers count as one seat.
    """
    seats = frame.assign(seat=frame["server"].where(frame["server"] == "curious server", "malicious server"))
    keys = ["update", "images", "seat", "network", "sent"]
    cells = []
    for (update, images, seat, network, sent), group in seats.dropna(subset=["update"]).groupby(
        keys, sort=False
    ):
        place = (str(update), int(float(str(images))), str(seat), str(network), str(sent))
        answered = group[(group["status"] == DONE) & group["psnr"].notna()]
        if answered.empty:
            cells.append(Cell(*place, tried=int((group["status"] == DONE).sum())))
            continue
        severity = answered["level"].map(lambda level: SEVERITY.index(level))
        best = answered.assign(severity=severity).sort_values(["severity", "gain"], ascending=[True, False])
        row = best.iloc[0]
        figures = float(row["psnr"]), float(row["floor"])
        cells.append(Cell(*place, str(row["attack"]), *figures, str(row["level"]), len(answered)))
    return cells


def _grid(cells: list[Cell]) -> tuple[list[tuple[str, int]], list[tuple[str, str, str]]]:
    rows = list(dict.fromkeys((cell.update, cell.images) for cell in cells))
    columns = sorted(
        dict.fromkeys(cell.column for cell in cells),
        key=lambda column: (column[0] != "curious server", column[1] != "untrained", column[2]),
    )
    return rows, columns


def frontier_table(frame: pd.DataFrame) -> str:
    """Markdown: a row for each update, a column for each seat, network and sending; "PSNR / floor (attack)", dB."""
    cells = worst_cells(frame)
    rows, columns = _grid(cells)
    found = {(cell.update, cell.images, *cell.column): cell for cell in cells}
    lines = ["| update | images | " + " | ".join(", ".join(column) for column in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for update, images in rows:
        texts = [_told(found.get((update, images, *column))) for column in columns]
        lines.append(f"| {update} | {images} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _told(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if not cell.attack:
        return cell.text
    shown = f"{cell.text} ({cell.attack})"
    return f"**{shown}**" if cell.level == "leak" else shown


def frontier_figure(frame: pd.DataFrame) -> Figure:
    """Redder, the further the worst attack's images lie above their floor; pale blue: nothing does.

    Framed in red: the auditor's verdict is that it leaks.
    """
    cells = worst_cells(frame)
    rows, columns = _grid(cells)
    found = {(cell.update, cell.images, *cell.column): cell for cell in cells}
    figure = Figure(figsize=(2.6 + 1.3 * len(columns), 1.9 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    norm, colours = Normalize(0, _SPAN), colormaps["OrRd"]
    for y, x, cell in _placed(rows, columns, found):
        gain = cell.psnr - cell.floor
        colour = colours(0.1 + 0.75 * float(norm(min(gain, _SPAN)))) if gain > 0 else _NOTHING
        face = colour if cell.attack else _NONE
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
        if cell.level == "leak":
            axes.add_patch(
                Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, fill=False, edgecolor="black", linewidth=1.4)
            )
        dark = cell.attack and gain > 0.7 * _SPAN
        axes.text(
            x + 0.5,
            y + 0.5,
            f"{cell.text}\n{cell.attack}" if cell.attack else cell.text,
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "#555555" if not cell.attack else "black",
        )
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks(
        np.arange(len(columns)) + 0.5, [f"{network}\n{sent}" for _, network, sent in columns], fontsize=8
    )
    axes.xaxis.tick_top()
    axes.set_yticks(
        np.arange(len(rows)) + 0.5, [f"{update}, {n} image{'s' * (n > 1)}" for update, n in rows], fontsize=8
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for boundary in range(1, len(rows)):
        if rows[boundary][0] != rows[boundary - 1][0]:
            axes.axhline(boundary, color="black", linewidth=1)
    servers = [column[0] for column in columns]
    for server in dict.fromkeys(servers):
        first, count = servers.index(server), servers.count(server)
        axes.text(first + count / 2, -1.15, server, ha="center", va="bottom", fontsize=10, weight="bold")
        if first:
            axes.axvline(first, color="black", linewidth=1)
    figure.suptitle(
        "PSNR of the worst attack / best floor without the update, dB; framed: the verdict is that it leaks",
        fontsize=9,
    )
    return figure


def _placed(
    rows: list[tuple[str, int]],
    columns: list[tuple[str, str, str]],
    found: dict[tuple[str, int, str, str, str], Cell],
) -> Iterator[tuple[int, int, Cell]]:
    for y, (update, images) in enumerate(rows):
        for x, column in enumerate(columns):
            cell = found.get((update, images, *column))
            if cell is not None:
                yield y, x, cell
