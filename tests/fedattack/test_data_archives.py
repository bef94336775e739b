"""The real data sets, complete and cut, against published counts and torchvision's readers."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fedattack.config import Config, DataConfig
from fedattack.data import build_world, load_dataset
from fedattack.data.cifar import read_batches
from fedattack.data.files import open_tree
from fedattack.data.idx import read_pair
from fedattack.errors import DataError

CASES = [
    ("mnist", "", (60_000, 1, 28, 28), 10, ""),
    ("mnist", "MNIST", (60_000, 1, 28, 28), 10, ""),
    ("fashion-mnist", "", (60_000, 1, 28, 28), 10, ""),
    ("fashion-mnist", "FashionMNIST/raw", (60_000, 1, 28, 28), 10, ""),
    ("cifar10", "", (2_500, 3, 32, 32), 10, "cut: 2,500 of 50,000 training images"),
    ("cifar10", "CIFAR10", (2_500, 3, 32, 32), 10, "cut: 2,500 of 50,000 training images"),
    ("lfw", "", (116, 3, 250, 250), 92, "read from lfw.tar.xz"),
    ("lfw", "LFW/lfw.tar.xz", (116, 3, 250, 250), 92, "cut: 116 of 13,233 images"),
    ("lfw", "LFW/lfw64.tar.xz", (240, 3, 64, 64), 12, "cut: 240 of 13,233 images"),
    ("lfw", "LFW/lfw32.tar.xz", (240, 3, 32, 32), 12, "cut: 12 of 5,749 people"),
    ("imagenet", "", (50, 3, 64, 64), 50, "cut: 50 of 1,000 classes"),
    ("imagenet", "ImageNetSample/imagenet64.tar.xz", (50, 3, 64, 64), 50, "cut"),
    ("image-folder", "ORL", (200, 1, 92, 92), 20, ""),
    ("image-folder", "LFW/lfw32.tar.xz", (240, 3, 32, 32), 12, ""),
]


@pytest.mark.parametrize(("name", "below", "shape", "classes", "note"), CASES)
def test_counts(
    shared_dir: Path, name: str, below: str, shape: tuple[int, ...], classes: int, note: str
) -> None:
    dataset = load_dataset(DataConfig(name=name, dir=str(shared_dir / "data" / below)), seed=0)
    assert (dataset.images.shape, dataset.classes) == (shape, classes)
    assert note in dataset.note
    assert bool(dataset.note) == bool(note)


def test_mnist_is_torchvisions(shared_dir: Path, tmp_path: Path) -> None:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = shared_dir / "data" / "MNIST" / "raw"
    images, labels = read_pair(raw / "t10k-images-idx3-ubyte.gz", raw / "t10k-labels-idx1-ubyte.gz")
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
    np.testing.assert_array_equal(
        images[:, 0], read_image_file(str(tmp_path / "t10k-images-idx3-ubyte")).numpy()
    )
    np.testing.assert_array_equal(labels, read_label_file(str(tmp_path / "t10k-labels-idx1-ubyte")).numpy())
    assert len(labels) == 10_000


@pytest.mark.parametrize("below", ["", "QMNIST", "QMNIST/raw"])
def test_qmnist_has_539_writers_and_mnists_digits(shared_dir: Path, below: str) -> None:
    data = shared_dir / "data"
    dataset = load_dataset(DataConfig(name="qmnist", dir=str(data / below)), seed=0)
    assert dataset.groups is not None
    assert len(np.unique(dataset.groups)) == 539
    assert "MNIST's training file" in dataset.note
    mnist = load_dataset(DataConfig(name="mnist", dir=str(data)), seed=0)
    np.testing.assert_array_equal(dataset.labels, mnist.labels)


def test_qmnist_cut_is_torchvisions(shared_dir: Path) -> None:
    from torchvision.datasets import QMNIST

    root = shared_dir / "checks" / "membership" / "qmnist_tiny"
    dataset = load_dataset(DataConfig(name="qmnist", dir=str(root)), seed=0)
    theirs = QMNIST(str(root), what="train", compat=False)
    np.testing.assert_array_equal(dataset.images[:, 0], theirs.data.numpy())
    expected = np.load(root / "labels_expected.npy", allow_pickle=False)
    np.testing.assert_array_equal(dataset.labels, expected[:, 0])
    np.testing.assert_array_equal(dataset.groups, expected[:, 2])
    assert dataset.note == "cut: 20 of 60,000 training images"


def test_cifar_cut_is_torchvisions_without_its_checksums(shared_dir: Path, tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    archive = shared_dir / "data" / "CIFAR10" / "cifar-10-subset-python.tar.xz"
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    with pytest.raises(RuntimeError):
        CIFAR10(str(tmp_path), train=True)

    class Cut(CIFAR10):
        train_list = [[name, None] for name, _ in CIFAR10.train_list]
        test_list = [[name, None] for name, _ in CIFAR10.test_list]
        meta = CIFAR10.meta | {"md5": None}

    for place in (archive, tmp_path, tmp_path / "cifar-10-batches-py"):
        dataset = load_dataset(DataConfig(name="cifar10", dir=str(place)), seed=0)
        theirs = Cut(str(tmp_path), train=True)
        np.testing.assert_array_equal(dataset.images.transpose(0, 2, 3, 1), theirs.data)
        assert dataset.labels.tolist() == theirs.targets
        assert list(dataset.class_names) == theirs.classes
    tree = open_tree(archive, lambda name: name.name == "test_batch")
    assert len(read_batches(tree, ["test_batch"], "labels", 10)[0]) == 500


def test_lfw_people_are_groups_and_image_size_resizes(shared_dir: Path) -> None:
    config = DataConfig(name="lfw", dir=str(shared_dir / "data" / "LFW"), image_size=32)
    dataset = load_dataset(config, seed=0)
    assert dataset.images.shape == (116, 3, 32, 32)
    assert dataset.groups is not None
    assert len(np.unique(dataset.groups)) == 92
    assert dataset.class_names[0] == "Aby_Har-Even"


def lfw_world(shared_dir: Path, auxiliary: str, **settings: object):  # type: ignore[no-untyped-def]
    folder = shared_dir / "data" / "LFW"
    data = {"dataset": "lfw", "data-dir": str(folder / "lfw32.tar.xz"), "auxiliary": auxiliary, **settings}
    return build_world(Config.from_mapping({"model": "tiny-cnn", **data}))


def test_lfw_public_faces_do_not_overlap(shared_dir: Path) -> None:
    world = lfw_world(shared_dir, str(shared_dir / "data" / "LFW" / "lfw32-auxiliary.npz"))
    assert tuple(world.auxiliary.images.shape) == (5_000, 3, 32, 32)
    assert world.auxiliary.labels is None
    assert "no person in common" in world.auxiliary.source
    assert len(world.pools.clients) == 216


def test_lfw_with_its_own_pictures_as_public_is_refused(shared_dir: Path) -> None:
    for file in ("lfw32.tar.xz", "lfw.tar.xz"):
        with pytest.raises(DataError, match="12 of the same people"):
            lfw_world(shared_dir, str(shared_dir / "data" / "LFW" / file))


def test_lfw_split_is_by_person(shared_dir: Path) -> None:
    world = lfw_world(shared_dir, "split")
    groups = world.dataset.groups
    victims = np.concatenate([world.pools.clients, world.pools.nonmembers])
    assert not set(groups[world.pools.auxiliary]) & set(groups[victims])


def test_qmnist_clients_are_writers(shared_dir: Path) -> None:
    settings = {
        "dataset": "qmnist",
        "data-dir": str(shared_dir / "data"),
        "partition": "natural",
        "clients": 200,
        "model": "tiny-cnn",
        "auxiliary-size": 1000,
    }
    world = build_world(Config.from_mapping(settings))
    groups = world.dataset.groups
    owners = [set(groups[ids].tolist()) for ids in world.partitions]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert not set().union(*owners) & set(groups[world.pools.auxiliary].tolist())
    assert len(world.auxiliary) == 1000
