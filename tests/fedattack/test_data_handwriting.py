"""Handwriting with its writers: QMNIST's columns and parts, SD19 in both layouts, held-out writers by series."""

from __future__ import annotations

import lzma
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.signal import convolve2d
from skimage.measure import label as pieces
from skimage.measure import regionprops

from fedattack.config import Config, DataConfig
from fedattack.data import ImageDataset, build_world, load_dataset, make_pools, world_record
from fedattack.data.facts import series_shift
from fedattack.data.sd19 import prepared
from fedattack.errors import BadRequest, ConfigError, DataError

COLUMNS = ("class", "series", "writer", "index", "code", "global_index", "duplicate", "unused")


def idx(array: np.ndarray) -> bytes:
    code = {"uint8": 0x08, "int32": 0x0C}[array.dtype.name]
    big = array.astype(array.dtype.newbyteorder(">"))
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + big.tobytes()


def qmnist_rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = np.zeros((count, 8), np.int32)
    columns[:, 0] = rng.integers(0, 10, count)
    columns[:, 1] = rng.choice([0, 4], count)
    columns[:, 2] = rng.integers(0, 20, count) + 2100 * (columns[:, 1] == 4)
    columns[:, 3], columns[:, 5] = np.arange(count) % 7, np.arange(count)
    return rng.integers(0, 256, (count, 4, 4), dtype=np.uint8), columns


def write_qmnist(
    folder: Path, prefix: str, images: np.ndarray, columns: np.ndarray, suffix: str = ""
) -> Path:
    raw = folder / "QMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for stem, array in (("images-idx3-ubyte", images), ("labels-idx2-int", columns)):
        data = idx(array)
        (raw / f"{prefix}-{stem}{suffix}").write_bytes(lzma.compress(data) if suffix else data)
    return folder


def load(name: str, folder: Path, **settings: object) -> ImageDataset:
    return load_dataset(
        Config.from_mapping(
            {f"data.{k}": v for k, v in settings.items()} | {"dataset": name, "data-dir": str(folder)}
        ).data,
        0,
    )


@pytest.fixture
def tiny(shared_dir: Path) -> Path:
    return shared_dir / "checks" / "membership" / "qmnist_tiny"


def test_all_eight_columns_are_facts(tiny: Path) -> None:
    expected = np.load(tiny / "labels_expected.npy", allow_pickle=False)
    dataset = load("qmnist", tiny)
    assert tuple(dataset.facts) == COLUMNS
    np.testing.assert_array_equal(np.stack([dataset.facts[name] for name in COLUMNS], axis=1), expected)
    np.testing.assert_array_equal(dataset.groups, expected[:, 2])


@pytest.mark.parametrize(
    ("settings", "column", "kept"),
    [
        ({"series": "hsf_4,6"}, 1, lambda v: np.isin(v, [4, 6])),
        ({"series": 4}, 1, lambda v: v == 4),
        ({"writers": "384,1000-1300"}, 2, lambda v: (v == 384) | ((v >= 1000) & (v <= 1300))),
        ({"where": {"global_index": "3000-9000"}}, 5, lambda v: (v >= 3000) & (v <= 9000)),
        ({"where.class": "1,3"}, 0, lambda v: np.isin(v, [1, 3])),
    ],
)
def test_facts_filter(tiny: Path, settings: dict[str, object], column: int, kept) -> None:  # type: ignore[no-untyped-def]
    expected = np.load(tiny / "labels_expected.npy", allow_pickle=False)
    ids = np.flatnonzero(kept(expected[:, column]))
    whole, dataset = load("qmnist", tiny), load("qmnist", tiny, **settings)
    assert 0 < len(ids) < 20
    np.testing.assert_array_equal(dataset.facts["global_index"], expected[ids, 5])
    np.testing.assert_array_equal(dataset.images, whole.images[ids])
    assert f": {len(ids)} of 20 images" in dataset.note


def test_any_fact_makes_groups(tiny: Path) -> None:
    dataset = load("qmnist", tiny, group_by="series", series="0,4")
    np.testing.assert_array_equal(dataset.groups, dataset.facts["series"])


def test_parts_are_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import QMNIST

    write_qmnist(tmp_path, "qmnist-test", *qmnist_rows(10_005))
    for part, count in (("test", 10_005), ("test10k", 10_000), ("test50k", 5)):
        ours, theirs = load("qmnist", tmp_path, part=part), QMNIST(str(tmp_path), what=part, compat=False)
        assert len(ours) == count
        np.testing.assert_array_equal(ours.images[:, 0], theirs.data.numpy())
        np.testing.assert_array_equal(np.stack(list(ours.facts.values()), axis=1), theirs.targets.numpy())


