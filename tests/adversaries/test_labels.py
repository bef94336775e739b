"""Labels from the head's entries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hcgla_scenes import observe, scenario, smooth_images

from adversaries.inversion.evidence.evidence import Evidence, Labels
from adversaries.inversion.evidence.head import head_entries, head_name
from adversaries.inversion.evidence.labels.counts import infer_labels
from fedattack.models import build_model
from fedattack.observation import Observation, Update


def labels_of(seen: Observation, update: Update | None = None) -> Labels:
    return infer_labels(Evidence(seen if update is None else dataclasses.replace(seen, update=update)))


def without(update: Update, *tensors: str) -> Update:
    """The update as if nothing of some tensors had been sent."""
    keep, start = torch.ones(update.numel, dtype=torch.bool), 0
    for name, size in zip(update.names, update.sizes, strict=True):
        keep[start : start + size] = name not in tensors
        start += size
    indices = torch.arange(update.numel) if update.indices is None else update.indices
    chosen = keep[indices]
    return dataclasses.replace(update, indices=indices[chosen], values=update.values[chosen])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("classes", [100, 1000])
def test_one_image_with_and_without_the_bias(classes: int, scope: str) -> None:
    scene = scenario(classes, rate=0.01, scope=scope)
    images = smooth_images(4)
    labels = torch.randperm(classes, generator=torch.Generator().manual_seed(1))[:4]
    for image, label in zip(images, labels, strict=True):
        seen = observe(scene, image[None], label[None])
        for update in (seen.update, without(seen.update, "head.bias")):
            found = labels_of(seen, update)
            assert found.values.tolist() == [int(label)]
            assert found.confidence == 1.0


def test_the_published_head() -> None:
    seen = observe(scenario(10_177), smooth_images(1), torch.tensor([9_876]))
    found = labels_of(seen)
    assert found.values.tolist() == [9_876]
    assert found.confidence == 1.0


def test_batches_with_repeated_labels_are_counted() -> None:
    scene = scenario(1000, rate=0.05)
    images = smooth_images(6, seed=3)
    for labels in ([5, 5, 5, 17, 200, 999], [1, 1, 2, 2, 3, 3], [10, 20, 30, 40, 50, 60]):
        seen = observe(scene, images, torch.tensor(labels), auxiliary=smooth_images(64, seed=9))
        for update in (seen.update, without(seen.update, "head.bias")):
            found = labels_of(seen, update)
            assert found.values.tolist() == labels
            assert found.confidence > 0.5


def test_convolutions_vote_where_nothing_of_the_head_was_sent() -> None:
    scene = scenario(50, rate=0.2)
    public = smooth_images(64, seed=9)
    for label, image in zip((0, 7, 33, 49), smooth_images(4, seed=2), strict=True):
        seen = observe(scene, image[None], torch.tensor([label]), auxiliary=public)
        blind = without(seen.update, "head.weight", "head.bias")
        found = labels_of(seen, blind)
        assert found.values.tolist() == [label]
        assert "votes" in found.note


def test_no_evidence_is_no_confidence() -> None:
    scene = scenario(50, rate=0.2)
    seen = observe(scene, smooth_images(1), torch.tensor([7]))
    nothing = without(seen.update, *seen.update.names)
    assert labels_of(seen, nothing).confidence == pytest.approx(1 / 50)
    batch = observe(scene, smooth_images(3), torch.tensor([7, 8, 9]))
    found = labels_of(batch, without(batch.update, *batch.update.names))
    assert len(found.values) == 3
    assert found.confidence < 0.05


def test_features_of_either_sign_need_the_bias_or_the_size() -> None:
    scene = scenario(60, rate=0.3, activation="tanh")
    for label, image in zip((4, 59), smooth_images(2, seed=6), strict=True):
        seen = observe(scene, image[None], torch.tensor([label]))
        sure = labels_of(seen)
        assert sure.values.tolist() == [label]
        assert sure.confidence == 1.0
        less = labels_of(seen, without(seen.update, "head.bias"))
        assert less.values.tolist() == [label]
        assert less.confidence < 1.0


@pytest.mark.parametrize(("name", "head"), [("resnet18", "head"), ("mlp", "3"), ("tiny-cnn", "head")])
def test_the_last_linear_layer_is_found(name: str, head: str) -> None:
    module = build_model(scenario(10, model=name, activation="relu").model)
    pairs = [(n, tuple(p.shape)) for n, p in module.named_parameters()]
    assert head_name(tuple(n for n, _ in pairs), tuple(s for _, s in pairs)) == head


@pytest.mark.parametrize("name", ["mlp", "tiny-cnn"])
def test_other_heads(name: str) -> None:
    scene = scenario(20, rate=0.05, model=name, activation="relu", size=16)
    seen = observe(scene, smooth_images(1, size=16), torch.tensor([13]))
    assert labels_of(seen).values.tolist() == [13]


def test_batchnorm_statistics_do_not_enter_the_observed_weights() -> None:
    scene = scenario(10, rate=0.5, model="resnet18", activation="relu", size=16)
    seen = observe(scene, smooth_images(2, size=16), torch.tensor([3, 8]))
    before = {name: tensor.clone() for name, tensor in seen.weights.items()}
    found = labels_of(seen)
    assert found.values.tolist() == [3, 8]
    assert all(torch.equal(before[name], seen.weights[name]) for name in before)


def test_head_entries_are_the_sent_ones() -> None:
    seen = observe(scenario(10, rate=0.01), smooth_images(1), torch.tensor([2]))
    head = head_entries(seen.update)
    dense = seen.update.dense()
    rebuilt = torch.zeros_like(dense["head.weight"])
    rebuilt[head.rows, head.cols] = head.values
    assert torch.equal(rebuilt, dense["head.weight"])
    cols, values, bias = head.row(2)
    assert torch.equal(dense["head.weight"][2, cols], values)
    assert bias == pytest.approx(float(dense["head.bias"][2]))
