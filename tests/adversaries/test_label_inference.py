"""Labels from updates, by each published way, against the truth over many draws."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hcgla_scenes import observe, scenario, smooth_images
from torch import Tensor

from adversaries.inversion.evidence.defences import known_entries
from adversaries.inversion.evidence.evidence import Evidence, Labels
from adversaries.inversion.evidence.labels import label_strategies
from adversaries.inversion.evidence.labels.label_strategies import STRATEGIES
from adversaries.inversion.evidence.one_gradient import mean_gradient
from adversaries.reconstruction.hcgla.memory import Remembered
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Update

COUNTING = ("auto", "llg", "llg-star", "llg-plus", "sparse-rows")


def right(found: Tensor, truth: Tensor) -> float:
    """Share of labels that are right, repeats counted."""
    return sum((Counter(found.tolist()) & Counter(truth.tolist())).values()) / len(truth)


def draw(count: int, classes: int, seed: int, distinct: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        return torch.randperm(classes, generator=generator)[:count]
    return torch.randint(0, classes, (count,), generator=generator)


def victims(
    batch: int,
    trials: int,
    model: str = "tiny-cnn",
    activation: str = "relu",
    distinct: bool = False,
    **how: object,
) -> list[tuple[Observation, Tensor]]:
    scene = scenario(10, model=model, activation=activation, size=16, **({"name": "none"} | how))
    public = smooth_images(64, 16, seed=99)
    found = []
    for trial in range(trials):
        labels = draw(batch, 10, trial, distinct)
        seen = observe(scene, smooth_images(batch, 16, seed=trial), labels, auxiliary=public, seed=trial)
        found.append((seen, labels))
    return found


def infer(strategy: str, seen: Observation) -> Labels:
    return label_strategies.infer(strategy, Evidence(seen))


def accuracy(strategy: str, cases: list[tuple[Observation, Tensor]]) -> float:
    return sum(right(infer(strategy, seen).values, truth) for seen, truth in cases) / len(cases)


def without(seen: Observation, tensor: str) -> Observation:
    """The observation as if nothing of one tensor had been sent."""
    update, keep, start = seen.update, [], 0
    for name, size in zip(seen.update.names, seen.update.sizes, strict=True):
        keep.append(torch.full((size,), name != tensor))
        start += size
    kept = torch.cat(keep)
    sparse = Update(update.names, update.shapes, kept.nonzero()[:, 0], update.values[kept], update.kind)
    return dataclasses.replace(seen, update=sparse)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_one_label_is_exact(activation: str) -> None:
    for seen, truth in victims(1, 10, activation=activation):
        for case in (seen, without(seen, "head.bias")):
            for strategy in ("idlg", "auto"):
                found = infer(strategy, case)
                assert found.values.tolist() == truth.tolist()
                assert found.confidence == pytest.approx(1.0)


def test_two_classes_with_features_of_either_sign_cannot_be_told() -> None:
    for activation, sure in (("relu", 1.0), ("tanh", 0.5)):
        scene = scenario(2, model="tiny-cnn", activation=activation, size=16, name="none")
        seen = without(observe(scene, smooth_images(1, 16), torch.tensor([1])), "head.bias")
        found = infer("idlg", seen)
        assert found.confidence == sure
        assert activation == "tanh" or found.values.tolist() == [1]


def test_distinct_labels_by_gradinversion() -> None:
    cases = victims(6, 10, distinct=True)
    assert accuracy("gradinversion", cases) == 1.0
    assert all(infer("gradinversion", seen).confidence == 1.0 for seen, _ in cases)


def test_gradinversion_is_unsure_of_repeated_labels() -> None:
    seen, truth = victims(6, 1)[0]
    assert len(set(truth.tolist())) < 6
    assert infer("gradinversion", seen).confidence < 1


@pytest.mark.parametrize(("batch", "least"), [(4, 0.93), (16, 0.9), (64, 0.9)])
def test_counts_with_repeated_labels_and_more_images_than_classes(batch: int, least: float) -> None:
    cases = victims(batch, 10)
    chance = sum(right(draw(batch, 10, 1000 + t), truth) for t, (_, truth) in enumerate(cases)) / len(cases)
    assert accuracy("auto", cases) >= 0.97
    assert accuracy("sparse-rows", cases) >= 0.97
    assert accuracy("llg-star", cases) >= least - 0.1
    assert accuracy("llg-plus", cases) >= least
    if batch < 64:  # with every class present, LLG's own estimate of a sample's impact is far too small
        assert accuracy("llg", cases) > chance
    assert all(len(infer(strategy, cases[0][0]).values) == batch for strategy in COUNTING)


def test_confidence_says_how_sure() -> None:
    sure, unsure = victims(4, 5), victims(64, 5)
    mean = [sum(infer("auto", seen).confidence for seen, _ in cases) / 5 for cases in (sure, unsure)]
    assert 0.9 < mean[1] <= mean[0] <= 1.0


def test_local_steps_are_read_as_their_mean_gradient() -> None:
    training = TrainingConfig(
        protocol="fedavg", local_steps=5, learning_rate=0.01, momentum=0.5, weight_decay=1e-3
    )
    for batch, least in ((1, 1.0), (8, 0.9)):
        assert accuracy("auto", victims(batch, 8, training=training)) >= least


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_three_local_steps_read_as_long_as_one_gradient(settings: dict[str, float]) -> None:
    training = TrainingConfig(protocol="fedavg", local_steps=3, learning_rate=1e-3, **settings)
    for (delta, _), (gradient, _) in zip(victims(1, 3, training=training), victims(1, 3), strict=True):
        found, first = mean_gradient(delta).values, gradient.update.values
        assert 0.95 < float(found.norm() / first.norm()) < 1.03
        assert float(torch.cosine_similarity(found, first, dim=0)) > 0.99


def test_one_local_step_is_undone_exactly() -> None:
    training = TrainingConfig(protocol="fedavg", learning_rate=0.02, momentum=0.9, weight_decay=0.1)
    (delta, _), (gradient, _) = victims(3, 1, training=training)[0], victims(3, 1)[0]
    torch.testing.assert_close(mean_gradient(delta).values, gradient.update.values, atol=2e-5, rtol=2e-4)


def test_signs_name_the_label() -> None:
    assert accuracy("auto", victims(1, 10, name="sign")) == 1.0
    distinct = victims(5, 10, distinct=True, name="sign")
    assert accuracy("auto", distinct) >= 0.95


@pytest.mark.parametrize(
    ("strategy", "batch", "how", "reason"),
    [
        ("idlg", 4, {}, "one label"),
        ("gradinversion", 16, {}, "distinct classes"),
        ("gradinversion", 4, {"activation": "tanh"}, "never negative"),
        ("llg", 4, {"activation": "tanh"}, "never negative"),
        ("llg", 4, {"name": "topk", "rate": 0.1}, "every entry"),
    ],
)
def test_what_cannot_work_is_refused(strategy: str, batch: int, how: dict, reason: str) -> None:
    seen, _ = victims(batch, 1, **how)[0]
    with pytest.raises(NotApplicable, match=reason):
        infer(strategy, seen)


def test_llg_plus_needs_auxiliary_images() -> None:
    seen, _ = victims(4, 1)[0]
    with pytest.raises(NotApplicable, match="auxiliary"):
        infer("llg-plus", dataclasses.replace(seen, auxiliary=None))


def test_residuals_of_earlier_rounds_are_refused() -> None:
    seen, _ = victims(4, 1, name="topk", error_feedback=True)[0]
    with pytest.raises(NotApplicable, match="round 2"):
        infer("auto", dataclasses.replace(seen, round=2))


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match="gradinversion"):
        infer("gradinvers", victims(1, 1)[0][0])


def test_what_a_round_shares_changes_nothing() -> None:
    cases = victims(8, 3)
    scene = cases[0][0]
    same = [dataclasses.replace(seen, weights=scene.weights) for seen, _ in cases]
    for strategy in set(STRATEGIES) - {"idlg", "gradinversion", "simulated"}:  # see test_simulated_labels
        together = [label_strategies.infer(strategy, one) for one in Evidence.of_round(same)]
        assert [one.values.tolist() for one in together] == [infer(strategy, o).values.tolist() for o in same]


ROUTES = {
    "auto": lambda seen: infer("auto", seen),
    "hcgla": lambda seen: label_strategies.infer("sparse-rows", Remembered().evidence(known_entries(seen))),
}
"""How each attack on local steps comes to labels; tensor's needs a two-layer model, see test_tensor."""


def right_over_local_steps(route: str, momentum: float, batches: int) -> int:
    """Labels right of 40 a batch number: six settings of batch, steps and compression."""
    hits = 0
    for compression in ({"name": "none"}, {"rate": 0.05}):
        generator = torch.Generator().manual_seed(0)
        for batch, steps in ((4, 3), (8, 3), (8, 5)):
            training = TrainingConfig(
                protocol="fedavg", local_steps=steps, learning_rate=0.01, momentum=momentum
            )
            scene = scenario(10, size=16, training=training, **compression)
            for number in range(batches):
                truth, images = (
                    torch.randint(10, (batch,), generator=generator),
                    smooth_images(batch, 16, seed=number),
                )
                seen = observe(scene, images, truth, auxiliary=smooth_images(32, 16, seed=99))
                hits += round(batch * right(ROUTES[route](seen).values, truth))
    return hits


@pytest.mark.parametrize("route", ROUTES)
def test_labels_under_momentum(route: str) -> None:
    assert right_over_local_steps(route, 0.9, 2) >= 72  # of 80


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_labels_under_momentum_in_full(route: str) -> None:
    assert right_over_local_steps(route, 0.9, 6) >= 214  # of 240
    assert right_over_local_steps(route, 0.0, 6) >= 225
