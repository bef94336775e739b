"""The metrics benchmark: what it compares with is right, and its answers are those of the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedattack.metrics import registered_correlation
from simulations.bench import metrics as bench


def test_the_loop_over_shifts_is_the_registered_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 9, 11, generator=generator)
    images = torch.stack([truth[0].flip(-1).roll(2, -2), truth[1] * 0.5])
    looped = [bench.correlation_by_loop(a, b) for a, b in zip(truth, images, strict=True)]
    assert registered_correlation(images, truth).tolist() == pytest.approx(looped, abs=1e-9)
    assert looped[1] == pytest.approx(1, abs=1e-9)


def test_seeds_are_averaged_and_intervals_are_the_widest() -> None:
    ends = [{"a_auc": x, "a_low": x - 0.1, "a_high": x + 0.1, "a_arms": {}} for x in (0.5, 0.7)]
    found = bench.over_seeds("a", ends)
    assert found["a_auc"] == pytest.approx(0.6)
    assert (found["a_low"], found["a_high"]) == pytest.approx((0.4, 0.8))
    assert len(found["a_arms"]) == 2


@pytest.mark.slow
def test_answers_equal_scikit_image() -> None:
    figures = bench.speed(quick=True)
    errors = {name: value for name, value in figures.items() if name.startswith("error_")}
    assert len(errors) == 7
    assert max(errors.values()) <= 1e-6
    assert all(value > 0 for name, value in figures.items() if name.startswith("speed_"))


@pytest.mark.slow
def test_every_metric_stands_in_the_table_of_arms(shared_dir: Path) -> None:
    figures = bench.arms("mnist", shared_dir / "data", 48, 5000, 800, quick=True)
    rows = figures["mnist_arms"]["metrics"]
    assert {*bench.SCORES, "regcorr-half", "labeller"} <= set(rows)
    assert len(figures["mnist_arms"]["recognised"]) == 24
