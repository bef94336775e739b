"""Objectives and regularisers against plain loops over victims and layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import observe, scenario, smooth_images
from torch import Tensor

from adversaries.inversion.gradients import Prediction, Segment, Sent, gradient_model
from adversaries.inversion.matching import regularisers
from adversaries.inversion.matching.objectives import LAYER_WEIGHTS, OBJECTIVES, LayerWeights, Layout, scale
from adversaries.inversion.matching.settings import Matching
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation

CPU = torch.device("cpu")
SHAPES = {"conv": (3, 2, 2), "bias": (3,), "head": (4, 6)}
VICTIMS = 3


def sent_sparsely(kept: float, seed: int = 0) -> tuple[Sent, Tensor, list[Tensor]]:
    """What three victims sent of SHAPES, a prediction, and each victim's (sent, predicted) rows of dense tensors.

    The head comes sparsely, as gathered and padded entries; what is missing of the others is marked in place.
    """
    generator = torch.Generator().manual_seed(seed)
    values, valid, rows, entries, masks = [], [], [], [], []
    segments: list[Segment] = []
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        mask = torch.rand(VICTIMS, size, generator=generator) < kept
        target, guess = (torch.randn(VICTIMS, size, generator=generator) for _ in range(2))
        masks.append((name, target * mask, guess, mask))
        width = max(int(mask.sum(1).max()), 1) if name == "head" and kept < 1 else size
        if width == size:
            chosen = torch.arange(size).expand(VICTIMS, -1)
            there = mask.float()
        else:
            chosen = torch.zeros(VICTIMS, width, dtype=torch.int64)
            there = torch.zeros(VICTIMS, width)
            for v in range(VICTIMS):
                positions = mask[v].nonzero()[:, 0]
                chosen[v, : len(positions)] = positions
                there[v, : len(positions)] = 1.0
        values.append(target.gather(1, chosen) * there)
        entries.append(guess.gather(1, chosen))
        valid.append(there)
        rows.append(chosen // math.prod(shape[1:]))
        start = segments[-1].stop if segments else 0
        segments.append(Segment(name, shape, start, start + width))
    sent = Sent(torch.cat(values, 1), torch.cat(valid, 1), tuple(segments), torch.cat(rows, 1))
    plain = [
        [(SHAPES[name], target[v], guess[v] * mask[v], mask[v]) for name, target, guess, mask in masks]
        for v in range(VICTIMS)
    ]
    return sent, torch.cat(entries, 1), plain  # type: ignore[return-value]


Piece = tuple[tuple[int, ...], Tensor, Tensor, Tensor]
"""Shape, what was sent, what was predicted there, and where: flat and dense, zero where nothing was sent."""


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0, eps=1e-20))


def plain_row_cosine(pieces: Sequence[Piece]) -> float:
    found = []
    for shape, target, guess, _ in pieces:
        count = shape[0] if len(shape) > 1 else 1
        for a, b in zip(target.reshape(count, -1), guess.reshape(count, -1), strict=True):
            if bool(a.any()):
                found.append(1 - cosine(a, b))
    return sum(found) / len(found)


def plain_sign(pieces: Sequence[Piece]) -> float:
    wrong, count = 0.0, 0
    for _, target, guess, _ in pieces:
        known = target != 0
        if bool(known.any()):
            rms = guess[known].square().mean().sqrt()
            wrong += float((-target[known].sign() * guess[known]).clamp(min=0).sum() / rms)
            count += int(known.sum())
    return wrong / count


def plain_kernel(pieces: Sequence[Piece]) -> float:
    found = 0.0
    for _, target, guess, mask in pieces:
        if bool(target.any()):
            sigma = mask.sum() * target[mask].square().mean()
            found += 1 - math.exp(-float((guess - target).square().sum() / sigma))
    return found


def total(term: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Piece]], float]:
    return lambda pieces: sum(float(term(guess - target)) for _, target, guess, _ in pieces)


PLAIN: dict[str, Callable[[Sequence[Piece]], float]] = {
    "masked-l2": total(lambda d: d.square().sum()),
    "l1": total(lambda d: d.abs().sum()),
    "l2-l1": total(lambda d: d.square().sum() + 0.1 * d.abs().sum()),
    "cosine": lambda pieces: 1 - cosine(torch.cat([p[1] for p in pieces]), torch.cat([p[2] for p in pieces])),
    "layer-cosine": lambda pieces: (
        sum(1 - cosine(p[1], p[2]) for p in pieces if p[1].any()) / sum(1 for p in pieces if p[1].any())
    ),
    "row-cosine": plain_row_cosine,
    "gaussian-kernel": plain_kernel,
    "sign": plain_sign,
}


@pytest.mark.parametrize("kept", [1.0, 0.4])
@pytest.mark.parametrize("name", PLAIN)
def test_objectives_are_the_plain_loops(name: str, kept: float) -> None:
    sent, entries, plain = sent_sparsely(kept)
    distance = OBJECTIVES.get(name).build(Layout(sent))
    entries.requires_grad_()
    found = distance(Prediction(entries), slice(0, VICTIMS))
    assert found.tolist() == pytest.approx([PLAIN[name](pieces) for pieces in plain], rel=1e-5)  # type: ignore[arg-type]
    # A victim alone is measured as in company, and padding pulls at nothing.
    alone = distance(Prediction(entries[1:2]), slice(1, 2))
    torch.testing.assert_close(alone, found[1:2])
    (slope,) = torch.autograd.grad(found.sum(), entries)
    assert bool(slope.isfinite().all())
    assert not bool((slope * (1 - sent.valid)).any())


def test_the_whole_norm_counts_what_was_not_sent() -> None:
    sent, entries, _ = sent_sparsely(0.4)
    kept = (entries * sent.valid).square().sum(1)
    found = OBJECTIVES.get("l2").build(Layout(sent))(Prediction(entries, kept + 7.0), slice(0, VICTIMS))
    expected = OBJECTIVES.get("masked-l2").build(Layout(sent))(Prediction(entries), slice(0, VICTIMS)) + 7.0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("l2", "sign")])
def test_the_truth_costs_nothing_and_zeros_cost_one_unit(name: str) -> None:
    sent, _, _ = sent_sparsely(0.4)
    distance = OBJECTIVES.get(name).build(Layout(sent))
    at_truth = distance(Prediction(sent.values), slice(0, VICTIMS))
    assert float(at_truth.abs().max()) < 1e-6
    unit = scale(OBJECTIVES.get(name), distance, sent)
    at_zero = distance(Prediction(torch.zeros_like(sent.values)), slice(0, VICTIMS))
    if name != "gaussian-kernel":
        torch.testing.assert_close(at_zero, unit)
    assert float(at_zero.min()) > 0


def test_the_signs_objective_cares_for_signs_alone() -> None:
    sent, _, _ = sent_sparsely(1.0)
    signs = dataclasses.replace(sent, values=sent.values.sign())
    distance = OBJECTIVES.get("sign").build(Layout(signs))
    assert float(distance(Prediction(3 * sent.values), slice(0, VICTIMS)).max()) == 0.0
    wrong = distance(Prediction(-sent.values), slice(0, VICTIMS))
    torch.testing.assert_close(wrong, distance(Prediction(-5 * sent.values), slice(0, VICTIMS)))
    assert float(wrong.min()) > 0.5


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("equal", [1, 1, 1]),
        ("falling", [1, 2 / 3, 1 / 3]),
    ],
)
def test_layer_weights(kind: LayerWeights, weights: list[float]) -> None:
    sent, entries, plain = sent_sparsely(1.0)
    assert kind in LAYER_WEIGHTS
    for name, term in (("masked-l2", torch.square), ("l1", torch.abs)):
        found = OBJECTIVES.get(name).build(Layout(sent, kind))(Prediction(entries), slice(0, VICTIMS))
        expected = [
            sum(w * float(term(p[2] - p[1]).sum()) for w, p in zip(weights, pieces, strict=True))
            for pieces in plain
        ]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
    found = OBJECTIVES.get("layer-cosine").build(Layout(sent, kind))(Prediction(entries), slice(0, VICTIMS))
    cosines = [[1 - cosine(p[1], p[2]) for p in pieces] for pieces in plain]
    expected = [sum(w * c for w, c in zip(weights, row, strict=True)) / sum(weights) for row in cosines]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["l2", "cosine"])
def test_objectives_over_everything_know_no_layers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is over all layers at once"):
        Matching(objective=name, layer_weights="falling")


def test_a_prediction_of_zeros_has_a_slope() -> None:
    sent, _, _ = sent_sparsely(1.0)
    for name in OBJECTIVES:
        objective = OBJECTIVES.get(name)
        zeros = torch.zeros_like(sent.values).requires_grad_()
        loss = objective.build(Layout(sent))(Prediction(zeros, zeros.square().sum(1)), slice(0, VICTIMS))
        (slope,) = torch.autograd.grad(loss.sum(), zeros)
        assert bool(slope.isfinite().all()), name


# Regularisers


def with_batch_norm(
    training: dict[str, object], size: int = 16, images: int = 3
) -> tuple[Observation, Tensor]:
    """What a ResNet-18's client sends, buffers included, and its private batch."""
    scene = scenario(5, rate=0.01, model="resnet18", activation="relu", size=size)
    private = smooth_images(images, size)
    seen = observe(scene, private, torch.arange(images))
    module = build_model(scene.model)
    module.load_state_dict(seen.weights)
    module.train()(private)
    buffers = {name: b.clone() for name, b in module.named_buffers() if b.is_floating_point()}
    settings = seen.scenario.training.model_copy(update=training)
    scene = dataclasses.replace(seen.scenario, training=settings)
    return dataclasses.replace(seen, buffers=buffers, scenario=scene), private


