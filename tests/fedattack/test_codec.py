"""CODEC and FOCI against other people's figures, a plain search, and with ties of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedattack.errors import DataError
from fedattack.rng import numpy_rng
from fedattack.unlearning.scrub import codec, foci, lfoci
from simulations.bench.foci import by_searches, run


@pytest.fixture(scope="module")
def cases(shared_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    folder = shared_dir / "checks" / "unlearning"
    expected = json.loads((folder / "codec_expected.json").read_text())
    with np.load(folder / "codec_inputs.npz") as arrays:
        return {n: (arrays[f"{n}__X"], arrays[f"{n}__Y"], told) for n, told in expected.items()}


def test_values_are_the_published_ones(cases) -> None:
    assert len(cases) == 8
    for name, (x, y, told) in cases.items():
        found = {
            "codec2_x0": codec(y, x[:, 0]),
            "codec2_all": codec(y, x),
            "codec3_x1_given_x0": codec(y, x[:, 1], given=x[:, 0]),
            "codec3_x0_given_last": codec(y, x[:, :1], given=x[:, -1:]),
        }
        found["independent_codec2_all"] = found["codec2_all"]
        for key, value in found.items():
            assert value == pytest.approx(told[key], rel=0, abs=1e-12), (name, key)


def test_orders_are_the_published_ones(cases) -> None:
    for name, (x, y, told) in cases.items():
        order, values = foci(x, y)
        assert order == told["foci_order"] == told["independent_order"], name
        assert values == pytest.approx(told["independent_vals"], rel=0, abs=1e-12), name
        if told["foci_order_no_early_stop"]:  # of the larger cases it was not worked out
            order, values = foci(x, y, stop=False)
            assert order == told["foci_order_no_early_stop"], name
            assert values == pytest.approx(told["foci_vals_no_early_stop"], rel=0, abs=1e-12), name


def nearest(points: np.ndarray) -> np.ndarray:
    """One point after the other: the first of the nearest others."""
    found = []
    for place, point in enumerate(points):
        distances = sum((column - at) ** 2 for column, at in zip(points.T, point, strict=True))
        others = [other for other in range(len(points)) if other != place]
        found.append(min(others, key=lambda other: distances[other]))
    return np.array(found)


def told(y: np.ndarray, points: np.ndarray, given: int) -> float:
    """CODEC by its definition, with the counts that it names, of the last column after the first `given`."""
    below = (y[None] <= y[:, None]).sum(1)
    above = (y[None] >= y[:, None]).sum(1)
    together = np.minimum(below, below[nearest(points)])
    if not given:
        top, bottom = (len(y) * together - above**2).sum(), (above * (len(y) - above)).sum()
    else:
        alone = np.minimum(below, below[nearest(points[:, :given])])
        top, bottom = (together - alone).sum(), (below - alone).sum()
    return float(top / bottom) if bottom else 0.0


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-170])  # 0.1 * k is not exact; squares of 1e-170 are 0
def test_ties_have_one_rule_on_every_path(scale: float) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        count, width = rng.integers(2, 40), rng.integers(1, 6)
        x = scale * rng.integers(0, rng.integers(1, 7), (count, width)).astype(float)
        x += 1e9 * scale * (rng.random((count, width)) < 0.3) * (seed % 2)
        y = rng.integers(0, 5, count)
        order, values = foci(x, y, stop=False)
        chosen: list[int] = []
        for place, value in zip(order, values, strict=True):
            left = [other for other in range(width) if other not in chosen]
            wanted = [told(y, x[:, [*chosen, other]], len(chosen)) for other in left]
            assert (place, value) == (left[int(np.argmax(wanted))], max(wanted))
            given = x[:, chosen] if chosen else None
            assert codec(y, x[:, place], given) == value
            chosen.append(place)


def test_duplicates_are_not_their_own_neighbours() -> None:
    x = np.repeat(np.arange(10.0), 2)
    paired = np.repeat(np.arange(10), 2)
    assert codec(paired, x) == 1.0  # the twin has the same response
    apart = np.tile(
        [0, 1], 10
    )  # the twin never has; as its own neighbour each would tell all, and the answer be 1
    assert codec(apart, x) == (20 * 20 * 10 - 10 * (20**2 + 10**2)) / (10 * 10 * 10) == -1.0


def test_pruned_search_chooses_like_a_search_for_every_candidate() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_t(2, (200, 12))  # outliers, whose neighbours are far
    y = np.sin(x[:, 3]) + x[:, 7] * (x[:, 1] > 0)
    order, values = foci(x, y)
    wanted, theirs = by_searches(x, y)
    assert order == wanted
    assert len(order) >= 3
    assert values == pytest.approx(theirs, rel=0, abs=1e-12)


def test_lfoci_is_foci_of_seeded_noise_on_both() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (300, 4)).astype(float)
    y = x[:, 2]
    assert lfoci(x, y, numpy_rng(3, "lfoci")) == lfoci(x, y, numpy_rng(3, "lfoci"))
    draws = numpy_rng(3, "lfoci")
    shaken = [x + 0.01 * draws.standard_normal(x.shape), y[:, None] + 0.01 * draws.standard_normal((300, 1))]
    assert lfoci(x, y, numpy_rng(3, "lfoci")) == foci(shaken[0], shaken[1])
    order, values = lfoci(x, y, numpy_rng(3, "lfoci"))
    assert order[0] == 2
    # the noise ranks within a level of y, which x does not tell: int u^2/4 du / int (u/2 - u^2/4) du = 1/2
    assert values[0] == pytest.approx(0.5, abs=0.05)


def test_bench_case_runs() -> None:
    figures = run(quick=True)
    assert figures["same_60"] is True
    assert figures["ratio_60"] > 0


@pytest.mark.parametrize(
    ("y", "z", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0], "2 rows beside a response of 3"),
        ([1.0, np.nan, 3.0], [1.0, 2.0, 3.0], "NaN"),
        ([1.0, 2.0], [1e200, 2.0], "beyond 1e"),
        ([1.0], [1.0], "n at least 2"),
        ([[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0], r"accepted: \(n,\) or \(n, 1\)"),
        ([1.0, 2.0], np.zeros((2, 0)), "d at least 1"),
    ],
)
def test_bad_input_is_refused(y, z, message: str) -> None:
    with pytest.raises(DataError, match=message):
        codec(y, z)
    with pytest.raises(DataError, match=message):
        foci(z, y)
