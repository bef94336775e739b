"""SemSim: triplets, distances, files, evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fedattack.config import MetricConfig
from fedattack.errors import ConfigError, DataError
from fedattack.files import write_tensors
from fedattack.metrics import Pairs, build_metrics, score
from fedattack.metrics.semsim.evaluation import (
    Evaluation,
    fisher_interval,
    group_correlations,
    image_auc,
    seen_and_unseen,
)
from fedattack.metrics.semsim.labeller import (
    Labeller,
    augmented,
    load_labeller,
    save_labeller,
    train_labeller,
)
from fedattack.metrics.semsim.network import embedding_network
from fedattack.metrics.semsim.rated import Rated, held_out, leave_one_out
from fedattack.metrics.semsim.training import (
    RECIPES,
    Recipe,
    SemSimNet,
    Triplets,
    load_semsim,
    save_semsim,
    train_semsim,
)
from fedattack.rng import torch_rng

QUICK = Recipe(steps=12, batch=16, width=4, dimensions=8, augmentation="exposure")


def rated(originals: int = 6, each: int = 4, size: int = 16) -> Rated:
    """Originals are patterns; half of the reconstructions are they with a little noise, half nothing but noise."""
    draws = torch_rng(0, "test semsim")
    images = torch.rand(originals, 1, size // 4, size // 4, generator=draws).repeat_interleave(4, 2)
    images = images.repeat_interleave(4, 3)
    owner = np.repeat(np.arange(originals), each)
    good = np.tile(np.arange(each) % 2 == 0, originals)
    noise = torch.rand(originals * each, 1, size, size, generator=draws)
    made = torch.where(torch.from_numpy(good)[:, None, None, None], images[owner] * 0.9 + 0.1 * noise, noise)
    facts = {
        "model": np.array([f"m{i % each}" for i in range(originals * each)]),
        "attack": np.array(["ig" if i % each < 2 else "dlg" for i in range(originals * each)]),
    }
    return Rated(images, made, owner, good, facts)


@pytest.fixture(scope="module")
def trained() -> SemSimNet:
    """A small SemSim that tells patterns from noise."""
    return train_semsim(rated(24), replace(QUICK, steps=40, width=8))


@pytest.fixture(scope="module")
def labeller() -> Labeller:
    """Tells upper from lower halves."""
    draws = torch_rng(1, "test semsim")
    labels = torch.arange(60) % 2
    images = torch.rand(60, 1, 16, 16, generator=draws) * 0.2
    for image, label in zip(images, labels, strict=True):
        image[:, 8 * int(label) : 8 * int(label) + 8] += 0.7
    return train_labeller(
        images, labels, "halves", 0, "a test", width=4, steps=40, class_names=("up", "down")
    )


def drawn(rule: str, data: Rated, fallback: bool = False, count: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets by a rule."""
    return Triplets(data, rule, fallback).draw(count, torch_rng(0, "test"))  # type: ignore[arg-type]


def test_papers_rule_has_an_original_a_recognised_and_an_unrecognised_of_it() -> None:
    data = rated()
    anchor, positive, negative = drawn("paper", data)
    many = len(data.originals)
    assert set(anchor.tolist()) == set(range(many))
    p, n = positive.numpy() - many, negative.numpy() - many
    assert (data.owner[p] == anchor.numpy()).all()
    assert (data.owner[n] == anchor.numpy()).all()
    assert data.recognised[p].all()
    assert not data.recognised[n].any()
    assert set(p) == set(np.flatnonzero(data.recognised))
    assert set(n) == set(np.flatnonzero(~data.recognised))


def test_released_rule_takes_every_image_as_anchor_and_its_own_kind_as_positive() -> None:
    data = rated()
    many = len(data.originals)
    owner = np.concatenate([np.arange(many), data.owner])
    kind = np.concatenate([np.ones(many, bool), data.recognised])
    anchor, positive, negative = (part.numpy() for part in drawn("sony", data))
    assert set(anchor) == set(range(many + len(data)))
    for part in (positive, negative):
        assert (owner[part] == owner[anchor]).all()
    assert (kind[positive] == kind[anchor]).all()
    assert (kind[negative] != kind[anchor]).all()
    assert (positive == anchor).any()  # it may be itself
    # Unrecognised anchors: two of a kind are pulled together, the original is among their negatives.
    assert set(negative[~kind[anchor]]) == set(np.flatnonzero(kind))


