"""Requests that cannot be carried out are refused before anything starts: exit 2, one sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bad_requests
import pytest

from simulations import pipeline
from simulations.run import main


class TrainingBegan(Exception):
    """A request was not refused."""


def faults(
    table: Sequence[bad_requests.Request],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """What is wrong with the answers to these requests, each made in a folder of its own."""

    def train(*_: Any, **__: Any) -> None:
        raise TrainingBegan

    monkeypatch.setattr(pipeline, "_train", train)
    found = []
    for number, request in enumerate(table):
        place = folder / str(number)
        place.mkdir()
        bad_requests.write_files(request, place)
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["fedattack", *request.arguments])
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            told = capsys.readouterr().err.strip()
            lacking = [word for word in request.words if word not in told]
            if ended.code != 2 or len(told.splitlines()) != 1 or lacking:
                found.append(f"{request}: exit {ended.code}, without {lacking}: {told[:200]}")
        except TrainingBegan:
            found.append(f"{request}: training began")
        except Exception as error:
            found.append(f"{request}: {type(error).__name__}: {error}")
    return found


def test_settings_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*bad_requests.of_settings(), *bad_requests.of_names()]
    assert len(quick) >= 200
    assert not faults(quick, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_parameters_of_plugins_files_and_what_the_data_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [*bad_requests.of_plugins(), *bad_requests.of_runs(), *bad_requests.of_files()]
    assert len(table) >= 400
    assert not faults(table, tmp_path, monkeypatch, capsys)
