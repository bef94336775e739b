"""Pools, auxiliary images and the world: disjoint, repeatable, and refused where they would overlap."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedattack.config import Config, DataConfig
from fedattack.data import (
    ImageDataset,
    Pools,
    build_world,
    load_auxiliary,
    load_dataset,
    make_pools,
    world_record,
)
from fedattack.errors import ConfigError, DataError

RNG = np.random.default_rng(1)


def people(count: int = 120, each: int = 4, size: int = 8) -> ImageDataset:
    images = RNG.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    who = np.arange(count, dtype=np.int64) // each
    names = tuple(f"Person_{i}" for i in range(count // each))
    return ImageDataset("people", images, who, names, who, "", names)


def without_groups(dataset: ImageDataset) -> ImageDataset:
    return ImageDataset("crowd", dataset.images, dataset.labels, dataset.class_names, None, "")


def assert_disjoint(pools: Pools) -> None:
    everything = np.concatenate([pools.clients, pools.nonmembers, pools.auxiliary, pools.withheld])
    assert len(np.unique(everything)) == len(everything)


def test_default_sizes_of_faces() -> None:
    config = DataConfig(name="faces")
    pools = make_pools(load_dataset(config, 0), config, seed=0)
    assert (len(pools.clients), len(pools.nonmembers), len(pools.auxiliary)) == (45, 10, 45)
    assert_disjoint(pools)


def test_pools_are_repeatable_and_depend_on_the_seed() -> None:
    dataset, config = without_groups(people()), DataConfig()
    first, again, other = (make_pools(dataset, config, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.clients, again.clients)
    assert np.array_equal(first.auxiliary, again.auxiliary)
    assert not np.array_equal(first.clients, other.clients)


@pytest.mark.parametrize("size", [None, 1, 10, 50])
@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_in_the_auxiliary_pool_and_in_another(size: int | None, seed: int) -> None:
    dataset = people()
    assert dataset.groups is not None
    pools = make_pools(dataset, DataConfig(auxiliary_size=size), seed)
    assert_disjoint(pools)
    assert len(pools.nonmembers) == 12
    assert len(pools.auxiliary) == (size or 56)
    victims = np.concatenate([pools.clients, pools.nonmembers])
    assert not set(dataset.groups[pools.auxiliary]) & set(dataset.groups[victims])
    left_out = 120 - len(pools.auxiliary) - len(victims)
    assert left_out == (0 if size is None else -size % 4)
    assert (f"{left_out} images left out" in pools.note) == bool(left_out)


def test_one_person_cannot_be_split() -> None:
    dataset = people(8, 8)
    with pytest.raises(DataError, match=r"'data\.auxiliary' = 'split'.*1 groups"):
        make_pools(dataset, DataConfig(), seed=0)
    assert len(make_pools(dataset, DataConfig(auxiliary_size=0), seed=0).clients) == 7


def test_explicit_sizes_and_nothing_left_for_the_clients() -> None:
    dataset = without_groups(people())
    pools = make_pools(dataset, DataConfig(nonmembers=30, auxiliary_size=89), seed=0)
    assert (len(pools.clients), len(pools.nonmembers), len(pools.auxiliary)) == (1, 30, 89)
    with pytest.raises(DataError, match=r"30 non-members \(setting 'data\.nonmembers'\) and 90 auxiliary"):
        make_pools(dataset, DataConfig(nonmembers=30, auxiliary_size=90), seed=0)
    none = make_pools(dataset, DataConfig(nonmembers=0, auxiliary_size=0), seed=0)
    assert (len(none.clients), len(none.nonmembers), len(none.auxiliary)) == (120, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_copies_never_lie_on_both_sides(seed: int) -> None:
    dataset = without_groups(people())
    dataset.images[60:] = dataset.images[:60]  # everything twice
    pools = make_pools(dataset, DataConfig(), seed)
    sides = [
        {dataset.images[i].tobytes() for i in ids}
        for ids in (pools.clients, pools.nonmembers, pools.auxiliary)
    ]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    assert "identical pictures" in pools.note


@pytest.mark.parametrize("seed", range(3))
def test_whole_people_are_held_out(seed: int) -> None:
    """No client has a sample of theirs, nor has the adversary; the rest is cut as always."""
    dataset = people()
    config = DataConfig(nonmember_unit="group", nonmembers=7, auxiliary_size=12)
    pools = make_pools(dataset, config, seed)
    assert_disjoint(pools)
    sides = [set(dataset.groups[i].tolist()) for i in (pools.clients, pools.nonmembers, pools.auxiliary)]
    assert [len(side) for side in sides] == [20, 7, 3]
    assert not sides[0] & sides[1] | sides[1] & sides[2] | sides[0] & sides[2]
    assert [len(pools.clients), len(pools.nonmembers), len(pools.auxiliary)] == [80, 28, 12]
    assert (
        len(
            np.unique(
                dataset.groups[make_pools(dataset, DataConfig(nonmember_unit="group"), seed).nonmembers]
            )
        )
        == 3
    )


@pytest.mark.parametrize("unit", ["sample", "group"])
def test_a_share_of_everybodys_samples_is_withheld(unit: str) -> None:
    dataset = people(each=6)
    config = DataConfig(withheld=0.34, nonmember_unit=unit, nonmembers=2, auxiliary_size=24)
    pools = make_pools(dataset, config, 0)
    assert_disjoint(pools)
    dealt, kept = (Counter(dataset.groups[ids].tolist()) for ids in (pools.clients, pools.withheld))
    assert dealt.keys() == kept.keys()
    assert {kept[who] for who in dealt if dealt[who] + kept[who] == 6} == {2}
    # At least one, and never all.
    for share, count in ((0.01, 1), (0.99, 5)):
        pools = make_pools(
            dataset, config.model_copy(update={"withheld": share, "nonmember_unit": "group"}), 0
        )
        assert set(Counter(dataset.groups[pools.withheld].tolist()).values()) == {count}
    assert not len(make_pools(dataset, DataConfig(), 0).withheld)


def test_people_are_refused_where_nobody_knows_whose_a_sample_is() -> None:
    for settings, words in (
        ({"nonmember_unit": "group"}, "'data.nonmember_unit' = 'group'"),
        ({"withheld": 0.3}, "'data.withheld' = 0.3"),
    ):
        with pytest.raises(DataError, match=f"setting {words}: this data set does not say whose a sample is"):
            make_pools(without_groups(people()), DataConfig(**settings), 0)
    config = DataConfig(nonmember_unit="group", nonmembers=30)
    with pytest.raises(DataError, match=r"'data\.nonmembers' = 30: data set 'faces' has 30 people"):
        make_pools(people(), config, 0)


def npz(path: Path, **arrays: np.ndarray) -> DataConfig:
    np.savez(path, **arrays)
    return DataConfig(auxiliary=str(path))


def pixels(count: int = 6, size: int = 8, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def granted(config: DataConfig, dataset: ImageDataset | None = None, seed: int = 0):  # type: ignore[no-untyped-def]
    dataset = dataset or people()
    return load_auxiliary(config, dataset, make_pools(dataset, config, seed), seed)


def test_split_auxiliary_is_the_pool() -> None:
    dataset, config = people(), DataConfig(auxiliary_size=10)
    pools = make_pools(dataset, config, 0)
    auxiliary = load_auxiliary(config, dataset, pools, 0)
    assert auxiliary is not None
    np.testing.assert_array_equal(auxiliary.images.numpy(), dataset.tensors(pools.auxiliary)[0].numpy())
    assert auxiliary.labels is not None
    assert auxiliary.labels.tolist() == dataset.labels[pools.auxiliary].tolist()
    assert granted(DataConfig(auxiliary_size=0)) is None


def test_npz_is_adapted_to_the_data_set(tmp_path: Path) -> None:
    images, labels = pixels(6, 16), np.arange(6)
    auxiliary = granted(npz(tmp_path / "a.npz", images=images, labels=labels))
    assert tuple(auxiliary.images.shape) == (6, 3, 8, 8)
    assert auxiliary.labels.tolist() == labels.tolist()
    assert "could not be looked for" in auxiliary.source
    same_size = granted(npz(tmp_path / "b.npz", images=images[:, :8, :8]))
    np.testing.assert_allclose(
        same_size.images.numpy(), images[:, :8, :8].transpose(0, 3, 1, 2) / 255, atol=1e-7
    )
    assert same_size.labels is None
    grey = granted(npz(tmp_path / "c.npz", images=images[..., 0] / 255.0))
    assert tuple(grey.images.shape) == (6, 3, 8, 8)


def test_auxiliary_size_draws_from_a_file(tmp_path: Path) -> None:
    images = pixels(50)
    config = npz(tmp_path / "a.npz", images=images).model_copy(update={"auxiliary_size": 5})
    dataset = people()
    first, again, other = (granted(config, dataset, seed) for seed in (1, 1, 2))
    assert len(first) == 5
    assert first.images.equal(again.images)
    assert not first.images.equal(other.images)
    with pytest.raises(DataError, match="holds 50 images, fewer than"):
        granted(config.model_copy(update={"auxiliary_size": 51}), dataset)
    assert granted(config.model_copy(update={"auxiliary_size": 0}), dataset) is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.full((2, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"images": np.full((2, 8, 8), 2.0)}, r"must lie in \[0, 1\]"),
        ({"images": np.zeros((2, 8, 8), np.int64)}, "must be uint8 or float; got int64"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"got \(2, 3, 8, 8\)"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"got \(8, 8\)"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"got \(0, 8, 8\)"),
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, "no array 'images'"),
        ({"images": pixels(2), "labels": np.array([0, 30])}, "the data set has 30 classes"),
        ({"images": pixels(2), "labels": np.array([0.0, 1.0])}, "'labels' must be integers"),
        ({"images": pixels(2), "labels": np.zeros(3, int)}, "'labels' must be integers of shape"),
        ({"images": pixels(2), "names": np.array(["a"])}, "'names' must be text"),
        ({"images": np.array([{}, []], dtype=object)}, "plain arrays"),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        granted(npz(tmp_path / "a.npz", **arrays))
    assert "setting 'data.auxiliary' = " in str(refused.value)


def test_missing_or_garbled_auxiliary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        granted(DataConfig(auxiliary=str(tmp_path / "absent.npz")))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04garbage")
    with pytest.raises(DataError, match="not a readable"):
        granted(DataConfig(auxiliary=str(tmp_path / "a.npz")))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="not a folder or an archive"):
        granted(DataConfig(auxiliary=str(tmp_path / "a.txt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        granted(DataConfig(auxiliary=str(tmp_path / "empty")))


def test_identical_images_are_an_overlap(tmp_path: Path) -> None:
    dataset = people()
    stolen = np.concatenate([pixels(5), dataset.images[[3, 50, 119]].transpose(0, 2, 3, 1)])
    with pytest.raises(DataError, match="auxiliary set overlaps the victims: 3 identical images"):
        granted(npz(tmp_path / "a.npz", images=stolen), dataset)


def test_the_same_people_are_an_overlap(tmp_path: Path) -> None:
    names = np.array(["Ann_Lee_0001", "Person_3_0002", "PERSON 7_0001.jpg"])
    with pytest.raises(DataError, match=r"overlaps the victims: 2 of the same people \(person 3, person 7\)"):
        granted(npz(tmp_path / "a.npz", images=pixels(3), names=names))
    with pytest.raises(DataError, match="2 of the same people"):  # classes may be people as well
        granted(npz(tmp_path / "a.npz", images=pixels(3), names=names), without_groups(people()))
    auxiliary = granted(npz(tmp_path / "b.npz", images=pixels(1), names=names[:1]))
    assert "no person in common" in auxiliary.source


def test_people_are_compared_under_random_labels_too(tmp_path: Path) -> None:
    folder = tmp_path / "lfw"
    for person in ("Ann_Lee", "Bo_Ek", "Cy_Oz"):
        (folder / person).mkdir(parents=True)
        for i in (1, 2):
            Image.fromarray(pixels(1)[0]).save(folder / person / f"{person}_000{i}.png")
    np.savez(tmp_path / "a.npz", images=pixels(1), names=np.array(["Bo_Ek_0009"]))
    settings = {
        "dataset": "lfw",
        "data-dir": str(tmp_path),
        "auxiliary": str(tmp_path / "a.npz"),
        "clients": 2,
    }
    for labels in ("natural", "random"):
        with pytest.raises(DataError, match=r"1 of the same people \(bo ek\)"):
            build_world(
                Config.from_mapping({**settings, "labels": labels, "classes": 50, "model": "tiny-cnn"})
            )


def test_folder_of_pictures_is_labelled_where_its_folders_are_classes(tmp_path: Path) -> None:
    dataset = without_groups(people())
    for folder in ("Person_3", "Person_9"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels(1, 12)[0]).save(tmp_path / folder / "1.png")
    auxiliary = granted(DataConfig(auxiliary=str(tmp_path)), dataset)
    assert auxiliary.labels.tolist() == [3, 9]
    assert tuple(auxiliary.images.shape) == (2, 3, 8, 8)
    (tmp_path / "Stranger").mkdir()
    Image.fromarray(pixels(1, 12)[0]).save(tmp_path / "Stranger" / "1.png")
    assert granted(DataConfig(auxiliary=str(tmp_path)), dataset).labels is None
    with pytest.raises(DataError, match="of the same people"):
        granted(DataConfig(auxiliary=str(tmp_path)), people())


def small_world(**settings: object):  # type: ignore[no-untyped-def]
    return build_world(
        Config.from_mapping({"dataset": "digits", "model": "tiny-cnn", "limit": 300, **settings})
    )


@pytest.mark.parametrize("part", ["iid", "dirichlet", "shards"])
def test_world_is_disjoint_and_repeatable(part: str) -> None:
    world, again = small_world(partition=part, seed=5), small_world(partition=part, seed=5)
    assert_disjoint(world.pools)
    assert sorted(np.concatenate(world.partitions).tolist()) == world.pools.clients.tolist()
    assert world.auxiliary.images.equal(again.auxiliary.images)
    assert json.dumps(world_record(world)) == json.dumps(world_record(again))
    assert json.dumps(world_record(world)) != json.dumps(world_record(small_world(partition=part, seed=6)))


def test_world_record_says_what_was_dealt() -> None:
    world = small_world(clients=4)
    record = json.loads(json.dumps(world_record(world)))
    assert {name: pool["size"] for name, pool in record["pools"].items()} == {
        "clients": 135,
        "nonmembers": 30,
        "auxiliary": 135,
        "withheld": 0,
    }
    assert record["unassigned"] == 0
    assert "limit: 300 of 1,797" in record["dataset"]["note"]
    for client, ids in zip(record["clients"], world.partitions, strict=True):
        assert client["ids"] == ids.tolist()
        assert sum(client["labels"].values()) == client["size"] == len(ids)


def test_scenario_carries_the_resolved_model() -> None:
    scenario = build_world(Config.from_mapping({"dataset": "faces", "model": "lenet-zhu"})).scenario
    assert scenario.image_shape == (1, 32, 32)
    assert scenario.model.classes == 10_177
    assert scenario.model.activation == "sigmoid"


def test_random_labels_fill_the_head() -> None:
    config = Config.from_mapping({"dataset": "faces", "model": "lenet-zhu", "labels": "random"})
    world = build_world(config)
    assert len(np.unique(world.dataset.labels)) == 100
    assert world.dataset.labels.max() > 100
    narrow = build_world(Config.from_mapping({"dataset": "faces", "labels": "random", "classes": 10}))
    assert np.bincount(narrow.dataset.labels).tolist() == [10] * 10


def test_a_head_narrower_than_the_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model\.classes' = 5: the data set has 10"):
        small_world(classes=5)


def test_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model\.channels' = 3: data set 'digits' has 1"):
        small_world(**{"model.channels": 3})
    with pytest.raises(ConfigError, match=r"'model\.image_size' = 32.*'data\.image_size' resizes"):
        small_world(**{"model.image_size": 32})


def test_too_many_clients_is_refused() -> None:
    with pytest.raises(DataError, match=r"setting 'federation\.clients' = 136: only 135 samples"):
        small_world(clients=136)
