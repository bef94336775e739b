"""Damaged files before every reader; the full count is a benchmark."""

from __future__ import annotations

import pytest

from simulations.bench.fuzz import fuzz_files


@pytest.mark.parametrize("cases", [134, pytest.param(3_000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(cases: int) -> None:
    figures = fuzz_files(cases, first=10**6)
    assert (figures["faults"], figures["hangs"], figures["over_memory"]) == (0, 0, 0), figures["wrong"]
    assert figures["read"] + figures["refused"] == cases
    assert figures["refused"] > cases / 2
    assert figures["kinds"] >= 60
