"""Readers: idx files, CIFAR batches, picture folders and archives, and what each refuses."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedattack.config import DataConfig
from fedattack.data import DATASETS, load_dataset
from fedattack.data.cifar import load_batch
from fedattack.data.dataset import random_labels
from fedattack.data.files import open_tree
from fedattack.data.idx import read_idx
from fedattack.data.pixels import adapt, decode
from fedattack.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, images: np.ndarray, labels: np.ndarray, compress: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        data = idx_bytes(array)
        name = f"{stem}.gz" if compress else stem
        (folder / name).write_bytes(gzip.compress(data) if compress else data)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    dataset = load_dataset(DataConfig(name="digits"), seed=0)
    assert dataset.images.shape == (1797, 1, 8, 8)
    np.testing.assert_array_equal(dataset.labels, load_digits().target)
    np.testing.assert_allclose(dataset.images[:, 0] / 255, load_digits().images / 16, atol=0.5 / 255 + 1e-12)
    images, labels = dataset.tensors(np.array([5, 3]))
    assert (images.shape, str(images.dtype), float(images.max())) == ((2, 1, 8, 8), "torch.float32", 1.0)
    assert labels.tolist() == [5, 3]


def test_faces_come_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    from skimage.data import lfw_subset

    dataset = load_dataset(DataConfig(name="faces", image_size=25), seed=0)
    np.testing.assert_array_equal(dataset.images[:, 0], np.rint(lfw_subset()[:100] * 255))
    assert dataset.labels.tolist() == list(range(100))
    assert "own identity" in dataset.note
    assert load_dataset(DataConfig(name="faces"), seed=0).image_size == 32


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", ["", "MNIST/raw", "raw"])
def test_idx_set_is_found_and_reported_as_cut(tmp_path: Path, compress: bool, below: str) -> None:
    images, labels = noise(7, 28, 28), np.arange(7, dtype=np.uint8)
    write_mnist(tmp_path / below, images, labels, compress)
    dataset = load_dataset(DataConfig(name="mnist", dir=str(tmp_path)), seed=0)
    np.testing.assert_array_equal(dataset.images[:, 0], images)
    assert dataset.labels.tolist() == labels.tolist()
    assert dataset.note == "cut: 7 of 60,000 training images"


def test_idx_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    array = RNG.integers(-(2**31), 2**31, (5, 8)).astype(">i4")
    (tmp_path / "x").write_bytes(idx_bytes(array, 0x0C))
    expected = read_sn3_pascalvincent_tensor(str(tmp_path / "x"), strict=False).numpy()
    np.testing.assert_array_equal(read_idx(tmp_path / "x", 2), expected)


def test_a_relative_with_the_same_file_names_is_not_taken(tmp_path: Path) -> None:
    write_mnist(tmp_path / "FashionMNIST" / "raw", noise(3, 28, 28), np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="no file train-images-idx3-ubyte"):
        load_dataset(DataConfig(name="mnist", dir=str(tmp_path / "FashionMNIST" / "raw")), seed=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "truncated"),
        (lambda data: data + b"x", "longer than its header"),
        (lambda data: b"\x00\x00\x08\x01" + data[4:], "1 dimensions; wanted 3"),
        (lambda data: b"\x89PNG" + data[4:], "not an idx file"),
        (lambda data: b"", "not an idx file"),
        (lambda data: data[:9], "header ends early"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "header is damaged"),
    ],
)
def test_corrupt_idx_is_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write_mnist(tmp_path, noise(4, 28, 28), np.zeros(4, np.uint8))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(name="mnist", dir=str(tmp_path)), seed=0)


def test_corrupt_gzip_and_mismatched_counts_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, noise(4, 28, 28), np.zeros(5, np.uint8))
    config = DataConfig(name="mnist", dir=str(tmp_path))
    with pytest.raises(DataError, match=r"holds 4 images.*5 labels"):
        load_dataset(config, seed=0)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read.*train-images"):
        load_dataset(config, seed=0)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=r"cannot read.*train-images"):
        load_dataset(config, seed=0)


def test_emnist_is_turned_upright_and_counts_letters_from_one(tmp_path: Path) -> None:
    images, labels = noise(3, 28, 28), np.array([1, 26, 3], np.uint8)
    folder = tmp_path / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "emnist-letters-train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    dataset = load_dataset(DataConfig(name="emnist-letters", dir=str(tmp_path)), seed=0)
    np.testing.assert_array_equal(dataset.images[:, 0], images.transpose(0, 2, 1))
    assert [dataset.class_names[i] for i in dataset.labels] == ["A", "Z", "C"]


def test_emnist_class_names_are_torchvisions() -> None:
    from torchvision.datasets import EMNIST

    from fedattack.data.idx import _BALANCED

    assert sorted(_BALANCED) == EMNIST.classes_split_dict["balanced"]


def test_usps_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import USPS

    values = RNG.uniform(-1, 1, (6, 256)).round(4)
    rows = [
        f"{label} " + " ".join(f"{i}:{value}" for i, value in enumerate(row, 1))
        for label, row in zip((1, 10, 3, 4, 5, 6), values, strict=True)
    ]
    data = bz2.compress("\n".join(rows).encode())
    (tmp_path / "usps.bz2").write_bytes(data)
    dataset = load_dataset(DataConfig(name="usps", dir=str(tmp_path)), seed=0)

    class Cut(USPS):
        split_list = {"train": ["", "usps.bz2", hashlib.md5(data).hexdigest()]}

    theirs = Cut(str(tmp_path), train=True)
    assert dataset.labels.tolist() == list(theirs.targets)
    # torchvision cuts the fraction of a level off, the reader rounds it.
    assert np.abs(dataset.images[:, 0].astype(int) - theirs.data).max() <= 1
    assert "cut: 6 of 7,291" in dataset.note


@pytest.mark.parametrize("place", ["zip.train.gz", "USPS/zip.train"])
def test_usps_under_its_other_published_name(tmp_path: Path, place: str) -> None:
    values, digits = RNG.uniform(-1, 1, (5, 256)).round(4), [6, 0, 9, 3, 1]
    rows = [f"{d:.4f} " + " ".join(map(str, row)) + " " for d, row in zip(digits, values, strict=True)]
    data = "\n".join(rows).encode()
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(gzip.compress(data) if place.endswith(".gz") else data)
    dataset = load_dataset(DataConfig(name="usps", dir=str(tmp_path)), seed=0)
    assert dataset.labels.tolist() == digits
    np.testing.assert_array_equal(dataset.images[:, 0].reshape(5, -1), np.rint((values + 1) * 127.5))
    (tmp_path / place).write_bytes(b"6 0.5 0.5")
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(DataConfig(name="usps", dir=str(tmp_path)), seed=0)


def cifar_batch(count: int = 4, protocol: int = 2, **changes: object) -> bytes:
    batch = {b"data": noise(count, 3072), b"labels": list(range(count)), b"batch_label": b"x", **changes}
    return pickle.dumps(batch, protocol=protocol)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_cifar_batch_equals_pickles_reading(protocol: int) -> None:
    data = cifar_batch(protocol=protocol)
    ours, plain = load_batch(data, "b"), pickle.loads(data, encoding="bytes")
    np.testing.assert_array_equal(ours["data"], plain[b"data"])
    assert ours["labels"] == plain[b"labels"]


def test_cifar_batch_of_python_2_is_read() -> None:
    """The published files: protocol 2 with byte strings (SHORT_BINSTRING), which Python 3 cannot write."""
    body = b"\x01" * 3072
    data = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", 3072)
        + body
        + b"tbU\x06labels]K\x06au."
    )
    batch = load_batch(data, "data_batch_1")
    assert batch["labels"] == [6]
    np.testing.assert_array_equal(batch["data"], np.ones((1, 3072), np.uint8))
    # numpy itself would believe these flags, and take the pixels for pointers to objects.
    flagged = data.replace(b"J\xff\xff\xff\xffK\x00tb", b"J\xff\xff\xff\xffK\x3ftb")
    assert flagged != data
    with pytest.raises(DataError, match="unexpected form"):
        load_batch(flagged, "data_batch_1")


def test_damaged_cifar_batches_are_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    data = pickle.dumps({b"data": np.zeros((1, 64), np.uint8), b"labels": [1, 2]}, protocol=2)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=3):
            damaged[place] = rng.integers(256)
        try:
            assert isinstance(load_batch(bytes(damaged), "b"), dict)
        except DataError:
            refused += 1
    assert refused > 1000


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_hostile_cifar_batch_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(cifar_batch(payload=_Runs(trap)))
    with pytest.raises(DataError, match=r"refused 'data_batch_1'.*mkdir"):
        load_dataset(DataConfig(name="cifar10", dir=str(tmp_path)), seed=0)
    assert not trap.exists()
    pickle.loads(cifar_batch(payload=_Runs(trap)))
    assert trap.exists(), "the trap must work, or the test shows nothing"


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'/etc/passwd'\ntR.",
        b"c_codecs\ndecode\n(S'x'\ntR.",
        b"cnumpy\nndarray\n(I99999999999\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n}S'__doc__'\nS'x'\nsb.",
        b"\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__call__Nsb.",
        b"K\x01r\xff\xff\xff\x7f.",
        b"I1\np2147483647\n.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"",
        b"\x80\x02K\x01.",
        b"]" * 10,
    ],
)
def test_every_other_global_and_every_trick_with_the_allowed_ones_is_refused(payload: bytes) -> None:
    with pytest.raises(DataError, match="refused"):
        load_batch(payload, "b")
    # The allowed callables are shared: no pickle may have changed them.
    assert load_batch(cifar_batch(), "b")["labels"] == [0, 1, 2, 3]


@pytest.mark.parametrize("payload", [b"K\x01r\xe8\x03\x00\x00.", b"I1\np1000\n."])
def test_far_memo_positions_are_refused_before_memory_is_claimed(payload: bytes) -> None:
    with pytest.raises(DataError, match="memo position of 1000"):
        load_batch(payload, "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 11}, "integers from 0 to 9"),
        ({"data": noise(4, 3000)}, "uint8 array"),
        ({"data": noise(4, 3072).astype(np.int64)}, "uint8 array"),
        ({"data": noise(3, 3072)}, "3 images, but 4 labels"),
    ],
)
def test_malformed_cifar_batch_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    count = changes.pop("count", 4)
    batch = {"data": noise(count, 3072), "labels": list(range(count))} | changes  # type: ignore[call-overload]
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(name="cifar10", dir=str(tmp_path)), seed=0)


def test_cifar100_reads_fine_labels_from_an_archive(tmp_path: Path) -> None:
    train = pickle.dumps(
        {b"data": noise(3, 3072), b"fine_labels": [99, 0, 5], b"coarse_labels": [1, 2, 3]}, protocol=2
    )
    meta = pickle.dumps({b"fine_label_names": [f"c{i}".encode() for i in range(100)]}, protocol=2)
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, data in (("train", train), ("meta", meta)):
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    dataset = load_dataset(DataConfig(name="cifar100", dir=str(tmp_path)), seed=0)
    assert dataset.labels.tolist() == [99, 0, 5]
    assert dataset.class_names[99] == "c99"


def write_pictures(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    for name, pixels in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))


def folder_config(folder: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"name": "image-folder", "dir": str(folder), **settings})


def test_image_folder_classes_are_sub_folders(tmp_path: Path) -> None:
    pictures = {"dog/1.png": noise(8, 8), "cat/1.png": noise(8, 8), "cat/deep/2.png": noise(8, 8)}
    write_pictures(tmp_path, pictures)
    (tmp_path / "README.txt").write_text("not a picture")
    dataset = load_dataset(folder_config(tmp_path), seed=0)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(dataset.images[2, 0], pictures["dog/1.png"])


def test_linked_class_folders_and_files_are_read_and_circles_are_not(tmp_path: Path) -> None:
    store = {"dogs/1.png": noise(8, 8), "dogs/2.png": noise(8, 8), "owl.png": noise(8, 8)}
    write_pictures(tmp_path / "store", store)
    write_pictures(tmp_path / "data", {"cats/1.png": noise(8, 8), "owls/1.png": noise(8, 8)})
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "store" / "dogs")
    (tmp_path / "data" / "owls" / "2.png").symlink_to(tmp_path / "store" / "owl.png")
    (tmp_path / "data" / "cats" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cats" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "data" / "cats" / "pipe.png")
    dataset = load_dataset(folder_config(tmp_path / "data"), seed=0)
    assert dataset.class_names == ("cats", "dogs", "owls")
    assert np.bincount(dataset.labels).tolist() == [1, 2, 2]


def windows_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            entry = zipfile.ZipInfo("x")
            entry.filename = entry.orig_filename = name
            stream = io.BytesIO()
            Image.fromarray(noise(8, 8)).save(stream, "PNG")
            packed.writestr(entry, stream.getvalue())
    return path


def test_a_zip_of_windows_keeps_its_classes(tmp_path: Path) -> None:
    names = [rf"set\{label}\{i}.png" for label in ("cats", "dogs") for i in range(2)]
    dataset = load_dataset(folder_config(windows_zip(tmp_path / "a.zip", names)), seed=0)
    assert (dataset.class_names, len(dataset)) == (("cats", "dogs"), 4)
    with pytest.raises(DataError, match="points outside it"):
        open_tree(windows_zip(tmp_path / "b.zip", [r"set\..\..\x.png"]), lambda _: True)
    with pytest.raises(DataError, match="twice"):
        open_tree(windows_zip(tmp_path / "c.zip", [r"a\x.png", "a/x.png"]), lambda _: True)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_train_and_val_above_the_classes_are_no_classes(tmp_path: Path, kind: str) -> None:
    names = [f"set/{part}/{label}/{i}.png" for part in ("train", "val") for label in "ab" for i in range(2)]
    write_pictures(tmp_path, {name: noise(8, 8) for name in names})
    place = tmp_path / "set"
    if kind == "zip":
        place = windows_zip(tmp_path / "set.zip", [name.replace("/", "\\") for name in names])
    dataset = load_dataset(folder_config(place), seed=0)
    assert (dataset.class_names, len(dataset)) == (("a", "b"), 8)
    assert "train and val hold one set of classes" in dataset.note
    write_pictures(tmp_path / "flat", {"train/1.png": noise(8, 8), "val/1.png": noise(8, 8)})
    assert load_dataset(folder_config(tmp_path / "flat"), seed=0).class_names == ("train", "val")


def test_a_folder_may_be_a_person(tmp_path: Path) -> None:
    write_pictures(tmp_path, {f"{who}/{i}.png": noise(8, 8) for who in ("Ann", "Bob") for i in range(3)})
    assert load_dataset(folder_config(tmp_path), seed=0).groups is None
    people = load_dataset(folder_config(tmp_path, groups="folder"), seed=0)
    assert people.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert people.group_names == ("Ann", "Bob")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar"])
def test_archives_and_folders_read_alike(tmp_path: Path, kind: str) -> None:
    pictures = {"set/b/1.png": noise(8, 8, 3), "set/a/1.png": noise(8, 8, 3), "set/a/2.png": noise(8, 8, 3)}
    write_pictures(tmp_path / "folder", pictures)
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for name in pictures:
                packed.write(tmp_path / "folder" / name, name)
            packed.writestr("__MACOSX/set/a/._1.png", b"junk")
    else:
        with tarfile.open(archive, f"w:{kind.partition('.')[2]}") as packed_tar:
            packed_tar.add(tmp_path / "folder" / "set", "set")
    ours = load_dataset(folder_config(archive), seed=0)
    plain = load_dataset(folder_config(tmp_path / "folder"), seed=0)
    np.testing.assert_array_equal(ours.images, plain.images)
    assert ours.class_names == plain.class_names == ("a", "b")


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"1.png": noise(8, 8), "2.png": noise(8, 8)})
    dataset = load_dataset(folder_config(tmp_path), seed=0)
    assert dataset.class_names == ("all",)
    assert dataset.labels.tolist() == [0, 0]


def test_one_class_folder_keeps_its_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"dog/1.png": noise(8, 8)})
    assert load_dataset(folder_config(tmp_path), seed=0).class_names == ("dog",)


def test_grey_and_colour_together_become_colour(tmp_path: Path) -> None:
    grey = noise(8, 8)
    write_pictures(tmp_path, {"a/1.png": grey, "b/1.png": noise(8, 8, 3)})
    dataset = load_dataset(folder_config(tmp_path), seed=0)
    assert dataset.channels == 3
    np.testing.assert_array_equal(dataset.images[0], np.repeat(grey[None], 3, 0))


def test_non_square_pictures_are_centre_cropped(tmp_path: Path) -> None:
    wide = noise(8, 12)
    write_pictures(tmp_path, {"1.png": wide})
    dataset = load_dataset(folder_config(tmp_path), seed=0)
    np.testing.assert_array_equal(dataset.images[0, 0], wide[:, 2:10])


def test_mixed_sizes_need_image_size(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a/1.png": noise(8, 8), "a/2.png": noise(16, 16)})
    with pytest.raises(DataError, match=r"8 to 16 pixels.*data\.image_size"):
        load_dataset(folder_config(tmp_path), seed=0)
    assert load_dataset(folder_config(tmp_path, image_size=8), seed=0).images.shape == (2, 1, 8, 8)


def test_resizing_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (1, 1, 32, 16))
    small = adapt(stripes, None, 8)
    assert np.abs(small[..., 1:-1].astype(int) - 127).max() <= 2, "a plain subsampling would give 0 or 255"
    np.testing.assert_array_equal(adapt(stripes, None, 32), stripes)


def test_adapt_and_decode_resize_alike() -> None:
    pixels = noise(20, 20, 3)
    ours = adapt(pixels.transpose(2, 0, 1)[None], 3, 9)[0]
    np.testing.assert_array_equal(ours.transpose(1, 2, 0), np.asarray(decode(png(pixels), "x", 9)))


def test_luma_is_itu_601() -> None:
    pixels = noise(1, 3, 8, 8)
    expected = (pixels[0] * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert np.abs(adapt(pixels, 1, None)[0, 0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no pictures"),
        ({"a/1.png": b"not a picture"}, "cannot read picture 'a/1.png'"),
        ({"a/1.png": png(noise(8, 8))[:60]}, "cannot read picture 'a/1.png'"),
        ({"a/1.png": png(noise(8, 8)), "2.png": png(noise(8, 8))}, "'2.png' lies beside class folders"),
    ],
)
def test_bad_image_folder_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_dataset(folder_config(tmp_path), seed=0)


def test_bad_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.xz").write_bytes(b"\xfd7zXZ\x00garbage")
    (tmp_path / "x.zip").write_bytes(b"PK garbage")
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    for name, message in (
        ("x.tar.xz", "cannot read archive"),
        ("x.zip", "cannot read"),
        ("x.rar", "not a folder"),
    ):
        with pytest.raises(DataError, match=message):
            load_dataset(folder_config(tmp_path / name), seed=0)
    with pytest.raises(DataError, match=r"several archives.*x\.tar\.xz, x\.zip"):
        load_dataset(folder_config(tmp_path), seed=0)


def test_archive_members_that_point_outside_are_refused(tmp_path: Path) -> None:
    data = png(noise(8, 8))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("../../evil/1.png")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("../evil/1.png", data)
    for name in ("x.tar", "x.zip"):
        with pytest.raises(DataError, match="outside"):
            open_tree(tmp_path / name, lambda _: True)


def test_lfw_layout_gives_people(tmp_path: Path) -> None:
    names = ("Ann_Lee/Ann_Lee_0001", "Bo_Ek/Bo_Ek_0001", "Bo_Ek/Bo_Ek_0002")
    write_pictures(tmp_path / "lfw", {f"{name}.png": noise(8, 8, 3) for name in names})
    for place in (tmp_path, tmp_path / "lfw"):
        dataset = load_dataset(DataConfig(name="lfw", dir=str(place)), seed=0)
        assert dataset.class_names == dataset.group_names == ("Ann_Lee", "Bo_Ek")
        assert dataset.groups is not None
        assert dataset.groups.tolist() == dataset.labels.tolist() == [0, 1, 1]
    write_pictures(tmp_path / "other", {"x/y.png": noise(8, 8)})
    with pytest.raises(DataError, match="of LFW there"):
        load_dataset(DataConfig(name="lfw", dir=str(tmp_path / "other")), seed=0)


def test_celeba_identity_is_class_and_group(tmp_path: Path) -> None:
    folder = tmp_path / "celeba"
    write_pictures(folder / "img_align_celeba", {f"00000{i}.png": noise(12, 8, 3) for i in (1, 2, 3)})
    table = folder / "identity_CelebA.txt"
    table.write_text("000001.png 2880\n000002.png 1\n000003.png 2880\n")
    config = DataConfig(name="celeba", dir=str(tmp_path))
    dataset = load_dataset(config, seed=0)
    assert dataset.labels.tolist() == [2879, 0, 2879]
    assert (dataset.classes, dataset.image_size) == (10_177, 8)
    assert "cut: 3 of 202,599" in dataset.note
    table.write_text("000001.png 2880\n")
    with pytest.raises(DataError, match=r"does not say who picture '000002\.png'"):
        load_dataset(config, seed=0)
    table.write_text("000001.png ten\n")
    with pytest.raises(DataError, match="line 1"):
        load_dataset(config, seed=0)


def test_caltech101_leaves_the_background_out(tmp_path: Path) -> None:
    names = ("accordion/image_0001", "BACKGROUND_Google/image_0001", "yin_yang/image_0001")
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    write_pictures(folder, {f"{name}.png": noise(12, 8, 3) for name in names})
    for place in (tmp_path, folder.parent, folder):
        dataset = load_dataset(DataConfig(name="caltech101", dir=str(place), image_size=8), seed=0)
        assert dataset.class_names == ("accordion", "yin_yang")


def test_imagenet_takes_wordnet_folders_under_train(tmp_path: Path) -> None:
    names = ("n01484850/a", "n01440764/b")
    write_pictures(tmp_path / "train", {f"{name}.png": noise(8, 8, 3) for name in names})
    dataset = load_dataset(DataConfig(name="imagenet", dir=str(tmp_path)), seed=0)
    assert dataset.class_names == ("n01440764", "n01484850")
    assert "cut: 2 of 1,000 classes" in dataset.note


NEEDS_FILES = sorted(set(DATASETS.names()) - {"digits", "faces"})


@pytest.mark.parametrize("name", NEEDS_FILES)
def test_missing_folders_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"setting 'data\.dir' is not set"):
        load_dataset(DataConfig(name=name), seed=0)
    with pytest.raises(DataError, match=r"setting 'data\.dir' = '.*absent' does not exist"):
        load_dataset(DataConfig(name=name, dir=str(tmp_path / "absent")), seed=0)
    with pytest.raises(DataError, match=r"setting 'data\.dir' = '.*'"):
        load_dataset(DataConfig(name=name, dir=str(tmp_path)), seed=0)
    (tmp_path / "file.txt").write_text("not a data set")
    with pytest.raises(DataError):
        load_dataset(DataConfig(name=name, dir=str(tmp_path / "file.txt")), seed=0)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fashion-mnist'"):
        load_dataset(DataConfig(name="fashion_mnist"), seed=0)


def test_failed_or_impossible_download_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(DataError, match=r"download of data set 'cifar10' to .* failed"):
        load_dataset(DataConfig(name="cifar10", dir=str(tmp_path), download=True), seed=0)
    with pytest.raises(DataError, match="no free download"):
        load_dataset(DataConfig(name="lfw", dir=str(tmp_path), download=True), seed=0)
    with pytest.raises(DataError, match=r"needs 'data\.dir'"):
        load_dataset(DataConfig(name="mnist", download=True), seed=0)


def test_every_data_set_has_a_summary() -> None:
    assert all(len(DATASETS.summary(name)) > 20 for name in DATASETS.names())


def test_limit_draws_before_decoding(tmp_path: Path) -> None:
    write_pictures(tmp_path, {f"a/{i}.png": noise(8, 8) for i in range(20)})
    config = folder_config(tmp_path, limit=5)
    first, again, other = (load_dataset(config, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    assert "limit: 5 of 20" in first.note
    # A picture that was not drawn is not opened.
    whole = load_dataset(folder_config(tmp_path), seed=0).images
    drawn = {image.tobytes() for image in first.images}
    undrawn = next(i for i, image in enumerate(whole) if image.tobytes() not in drawn)
    name = sorted(f"a/{i}.png" for i in range(20))[undrawn]
    (tmp_path / name).write_bytes(b"broken")
    np.testing.assert_array_equal(load_dataset(config, 1).images, first.images)


def test_random_labels_are_distinct_while_they_last() -> None:
    natural = load_dataset(DataConfig(name="digits"), seed=3)
    wide = random_labels(natural, 2000, seed=3)
    assert len(np.unique(wide.labels)) == 1797
    assert wide.classes == 2000
    narrow = random_labels(natural, 10, seed=3)
    counts = np.bincount(narrow.labels)
    assert counts.max() - counts.min() <= 1
    assert "random draw" in narrow.note
    np.testing.assert_array_equal(natural.images, narrow.images)
    # Independent of the natural labels: agreement is binomial(1797, 0.1), 180 +- 13.
    assert 120 < int((natural.labels == narrow.labels).sum()) < 240
    np.testing.assert_array_equal(random_labels(natural, 10, 3).labels, narrow.labels)
    assert not np.array_equal(random_labels(natural, 10, 4).labels, narrow.labels)