def test_an_original_without_both_labels_is_refused_or_counted() -> None:
    data = rated()
    answers = data.recognised.copy()
    answers[data.owner == 0] = True  # nothing unrecognised
    answers[data.owner == 1] = False  # nothing recognised
    data = replace(data, recognised=answers)
    for rule in ("paper", "sony"):
        with pytest.raises(
            DataError, match=r"2 of 6 originals lack a label \(1 have no recognised, 1 no unrec"
        ):
            drawn(rule, data)
    paper = Triplets(data, "paper", True)
    assert paper.figures == {"originals": 5, "left_out": 1, "fallback_negatives": 1}
    anchor, _, negative = paper.draw(4000, torch_rng(0, "test"))
    assert 1 not in anchor
    theirs = data.owner[negative.numpy()[anchor.numpy() == 0] - 6]
    assert (theirs != 0).all()
    assert not data.recognised[negative.numpy() - 6].any()
    # By the released code's rule such an original is its own positive.
    anchor, positive, _ = drawn("sony", data, fallback=True)
    assert (positive[anchor == 1] == 1).all()
    with pytest.raises(DataError, match="no triplet among"):
        Triplets(replace(data, recognised=np.ones(len(data), bool)), "paper", True)


def test_identical_folders_have_distance_zero_and_order_changes_nothing(trained: SemSimNet) -> None:
    data = rated(30)
    truth = data.originals[data.owner]
    assert trained.distances(truth, truth).tolist() == [0.0] * len(truth)
    found = trained.distances(data.reconstructions, truth)
    assert (found > 0).all()
    order = torch.randperm(len(truth), generator=torch_rng(3, "test"))
    again = trained.distances(data.reconstructions[order], truth[order])
    assert torch.equal(again, found[order])
    assert float(found.max()) <= 2  # of vectors of length 1


def test_training_separates_and_does_not_depend_on_the_order_of_the_files(trained: SemSimNet) -> None:
    data = rated(24)
    distances = trained.distances(data.reconstructions, data.originals[data.owner])
    assert image_auc(-distances.numpy(), data.recognised) > 0.95
    assert trained.facts.figures["wrong_way"] < 0.1
    small = rated()
    order = np.random.default_rng(0).permutation(len(small))
    moved = np.random.default_rng(1).permutation(len(small.originals))
    other = Rated(
        small.originals[moved],
        small.reconstructions[order],
        np.argsort(moved)[small.owner[order]],
        small.recognised[order],
        {name: values[order] for name, values in small.facts.items()},
    )
    first, second = train_semsim(small, QUICK), train_semsim(other, QUICK)
    assert first.hash == second.hash
    assert first.facts == second.facts
    assert train_semsim(small, replace(QUICK, seed=1)).hash != first.hash


def test_normalisation_is_one_flag_for_training_and_scoring() -> None:
    data = rated()
    raw = train_semsim(data, replace(QUICK, normalised=False))
    long = raw.embed(data.originals).norm(dim=1)
    assert not torch.allclose(long, torch.ones_like(long), atol=1e-3)
    unit = train_semsim(data, QUICK).embed(data.originals).norm(dim=1)
    assert torch.allclose(unit, torch.ones_like(unit), atol=1e-6)


def test_published_net_has_512_dimensions_and_the_published_settings() -> None:
    recipe = RECIPES["published"]
    with torch.device("meta"):
        net = embedding_network(recipe.network, 3, recipe.width, recipe.dimensions)
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    # ResNet-18 with a 3x3 stem has 11,173,962 parameters; 5,130 of them are its head for 10 classes.
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_173_962 - 5_130
    assert (recipe.optimiser, recipe.learning_rate, recipe.augmentation) == ("sgd", 0.05, "crop-flip")


