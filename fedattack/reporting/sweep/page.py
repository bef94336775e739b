"""What a sweep writes beside its cells: the table, the figures, and a page that opens from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedattack.audit.family import get_family
from fedattack.files import write_bytes
from fedattack.reporting import figures, formats
from fedattack.reporting.report import environment
from fedattack.reporting.sweep.figures import heat_map, utility_leakage
from fedattack.reporting.sweep.table import DONE, SEED, SweepTable, over_seeds
from fedattack.reporting.template import SWEEP
from fedattack.storage.plain import fedattack_version


def write_sweep(folder: Path, table: SweepTable, *, command: str = "") -> Path:
    """Write ``cells.csv``, ``cells.parquet``, ``figures/*.png`` and ``index.html``, and say where the page is."""
    write_bytes(folder / "cells.csv", table.frame.to_csv(index=False).encode())
    buffer = io.BytesIO()
    table.frame.to_parquet(buffer, index=False)
    write_bytes(folder / "cells.parquet", buffer.getvalue())
    counts = table.frame.drop_duplicates("cell")["status"].value_counts()
    if together := over_seeds(table):
        write_bytes(folder / "seeds.csv", pd.DataFrame(together).to_csv(index=False).encode())
    template = environment().from_string(SWEEP)
    page = template.render(
        summary="; ".join(f"{number} runs {status}" for status, number in counts.items()),
        pictures=_pictures(folder, table),
        seeds=_over_seeds(table, over_seeds(table)),
        columns=[*_labels(table), "outcome", *_LEAKED, *_scored(table), *_REST],
        rows=[_row(table, row, _scored(table)) for row in _records(table.frame)],
        reasons=_reasons(table.frame),
        command=command or "fedattack sweep FILE",
        version=fedattack_version(),
    )
    path = folder / "index.html"
    write_bytes(path, page.encode())
    return path


def _pictures(folder: Path, table: SweepTable) -> list[dict[str, str]]:
    shown = []
    for family in table.families:
        drawn = [("leakage", heat_map, f"{family}: leakage of every cell")]
        if table.frame["accuracy"].notna().any():
            drawn.append(("utility", utility_leakage, f"{family}: accuracy against leakage"))
        for name, draw, alt in drawn:
            data = figures.png(draw(table, family))
            write_bytes(folder / "figures" / f"{family}-{name}.png", data)
            shown.append({"data": base64.b64encode(data).decode(), "alt": alt, "caption": _CAPTIONS[name]})
    return shown


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
    return {"columns": columns, "rows": rows}


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
