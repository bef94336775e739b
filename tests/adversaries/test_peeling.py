"""Peeling of rows that hold sums of images: what is believed, in which order, and every threshold from both sides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adversaries.inversion.solvers import peeling
from adversaries.inversion.solvers.peeling import Replay, Rows, Sample, agreeing, peel


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def always(shares: Tensor) -> Replay:
    """A model under which every input moves the rows by `shares`, (C, K)."""
    return lambda inputs: shares.expand(len(inputs), *shares.shape)


def known(images: Tensor, shares: Tensor) -> Replay:
    """A model that knows `images` (N, d), with `shares` (N, C, K), and takes nothing else for an image."""

    def replay(inputs: Tensor) -> Tensor:
        nearest = torch.cdist(inputs, images)
        return shares[nearest.argmin(1)] * (nearest.amin(1) < 1e-3)[:, None, None]

    return replay


def row(
    pixels: Sequence[float] = (0.2, 0.7),
    *,
    scalar: float = 2.0,
    noise: float = 0.0,
    misfit: float = 0.0,
    scale: float = 0.0,
    tolerance: float = 0.0,
) -> list[Sample]:
    """What is found in one row that shows `pixels`, where the model gives its scalar with `misfit`."""
    rows = Rows(double(scalar), scalar * double(pixels), double(noise), scale)
    return peel(rows, always(double([scalar * (1 + misfit)])), 1, 1, tolerance=tolerance)[0]


BELIEVED: list[tuple[dict[str, object], dict[str, object]]] = [
    # noise < scalar / 10
    ({"noise": 0.198}, {"noise": 0.202}),
    ({"noise": 0.198, "scalar": -2.0}, {"noise": 0.1, "scalar": 1.0}),
    # pixels in [-slack, 1 + slack], slack = 3 noise / scalar + 1e-4, the ends left out
    ({"pixels": (-0.03008, 0.5), "noise": 0.02}, {"pixels": (-0.03012, 0.5), "noise": 0.02}),
    ({"pixels": (0.5, 1.03008), "noise": 0.02}, {"pixels": (0.5, 1.03012), "noise": 0.02}),
    ({"pixels": (0.0, 1.0)}, {"pixels": (-1e-4, 0.5), "scalar": 1.0}),
    ({"pixels": (0.0, 0.0)}, {"pixels": (0.5, 1 + 1e-4), "scalar": 1.0}),
    # misfit <= tolerance (1 + 0.1 scale / scalar) + 3 noise / scalar, of which noise excuses .02 at most
    *(
        ({"misfit": sign * inner, **given}, {"misfit": sign * outer, **given})
        for sign in (1, -1)
        for inner, outer, given in (
            (0.00999, 0.01001, {"tolerance": 0.01}),
            (0.01499, 0.01501, {"tolerance": 0.01, "scale": 10.0}),
            (0.01999, 0.02001, {"tolerance": 0.01, "scale": 10.0, "scalar": -1.0}),
            (0.01499, 0.01501, {"noise": 0.01}),
            (0.01999, 0.02001, {"noise": 0.1}),
        )
    ),
]


@pytest.mark.parametrize(("believed", "refused"), BELIEVED)
def test_a_row_is_believed_up_to_its_noise(believed: dict, refused: dict) -> None:
    (sample,) = row(**believed)
    assert torch.allclose(sample.input, double(*believed.get("pixels", (0.2, 0.7))), atol=1e-15)
    assert sample.misfit == pytest.approx(abs(believed.get("misfit", 0.0)), abs=1e-12)
    assert sample.error == pytest.approx(believed.get("noise", 0.0) / abs(believed.get("scalar", 2.0)))
    assert (sample.label, sample.sweep, sample.support) == (0, 0, 1)
    assert row(**refused) == []


@pytest.mark.parametrize(
    ("held", "predicted", "found"),
    [(0.7, 2.6, 0), (0.75, 2.6, 0), (0.8, 2.6, 1), (0.0, 2.4, 1), (0.0, 2.5, 1), (0.0, -2.6, 0)],
)
def test_a_mixture_would_have_moved_an_empty_row(held: float, predicted: float, found: int) -> None:
    """Row 1, noise 1/4, is empty up to 3 times that; an image that moves it more than 10 times is none."""
    rows = Rows(double(4, 0), double([2, 1], [-held, 0]), double(0.01, 0.25), 4.0)
    assert len(peel(rows, always(double([4, predicted])), 1, 1, tolerance=0)[0]) == found


def test_label_and_count_are_those_that_give_the_scalar_and_the_row_is_left_empty() -> None:
    """Label 2, counted three times, gives 6.06 where 6 was seen: what is taken out is what was seen."""
    shares = double([1.7, 1, 0.2], [-2, 1, 0.3], [2.02, 1, 0.45], [0.1, 2, 9])
    rows = Rows(double(6, 7, 1), double([3, 6], [4, 3], [0.7, 0.2]), double(0, 0, 0), 7.0)
    (sample,), left = peel(rows, always(shares), 4, 1, tolerance=0.02, times=(1, 2, 3), sweeps=1)
    taken = shares[2] * 6 / 2.02
    assert sample.label == 2
    assert sample.misfit == pytest.approx(0.01)
    assert torch.allclose(sample.shares, taken)
    assert torch.allclose(left.scalars, rows.scalars - taken)
    assert torch.allclose(left.vectors, rows.vectors - taken[:, None] * double(0.5, 1))
    assert left.scalars[0] == 0
    assert torch.equal(rows.scalars, double(6, 7, 1)), "the rows that were given stay as they are"
    assert peel(rows, always(shares), 4, 1, tolerance=0.02, times=(1, 2))[0] == []
    assert peel(rows, always(shares), 4, 1, tolerance=0.02)[0] == []


@pytest.mark.parametrize(("share", "sweep"), [(2**-10, 0), (2**-9, 1), (-(2**-9), 1)])
def test_a_row_that_was_moved_beyond_its_noise_waits_for_the_next_sweep(share: float, sweep: int) -> None:
    images = double([0.25, 0.5], [0.75, 0.25])
    shares = double([[4, share]], [[0, 1]])
    told: list[int] = []
    rows = Rows(shares.sum((0, 1)), torch.einsum("nck,nd->kd", shares, images), double(2**-10, 2**-10), 4.0)
    found, _ = peel(
        rows, lambda x: shares[torch.cdist(x, images).argmin(1)], 1, 2, tolerance=0.01, progress=told.append
    )
    assert [sample.sweep for sample in found] == [0, sweep]
    assert told == [2] if sweep == 0 else [1, 2]


def test_the_surest_come_first_and_no_more_than_the_limit() -> None:
    images = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.eye(5).double()[:, None] * double(1, -2, 3, 1, 1)
    noise = 1e-6 * double(3, 2, 12, 5, 2)  # over scalar: 3, 1, 4, 5, 2
    rows = Rows(shares.sum((0, 1)), shares.sum(0).sum(0)[:, None] * images, noise, 3.0)
    for limit in (1, 3, 5):
        told: list[int] = []
        found, left = peel(rows, known(images, shares), 1, limit, tolerance=1e-6, progress=told.append)
        order = [1, 4, 0, 2, 3][:limit]
        assert torch.allclose(torch.stack([sample.input for sample in found]), images[order])
        assert [int(sample.shares.abs().argmax()) for sample in found] == order
        assert told == [limit], "nothing is looked at once the batch is full"
        assert torch.nonzero(left.scalars)[:, 0].tolist() == sorted(set(range(5)) - set(order))
    assert peel(rows, known(images, shares), 1, 5, tolerance=1e-6, sweeps=0)[0] == []


@pytest.mark.parametrize(("numbers", "together"), [(10**6, 6), (36, 3), (1, 1)])
def test_rows_looked_at_in_portions_give_the_same(
    monkeypatch: pytest.MonkeyPatch, numbers: int, together: int
) -> None:
    """Two classes, six rows: one image alone in four of them, another in one, and beside it in the last."""
    monkeypatch.setattr(peeling, "_NUMBERS_AT_ONCE", numbers)
    images = double([0.1, 0.9], [0.6, 0.3])
    shares = torch.zeros(2, 2, 6).double()
    shares[0, 1] = double(1, 2, 3, 4, 0, 2)
    shares[1, 0] = double(0, 0, 0, 0, 2, 1)
    rows = Rows(shares.sum((0, 1)), torch.einsum("nck,nd->kd", shares, images), 1e-9 * torch.ones(6), 4.0)
    asked: list[int] = []
    replay = known(images, shares)

    def counting(inputs: Tensor) -> Tensor:
        asked.append(len(inputs))
        return replay(inputs)

    found, left = peel(rows, counting, 2, 4, tolerance=1e-6)
    assert [(sample.label, sample.support, sample.sweep) for sample in found] == [(1, 4, 0), (0, 1, 0)]
    assert left.vectors.abs().max() < 1e-8
    assert max(asked) == together


def test_black_images_no_rows_and_no_images() -> None:
    nothing = Rows(torch.zeros(0).double(), torch.zeros(0, 2).double(), torch.zeros(0).double(), 0.0)
    assert peel(nothing, always(torch.zeros(3, 0)), 3, 4, tolerance=0.1)[0] == []
    black = Rows(double(2, 2), double([0, 0], [0, 0]), double(1e-9, 1e-9), 2.0)
    assert [sample.support for sample in peel(black, always(double([2, 2])), 1, 4, tolerance=0.1)[0]] == [2]
    silent = Rows(double(0, 0), double([0, 0], [0, 0]), double(0, 1e-9), 0.0)
    assert peel(silent, always(double([1, 1])), 1, 4, tolerance=0.1)[0] == []


@pytest.mark.parametrize(
    ("noise", "apart", "support"),
    [(0.0, 0.99e-4, 2), (0.0, 1e-4, 1), (0.0, 1.01e-4, 1), (0.02, 0.0899, 2), (0.02, 0.0903, 1)],
)
def test_rows_that_show_one_image_support_it(noise: float, apart: float, support: int) -> None:
    """Up to 3 (noise / 2 + noise / 1) + 1e-4, in the pixel that differs most."""
    rows = Rows(double(2, 1), double([0, 1], [apart, 0.5]), double(noise, noise), 2.0)
    (sample,), _ = peel(rows, always(double([2, 1])), 1, 1, tolerance=0)
    assert sample.support == support
    assert torch.equal(sample.input, double(0, 0.5))
    # With another label it is another image.
    rows = Rows(double(2, 1), double([0, 1], [0, 0.5]), double(noise, noise), 2.0)
    (sample,), _ = peel(rows, always(double([2, -1], [-2, 1])), 2, 1, tolerance=0)
    assert sample.support == 1


# ---------------------------------------------------------------------- rows that are too uncertain for replaying


def uncertain(inputs: Tensor, scalars: Tensor, noise: Tensor) -> Rows:
    return Rows(scalars, scalars[:, None] * inputs, noise, float(scalars.abs().max()))


def test_agreeing_rows_are_averaged_by_their_weight() -> None:
    """Three rows of one image, two of a surer one, one alone: the first two, the one that most rows show first."""
    a, b, c = double(0.1, 0.2, 0.3, 0.4), double(0.9, 0.8, 0.1, 0.5), double(0.5, 0.5, 0.9, 0.1)
    inputs = torch.stack([b, a, c, a + 0.01, b - 0.01, a + double(0.02, 0, 0, 0)])
    scalars, noise = double(4, 1, 5, -2, 4, 3), double(0.04, 0.05, 0.05, 0.08, 0.12, 0.18)
    shares = torch.zeros(3, 6).double()
    shares[:, 1] = double(0.4, -1, 0.47)
    shares[:, 0] = double(1.9, 9, 1.0)
    rows = uncertain(inputs, scalars, noise)
    told: list[int] = []
    found, left = agreeing(rows, always(shares), 5, times=(1, 2), progress=told.append)
    first, second = found
    # The surest of the three, row 3, stands for them: its scalar -2 is twice label 1's share there, were there one.
    assert torch.allclose(first.input, (1 * inputs[1] + 4 * inputs[3] + 9 * inputs[5]) / 14)
    assert torch.allclose(second.input, (inputs[0] + inputs[4]) / 2)
    assert (first.support, second.support, first.sweep, second.sweep) == (3, 2, 0, 0)
    assert first.error == pytest.approx(0.08 / 2 / 3**0.5)
    assert second.error == pytest.approx(0.04 / 4 / 2**0.5)
    assert (second.label, second.misfit) == (0, pytest.approx(0.05))
    assert torch.equal(second.shares, shares[0])
    assert told == [1, 2]
    assert left.vectors.abs().amax(1).gt(0).tolist() == [False, False, True, False, False, False]
    assert torch.equal(rows.vectors[0], 4 * b)
    assert torch.equal(left.scalars, scalars)
    only, left = agreeing(rows, always(shares), 1)
    assert [sample.support for sample in only] == [3]
    assert int(left.vectors.abs().amax(1).gt(0).sum()) == 3


@pytest.mark.parametrize(
    ("own", "label", "misfit"),
    [((0.96, -2.0), 0, 0.04), ((-0.5, 1.02), 1, 0.02), ((0.0, -1.0), 0, 1.0), ((0.0, 0.0), 1, 0.1)],
)
def test_an_uncertain_image_is_counted_where_it_was_seen_or_would_be(
    own: tuple[float, float], label: int, misfit: float
) -> None:
    """Row 0 of two; where the model leaves nothing there, the row that it would move most (the third, by -4.4)."""
    elsewhere = double(-4.4, 0.9) if not any(own) else double(9, 9)
    shares = torch.stack([double(*own), double(0.1, 0.2), elsewhere], 1)
    inputs = double([0.3, 0.6, 0.6], [0.3, 0.6, 0.6], [3, 0, 0])
    (sample,), _ = agreeing(uncertain(inputs, double(1, 1, 1), double(0.01, 0.02, 0.01)), always(shares), 3)
    assert (sample.label, sample.misfit) == (label, pytest.approx(misfit))
    assert torch.equal(sample.shares, shares[label])


@pytest.mark.parametrize(("apart", "found"), [(0.0299, 1), (0.0301, 0)])
@pytest.mark.parametrize("pixels", [2, 5])
def test_rows_agree_within_three_hundredths(apart: float, found: int, pixels: int) -> None:
    inputs = torch.full((2, pixels), 0.5, dtype=torch.float64)
    inputs[1] += apart
    rows = uncertain(inputs, double(1, 1), double(0.01, 0.01))
    assert len(agreeing(rows, always(double([1, 1])), 2)[0]) == found
    edge = uncertain(double([0.0], [0.03]), double(1, 1), double(0.01, 0.01))
    assert agreeing(edge, always(double([1, 1])), 2)[0] == []


def test_a_row_speaks_for_one_image_only() -> None:
    """A chain of four, each alike to the next: the second takes its neighbours, and the fourth is left alone."""
    inputs = 0.02 * torch.arange(4)[:, None].double() + double(0.3, 0.3)
    rows = uncertain(inputs, double(1, 1, 1, 1), double(0.01, 0.01, 0.01, 0.01))
    (sample,), left = agreeing(rows, always(double([1, 1, 1, 1])), 4)
    assert sample.support == 3
    assert torch.allclose(sample.input, inputs[1])
    assert left.vectors[:, 0].gt(0).tolist() == [False, False, False, True]
