"""A finished run, read from its folder: what it found, its records, what it was called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fedattack.errors import ConfigError, DataError
from fedattack.reading import Unreadable, read_frame
from fedattack.storage.plain import read_json


@dataclass(frozen=True)
class Finished:
    """A run's folder with its ``summary.json`` (:func:`fedattack.storage.records.summary_document`)."""

    path: Path
    summary: dict[str, Any]

    @classmethod
    def read(cls, path: Path | str) -> Finished:
        """Read a run folder.

        Raises
        ------
        ConfigError
            If the folder is no finished run: missing, a sweep's, or of a run that did not end.
        DataError
            If its summary is malformed.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"RUN {str(path)!r}: is no folder; give the folder of a finished run")
        if (path / "cells.parquet").is_file():
            raise ConfigError(
                f"RUN {str(path)!r}: is a sweep; give runs, those of a sweep lie below its cells"
            )
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"RUN {str(path)!r}: is no run folder (no config.toml); give one of a finished run"
            )
        if not (path / "summary.json").is_file():
            raise ConfigError(f"RUN {str(path)!r}: did not finish (no summary.json); start it again first")
        summary = read_json(path / "summary.json")
        if not isinstance(summary, dict) or not {"config", "attacks", "federation"} <= set(summary):
            raise DataError(f"{path / 'summary.json'} is no summary of a run")
        return cls(path, summary)

    @cached_property
    def records(self) -> pd.DataFrame:
        """The run's records; DataError where they cannot be read."""
        path = self.path / "records.parquet"
        try:
            return read_frame(path)
        except Unreadable as error:
            raise DataError(f"cannot read {path}: {error.reason}") from None

    def attack(self, name: str) -> pd.DataFrame:
        """The records of one attack."""
        frame = self.records
        return frame[frame["attack"] == name] if "attack" in frame else frame


def named_apart(paths: list[Path]) -> list[str]:
    """Short names of folders, none twice: the last parts that tell them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]
