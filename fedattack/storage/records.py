"""The records table and the summary: what a run found, for machines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedattack.audit.family import AuditResult, by_family, headline, told_together
from fedattack.config import Config
from fedattack.files import write_bytes
from fedattack.storage.plain import plain, write_json
from fedattack.storage.run_folder import RunFolder
from fedattack.storage.spreadsheet import csv_bytes
from fedattack.version import fedattack_version


def records_frame(results: Sequence[AuditResult]) -> pd.DataFrame:
    """All records in one table; columns that do not apply are empty.

    Column types do not depend on what a run happens to hold, so that tables of several runs concatenate.
    """
    types = dict.fromkeys(("attack", "family", "status"), "string")
    for family, _ in by_family(results):
        types |= family.types
    rows = [row for result in results for row in result.records]
    frame = pd.DataFrame(rows)
    texts = {name for row in rows for name in row if isinstance(row[name], str)}
    chosen = {name: types.get(name, "string" if name in texts else "float64") for name in frame.columns}
    return frame.astype(chosen)


def summary_document(
    config: Config,
    results: Sequence[AuditResult],
    federation: Mapping[str, Any] | None,
    left_out: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``, already in JSON's own types: NaN is null, infinities "inf", "-inf".

    "version", "run" (:func:`fedattack.reporting.provenance.provenance`), "config", "federation" (as given),
    "headline" (:func:`fedattack.audit.family.headline`), "left_out" (attack -> why it does not
    apply), "together" (family -> what is told of all its attacks, with "text") and "attacks": name -> the audit's
    summary with "family", "count", "metrics" (metric -> "mean", "worst" for whoever attacks, "best", "low", "high"),
    "floors" (floor -> metric -> the same), "seconds", "level" and more.
    """
    document = {
        "version": fedattack_version(),
        "run": dict(run or {}),
        "config": config.model_dump(mode="json"),
        "federation": dict(federation or {}),
        "headline": headline(results, federation),
        "left_out": dict(left_out or {}),
        "together": told_together(results),
        "attacks": {r.attack: r.summary | ({"threat": r.threat} if r.threat else {}) for r in results},
    }
    return dict(plain(document))


def write_records(folder: RunFolder, results: Sequence[AuditResult]) -> None:
    """Write ``records.csv`` and ``records.parquet``."""
    frame = records_frame(results)
    write_bytes(folder.path / "records.csv", csv_bytes(frame))
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_bytes(folder.path / "records.parquet", buffer.getvalue())


def write_requests(folder: RunFolder, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Write ``requests.csv``: what the server decided about each deletion request, one row per verdict."""
    columns = ("attack", "seed", "arm", "round", "client", "gate", "accepted", "samples", "reason", "tag")
    frame = pd.DataFrame(list(verdicts), columns=columns)
    write_bytes(folder.path / "requests.csv", csv_bytes(frame))


def write_summary(
    folder: RunFolder,
    results: Sequence[AuditResult],
    federation: Mapping[str, Any] | None,
    left_out: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write ``summary.json``; see :func:`summary_document`."""
    document = summary_document(folder.config, results, federation, left_out, run)
    write_json(folder.path / "summary.json", document)
