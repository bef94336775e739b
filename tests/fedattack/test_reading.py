"""What lies behind a file's name, and how much of it there is, is settled before it is read."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import pickle
import signal
import socket
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from adversaries.reconstruction.hcgla.starts import read_start_image
from fedattack import reading
from fedattack.annotation.pairs import Picture
from fedattack.annotation.table import read_table
from fedattack.config import Config, DataConfig
from fedattack.data import load_dataset, plain_pickle
from fedattack.data.cifar import load_batch
from fedattack.data.files import open_tree
from fedattack.data.idx import read_idx
from fedattack.data.images import read_images
from fedattack.errors import BadRequest, ConfigError, DataError
from fedattack.files import load_tensors
from fedattack.generative.saved import load_gan
from fedattack.metrics.weights import read_state
from fedattack.models import read_weights
from fedattack.reading import Unreadable, read_frame, read_json, read_text
from fedattack.storage.plain import read_json as stored_json
from simulations.studies.semsim_presets import Benchmark
from simulations.studies.sweep import Sweep

READERS: dict[str, Callable[[Path], object]] = {
    "settings.toml": Config.from_toml,
    "sweep.toml": Sweep.from_toml,
    "benchmark.toml": lambda path: Benchmark.named(str(path)),
    "document.json": stored_json,
    "weights.safetensors": lambda path: read_weights(str(path), torch.nn.Linear(1, 1)),
    "gan.safetensors": load_gan,
    "weights.pth": read_state,
    "images.npz": read_images,
    "images.npy": read_images,
    "set.zip": read_images,
    "set.tar.xz": lambda path: load_dataset(DataConfig(name="image-folder", dir=str(path)), 0),
    "rated.png": Picture.read,
    "start.png": lambda path: read_start_image(str(path), (3, 8, 8)),
    "ratings.csv": read_table,
    "records.parquet": read_frame,
    "train-images-idx3-ubyte.gz": lambda path: read_idx(path, 3),
}


@pytest.fixture
def clock() -> Iterator[None]:
    """A test that hangs ends after 20 seconds."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.usefixtures("clock")
def test_no_reader_waits_for_a_pipe_or_opens_a_device(name: str, tmp_path: Path) -> None:
    pipe, device, held = (tmp_path / kind / name for kind in ("pipe", "device", "socket"))
    for path in (pipe, device, held):
        path.parent.mkdir()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(held))
        for path in (pipe, device, held, tmp_path / "absent" / name):
            with pytest.raises(BadRequest) as refused:
                READERS[name](path)
            assert name in str(refused.value)
            assert "\n" not in str(refused.value)


def test_kinds_and_sizes_are_named(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 100)
    for path, limit, sentence in (
        (tmp_path, 10, "it is a folder; a regular file is accepted"),
        (Path("/dev/null"), 10, "it is a device"),
        (tmp_path / "big", 99, "it has 100 bytes; at most 99 are accepted"),
        (tmp_path / "none", 10, "no such file"),
        (tmp_path / "big" / "x", 10, "no such file"),
        (Path("/proc/self/maps"), 10, "it holds more than the 10 bytes that are accepted"),
    ):
        with pytest.raises(Unreadable, match=sentence):
            read_text(path, limit)
    error = Unreadable("x", "why", True)
    again = pickle.loads(pickle.dumps(error))  # it travels between processes
    assert (str(again), again.reason, again.absent) == (str(error), "why", True)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", "utf-16"])
def test_byte_order_marks_are_left_out(mark: bytes | str, tmp_path: Path) -> None:
    def written(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(mark) if isinstance(mark, str) else mark + text.encode())
        return path

    assert Config.from_toml(written(tmp_path / "c.toml", "seed = 7\n")).seed == 7
    assert read_json(written(tmp_path / "d.json", '{"a": "\u00e9"}')) == {"a": "\u00e9"}
    written(tmp_path / "celeba" / "identity_CelebA.txt", "000001.png 2880\r\n")
    place = tmp_path / "celeba" / "img_align_celeba"
    place.mkdir()
    Image.new("RGB", (8, 8)).save(place / "000001.png")
    assert load_dataset(DataConfig(name="celeba", dir=str(tmp_path)), 0).labels.tolist() == [2879]


