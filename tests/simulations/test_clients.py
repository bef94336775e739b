"""The benchmark of many clients measures the same work on all sides."""

from __future__ import annotations

import pytest
import torch

from simulations.bench.clients import bare_round, crowd, run, tree_cpu_seconds
from simulations.client_app import Workplace
from simulations.engine.federation import run_federation


def test_the_bare_loop_reaches_what_the_federation_reaches() -> None:
    config, world = crowd(20)
    place = Workplace.of(config, world)
    assert sum(parameter.numel() for parameter in place.model.parameters()) == 9098
    assert [len(ids) for ids in world.partitions] == [16] * 20
    bare = bare_round(place)
    result = run_federation(config, world)
    assert result.rounds[0].clients == tuple(range(20))
    for name, tensor in result.weights.items():
        torch.testing.assert_close(bare[name], tensor, rtol=1e-5, atol=1e-6)


def test_cpu_seconds_grow_with_work() -> None:
    before = tree_cpu_seconds()
    for _ in range(300):
        torch.rand(200, 200) @ torch.rand(200, 200)
    assert tree_cpu_seconds() > before


@pytest.mark.slow
@pytest.mark.ray
def test_the_benchmark_runs_and_reports_ratios() -> None:
    """Its figures are judged where it is run on a quiet machine, never here."""
    figures = run(quick=True)
    assert {"inline_over_bare", "ray_over_bare", "flower_over_bare"} <= figures.keys()
    assert all(figures[name] > 0 for name in ("inline_over_bare", "ray_over_bare", "flower_over_bare"))
