"""How the clients' pool is dealt out: own partitioners in NumPy, and an adapter for flwr-datasets'."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from fedattack.config import PartitionConfig
from fedattack.data.dataset import ImageDataset, require_groups
from fedattack.data.facts import SERIES, interleaved
from fedattack.errors import ConfigError, DataError
from fedattack.registry import Registry
from fedattack.rng import numpy_rng

Partitioner = Callable[..., list[np.ndarray]]
"""Labels (n,), groups (n,) or None, clients, settings and generator to each client's positions."""

PARTITIONERS: Registry[Partitioner] = Registry(
    "partition",
    {
        "iid": "fedattack.data.partitioners:iid",
        "dirichlet": "fedattack.data.partitioners:dirichlet",
        "shards": "fedattack.data.partitioners:shards",
        "natural": "fedattack.data.partitioners:natural",
    },
    group="fedattack.partitioners",
)


def partition(
    dataset: ImageDataset, ids: np.ndarray, config: PartitionConfig, clients: int, seed: int
) -> list[np.ndarray]:
    """Deal the samples `ids`, int64 (n,), out to clients: each one's, disjoint, none empty, in random order.

    `config.name` is a registered partitioner or a flwr-datasets class
    ("flwr_datasets.partitioner:DirichletPartitioner", constructed with `options`); only the latter and
    "natural" with `groups_per_client` may leave samples out. Raises ConfigError if it is unknown or cannot be built
    from its options, DataError if there are too few samples or groups for so many clients. A partitioner with a
    parameter `series`, int64 (n,) or None, is told the series of writers of each sample.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if clients > len(ids):
        raise DataError(f"setting 'federation.clients' = {clients}: only {len(ids)} samples to deal out")
    rng = numpy_rng(seed, "partition")
    if config.name.partition(":")[0].split(".")[0] == "flwr_datasets":
        _require_flwr_datasets(config.name)
    target: Any = PARTITIONERS.get(config.name)
    deal: Partitioner = _adapted(target, config.name) if isinstance(target, type) else target
    groups = None if dataset.groups is None else dataset.groups[ids]
    known: dict[str, Any] = {}
    _refuse_unlike(target, config.name)
    if SERIES in dataset.facts and SERIES in inspect.signature(deal).parameters:
        known[SERIES] = dataset.facts[SERIES][ids]
    parts = deal(dataset.labels[ids], groups, clients, config, rng, **known)
    complete = not isinstance(target, type) and config.groups_per_client is None
    _check(parts, clients, len(ids), config.name, complete)
    return [ids[rng.permutation(part)] for part in parts]


def _refuse_unlike(target: Any, name: str) -> None:
    """Refuse what is no partitioner."""
    contract = (
        "a plug-in of this kind is a function (labels, groups, clients, config, rng) that answers each client's "
        "positions, or a class of flwr_datasets.partitioner"
    )
    if isinstance(target, type):
        if not hasattr(target, "load_partition"):
            raise ConfigError(f"partition {name!r} is a class {target.__name__!r}; {contract}")
        return
    try:
        inspect.signature(target).bind(None, None, 1, None, None)
    except (TypeError, ValueError):
        what = f"takes {inspect.signature(target)}" if callable(target) else f"is a {type(target).__name__}"
        raise ConfigError(f"partition {name!r} {what}; {contract}") from None


def _check(parts: list[np.ndarray], clients: int, count: int, name: str, complete: bool) -> None:
    if len(parts) != clients:
        raise DataError(f"setting 'partition.name' = {name!r} made {len(parts)} parts for {clients} clients")
    dealt = np.concatenate(parts)
    if len(np.unique(dealt)) != len(dealt) or dealt.min(initial=0) < 0 or dealt.max(initial=0) >= count:
        raise DataError(
            f"setting 'partition.name' = {name!r} gave a sample to two clients, or one that is not there"
        )
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise DataError(
            f"setting 'partition.name' = {name!r} left {len(empty)} of {clients} clients without samples "
            f"(the first is client {empty[0]}): fewer clients or other options are needed"
        )
    if complete and len(dealt) != count:
        raise DataError(f"setting 'partition.name' = {name!r} dealt out {len(dealt)} of {count} samples")


def iid(
    labels: np.ndarray, groups: np.ndarray | None, clients: int, config: PartitionConfig, rng: Generator
) -> list[np.ndarray]:
    """Every client a random share of equal size (one sample more for the first few)."""
    return np.array_split(rng.permutation(len(labels)), clients)


def dirichlet(
    labels: np.ndarray, groups: np.ndarray | None, clients: int, config: PartitionConfig, rng: Generator
) -> list[np.ndarray]:
    """Unequal labels and sizes: each class is cut in shares drawn from Dirichlet(alpha).

    A client that would get nothing is given one random sample of a client with several; nothing is redrawn, so any
    alpha works with as many clients as samples.

    References
    ----------
    .. [1] M. Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, section 4.
    .. [2] T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
       Visual Classification", arXiv:1909.06335.
    """
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, config.alpha))
        # Rounded cumulative shares: every sample goes to somebody, and no count is off by more than one.
        ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
        ends[-1] = len(members)
        owner[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    return _by_owner(_fill_empty(owner, clients, rng), clients)


def _by_owner(owner: np.ndarray, clients: int) -> list[np.ndarray]:
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.searchsorted(owner[order], np.arange(1, clients)))


def _fill_empty(owner: np.ndarray, clients: int, rng: Generator) -> np.ndarray:
    """Move a uniformly drawn sample, nobody's last, to each client that has none: all clients are thinned alike."""
    sizes = np.bincount(owner, minlength=clients)
    empty = np.flatnonzero(sizes == 0).tolist()
    for sample in rng.permutation(len(owner)):
        if not empty:
            break
        if sizes[owner[sample]] > 1:
            sizes[owner[sample]] -= 1
            owner[sample] = empty.pop()
            sizes[owner[sample]] = 1
    return owner