def test_the_batchs_statistics_follow_from_the_buffers() -> None:
    seen, private = with_batch_norm({})
    targets = regularisers.batch_norm_targets([seen], len(private), CPU)
    model = gradient_model([seen], torch.arange(3)[None], device=CPU)
    found = model.predict(private[None], slice(0, 1), statistics=True).statistics
    found = tuple((mean.detach(), variance.detach()) for mean, variance in found)
    assert len(found) == len(targets) == 20
    for layer, target in zip(found, targets, strict=True):
        for one, other in zip(layer, target, strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-3, atol=1e-4)
    assert float(regularisers.batch_norm(found, targets)) < 1e-2
    others = model.predict(1 - private[None], slice(0, 1), statistics=True).statistics
    assert float(regularisers.batch_norm(others, targets).detach()) > 1.0


@pytest.mark.parametrize("case", ["no buffers", "several steps"])
def test_else_the_running_statistics_are_the_targets(case: str) -> None:
    several = {"protocol": "fedavg", "local_steps": 3}
    seen, private = with_batch_norm(several if case == "several steps" else {})
    if case == "no buffers":
        seen = dataclasses.replace(seen, buffers={})
    (mean, variance), *_ = regularisers.batch_norm_targets([seen, seen], len(private), CPU)
    assert mean.shape == variance.shape == (2, 64)
    assert not bool(mean.any())
    assert bool((variance == 1).all())


