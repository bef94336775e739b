"""What a sweep writes beside its cells: the table, the figures, and a page that opens from disk."""

from __future__ import annotations

import base64
import datetime
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedattack.audit.family import SEVERITY, Family, get_family
from fedattack.files import write_bytes
from fedattack.reporting import figures, formats
from fedattack.reporting.pages import render
from fedattack.reporting.provenance import provenance, told
from fedattack.reporting.sweep.changes import pairs_of_runs, what_would_change
from fedattack.reporting.sweep.figures import heat_map, utility_leakage
from fedattack.reporting.sweep.table import DONE, SEED, SweepTable, over_seeds
from fedattack.storage.spreadsheet import csv_bytes

_MOST_CHANGES = 60
"""Rows of a table of changes; all pairs are in changes.csv."""


def write_sweep(
    folder: Path, table: SweepTable, *, command: str = "", run: dict[str, Any] | None = None
) -> Path:
    """Write ``cells.csv``, ``cells.parquet``, ``changes.csv``, ``figures/*.png`` and ``index.html``; the page's path.

    `run` is a :func:`~fedattack.reporting.provenance.provenance`; None: of a moment ago.
    """
    write_bytes(folder / "cells.csv", csv_bytes(table.frame))
    buffer = io.BytesIO()
    table.frame.to_parquet(buffer, index=False)
    write_bytes(folder / "cells.parquet", buffer.getvalue())
    counts = table.frame.drop_duplicates("cell")["status"].value_counts()
    if together := over_seeds(table):
        write_bytes(folder / "seeds.csv", csv_bytes(pd.DataFrame(together)))
    moved = [pairs for family in table.families if len(pairs := pairs_of_runs(table, family))]
    if moved:
        write_bytes(folder / "changes.csv", csv_bytes(pd.concat(moved, ignore_index=True)))
    page = render(
        "sweep",
        title=folder.name,
        top=_top(table),
        summary="; ".join(f"{number} runs {status}" for status, number in counts.items()),
        worst=_worst(table),
        changes=_changes(table),
        pictures=_pictures(folder, table),
        seeds=_over_seeds(table, together),
        labels=len(_labels(table)),
        columns=[*_labels(table), "outcome", *_LEAKED, *_scored(table), *_REST],
        rows=[_row(table, row, _scored(table)) for row in _records(table.frame)],
        reasons=_reasons(table.frame),
        command=command or "fedattack sweep FILE",
        run=told(run or provenance(datetime.datetime.now(datetime.UTC))),
    )
    path = folder / "index.html"
    write_bytes(path, page.encode())
    return path


def _attacked(table: SweepTable) -> list[dict[str, Any]]:
    """The rows of runs that were attacked, the worst for whoever defends first."""
    rows = [row for row in _records(table.frame) if row["status"] == DONE and not pd.isna(row["family"])]

    def rank(row: dict[str, Any]) -> tuple[int, float]:
        leaked = row[get_family(row["family"]).leakage.column]
        return SEVERITY.index(row["level"]), -(0.0 if pd.isna(leaked) else leaked)

    return sorted(rows, key=rank)


def _top(table: SweepTable) -> dict[str, str]:
    """The worst that any run found, and how many runs it was found in."""
    rows = _attacked(table)
    if not rows:
        return {"level": "undecided", "text": "No run of this sweep was attacked"}
    worst = rows[0]
    words = get_family(worst["family"]).words(worst["level"])
    alike = len({row["cell"] for row in rows if row["level"] == worst["level"]})
    several = f"in {alike} of {len({row['cell'] for row in rows})} runs"
    return {
        "level": worst["level"],
        "text": f"worst found: {words}, {several}, most by {worst['attack']}",
    }


def _worst(table: SweepTable) -> dict[str, Any]:
    """For each attack its worst run: which settings, and what leaked."""
    axes = [axis for axis in _labels(table) if axis != "attack"]
    rows, seen = [], set[str]()
    for row in _attacked(table):
        if row["attack"] in seen:
            continue
        seen.add(row["attack"])
        family = get_family(row["family"])
        leakage, ends = family.leakage, {}
        ends = {end: _known(row[f"{leakage.column}_{end}"]) for end in ("low", "high")}
        figure = (
            f"{formats.decimal(row[leakage.column], leakage.digits)} {formats.interval(ends, leakage.digits)}"
        )
        where = ", ".join(
            f"{axis} {row[f'axis.{axis}']}" for axis in axes if not pd.isna(row[f"axis.{axis}"])
        )
        rows.append([row["attack"], family.words(row["level"]), leakage.label, figure, where])
    return {
        "columns": ["attack", "verdict", "figure", "leakage", "in the run of"],
        "rows": rows,
        "words": [1, 2, 4],
    }


def _changes(table: SweepTable) -> list[dict[str, Any]]:
    """The tables of :func:`what_would_change`, family by family, as the page shows them."""
    shown = []
    for name in table.families:
        family = get_family(name)
        digits = family.leakage.digits
        rows = [
            {
                "setting": row["setting"],
                "first": row["from"],
                "then": row["to"],
                "moved": row["moved"],
                "pairs": row["pairs"],
                "moves": row["moved"] > 0,
                "often": _levels(family, *row["often"]),
                **{end: _signed(row[end], digits) for end in ("mean", "least", "most")},
            }
            for row in what_would_change(table, name)
        ]
        if rows:
            shown.append({"family": name, "label": family.leakage.label, "rows": rows[:_MOST_CHANGES]})
    return shown