def shards(
    labels: np.ndarray, groups: np.ndarray | None, clients: int, config: PartitionConfig, rng: Generator
) -> list[np.ndarray]:
    """Few labels a client: samples sorted by label, cut into equal shards, `shards_per_client` dealt to each.

    References
    ----------
    .. [1] H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
       2017, section 3.
    """
    count = clients * config.shards_per_client
    if count > len(labels):
        raise DataError(
            f"setting 'partition.shards_per_client' = {config.shards_per_client}: {clients} clients need {count} "
            f"shards, there are only {len(labels)} samples"
        )
    shuffled = rng.permutation(len(labels))
    cut = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
    dealt = rng.permutation(count).reshape(clients, config.shards_per_client)
    return [np.concatenate([cut[shard] for shard in hand]) for hand in dealt]


def natural(
    labels: np.ndarray,
    groups: np.ndarray | None,
    clients: int,
    config: PartitionConfig,
    rng: Generator,
    series: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Whole people (writers, ...) to a client: groups in random order, equally many to each.

    With `groups_per_client` so many to each, in the proportions of their series where those are known, and the
    others' samples to nobody.
    """
    groups = require_groups(groups, "setting 'partition.name' = 'natural'")
    whose, first, position = np.unique(groups, return_index=True, return_inverse=True)
    if clients * (config.groups_per_client or 1) > len(whose):
        each = config.groups_per_client
        raise DataError(
            f"setting 'federation.clients' = {clients}: only {len(whose)} groups to deal out under "
            "partition 'natural'" + (f", {each} to each ('partition.groups_per_client')" if each else "")
        )
    order = rng.permutation(len(whose))
    if config.groups_per_client is not None:
        mixed = np.arange(len(order)) if series is None else interleaved(series[first[order]])
        order = order[np.sort(mixed[: clients * config.groups_per_client])]
    owner_of_group = np.full(len(whose), clients)
    for client, hand in enumerate(np.array_split(order, clients)):
        owner_of_group[hand] = client
    return _by_owner(owner_of_group[position], clients + 1)[:clients]


def _require_flwr_datasets(name: str) -> None:
    try:
        import flwr_datasets  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"setting 'partition.name' = {name!r} needs the optional package flwr-datasets ({error}); without it: "
            f"{', '.join(PARTITIONERS.names())}"
        ) from None


def _adapted(partitioner: type, name: str) -> Partitioner:
    """A flwr-datasets partitioner class as one of ours; it partitions a table of labels, never pixels."""

    def deal(
        labels: np.ndarray, groups: np.ndarray | None, clients: int, config: PartitionConfig, rng: Generator
    ) -> list[np.ndarray]:
        from datasets import Dataset

        columns: dict[str, Any] = {"label": labels, "idx": np.arange(len(labels))}
        if groups is not None:
            columns["group"] = groups
        accepted = inspect.signature(partitioner).parameters
        options: dict[str, Any] = {"num_partitions": clients, "seed": int(rng.integers(2**31))}
        options["partition_by"] = "group" if "NaturalId" in partitioner.__name__ else "label"
        options["alpha"] = config.alpha
        chosen = {key: value for key, value in options.items() if key in accepted} | config.options
        try:
            built = partitioner(**chosen)
            built.dataset = Dataset.from_dict(columns)
            parts = built.num_partitions
            if parts != clients:
                raise ConfigError(
                    f"setting 'partition.name' = {name!r} makes {parts} partitions, "
                    f"but 'federation.clients' = {clients}"
                )
            return [np.asarray(built.load_partition(i)["idx"], dtype=np.int64) for i in range(parts)]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"setting 'partition.options' = {config.options!r} of {name!r}: {error}"
            ) from error

    return deal