def test_checkpoint_holds_what_scoring_needs(trained: SemSimNet, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_semsim(path, trained)
    read = load_semsim(path)
    assert read.facts == trained.facts
    assert read.hash == trained.hash
    data = rated()
    truth = data.originals[data.owner]
    assert torch.equal(
        read.distances(data.reconstructions, truth), trained.distances(data.reconstructions, truth)
    )
    facts = read.facts
    assert (facts.rule, facts.label_source, facts.normalised, facts.size) == ("paper", "human", True, 16)
    assert facts.seen == {"model": ("m0", "m1", "m2", "m3"), "attack": ("dlg", "ig")}
    assert len(facts.originals) == 24


def rewrite(path: Path, changes: dict[str, object], tensors: dict[str, Tensor] | None = None) -> None:
    """A checkpoint with another description."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fedattack"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    write_tensors(path, held | (tensors or {}), {"fedattack": json.dumps(header | changes)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "labeller"}, "says kind 'labeller', format 1; accepted: 'SemSim', format 1"),
        ({"format": 9}, "format 9; accepted"),
        ({"width": 1000}, "its tensors do not fit the net that it names"),
        ({"width": 10**9}, "width is malformed"),
        ({"network": "os.system"}, "network is malformed"),
        ({"mean": [0.1, 0.2]}, "2 means, 1 deviations of 1 channels"),
        ({"std": [0.0]}, "std.0 is malformed"),
        ({"mean": [float("nan")]}, "mean.0 is malformed"),
        ({"size": "big"}, "size is malformed"),
        ({"more": 1}, "more is malformed"),
        ({"split_hash": "0"}, "split_hash is not that of its list"),
        ({"network": "resnet18"}, "network 'resnet18' has width 64"),
    ],
)
def test_hostile_checkpoints_are_refused(
    trained: SemSimNet, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    path = tmp_path / "s.safetensors"
    save_semsim(path, trained)
    rewrite(path, changes)
    with pytest.raises(DataError, match=sentence) as refused:
        load_semsim(path)
    assert "\n" not in str(refused.value)


def test_foreign_files_are_refused(trained: SemSimNet, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(DataError, match="no such file"):
        load_semsim(path)
    torch.save({"a": torch.zeros(2)}, path)  # a pickle is not read
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_semsim(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="says nothing of itself"):
        load_semsim(path)
    save_semsim(path, trained)
    rewrite(path, {}, {"head.bias": torch.full((8,), torch.nan)})
    with pytest.raises(DataError, match="NaN or infinite"):
        load_semsim(path)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_semsim(tmp_path)


def test_metric_semsim(trained: SemSimNet, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_semsim(path, trained)
    metrics = build_metrics(MetricConfig(names=("semsim",), options={"semsim": {"checkpoint": str(path)}}))
    metric = metrics["semsim"]
    metric.check((1, 16, 16))
    assert metric.heading == "SemSim"
    record = metric.record()
    assert (record["sha256"], record["rule"], record["label_source"]) == (trained.hash, "paper", "human")
    for size in ((3, 16, 16), (1, 32, 32)):
        with pytest.raises(DataError, match="was trained on images of 1 x 16 x 16; these are of"):
            metric.check(size)
    data = rated()
    truth = data.originals[data.owner]
    broken = data.reconstructions.clone()
    broken[3, 0, 0, 0] = torch.nan
    found = score(metrics, Pairs(broken, truth))["semsim"]
    wanted = trained.distances(data.reconstructions, truth)
    assert np.isnan(found[3])
    assert np.delete(found, 3).tolist() == pytest.approx(np.delete(wanted.numpy(), 3).tolist(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"'metric.semsim.checkpoint' is not set"):
        build_metrics(MetricConfig(names=("semsim",)))["semsim"].check((1, 16, 16))
    with pytest.raises(DataError, match="no such file"):
        type(metric)(checkpoint=str(tmp_path / "none")).check((1, 16, 16))  # type: ignore[call-arg]


def test_proxies_are_named(labeller: Labeller, tmp_path: Path) -> None:
    net = train_semsim(replace(rated(), proxy="halves"), QUICK)
    assert net.facts.heading == "SemSim-proxy[halves]"
    assert net.facts.label_source == "proxy"
    save_semsim(tmp_path / "s.safetensors", net)
    options = {"semsim": {"checkpoint": str(tmp_path / "s.safetensors")}}
    metric = build_metrics(MetricConfig(names=("semsim",), options=options))["semsim"]
    assert metric.heading == "SemSim-proxy[halves]"
    assert metric.record()["proxy"] == "halves"


def test_labeller_knows_its_classes_when_exposure_and_place_change(
    labeller: Labeller, tmp_path: Path
) -> None:
    images = torch.full((2, 1, 16, 16), 0.1)
    images[0, :, :8], images[1, :, 8:] = 0.9, 0.9
    labels = torch.tensor([0, 1])
    pale = (images - images.mean()) * 0.2 + images.mean()
    for changed in (images, pale, (images + 0.3).clamp(0, 1)):
        assert (labeller.true_class(changed, labels) > 0.6).all()
    assert torch.allclose(labeller.probabilities(images).sum(1), torch.ones(2, dtype=torch.float64))
    path = tmp_path / "l.safetensors"
    save_labeller(path, labeller)
    read = load_labeller(path)
    assert (read.hash, read.facts) == (labeller.hash, labeller.facts)
    assert torch.equal(read.probabilities(images), labeller.probabilities(images))
    with pytest.raises(DataError, match="classes 0 to 1; the labels run from 0 to 2"):
        labeller.true_class(images, torch.tensor([0, 2]))
    with pytest.raises(DataError, match="was trained on images of 1 x 16 x 16"):
        labeller.probabilities(torch.zeros(1, 3, 16, 16))
    with pytest.raises(DataError, match="of 1 classes; at least 20 of 2"):
        train_labeller(torch.zeros(30, 1, 16, 16), torch.zeros(30, dtype=torch.int64), "x", 0)
    with pytest.raises(DataError, match="kind 'labeller'"):
        load_semsim(path)
    metric = build_metrics(
        MetricConfig(names=("recognised",), options={"recognised": {"checkpoint": str(path)}})
    )
    assert metric["recognised"].heading == "recognised[halves]"
    found = score(metric, Pairs(images, images, labels))["recognised"]
    assert found == pytest.approx(labeller.true_class(images, labels).tolist())
    assert np.isnan(score(metric, Pairs(images, images))["recognised"]).all()  # no labels: no score


def test_augmentation_changes_each_image_on_its_own() -> None:
    images = torch.rand(1, 1, 16, 16, generator=torch_rng(0, "test")).expand(64, 1, 16, 16)
    changed = augmented(images, torch_rng(1, "test"))
    assert changed.shape == images.shape
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    untouched = (changed == images).flatten(1).all(1).sum()
    assert 0 < int(untouched) < 16  # a sixteenth, on average
    assert len(changed.flatten(1).unique(dim=0)) == 64 - int(untouched) + 1


def test_image_auc_is_scikit_learns_and_weights_count_like_copies() -> None:
    rng = np.random.default_rng(0)
    values, kinds = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    assert image_auc(values, kinds) == pytest.approx(roc_auc_score(kinds, values), abs=1e-12)
    with pytest.raises(DataError, match="all 3 images are recognised; an AUC needs images of both kinds"):
        image_auc([1, 2, 3], [True, True, True])
    with pytest.raises(DataError, match="all 3 images are unrecognised"):
        image_auc([1, 2, 3], [False, False, False])
    with pytest.raises(DataError, match="some images have no value"):
        image_auc([1, np.nan], [True, False])


def test_group_correlations_are_scipys() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 8, 14).astype(float)
    y = x + rng.integers(0, 5, 14)
    found = group_correlations(x, y)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found["kendall"] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    with pytest.raises(DataError, match="at least 3 models or other groups; got 2"):
        group_correlations([1, 2], [1, 2])
    with pytest.raises(DataError, match="shares recognised that differ; all 3 are"):
        group_correlations([1, 2, 3], [0.5, 0.5, 0.5])


def test_interval_of_14_models() -> None:
    assert fisher_interval("pearson", 0.8, 14) == pytest.approx((0.47, 0.93), abs=0.005)
    assert fisher_interval("pearson", 0.5, 14) == pytest.approx((-0.04, 0.81), abs=0.005)
    assert fisher_interval("pearson", 0.5, 3) is None


def scene(originals: int = 40, groups: int = 8, seed: int = 0) -> tuple[Rated, np.ndarray, np.ndarray]:
    """Groups of rising quality; a score that follows recognition and one that is noise."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(originals), groups)
    group = np.tile(np.arange(groups), originals)
    latent = group / groups + rng.normal(0, 0.3, len(owner))
    yes = latent + rng.normal(0, 0.2, len(owner)) > 0.5
    images = torch.rand(originals, 1, 8, 8, generator=torch_rng(seed, "scene"))
    names = {
        "model": np.array([f"m{i}" for i in group]),
        "attack": np.where(group % 2 == 0, "ig", "dlg").astype(str),
    }
    return (
        Rated(images, images[owner], owner, yes, names),
        latent,
        rng.normal(size=len(owner)),
    )


def test_evaluation_tells_a_good_score_from_noise_with_paired_intervals() -> None:
    data, good, noise = scene()
    held = Evaluation(data, {"good": good, "noise": noise}, ("model",), replicates=300)
    figures = held.figures("good")
    assert figures["auc"].value == pytest.approx(roc_auc_score(data.recognised, good))
    means = [[part[data.facts["model"] == m].mean() for m in held.groups] for part in (good, data.recognised)]
    assert figures["spearman"].value == pytest.approx(stats.spearmanr(*means).statistic)
    for figure in figures.values():
        assert figure.low <= figure.value <= figure.high
    assert (figures["auc"].count, figures["pearson"].count) == (320, 8)
    assert figures["pearson"].fisher == fisher_interval("pearson", figures["pearson"].value, 8)
    gain = held.difference("good", "noise")["auc"]
    assert gain.value == pytest.approx(figures["auc"].value - held.figures("noise")["auc"].value)
    assert gain.low > 0
    same = held.difference("good", "good")["auc"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # The more is drawn again, the wider; a second look gives the same.
    fixed = Evaluation(data, {"good": good}, ("model",), replicates=300, over_groups=False).figures("good")[
        "auc"
    ]
    assert fixed.high - fixed.low < figures["auc"].high - figures["auc"].low
    again = Evaluation(data, {"good": good, "noise": noise}, ("model",), replicates=300)
    assert again.figures("good") == figures


def test_bootstrap_over_originals_agrees_with_delongs_standard_error() -> None:
    rng = np.random.default_rng(2)
    count = 300
    yes = rng.random(count) < 0.5
    values = yes + rng.normal(0, 1, count)
    images = torch.rand(count, 1, 8, 8, generator=torch_rng(0, "delong"))
    names = {"model": np.array(["a"] * count)}
    data = Rated(images, images, np.arange(count), yes, names)
    held = Evaluation(data, {"x": values}, ("model",), replicates=1000, over_groups=False).figures("x")["auc"]
    ones, zeros = values[yes], values[~yes]
    above = (ones[:, None] > zeros[None, :]).astype(float)
    error = np.sqrt(above.mean(1).var(ddof=1) / len(ones) + above.mean(0).var(ddof=1) / len(zeros))
    assert held.high - held.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_class_or_two_models_is_a_sentence_and_no_nan_in_silence() -> None:
    data, good, _ = scene()
    only = data.only(data.recognised)
    told = Evaluation(only, {"good": good[data.recognised]}, ("attack",), replicates=50).figures("good")
    assert str(told["auc"]).startswith("no score: all")
    assert "at least 3 models" in told["spearman"].why
    missing = good.copy()
    missing[:5] = np.nan
    partly = Evaluation(data, {"good": missing}, ("model",), replicates=50).figures("good")
    assert partly["auc"].count == 315
    with pytest.raises(ConfigError, match="'defence' is not known of these ratings; known: model, attack"):
        Evaluation(data, {"good": good}, ("defence",))


def test_splits_are_by_original_and_leave_one_value_out() -> None:
    data, *_ = scene()
    test = held_out(data, 0.25, 0)
    assert len(set(data.owner[test])) == 10
    assert not set(data.owner[test]) & set(data.owner[~test])
    order = np.random.default_rng(0).permutation(len(data.originals))
    moved = replace(data, originals=data.originals[order], owner=np.argsort(order)[data.owner])
    assert (held_out(moved, 0.25, 0) == test).all()  # whatever the order
    parts = list(leave_one_out(data, "attack", 0.25, 0))
    assert [name for name, *_ in parts] == ["dlg", "ig"]
    for name, train, tested in parts:
        assert set(data.facts["attack"][tested]) == {name}
        assert name not in data.facts["attack"][train]
        assert not set(data.owner[tested]) & set(data.owner[train])
    with pytest.raises(ConfigError, match=r"0\.001 of 40 originals"):
        held_out(data, 0.001, 0)
    masks = seen_and_unseen(data, {"attack": ("ig",), "model": ()})
    assert list(masks) == ["all", "model unseen", "attack seen", "attack unseen"]
    assert (masks["attack seen"] == (data.facts["attack"] == "ig")).all()
    with pytest.raises(DataError, match="an original stands there twice"):
        replace(data, originals=data.originals[torch.zeros(40, dtype=torch.int64)])
