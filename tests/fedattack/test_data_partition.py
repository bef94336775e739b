"""Partitioners: disjoint, complete, repeatable, and as skewed as they say."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedattack.config import PartitionConfig
from fedattack.data import PARTITIONERS, ImageDataset, partition
from fedattack.errors import ConfigError, DataError


def table(labels: np.ndarray, groups: np.ndarray | None = None) -> ImageDataset:
    images = np.zeros((len(labels), 1, 1, 1), np.uint8)
    names = tuple(str(i) for i in range(int(labels.max()) + 1))
    return ImageDataset("table", images, labels.astype(np.int64), names, groups, "")


def balanced(count: int, classes: int = 10) -> ImageDataset:
    return table(np.arange(count) % classes, np.arange(count) // 7)


@pytest.mark.parametrize("name", PARTITIONERS.names())
def test_parts_are_disjoint_complete_and_repeatable(name: str) -> None:
    dataset = balanced(3000)
    ids = np.random.default_rng(0).permutation(3000)[:2000]
    parts = partition(dataset, ids, PartitionConfig(name=name), 20, seed=1)
    assert len(parts) == 20
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == sorted(ids.tolist())
    again = partition(dataset, ids, PartitionConfig(name=name), 20, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    other = partition(dataset, ids, PartitionConfig(name=name), 20, seed=2)
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_iid_sizes_are_equal() -> None:
    parts = partition(balanced(103), np.arange(103), PartitionConfig(name="iid"), 10, seed=0)
    assert sorted(map(len, parts)) == [10] * 7 + [11] * 3


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_dirichlet_skew_is_the_distributions(alpha: float) -> None:
    """For shares p ~ Dirichlet(alpha, ..., alpha) over n clients, E[sum p^2] = (alpha + 1) / (n alpha + 1)."""
    clients, classes, per_class = 10, 20, 1000
    dataset = table(np.repeat(np.arange(classes), per_class))
    squares = []
    for seed in range(10):
        config = PartitionConfig(name="dirichlet", alpha=alpha)
        parts = partition(dataset, np.arange(len(dataset)), config, clients, seed)
        counts = np.array([np.bincount(dataset.labels[part], minlength=classes) for part in parts])
        squares.append(((counts / per_class) ** 2).sum(0))
    mean, spread = np.mean(squares), np.std(squares) / np.sqrt(np.size(squares))
    assert abs(mean - (alpha + 1) / (clients * alpha + 1)) < 4 * spread + 1e-4


def test_dirichlet_fills_a_thousand_clients_and_keeps_their_spread() -> None:
    """A client's share s is the mean of k classes': E[sum s^2] = (alpha + 1) / k(n alpha + 1) + (k - 1) / kn."""
    clients, classes, alpha = 1000, 10, 0.1
    dataset = balanced(60_000, classes)
    start = time.process_time()
    parts = partition(
        dataset, np.arange(60_000), PartitionConfig(name="dirichlet", alpha=alpha), clients, seed=0
    )
    assert time.process_time() - start < 2
    assert min(map(len, parts)) >= 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(60_000))
    shares = np.array([len(part) for part in parts]) / 60_000
    expected = (alpha + 1) / (classes * (clients * alpha + 1)) + (classes - 1) / (classes * clients)
    assert abs((shares**2).sum() / expected - 1) < 0.1


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1e3])
def test_dirichlet_with_as_many_clients_as_samples(alpha: float) -> None:
    parts = partition(balanced(50), np.arange(50), PartitionConfig(name="dirichlet", alpha=alpha), 50, seed=0)
    assert sorted(int(part[0]) for part in parts) == list(range(50))


def test_shards_give_few_labels() -> None:
    dataset = balanced(2000)
    config = PartitionConfig(name="shards", shards_per_client=2)
    parts = partition(dataset, np.arange(2000), config, 50, seed=0)
    assert {len(part) for part in parts} == {40}
    assert max(len(np.unique(dataset.labels[part])) for part in parts) <= 2
    with pytest.raises(DataError, match=r"'partition\.shards_per_client' = 2: 1500 clients need 3000 shards"):
        partition(dataset, np.arange(2000), config, 1500, seed=0)


def test_natural_deals_whole_groups() -> None:
    dataset = balanced(700)
    assert dataset.groups is not None
    parts = partition(dataset, np.arange(700), PartitionConfig(name="natural"), 30, seed=0)
    owners = [set(dataset.groups[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == 100 == len(set().union(*owners))
    assert {len(owner) for owner in owners} == {3, 4}
    with pytest.raises(DataError, match=r"'federation\.clients' = 101: only 100 groups"):
        partition(dataset, np.arange(700), PartitionConfig(name="natural"), 101, seed=0)
    with pytest.raises(DataError, match="does not say whose"):
        partition(table(np.arange(10)), np.arange(10), PartitionConfig(name="natural"), 2, seed=0)


def test_natural_deals_so_many_people_to_each_and_leaves_the_others_out() -> None:
    groups = np.arange(700) // 7
    dataset = table(np.arange(700) % 10, groups)
    config = PartitionConfig(name="natural", groups_per_client=3)
    parts = partition(dataset, np.arange(700), config, 12, seed=0)
    hands = [set(groups[part].tolist()) for part in parts]
    assert [len(hand) for hand in hands] == [3] * 12
    assert len(set().union(*hands)) == 36
    assert all(len(part) == 21 for part in parts)
    with pytest.raises(DataError, match=r"only 100 groups .* 3 to each \('partition.groups_per_client'\)"):
        partition(dataset, np.arange(700), config, 34, seed=0)


def test_more_clients_than_samples_is_refused() -> None:
    with pytest.raises(DataError, match=r"setting 'federation\.clients' = 11: only 10 samples"):
        partition(balanced(10), np.arange(10), PartitionConfig(name="iid"), 11, seed=0)


def test_unknown_partition_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dirichlet'"):
        partition(balanced(10), np.arange(10), PartitionConfig(name="dirichle"), 2, seed=0)


def overlapping(labels, groups, clients, config, rng):  # type: ignore[no-untyped-def]
    """A faulty plug-in: everybody gets everything."""
    return [np.arange(len(labels))] * clients


def lazy(labels, groups, clients, config, rng):  # type: ignore[no-untyped-def]
    """A faulty plug-in: one client gets everything."""
    return [np.arange(len(labels)), *[np.empty(0, np.int64)] * (clients - 1)]


@pytest.mark.parametrize(
    ("faulty", "message"), [("overlapping", "to two clients"), ("lazy", "left 1 of 2 clients")]
)
def test_faulty_plugins_are_found_out(faulty: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(balanced(10), np.arange(10), PartitionConfig(name=f"{__name__}:{faulty}"), 2, seed=0)


def test_flwr_datasets_is_optional() -> None:
    try:
        import flwr_datasets  # noqa: F401
    except ImportError:
        config = PartitionConfig(name="flwr_datasets.partitioner:IidPartitioner")
        with pytest.raises(ConfigError, match="needs the optional package flwr-datasets"):
            partition(balanced(10), np.arange(10), config, 2, seed=0)
    else:
        pytest.skip("flwr-datasets is installed")


@pytest.mark.parametrize(
    ("name", "options", "complete"),
    [
        ("IidPartitioner", {}, True),
        ("DirichletPartitioner", {"min_partition_size": 1}, True),
        ("ShardPartitioner", {"num_shards_per_partition": 2}, True),
        ("NaturalIdPartitioner", {}, True),
        ("SizePartitioner", {"partition_sizes": [100] * 10}, False),
    ],
)
def test_flwr_datasets_partitioners(name: str, options: dict[str, object], complete: bool) -> None:
    pytest.importorskip("flwr_datasets")
    dataset = table(np.arange(2000) % 10, np.arange(2000) % 10)
    config = PartitionConfig(name=f"flwr_datasets.partitioner:{name}", options=options)
    ids = np.arange(2000)[::-1]
    parts = partition(dataset, ids, config, 10, seed=0)
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt) == (2000 if complete else 1000)
    again = partition(dataset, ids, config, 10, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if name == "NaturalIdPartitioner":
        assert dataset.groups is not None
        assert all(len(np.unique(dataset.groups[part])) == 1 for part in parts)
        with pytest.raises(ConfigError, match=r"makes 10 partitions, but 'federation\.clients' = 9"):
            partition(dataset, ids, config, 9, seed=0)


def test_flwr_datasets_bad_options_are_named() -> None:
    pytest.importorskip("flwr_datasets")
    config = PartitionConfig(name="flwr_datasets.partitioner:IidPartitioner", options={"nonsense": 1})
    with pytest.raises(ConfigError, match=r"'partition\.options' = \{'nonsense': 1\}"):
        partition(balanced(100), np.arange(100), config, 2, seed=0)