def test_duplicates_are_left_out_or_kept(tmp_path: Path) -> None:
    images, columns = qmnist_rows(30)
    columns[[4, 9], 6] = [2, 7]  # the index of the sample of which it is a copy
    write_qmnist(tmp_path, "xnist", images, columns, ".xz")
    dataset = load("qmnist", tmp_path, part="nist")
    np.testing.assert_array_equal(dataset.facts["global_index"], np.delete(np.arange(30), [4, 9]))
    assert "duplicates left out: 2" in dataset.note
    assert len(load("qmnist", tmp_path, part="nist", duplicates="keep")) == 30


def test_mnist_stands_in_for_ten_thousand_test_images(shared_dir: Path) -> None:
    data = shared_dir / "data"
    dataset, mnist = load("qmnist", data, part="test10k"), load("mnist", data, part="test")
    np.testing.assert_array_equal(dataset.labels, mnist.labels)
    np.testing.assert_array_equal(dataset.images, mnist.images)
    assert len(np.unique(dataset.groups)) == 297
    assert "MNIST's test file" in dataset.note
    with pytest.raises(DataError, match="can stand in for the parts train and test10k, not for test50k"):
        load("qmnist", data, part="test50k")


def test_writers_are_held_out_and_granted_as_the_series_are_mixed(shared_dir: Path) -> None:
    dataset = load("qmnist", shared_dir / "data", limit=12_000)
    series, writers = dataset.facts["series"], dataset.facts["writer"]
    known = np.unique(np.stack([series, writers]), axis=1)
    assert len(known.T) == 539
    assert len(np.unique(writers)) == 539  # no writer of two series shares a number
    for seed in range(3):
        config = DataConfig(name="qmnist", nonmember_unit="group", nonmembers=100, auxiliary_size=3_000)
        pools = make_pools(dataset, config, seed)
        sides = [set(writers[ids].tolist()) for ids in (pools.nonmembers, pools.auxiliary, pools.clients)]
        assert len(sides[0]) == 100
        assert sum(map(len, sides)) == 539
        for side in sides:  # 289 writers of series 0, 250 of series 4
            share = np.mean([writer < 2100 for writer in side])
            assert abs(share - 289 / 539) <= 1 / len(side)


def test_the_people_that_are_dealt_out_are_mixed_as_the_series(tmp_path: Path) -> None:
    from fedattack.config import PartitionConfig
    from fedattack.data import partition

    write_qmnist(tmp_path, "qmnist-train", *qmnist_rows(2_000))
    dataset = load("qmnist", tmp_path)
    series, everybody = dataset.facts["series"], np.arange(2_000)
    config = PartitionConfig(name="natural", groups_per_client=1)
    for seed in range(5):
        parts = partition(dataset, everybody, config, 10, seed)
        assert sorted(series[part[0]] for part in parts) == [0] * 5 + [4] * 5  # 20 writers of each there
        assert [part.tolist() for part in parts] == [
            part.tolist() for part in partition(dataset, everybody, config, 10, seed)
        ]


def shift_world(tmp_path: Path, **settings: object):  # type: ignore[no-untyped-def]
    if not (tmp_path / "QMNIST").exists():
        write_qmnist(tmp_path, "qmnist-train", *qmnist_rows(400))
    named = {
        "dataset": "qmnist",
        "data-dir": str(tmp_path),
        "image-size": 8,
        "model": "mlp",
        "auxiliary-size": 0,
    }
    return build_world(Config.from_mapping(named | settings))


@pytest.mark.parametrize("unit", ["sample", "group"])
def test_nonmembers_of_another_series_are_called_a_shift(tmp_path: Path, unit: str) -> None:
    settings = {"data.nonmember_unit": unit, "data.nonmembers": 20}
    same = shift_world(tmp_path, **settings)
    assert not same.shift
    other = shift_world(tmp_path, **settings, **{"data.series": "0", "data.nonmember_series": "hsf_4"})
    series = other.dataset.facts["series"]
    assert set(series[np.concatenate(other.partitions)]) == {0}
    assert set(series[other.pools.nonmembers]) == {4}
    wanted = "distribution shift, not membership: members are 100% series 0, non-members 100% series 4"
    assert other.shift.startswith(wanted)
    assert wanted in world_record(other)["dataset"]["note"]


