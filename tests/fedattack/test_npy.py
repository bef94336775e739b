"""NumPy's files: what is read as NumPy reads it, and what is refused before memory is taken."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedattack.errors import DataError
from fedattack.npy import MAX_HEADER, read_array, read_header, read_npy, read_npz

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(24, dtype="<i8").reshape(2, 3, 4)),
    np.arange(4, dtype=">f8"),
    np.array(2.5),
    np.zeros((0, 7), np.uint8),
    np.array([True, False]),
    np.array([1 + 2j], np.complex64),
    np.array(["Ann Lée", "Bo"]),
    np.array([b"ab", b"c"]),
]


def npy(value: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, value, version)
    return stream.getvalue()


def headed(header: str, body: bytes = b"") -> bytes:
    text = header.encode("utf-8")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def header(descr: str = "'<f4'", fortran: str = "False", shape: str = "(2, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("value", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_are_read_as_numpy_reads_them(value: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, value)
    np.savez_compressed(tmp_path / "a.npz", images=value, other=np.arange(3))
    found = [
        read_array(npy(value, (1, 0))),
        read_array(npy(value, (2, 0))),
        read_npy(path, 10_000),
        read_npy(path, 10_000, mapped=True),
        read_npz(tmp_path / "a.npz", ["images", "labels"], 10_000)["images"],
    ]
    for one in found:
        assert one.dtype == value.dtype
        assert np.array_equal(one, value)
        assert one.flags.f_contiguous == value.flags.f_contiguous


@pytest.mark.parametrize(
    "text",
    [
        '{"shape":(2,3),"fortran_order":False,"descr":"<f4"}',
        "{ 'descr' : '<f4' , 'shape':( 2L , 3L , ), 'fortran_order':  False}   \n",
    ],
)
def test_other_writers_spellings(text: str) -> None:
    assert read_header(headed(text)).shape == (2, 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (header(descr="'|O'"), r"type '\|O'; accepted: numbers"),
        (header(descr="[('a', '<f4')]"), "header holds"),
        (header(descr="'<f4', 'descr': '<f8'"), "'descr' twice"),
        (header(shape="(-1, 3)"), "header holds"),
        (header(shape="(2**3,)"), "header holds"),
        (header(shape="6"), "header holds"),
        (header(shape="(3)"), "header holds"),
        (header(shape=f"({'9' * 19}, {'9' * 19})"), "no memory holds"),
        (header(shape=f"({'9' * 19}, 0, {'9' * 19})"), "no memory holds"),
        (header(shape="(" + "1, " * 33 + ")"), "header holds"),
        (header(shape="(" * 3000), "header holds"),
        (header(descr="'<U0'"), "text of no length"),
        (header(fortran="0"), "header holds"),
        (header(descr="(2, 3)"), r"holds .'descr': \(2, 3\)"),
        ("{'descr': '<f4', 'shape': (2, 3)}", "lacks 'fortran_order'"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'x': 1}", "header holds"),
        ("__import__('os')", "is no dict"),
        ("{}", "lacks 'descr'"),
        ("{é}", "not ASCII"),
        (" " * (MAX_HEADER + 1), "at most 4096"),
    ],
)
def test_other_headers_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_header(headed(text, b"\0" * 24))


def test_text_that_is_none() -> None:
    for point in (0x110000, 0xD800):
        data = headed(header("'<U1'", shape="(1,)"), point.to_bytes(4, "little"))
        with pytest.raises(ValueError, match="text that is none"):
            read_array(data)


def test_files_that_promise_more_than_they_bring(tmp_path: Path) -> None:
    whole = npy(np.arange(1000, dtype=np.float64))
    path, archive = tmp_path / "a.npy", tmp_path / "a.npz"
    for data, why in (
        (whole[:-1], "declares 8000 bytes and 7999 follow"),
        (whole + b"\0", "declares 8000 bytes and 8001 follow"),
        (headed(header(shape="(99999999999,)")), "declares 399999999996 bytes and 0 follow"),
        (b"", "begins with b''"),
        (b"PK\x03\x04" + whole, "begins with"),
    ):
        path.write_bytes(data)
        for mapped in (False, True):
            with pytest.raises(DataError, match=why):
                read_npy(path, 10_000, mapped=mapped)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("images.npy", data)
        with pytest.raises(DataError, match=f"'images': .*{why}"):
            read_npz(archive, ["images"], 10_000)


def test_limits_hold_before_anything_is_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "a.npz"
    np.savez_compressed(archive, images=np.zeros(10**7, np.uint8))
    assert archive.stat().st_size < 20_000
    with pytest.raises(DataError, match="unpacks to 10,000,128 bytes; 1,000,000 are accepted"):
        read_npz(archive, ["images"], 10**6)
    np.save(tmp_path / "a.npy", np.zeros(1000))
    with pytest.raises(DataError, match="has 8,128 bytes; 8,000 are accepted"):
        read_npy(tmp_path / "a.npy", 8000)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("images.npy", npy(np.zeros(3)))
        packed.writestr("images", npy(np.ones(3)))
    with pytest.raises(DataError, match="'images' 2 times"):
        read_npz(archive, ["images"], 10**6)
    archive.write_bytes(b"no zip")
    with pytest.raises(DataError, match="not a zip file"):
        read_npz(archive, ["images"], 10**6)


def test_mutated_files_are_read_as_numpy_reads_them_or_refused() -> None:
    """What NumPy's reader and this one both accept, they read alike; anything else is one ValueError."""
    rng, read = np.random.default_rng(0), 0
    seeds = [npy(value) for value in ARRAYS if value.dtype.kind != "S"]
    for _ in range(10_000):
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.choice([rng.integers(256), *b"'(),:<>L{}0123456789"])
        try:
            found = read_array(bytes(data))
        except ValueError:
            continue
        read += 1
        try:
            theirs = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except ValueError:
            continue
        assert found.shape == theirs.shape
        assert found.tobytes() == theirs.tobytes()
    assert read > 300
