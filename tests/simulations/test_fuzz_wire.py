"""Bytes from the wire that no honest client sends: read or refused, never anything else."""

from __future__ import annotations

from simulations.bench.fuzz_wire import fuzz_headers, fuzz_payloads


def test_mutated_payloads_and_headers_are_read_or_refused() -> None:
    """A part of ``python -m simulations.bench fuzz-wire``."""
    payloads, headers = fuzz_payloads(1000, seed=1), fuzz_headers(400, seed=1)
    for found in (payloads, headers):
        assert found["first"] == []
        assert found["slow"] == 0
        assert found["read"] > 10
        assert found["refused"] > 100
