"""What is read from a client's bytes and what is refused, and that the light records travel as Flower's own."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedattack.errors import PayloadError
from strategies import messages
from strategies.light_records import HeldArray, LightArrays, LightMetrics, LightRecords, SteppedArray
from strategies.messages import read_dense, to_record, to_tensors

VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)
ALLOWED = 4096
"""Bytes of the longest header that is parsed."""


def npy(value: np.ndarray = VALUE, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, value, version)
    return stream.getvalue()


def headed(header: bytes, body: bytes = VALUE.tobytes()) -> bytes:
    """An npy file of format 1.0 with that header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def padded(length: int) -> bytes:
    return (b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }".ljust(length - 1)) + b"\n"


def read(data: bytes, *, stype: str = "numpy.ndarray") -> np.ndarray:
    return read_dense(Array("float32", (2, 3), stype, data), (2, 3), "float32")


@pytest.mark.parametrize(
    "data",
    [
        npy(),
        npy(version=(2, 0)),
        npy(version=(3, 0)),
        npy(np.asfortranarray(VALUE)),
        headed(padded(ALLOWED)),
    ],
)
def test_npy_of_all_versions_and_orders_is_read_without_a_copy(data: bytes) -> None:
    value = read(data)
    assert np.array_equal(value, VALUE)
    assert not value.flags.writeable
    assert not value.flags.owndata


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy()[:-1], "an array declares 24 bytes and brings 23"),
        (npy() + b"x", "an array declares 24 bytes and brings 25"),
        (npy(VALUE.T.copy()), r"an array of shape \(3, 2\) and type float32, not \(2, 3\) and float32"),
        (npy(VALUE.astype("f8")), r"an array of shape \(2, 3\) and type float64, not \(2, 3\) and float32"),
        (npy().replace(b"\x01\x00", b"\x01\x01", 1), r"not readable as npy: .*1, 1"),
        (npy(version=(2, 0)).replace(b"\x02\x00", b"\x02\x01", 1), r"not readable as npy: .*2, 1"),
        (npy(version=(2, 0)).replace(b"\x02\x00", b"\x00\x00", 1), r"not readable as npy: .*0, 0"),
        (b"PK" + npy(), "not readable as npy"),
        (npy(np.where(VALUE == 4, np.nan, VALUE).astype("f4")), "holds NaN or infinite"),
        (npy(np.where(VALUE == 4, -np.inf, VALUE).astype("f4")), "holds NaN or infinite"),
    ],
)
def test_other_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        read(data)


def test_what_a_header_says_is_cut_to_a_line() -> None:
    with pytest.raises(PayloadError, match=r"its header declares 4097 bytes; at most 4096 are accepted$"):
        read(headed(padded(ALLOWED + 1)))
    with pytest.raises(PayloadError) as caught:
        read(headed(b"{" + b"?\n" * 1000 + b"}"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_another_serialisation_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"serialised as 'pickle', not 'numpy\.ndarray'"):
        read(npy(), stype="pickle")


@pytest.mark.parametrize("kind", [Array, HeldArray])
def test_shape_type_and_finiteness_hold_for_arrays_of_either_kind(kind: type[Array]) -> None:
    counts = np.arange(3)
    assert np.array_equal(read_dense(kind(counts), (3,), "int64"), counts)
    assert np.array_equal(read_dense(kind(VALUE), (2, 3), "float32"), VALUE)
    for shape, dtype in (((3, 2), "float32"), ((2, 3), "float64"), ((6,), "float64")):
        with pytest.raises(PayloadError, match="an array of shape"):
            read_dense(kind(VALUE), shape, dtype)
    with pytest.raises(PayloadError, match="NaN"):
        read_dense(kind(VALUE * np.float32(np.nan)), (2, 3), "float32")


def test_tensors_that_are_differentiated_become_records() -> None:
    weights = {"w": torch.ones(2, 2, requires_grad=True), "n": torch.tensor(3)}
    back = to_tensors(to_record(weights))
    assert list(back) == ["w", "n"]
    assert torch.equal(back["w"], weights["w"].detach())
    assert back["n"].dtype == torch.int64


def test_error_codes_are_nobody_else_s() -> None:
    flowers = {value for name, value in vars(ErrorCode).items() if not name.startswith("_")}
    ours = [messages.DROPPED_OUT, messages.OVERSIZED]
    assert flowers
    assert len({*ours} - flowers) == len(ours)


# ---------------------------------------------------------------------- light records


@pytest.mark.parametrize("scale", [1.0, 1.5, -0.5])
@pytest.mark.parametrize("sparse", [False, True])
def test_stepped_arrays_scale_their_step(sparse: bool, scale: float) -> None:
    base = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    positions = np.array([1, 5]) if sparse else None
    values = np.array([2.0, -3.0], np.float32) if sparse else np.arange(6, dtype=np.float32)
    expected = base.copy()
    expected.flat[positions if sparse else slice(None)] += np.float32(scale) * values
    stepped = SteppedArray(base, values, positions, scale)
    assert np.array_equal(read_dense(stepped, (2, 3), "float32"), expected)
    assert np.array_equal(pickle.loads(pickle.dumps(stepped)).numpy(), expected)


def test_objects_are_not_written() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        _ = HeldArray(np.array([object()])).data


def test_light_records_go_over_the_wire_as_flowers_do() -> None:
    heavy = ArrayRecord({"a": Array(VALUE), "b": Array(VALUE.T.copy())})
    light = LightArrays({"a": HeldArray(VALUE), "b": HeldArray(VALUE.T.copy())})
    metrics, light_metrics = MetricRecord({"n": 1, "x": 0.5}), LightMetrics({"n": 1, "x": 0.5})
    whole = RecordDict({"arrays": heavy, "metrics": metrics})
    light_whole = LightRecords({"arrays": light, "metrics": light_metrics})
    for ours, flowers in ((light, heavy), (light_metrics, metrics), (light_whole, whole)):
        assert ours.deflate() == flowers.deflate()
        assert type(pickle.loads(pickle.dumps(ours))) is type(flowers)
        assert pickle.loads(pickle.dumps(ours)) == flowers
    assert HeldArray(VALUE).deflate() == Array(VALUE).deflate()


def test_light_records_are_mappings() -> None:
    light = LightMetrics({"n": 1})
    assert light == {"n": 1}
    assert light != {"n": 2}
    assert light != 1
    assert (light.get("n"), light.get("m"), light.get("m", 7)) == (1, None, 7)
    assert ("n" in light, "m" in light, len(light), repr(light)) == (True, False, 1, "{'n': 1}")
    assert (list(light.keys()), list(light.values()), list(light.items())) == (["n"], [1], [("n", 1)])