def test_text_that_is_none_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one\ntw\xff\n")
    with pytest.raises(Unreadable, match="line 2 is not UTF-8"):
        read_text(tmp_path / "x")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "more than 64 deep"),
        ("[" * 70 + "]" * 70, "more than 64 deep"),
        ('{"a": ' * 65 + "1" + "}" * 65, "more than 64 deep"),
        ("9" * 5000, "digits"),
        ('{"a": "\\ud800"}', "surrogates"),
        ('{"a": 1', "no JSON"),
    ],
)
def test_documents_of_no_use_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Unreadable, match=sentence):
        read_json(tmp_path / "x.json")
    assert read_json(_json(tmp_path / "y.json", [[["\U0001f600"]]])) == [[["\U0001f600"]]]


def _json(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 3000, "a." * 200_000 + "a = 1", "a = " + "{a=" * 500 + "1" + "}" * 500, "x" * 2_000_000],
)
def test_settings_of_no_use_are_refused_in_time(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match="is not readable TOML"):
        Config.from_toml(tmp_path / "c.toml")


# ----------------------------------------------------------------------------- bombs


def gzip_of_zeros(head: bytes, zeros: int) -> bytes:
    """A .gz file of some bytes and many zeros, made without holding them."""
    packer = zlib.compressobj(1, wbits=31)
    parts = [packer.compress(head)]
    parts += [packer.compress(bytes(2**20)) for _ in range(zeros // 2**20)]
    return b"".join(parts) + packer.flush()


def test_what_unpacks_to_a_hundred_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FREE", 2**20)
    size = 4 * 2**20
    head = bytes([0, 0, 8, 1]) + struct.pack(">I", size)
    (tmp_path / "x.gz").write_bytes(gzip_of_zeros(head, size))
    with pytest.raises(DataError, match=r"unpacks to more than [\d,]+ bytes, of"):
        read_idx(tmp_path / "x.gz", 1)
    member = tarfile.TarInfo("a/1.png")
    member.size = size
    (tmp_path / "x.tar.gz").write_bytes(gzip_of_zeros(member.tobuf(), size))
    with pytest.raises(DataError, match="unpacks to more than"):
        open_tree(tmp_path / "x.tar.gz", lambda _: True)
    for name in ("x.zip", "x.npz"):
        with (
            zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as packed,
            packed.open("images.npy", "w") as stream,
        ):
            for _ in range(size // 2**20):
                stream.write(bytes(2**20))
        with pytest.raises(DataError, match="unpacks to 4,194,304 bytes"):
            read_images(tmp_path / name)


def test_a_zip_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/1.png", bytes(2**20))
    data = (tmp_path / "x.zip").read_bytes().replace(struct.pack("<L", 2**20), struct.pack("<L", 100))
    (tmp_path / "x.zip").write_bytes(data)
    tree = open_tree(tmp_path / "x.zip", lambda _: True)
    with pytest.raises(DataError, match=r"cannot read 'a/1\.png' of archive"):
        tree.read("a/1.png")


def test_an_xz_file_cannot_claim_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as lowered:
        lowered.setattr(reading, "_XZ_MEMORY", 2**20)
        (tmp_path / "x.xz").write_bytes(lzma.compress(b"x" * 100))  # asks for 8 MiB
        with pytest.raises(DataError, match="Memory usage limit"):
            read_idx(tmp_path / "x.xz", 1)
    two = (
        lzma.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2])) + bytes(8) + lzma.compress(b"ab")
    )  # streams and padding
    (tmp_path / "y.xz").write_bytes(two)
    assert read_idx(tmp_path / "y.xz", 1).tolist() == [97, 98]
    (tmp_path / "z.xz").write_bytes(two[:-6])
    with pytest.raises(DataError, match=r"cannot read .*z\.xz"):
        read_idx(tmp_path / "z.xz", 1)