def _levels(family: Family, first: str, then: str) -> str:
    words = [family.words(level) for level in (first, then)]  # type: ignore[arg-type]
    return f"stays: {words[0]}" if first == then else f"from {words[0]} to {words[1]}"


def _signed(value: float, digits: int) -> str:
    return formats.NONE if math.isnan(value) else formats.signed(value, digits)


def _pictures(folder: Path, table: SweepTable) -> list[dict[str, str]]:
    shown = []
    for family in table.families:
        rows = table.frame[(table.frame["status"] == DONE) & (table.frame["family"] == family)]
        if len(rows) < 2:  # one point is a table
            continue
        found = _told_of(table, family)
        drawn = [("leakage", heat_map, f"{family}: leakage of every run. {found}")]
        if rows["accuracy"].notna().sum() > 1:
            drawn.append(("utility", utility_leakage, f"{family}: accuracy against leakage. {found}"))
        for name, draw, alt in drawn:
            data = figures.png(draw(table, family))
            write_bytes(folder / "figures" / f"{family}-{name}.png", data)
            shown.append({"data": base64.b64encode(data).decode(), "alt": alt, "caption": _CAPTIONS[name]})
    return shown


def _told_of(table: SweepTable, family: str) -> str:
    """From the least to the most that leaked in any run of a family."""
    leakage = get_family(family).leakage
    rows = [row for row in _attacked(table) if row["family"] == family and not pd.isna(row[leakage.column])]
    if not rows:
        return "No run has a figure."
    ends = sorted(rows, key=lambda row: row[leakage.column])
    named = [
        f"{formats.decimal(row[leakage.column], leakage.digits)} in {row['cell'].rpartition('-')[0] or row['cell']}"
        for row in (ends[0], ends[-1])
    ]
    return f"{leakage.label} from {named[0]} to {named[1]}."


_CAPTIONS = {
    "leakage": "Pale blue: at or below the floor. Redder: more above it. Framed in red: the figure shows nothing, "
    "and the verdict found leakage all the same (labels, recognised images). Hatched: not applicable or "
    "failed.",
    "utility": "Down and right is where one wants to be: private and useful. Below the dashed line this figure shows "
    "nothing; a red ring: the run's verdict found leakage all the same.",
}

_LEAKED, _REST = ("leakage", "95 % interval"), ("accuracy", "epsilon", "time")


def _scored(table: SweepTable) -> list[str]:
    """Headings of what the families of the table's rows show besides."""
    rows = [row for row in _records(table.frame) if row["status"] == DONE and not pd.isna(row["family"])]
    return list(dict.fromkeys(name for row in rows for name in get_family(row["family"]).sweep_columns(row)))


def _over_seeds(table: SweepTable, together: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of :func:`over_seeds` as a page shows it: its columns, and rows."""
    axes = [axis for axis in _labels(table) if f"axis.{axis}" != SEED]
    columns = [*axes, "seeds", "leakage: mean", "95 % over seeds", "worst"]
    rows = []
    for row in together:
        digits = get_family(row["family"]).leakage.digits
        labels = ["" if pd.isna(row[f"axis.{axis}"]) else row[f"axis.{axis}"] for axis in axes]
        ends = formats.interval(row, digits)
        figures = [formats.decimal(row["mean"], digits), ends, formats.decimal(row["worst"], digits)]
        rows.append({"labels": labels, "figures": [str(row["seeds"]), *figures]})
    return {"columns": columns, "rows": rows, "labels": len(axes)}


def _labels(table: SweepTable) -> list[str]:
    return [name.removeprefix("axis.") for name in table.frame.columns if name.startswith("axis.")]


def _row(table: SweepTable, row: dict[str, Any], scored: Sequence[str]) -> dict[str, Any]:
    labels = ["" if pd.isna(row[f"axis.{axis}"]) else row[f"axis.{axis}"] for axis in _labels(table)]
    done = row["status"] == DONE
    attacked = done and not pd.isna(row["family"])
    leaked, shown = [formats.NONE] * 2, dict[str, str]()
    outcome = row["status"]
    if attacked:
        family = get_family(row["family"])
        leakage = family.leakage
        outcome = family.words(row["level"])
        ends = {end: _known(row[f"{leakage.column}_{end}"]) for end in ("low", "high")}
        shown = dict(family.sweep_columns(row))
        leaked = [
            formats.decimal(row[leakage.column], leakage.digits),
            formats.interval(ends, leakage.digits),
        ]
    leaked += [shown.get(name, formats.NONE) for name in scored]
    figures = [*leaked, formats.percent(row["accuracy"]), formats.decimal(row["epsilon"], 2)]
    return {
        "labels": labels,
        "outcome": outcome,
        "level": row["level"] if attacked else "",
        "link": f"cells/{row['cell']}/report.html" if done else "",
        "figures": [*figures, formats.seconds(row["seconds"])],
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _known(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _reasons(frame: pd.DataFrame) -> list[tuple[str, str]]:
    rows = frame[frame["status"] != DONE].drop_duplicates("cell")
    return [(row["cell"], f"{row['status']}: {row['reason']}") for row in _records(rows)]
