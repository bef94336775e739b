"""The soak: memory does not grow with the rounds."""

from __future__ import annotations

from simulations.bench.soak import run


def test_quick_soak_stays_where_it_is() -> None:
    figures = run(quick=True, rounds=12)
    assert len(figures["resident_mib"]) == 12
    assert figures["updates"] == 96
    assert figures["candidates"] == 40
    assert figures["grown_mib"] < 20