def test_batch_norm_by_hand_and_without() -> None:
    layer = (torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]]))
    target = (torch.zeros(1, 2), torch.ones(1, 2))
    assert float(regularisers.batch_norm((layer, layer), (target, target))) == 10.0
    plain = observe(scenario(5, size=16, training=TrainingConfig()), smooth_images(1, 16), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="no BatchNorm"):
        regularisers.batch_norm_targets([plain], 1, CPU)


def test_pixel_terms_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).reshape(1, 1, 1, 2, 2)
    assert float(regularisers.tv_l2(image)[0]) == pytest.approx((0.25 + 0.25) / 2 + (1.0 + 0.0) / 2)
    assert float(regularisers.tv_l1(image)[0]) == pytest.approx((0.5 + 0.5) / 2 + (1.0 + 0.0) / 2)
    assert float(regularisers.l2(image)[0]) == pytest.approx(1.5 / 4)
    assert float(regularisers.group(image, torch.zeros_like(image))[0]) == pytest.approx(1.5 / 4)


PLAIN_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tv1": lambda x: x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean(),
    "tv2": lambda x: x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean(),
    "l2": lambda x: x.square().mean(),
}


@pytest.mark.parametrize("name", regularisers.PIXEL_TERMS)
def test_pixel_terms_and_their_slopes_are_autograds(name: str) -> None:
    images = torch.randn(3, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    values, slopes = regularisers.PIXEL_TERMS.get(name)(images, 1.0)
    for victim, value, slope in zip(images, values, slopes, strict=True):
        x = victim.clone().requires_grad_()
        expected = PLAIN_TERMS[name](x)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(slope, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("kept", [1.0, 0.4])
@pytest.mark.parametrize(
    ("name", "weights"), [("masked-l2", "equal"), ("masked-l2", "falling"), ("cosine", "equal")]
)
def test_slopes_that_are_written_out_are_autograds(name: str, kept: float, weights: LayerWeights) -> None:
    sent, entries, _ = sent_sparsely(kept)
    layout, objective = Layout(sent, weights), OBJECTIVES.get(name)
    assert objective.slope is not None
    entries.requires_grad_()
    expected = objective.build(layout)(Prediction(entries), slice(0, VICTIMS))
    (expected_slope,) = torch.autograd.grad(expected.sum(), entries)
    found, slope = objective.slope(layout)(entries.detach(), slice(0, VICTIMS))
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(slope, expected_slope)
    alone = objective.slope(layout)(entries.detach()[1:2], slice(1, 2))
    torch.testing.assert_close(alone[1], slope[1:2])