def test_a_shift_is_the_distance_of_the_shares() -> None:
    series = np.repeat([0, 4], 100).astype(np.int64)
    members = np.arange(50, 150)  # half and half
    for foreign, told in ((64, False), (66, True)):
        others = np.concatenate([np.arange(100, 100 + foreign), np.arange(100 - foreign)])
        assert bool(series_shift(series, members, others)) == told
    assert not series_shift(None, members, members)


BAD_QMNIST = [
    ({"part": "validation"}, "'data.part' = 'validation': data set 'qmnist' has train, test, test10k"),
    ({"series": "5"}, r"'data.series' = '5': nothing in data set 'qmnist' is of 5; it has 0-4, 6-7"),
    ({"series": "four"}, "'data.series' = 'four': 'four' is neither a number nor a range"),
    ({"writers": "9-3"}, "'9-3' is neither a number nor a range"),
    ({"where": {"colour": "1"}}, "does not tell the colour of a sample; known: class, code"),
    ({"where": {"series": "1"}}, "use setting 'data.series'"),
    ({"group_by": "town"}, "'data.group_by' = 'town': data set 'qmnist' does not tell the town"),
    ({"nonmember_series": "5"}, "'data.nonmember_series' = '5': nothing in"),
    ({"series": "0", "writers": "2366"}, "data.series, data.writers together leave nothing"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_QMNIST)
def test_bad_filters_are_refused(tiny: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        load("qmnist", tiny, **settings)


def test_filters_need_facts() -> None:
    for settings in ({"series": "0"}, {"writers": "1"}, {"group_by": "writer"}, {"nonmember_series": "4"}):
        with pytest.raises(ConfigError, match=r"'digits' does not tell the .*; 'qmnist' and 'sd19' do"):
            load_dataset(DataConfig(name="digits", **settings), 0)
    with pytest.raises(ConfigError, match=r"'data.part' = 'test': data set 'digits' is not in parts"):
        load_dataset(DataConfig(name="digits", part="test"), 0)


@pytest.mark.parametrize(
    ("name", "split", "first", "classes"),
    [
        ("emnist-digits", "digits", 0, 10),
        ("emnist-letters", "letters", 1, 26),
        ("emnist-mnist", "mnist", 0, 10),
        ("emnist-bymerge", "bymerge", 0, 47),
        ("emnist", "balanced", 0, 47),
        ("emnist-byclass", "byclass", 0, 62),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_emnist_is_torchvisions_turned_upright(
    tmp_path: Path, name: str, split: str, first: int, classes: int, part: str
) -> None:
    from torchvision.datasets import EMNIST

    rng, raw = np.random.default_rng(1), tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for one in ("train", "test"):
        labels = rng.integers(first, first + classes, 9).astype(np.uint8)
        pixels = rng.integers(0, 256, (9, 28, 28), dtype=np.uint8)
        (raw / f"emnist-{split}-{one}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"emnist-{split}-{one}-labels-idx1-ubyte").write_bytes(idx(labels))
    ours = load(name, tmp_path, part=part)
    theirs = EMNIST(str(tmp_path), split=split, train=part == "train")
    np.testing.assert_array_equal(ours.images[:, 0], theirs.data.numpy().transpose(0, 2, 1))
    np.testing.assert_array_equal(ours.labels, theirs.targets.numpy() - first)
    assert ours.classes == classes


# --- SD19 -----------------------------------------------------------------------------------------------------------


def stroke(seed: int, narrow: bool = False) -> np.ndarray:
    """True where there is ink: a wandering line and a speck, 128x128."""
    rng = np.random.default_rng(seed)
    ink = np.zeros((128, 128), bool)
    x = 60.0
    for y in range(30, 95):
        x += 0.0 if narrow else rng.normal(0.4, 1.2)
        ink[y, int(x) : int(x) + 5] = True
    ink[5, 5 + seed % 50] = True
    return ink


def packed_of(*inks: np.ndarray) -> np.ndarray:
    return np.stack([np.packbits(~ink) for ink in inks])


def reference(ink: np.ndarray, side: int = 28) -> np.ndarray:
    """The source project's steps, by other libraries: largest box, widened, 5x5 Gaussian, maximum, Lanczos."""
    top, left, bottom, right = max(
        (one.bbox for one in regionprops(pieces(ink, connectivity=2))),
        key=lambda box: (box[2] - box[0]) * (box[3] - box[1]),
    )
    ratio = (right - left) / (bottom - top)
    more = int(1 / ratio) + int(ratio * 15) if ratio < 0.6 else 0
    crop = ink[top:bottom, left - more : right + more].astype(float)
    bell = np.exp(-(np.arange(-2, 3) ** 2) / 18)
    kernel = np.outer(bell, bell) / bell.sum() ** 2
    smooth = convolve2d(np.pad(crop, 2, mode="reflect"), kernel, mode="valid")
    scaled = Image.fromarray((smooth / smooth.max()).astype(np.float32))
    grey = np.asarray(scaled.resize((side, side), Image.Resampling.LANCZOS))
    return np.rint(grey.clip(0, 1) * 255).astype(int)


@pytest.mark.parametrize("narrow", [False, True])
def test_pictures_are_prepared_as_by_the_source_project(narrow: bool) -> None:
    inks = [stroke(seed, narrow) for seed in range(4)]
    ours = prepared(packed_of(*inks), 28)
    assert ours.shape == (4, 1, 28, 28)
    for picture, ink in zip(ours[:, 0], inks, strict=True):
        assert np.abs(picture.astype(int) - reference(ink)).max() <= 1
        assert picture.max() > 220


def test_a_narrow_stroke_at_the_edge_stays_in_the_middle() -> None:
    ink = np.zeros((128, 128), bool)
    ink[20:100, :3] = True
    (picture,) = prepared(packed_of(ink), 28)[:, 0]
    columns = picture.sum(axis=0).astype(float)
    np.testing.assert_allclose(columns, columns[::-1], rtol=0.02, atol=20)


def arrays(folder: Path, series: int, inks: list[np.ndarray], labels: list[int]) -> Path:
    np.save(folder / f"HSF_{series}_images.npy", packed_of(*inks))
    np.save(folder / f"HSF_{series}_labels.npy", np.array(labels, np.uint8))
    (folder / f"HSF_{series}_paths.pkl").write_bytes(b"cos\nabort\n(tR.")  # would end the process if opened
    return folder


BLANK, UNFILLED = np.zeros((128, 128), bool), np.ones((128, 128), bool)


def test_packed_arrays_are_read_without_their_pickles(tmp_path: Path) -> None:
    inks = [stroke(i) for i in range(6)]
    arrays(tmp_path, 0, [inks[0], BLANK, inks[1], inks[0], UNFILLED], [3, 9, 5, 3, 0])
    arrays(tmp_path, 4, inks[2:6], [1, 2, 3, 4])
    dataset = load("sd19", tmp_path)
    assert dataset.labels.tolist() == [3, 5, 1, 2, 3, 4]
    assert dataset.facts["series"].tolist() == [0, 0, 4, 4, 4, 4]
    assert dataset.groups is None
    for words in (
        "blank pictures left out with their labels: 2",
        "duplicates left out: 1",
        "writers unknown",
    ):
        assert words in dataset.note
    np.testing.assert_array_equal(dataset.images, prepared(packed_of(*inks), 28))
    assert load("sd19", tmp_path, series="hsf_4", image_size=20).images.shape == (4, 1, 20, 20)
    assert len(load("sd19", tmp_path, duplicates="keep")) == 7
    np.save(tmp_path / "HSF_0_writers.npy", np.array(["f0007_14"] * 3 + ["f0009_01"] * 2))
    (tmp_path / "HSF_4_writers.csv").write_text("2100\n2100\n2101\n2102\n")
    known = load("sd19", tmp_path)
    assert known.facts["writer"].tolist() == [7, 7, 2100, 2100, 2101, 2102]
    assert known.groups is not None
    assert known.group_names is not None
    names = [known.group_names[i] for i in known.groups]
    assert names == ["hsf_0 writer 7"] * 2 + [*(f"hsf_4 writer {n}" for n in (2100, 2100, 2101, 2102))]


def save_png(folder: Path, name: str, ink: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(~ink * np.uint8(255)).convert("RGB").save(path)


def extracted(folder: Path) -> Path:
    """Two writers of hsf_0 with digits and capitals, one of hsf_4 with digits; one copy, one blank, one unmatched."""
    for series, writer, name, seed, code in (
        (0, "0000_14", "d0000_14", 0, "30"),
        (0, "0000_14", "d0000_14", 1, "37"),
        (0, "0001_41", "d0001_41", 2, "37"),
        (0, "0001_41", "d0001_41", 0, "30"),  # a copy of the first
        (0, "0001_41", "u0001_41", 3, "4b"),
        (4, "2100_02", "d2100_02", 4, "39"),
        (4, "2100_02", "d2100_02", 5, None),
    ):
        number = len(list((folder / f"by_write/hsf_{series}/f{writer}/{name}").glob("*.png")))
        save_png(folder, f"by_write/hsf_{series}/f{writer}/{name}/{name}_{number:05d}.png", stroke(seed))
        if code is not None:
            kind = {"3": "digit", "4": "upper"}[code[0]]
            save_png(folder, f"by_field/hsf_{series}/{kind}/{code}/{code}_{seed:05d}.png", stroke(seed))
    save_png(folder, "by_write/hsf_0/f0000_14/d0000_14/d0000_14_00002.png", BLANK)
    save_png(folder, "by_field/hsf_0/digit/31/31_00000.png", BLANK)
    return folder


def assert_extracted(folder: Path) -> None:
    digits = load("sd19", folder)
    assert digits.labels.tolist() == [0, 7, 7, 9]
    assert digits.facts["writer"].tolist() == [0, 0, 1, 2100]
    assert digits.facts["index"].tolist() == [0, 1, 0, 0]
    assert digits.facts["series"].tolist() == [0, 0, 0, 4]
    assert digits.group_names == ("hsf_0 writer 0", "hsf_0 writer 1", "hsf_4 writer 2100")
    np.testing.assert_array_equal(digits.images, prepared(packed_of(*map(stroke, (0, 1, 2, 4))), 28))
    for words in (
        "1 of hsf_4 left out",
        "blank pictures left out with their labels: 1",
        "duplicates left out: 1",
    ):
        assert words in digits.note
    capitals = load("sd19", folder, part="uppers")
    assert (capitals.labels.tolist(), capitals.classes, capitals.class_names[10]) == ([10], 26, "K")


def test_published_folders_and_archives_know_writers_and_classes(tmp_path: Path) -> None:
    folder = extracted(tmp_path / "folders")
    assert_extracted(folder)
    zipped = tmp_path / "archives"
    zipped.mkdir()
    for name in ("by_write", "by_class"):
        with zipfile.ZipFile(zipped / f"{name}.zip", "w") as archive:
            for path in sorted((folder / name.replace("class", "field")).rglob("*.png")):
                inside = path.relative_to(folder).as_posix()
                if name == "by_class":  # by_class/<code>/hsf_<k>/... says the same
                    _, series, _, code, file = inside.split("/")
                    inside = f"by_class/{code}/{series}/{series}_{file}"
                archive.write(path, inside)
    assert_extracted(zipped)


BAD_SD19 = [
    (
        {"series": "hsf_5"},
        r"'data.series' = '5': nothing in data set 'sd19: digits in by_write' is of 5; it has 0, 4",
    ),
    (
        {"part": "uppers", "series": "4"},
        r"'data.series' = '4': .*sd19: uppers in by_write' is of 4; it has 0",
    ),
    ({"part": "lowers"}, "no lowers of SD19 there, neither by_write with by_field nor HSF_<k>_images.npy"),
    ({"part": "const"}, "'data.part' = 'const': data set 'sd19' has digits, uppers, lowers"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SD19)
def test_missing_series_and_letters_are_named(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        load("sd19", extracted(tmp_path), **settings)
    assert "\n" not in str(caught.value)


def test_half_of_the_published_folders_is_not_enough(tmp_path: Path) -> None:
    folder = extracted(tmp_path)
    (folder / "by_field").rename(folder / "elsewhere")
    with pytest.raises(
        DataError, match="by_write tells no classes of its digits; put by_field or by_class beside"
    ):
        load("sd19", folder)
    (folder / "by_write").rename(folder / "written")
    (folder / "elsewhere").rename(folder / "by_field")
    with pytest.raises(DataError, match="by_field tells no writers of its digits; put by_write beside it"):
        load("sd19", folder)


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    arrays(tmp_path, 4, [stroke(0), stroke(1)], [1, 2])
    with pytest.raises(DataError, match=r"'data.part' = 'uppers': the arrays in .* hold digits only"):
        load("sd19", tmp_path, part="uppers")
    (tmp_path / "HSF_4_writers.csv").write_text("2100\n")
    with pytest.raises(DataError, match="names 1 writers for 2 images"):
        load("sd19", tmp_path)
    for name, array, message in (
        ("HSF_4_labels.npy", np.array([1], np.uint8), "2 images and 1 labels"),
        ("HSF_4_labels.npy", np.array([1, 2], object), "cannot read .* as a plain array"),
        ("HSF_4_images.npy", np.zeros((2, 784), np.uint8), r"wanted \(N, 2048\)"),
    ):
        np.save(tmp_path / name, array, allow_pickle=True)
        with pytest.raises(DataError, match=message):
            load("sd19", tmp_path)