def blank_png(width: int, height: int) -> bytes:
    """A PNG that declares so many pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_pictures_are_bounded_before_they_are_decoded(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(blank_png(13_000, 13_000))
    for read in (
        lambda: load_dataset(DataConfig(name="image-folder", dir=str(tmp_path), image_size=32), 0),
        lambda: read_images(tmp_path),
        lambda: Picture.read(tmp_path / "0.png"),
        lambda: read_start_image(str(tmp_path / "0.png"), (3, 8, 8)),
    ):
        with pytest.raises(BadRequest, match=r"13,000 x 13,000 pixels; from 1 to 50,331,648"):
            read()


# ------------------------------------------------------------------------------- tar


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "a/1.png") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (header(2**40, tarfile.XHDTYPE), "claims 1,099,511,627,776 bytes"),
        (header(2**40, tarfile.GNUTYPE_LONGNAME), "claims 1,099,511,627,776 bytes"),
        (header(-5), "damaged"),
        (
            header(512, tarfile.XHDTYPE) + b"20 size=-99999999\n".ljust(512, b"\0"),
            "extended header in it is damaged",
        ),
        (
            header(512, tarfile.XHDTYPE) + b"14 size=-9999\n".ljust(512, b"\0") + header(0),
            "names size '-9999'",
        ),
        (header(512, tarfile.XHDTYPE) + b"22 GNU.sparse.major=1\n".ljust(512, b"\0"), "holes"),
        (header(0, tarfile.GNUTYPE_SPARSE), "holes"),
        (header(2**20, tarfile.XHDTYPE) + b"1" * 2**20, "extended header in it is damaged"),
        (header(0, tarfile.GNUTYPE_LONGNAME) * 50, "too many headers"),
        (header(100), "it ends within a file"),
        (header(0) + b"x" * 512, "a header in it is damaged"),
        (header(0) + b"x" * 100, "a header in it is damaged"),
    ],
)
def test_hostile_tar_headers_are_refused(data: bytes, sentence: str, tmp_path: Path) -> None:
    for path, content in ((tmp_path / "x.tar", data), (tmp_path / "x.tar.gz", gzip.compress(data))):
        path.write_bytes(content)
        with pytest.raises(DataError, match=sentence):
            open_tree(path, lambda _: True)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
    ],
)
def test_an_archive_holds_regular_files_only(kind: bytes, what: str, tmp_path: Path) -> None:
    member = tarfile.TarInfo("a/1.png")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(DataError, match=f"holds 'a/1.png', which is {what}; regular files are accepted"):
        open_tree(tar(tmp_path / "x.tar", (member, b"")), lambda _: True)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        entry = zipfile.ZipInfo("a/1.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(entry, "/etc/passwd")
    with pytest.raises(DataError, match="which is a link"):
        open_tree(tmp_path / "x.zip", lambda _: True)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_read_as_the_library_does(format: int, tmp_path: Path) -> None:
    names = ["set/a/1.png", "set/\u00e9t\u00e9/2.png", f"set/b/{'long' * 20}.png"]
    names += [] if format == tarfile.USTAR_FORMAT else [f"set/c/{'long' * 60}.png"]
    members = [(tarfile.TarInfo(name), name.encode() * 100) for name in names]
    for path in (tmp_path / "x.tar", tmp_path / "x.tar.gz"):
        tar(tmp_path / "x.tar", *members, format=format)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
        tree = open_tree(path, lambda _: True)
        with tarfile.open(path) as theirs:
            assert {name: tree.read(name) for name in tree.names} == {
                one.name: theirs.extractfile(one).read()
                for one in theirs  # type: ignore[union-attr]
            }


def test_names_that_nothing_can_show_are_refused(tmp_path: Path) -> None:
    for name, place in (("a/\x1b[2J.png", tmp_path / "one"), (b"a/\xff.png", tmp_path / "two")):
        path = os.path.join(os.fsencode(place), os.fsencode(name))
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as stream:
            stream.write(b"x")
        with pytest.raises(DataError, match="UTF-8 without control characters is accepted"):
            open_tree(place, lambda _: True)
    member = tarfile.TarInfo("a/\x1b[2J.png")
    with pytest.raises(DataError, match="control characters"):
        open_tree(tar(tmp_path / "x.tar", (member, b"x")), lambda _: True)
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "at 1.00\u202fPM.png").write_bytes(b"x")  # as macOS names a picture of the screen
    assert len(open_tree(tmp_path / "three", lambda _: True).names) == 1


# --------------------------------------------------------------------------- pickles


def nested_key(levels: int) -> bytes:
    """A pickle of a dict whose key holds 2**levels values, of which every hash function takes each."""
    return b"}N" + b"q\x00h\x00\x86" * levels + b"Ns."


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (nested_key(60), "in two places|for a key"),
        (b"}(K\x01K\x02tNs.", "a tuple for a key; text is accepted"),
        (b"}K\x01Ns.", "a int for a key"),
        (b"]" * 9_000 + b"a" * 8_999 + b".", "8 deep"),
        (b"(" * 10_001 + b".", "marks"),
        (b"N" * 10_001 + b".", "more than 10,000 values"),
        (b"]q\x00h\x00a.", "in two places"),
        (b"}U\x01aI" + b"9" * 10_000 + b"\ns.", "a number of 10,000 digits"),
    ],
)
def test_a_batch_takes_no_time_and_no_memory_but_its_own(
    data: bytes, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_pickle, "_MOST_VALUES", 10_000)
    with pytest.raises(DataError, match=sentence):
        load_batch(data, "data_batch_1")


def test_batches_of_every_protocol_are_read() -> None:
    shape = (3, 3072)
    batch = {
        "data": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        "coarse": np.arange(3, dtype=">i4"),
        "labels": [0, 7, 2**40],
        "share": 0.25,
        "names": ("a", b"\xe9", None, True),
        "filenames": [f"{i}.png" for i in range(300)],
        b"nested": {"x": [[1], [2]]},
    }
    for protocol in range(5):
        found = load_batch(pickle.dumps(batch, protocol), "b")
        assert found.keys() == {"data", "coarse", "labels", "share", "names", "filenames", "nested"}
        np.testing.assert_array_equal(found["data"], batch["data"])
        np.testing.assert_array_equal(found["coarse"], batch["coarse"])
        assert found["coarse"].dtype == np.dtype(">i4")
        for name in ("labels", "share", "names", "filenames"):
            assert found[name] == batch[name]


# --------------------------------------------------------------------------- tensors


def test_tensors_claim_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(data)
        with pytest.raises(Unreadable, match="its header claims"):
            load_tensors(path)
    wide = torch.zeros(1).expand(200_000, 1_000)
    torch.save({"w": wide}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="its tensors claim 800,000,000 bytes"):
        read_state(tmp_path / "x.pth")


@pytest.mark.usefixtures("clock")
def test_a_weight_file_cannot_hold_up_its_reader(tmp_path: Path) -> None:
    payload = b"\x80\x02}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Ns."
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as packed:
        packed.writestr("archive/data.pkl", payload)
        packed.writestr("archive/version", b"3\n")
    with pytest.raises(DataError, match="holds more than 10,000,000 others"):
        read_state(tmp_path / "x.pth")


# --------------------------------------------------------------------------- remarks


def test_what_is_not_read_of_a_picture_is_said(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "1.jpg", exif=turned.tobytes())
    picture.convert("RGBA").save(tmp_path / "2.png")
    picture.convert("P").save(tmp_path / "3.png", transparency=bytes(range(256)))
    picture.convert("CMYK").save(tmp_path / "4.jpg")
    picture.save(tmp_path / "5.gif", save_all=True, append_images=[picture.rotate(90)])
    (tmp_path / "6.ppm").write_bytes(b"P6 8 8 65535\n" + pixels.astype(">u2").tobytes())
    picture.save(tmp_path / "7.png")
    dataset = load_dataset(DataConfig(name="image-folder", dir=str(tmp_path)), 0)
    assert dataset.images.shape == (7, 3, 8, 8)
    np.testing.assert_array_equal(dataset.images[6].transpose(1, 2, 0), pixels)
    for remark in (
        "1 picture that EXIF says to turn, read as they are stored",
        "2 pictures with transparency, which is dropped",
        "1 picture in CMYK",
        "1 picture of several frames: the first is read",
        "1 picture of 16 bits a channel, read as 8",
    ):
        assert remark in dataset.note, dataset.note


def test_text_of_a_table_is_text(tmp_path: Path) -> None:
    pd.DataFrame({"name": ["anybody"] * 3, "number": [1, 2, 3]}).to_parquet(
        tmp_path / "x.parquet", compression=None, use_dictionary=False
    )
    assert read_frame(tmp_path / "x.parquet")["name"].tolist() == ["anybody"] * 3
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"anybody", b"any\xff\xfe\xfdy"))
    with pytest.raises(Unreadable, match="it is damaged"):
        read_frame(tmp_path / "x.parquet")
