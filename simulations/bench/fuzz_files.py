"""Small sound files of every kind that the project reads, each with the reader that takes it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image
from safetensors.torch import save

from adversaries.inversion.learning.files import load_learned, save_learned
from adversaries.reconstruction.hcgla.starts import read_start_image
from fedattack import sealed
from fedattack.annotation.exchange import read_answers
from fedattack.annotation.pairs import Picture
from fedattack.annotation.table import COLUMNS, csv_lines, read_table, to_frame
from fedattack.config import CompressionConfig, Config, DataConfig, ModelConfig, TrainingConfig
from fedattack.data.images import plain_arrays, read_images
from fedattack.data.load import load_dataset
from fedattack.generative.saved import GanSettings, load_gan, save_gan
from fedattack.groundtruth import GroundTruth
from fedattack.metrics.semsim.checkpoint import Described, load_net, save_net
from fedattack.metrics.weights import read_state
from fedattack.models import build_model, initial_weights, read_weights
from fedattack.observation import Candidates, Observation, Scenario, Update
from fedattack.reading import read_frame, read_json
from fedattack.storage import load_observations, load_truths, save_observation, save_truth
from fedattack.storage.membership import load_candidates, save_candidates
from simulations.studies.semsim_presets import PRESETS as BENCHMARKS
from simulations.studies.semsim_presets import Benchmark
from simulations.studies.sweep import Sweep


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


_PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": _gzip, "xz": lzma.compress, "bz2": bz2.compress}


def _same(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Kind:
    """Sound bytes of a kind of file, its name, and the reader; `mended` repairs checksums, or packs."""

    sound: bytes
    name: str
    read: Callable[[Path], object]
    mended: Callable[[bytes], bytes] = _same
    beside: dict[str, bytes] = field(default_factory=dict)

    def write(self, data: bytes, place: Path) -> Path:
        """The file, in a folder of its own with what lies beside it."""
        for name, content in {**self.beside, self.name: data}.items():
            path = place / _folder(self.name) / name
            if not path.exists() or name == self.name:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return place / _folder(self.name) / self.name


def _folder(name: str) -> str:
    return name.replace("/", "_")


def file_kinds(place: Path) -> dict[str, Kind]:
    """Every kind, by name; `place` is a folder to make the files in."""
    kinds: dict[str, Kind] = {}
    for make in (_pictures, _numbers, _archives, _tables, _texts, _tensors, _observed):
        for name, kind in make(place / make.__name__).items():
            assert name not in kinds
            kinds[name] = kind
    return kinds


# ------------------------------------------------------------------- pictures


def _picture(format: str, side: int = 12, grey: bool = False, **options: Any) -> bytes:
    rng = np.random.default_rng(side)
    pixels = rng.integers(0, 256, (side, side) if grey else (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def _animated(format: str) -> bytes:
    frames = [Image.fromarray(np.full((12, 12, 3), 60 * i, np.uint8)) for i in range(4)]
    stream = io.BytesIO()
    frames[0].save(stream, format, save_all=True, append_images=frames[1:])
    return stream.getvalue()


def _chunks_mended(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold."""
    done, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        done += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(done) + data[at:]


def _read_set(path: Path) -> None:
    load_dataset(DataConfig(name="image-folder", dir=str(path.parent), image_size=8), 0)


def _pictures(place: Path) -> dict[str, Kind]:
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = io.BytesIO()
    Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12)).convert("P").save(
        palette, "PNG", transparency=bytes(range(256))
    )
    files = {
        "png": _picture("PNG"),
        "png-grey": _picture("PNG", grey=True),
        "png-palette": palette.getvalue(),
        "jpg": _picture("JPEG", exif=turned.tobytes()),
        "gif": _animated("GIF"),
        "webp": _picture("WEBP"),
        "webp-animated": _animated("WEBP"),
        "bmp": _picture("BMP"),
        "ppm": _picture("PPM"),
        "pgm": _picture("PPM", grey=True),
        "tif": _picture("TIFF", compression="tiff_lzw"),
        "tiff": _picture("TIFF"),
    }
    kinds = {
        name: Kind(
            data,
            f"{name}.{name.partition('-')[0]}",
            _read_set,
            _chunks_mended if name.startswith("png") else _same,
        )
        for name, data in files.items()
    }
    kinds["rated picture"] = Kind(
        files["png"], "rated.png", lambda path: Picture.read(path).pixels(), _chunks_mended
    )
    kinds["start image"] = Kind(
        files["jpg"], "start.jpg", lambda path: read_start_image(str(path), (3, 12, 12))
    )
    kinds["square images"] = Kind(
        files["png"], "square/1.png", lambda path: read_images(path.parent), _chunks_mended
    )
    return kinds


# -------------------------------------------------------------------- numbers


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _set(name: str, levels: int = 1) -> Callable[[Path], object]:
    return lambda path: load_dataset(DataConfig(name=name, dir=str(path.parents[levels - 1])), 0)


def _numbers(place: Path) -> dict[str, Kind]:
    rng = np.random.default_rng(0)
    images, labels = _idx(rng.integers(0, 256, (5, 8, 8), dtype=np.uint8)), _idx(np.arange(5, dtype=np.uint8))
    pair = {"train-labels-idx1-ubyte": labels}
    kinds = {"idx": Kind(images, "train-images-idx3-ubyte", _set("mnist"), beside=pair)}
    for suffix, pack in _PACKERS.items():
        name = f"train-images-idx3-ubyte.{suffix}"
        kinds[f"idx.{suffix}"] = Kind(pack(images), name, _set("mnist"), beside=pair)
        within = {f"in/{other}": data for other, data in pair.items()}
        kinds[f"idx in {suffix}"] = Kind(images, f"in/{name}", _set("mnist"), pack, within)
    batch = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [1, 2], "batch_label": "one"}
    for protocol in (0, 2, 4):
        name = f"cifar-{protocol}/data_batch_1"
        kinds[f"cifar {protocol}"] = Kind(pickle.dumps(batch, protocol), name, _set("cifar10"))
    meta = {"label_names": [str(i) for i in range(10)]}
    kinds["cifar names"] = Kind(
        pickle.dumps(meta, 2),
        "names/batches.meta",
        _set("cifar10"),
        beside={"names/data_batch_1": pickle.dumps(batch, 2)},
    )
    values = rng.uniform(-1, 1, (3, 256)).round(2)
    rows = "\n".join(
        f"{i + 1} " + " ".join(f"{j}:{v}" for j, v in enumerate(row, 1)) for i, row in enumerate(values)
    )
    kinds["usps"] = Kind(rows.encode(), "usps.bz2", _set("usps"), bz2.compress)
    kinds["usps.bz2"] = Kind(bz2.compress(rows.encode()), "packed/usps.bz2", _set("usps"))
    plain = "\n".join(f"{i} " + " ".join(map(str, row)) for i, row in enumerate(values))
    kinds["zip.train"] = Kind(plain.encode(), "zip.train", _set("usps"))
    kinds |= _arrays(rng)
    return kinds


def _arrays(rng: np.random.Generator) -> dict[str, Kind]:
    def npy(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    def npz(images: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", images)
            archive.writestr("labels.npy", npy(np.arange(4)))
            archive.writestr("names.npy", npy(np.array(["Ann_Lee_0001", "b", "c", "d"])))
        return stream.getvalue()

    images = npy(rng.integers(0, 256, (4, 8, 8), dtype=np.uint8))
    packed = npy(rng.integers(0, 256, (4, 2048), dtype=np.uint8))
    series = {"HSF_0_labels.npy": npy(np.arange(4, dtype=np.uint8)), "HSF_0_writers.csv": b"1\n2\n3\n4\n"}
    return {
        "npy": Kind(images, "images.npy", read_images),
        "npz": Kind(npz(images), "images.npz", read_images),
        "npy in npz": Kind(images, "in.npz", lambda path: plain_arrays(path, "labels", "names"), npz),
        "sd19": Kind(packed, "HSF_0_images.npy", _set("sd19"), beside=series),
        "sd19 writers": Kind(
            series["HSF_0_writers.csv"],
            "writers/HSF_0_writers.csv",
            _set("sd19"),
            beside={
                "writers/HSF_0_images.npy": packed,
                "writers/HSF_0_labels.npy": series["HSF_0_labels.npy"],
            },
        ),
    }


# ------------------------------------------------------------------- archives


def _tar(format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name in ("set/a/1.png", f"set/b/{'long' * 40}.png"):
            data = _picture("PNG", 8)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _headers_mended(data: bytes) -> bytes:
    """A tar whose headers have the checksums of what they say."""
    done = bytearray(data)
    for at in range(0, len(done) - 511, 512):
        if done[at + 257 : at + 262] == b"ustar":
            block = done[at : at + 512]
            block[148:156] = b" " * 8
            done[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(done)


def _after(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: pack(_headers_mended(data))


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("set/a/1.png", r"set\b\2.png"):
            archive.writestr(name, _picture("PNG", 8))
    return stream.getvalue()


def _read_archive(path: Path) -> None:
    load_dataset(DataConfig(name="image-folder", dir=str(path), image_size=8), 0)


def _archives(place: Path) -> dict[str, Kind]:
    pax, gnu = _tar(tarfile.PAX_FORMAT), _tar(tarfile.GNU_FORMAT)
    kinds = {
        "tar pax": Kind(pax, "pax.tar", _read_archive, _headers_mended),
        "tar gnu": Kind(gnu, "gnu.tar", _read_archive, _headers_mended),
        "zip": Kind(_zip(), "set.zip", _read_archive),
    }
    for suffix, pack in _PACKERS.items():
        kinds[f"tar.{suffix}"] = Kind(pack(pax), f"set.tar.{suffix}", _read_archive)
        kinds[f"tar in {suffix}"] = Kind(pax, f"in.tar.{suffix}", _read_archive, _after(pack))
    return kinds


# --------------------------------------------------------------------- tables


def _tables(place: Path) -> dict[str, Kind]:
    row = dict.fromkeys(COLUMNS, "x") | {
        "schema_version": "1",
        "original_sha256": "0" * 64,
        "reconstruction_sha256": "1" * 64,
        "compression": "1",
        "seed": "0",
        "protocol": "match",
        "label": "1",
        "choice": "same",
        "confidence": "",
        "annotator_type": "human",
        "proxy_name": "",
        "shown_px": "256",
        "timestamp": "2026-01-01T00:00:00+00:00",
        "is_attention_check": "0",
    }
    frame = io.BytesIO()
    to_frame([row, row]).to_parquet(frame)
    identities = b"\xef\xbb\xbf000001.png 2880\r\n000002.png 1\r\n"
    faces = {f"celeba/img_align_celeba/{i:06}.png": _picture("PNG", 8) for i in (1, 2)}
    return {
        "ratings csv": Kind(csv_lines([row, row], header=True), "ratings.csv", read_table),
        "ratings parquet": Kind(frame.getvalue(), "ratings.parquet", read_table),
        "records csv": Kind(b"attack,round\nig,1\ndlg,2\n", "records.csv", read_frame),
        "records parquet": Kind(frame.getvalue(), "records.parquet", read_frame),
        "identities": Kind(identities, "celeba/identity_CelebA.txt", _set("celeba", 1), beside=faces),
    }


# ----------------------------------------------------------------------- text


_SWEEP = """
[settings]
dataset = "digits"
engine = "inline"
[axes]
attack = ["ig", "dlg"]
batch-size = [1, 2]
"""


def _texts(place: Path) -> dict[str, Kind]:
    answers = {"format": 1, "export": "abc", "annotator": "ann", "answers": [{"token": "t", "choice": 0}]}
    document = {"rounds": [{"round": 1, "loss": 0.5, "clients": [1, 2]}], "note": "\u00e9"}
    return {
        "settings": Kind(Config().to_toml().encode(), "config.toml", Config.from_toml),
        "sweep": Kind(_SWEEP.encode(), "sweep.toml", Sweep.from_toml),
        "benchmark": Kind(
            tomli_w.dumps(next(iter(BENCHMARKS.values()))).encode(),
            "benchmark.toml",
            _refused_or_read(Benchmark.named),
        ),
        "answers": Kind(json.dumps(answers).encode(), "answers.json", read_answers),
        "json": Kind(json.dumps(document).encode(), "document.json", read_json),
    }


def _refused_or_read(read: Callable[[str], object]) -> Callable[[Path], object]:
    return lambda path: read(str(path))


# -------------------------------------------------------------------- tensors


def _model() -> ModelConfig:
    return ModelConfig(name="tiny-cnn", classes=3, channels=1, image_size=8, activation="sigmoid")


def _torch_file(weights: dict[str, torch.Tensor], zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(weights, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _tensors(place: Path) -> dict[str, Kind]:
    weights = initial_weights(_model(), 0)
    module = build_model(_model())
    save_learned(place / "learned.safetensors", {"w": torch.ones(3)}, {"kind": "denoiser"})
    described = Described(channels=1, size=8, mean=(0.5,), std=(0.2,), seed=0)
    save_net(place / "net.safetensors", "net", {"w": torch.ones(3)}, described)
    nets = ModelConfig(name="wgan-gp-mlp", channels=1, image_size=8, classes=10, activation="relu", width=8)
    gan = GanSettings(model=nets)
    save_gan(place / "gan.safetensors", initial_weights(gan.model, 0), gan)
    few = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    return {
        "weights": Kind(save(weights), "weights.safetensors", lambda path: read_weights(str(path), module)),
        "learned": Kind(
            (place / "learned.safetensors").read_bytes(),
            "learned.safetensors",
            lambda path: load_learned(path, "denoiser"),
        ),
        "net": Kind(
            (place / "net.safetensors").read_bytes(),
            "net.safetensors",
            lambda path: load_net(path, "net", Described),
        ),
        "generator": Kind((place / "gan.safetensors").read_bytes(), "gan.safetensors", load_gan),
        "torch": Kind(_torch_file(few, True), "torch.pth", read_state),
        "torch, old": Kind(_torch_file(few, False), "old.pth", read_state),
    }


def _of(read: Callable[[Path, str], object], what: str) -> Callable[[Path], object]:
    return lambda path: read(path, what)


def _observed(place: Path) -> dict[str, Kind]:
    model = _model()
    weights = initial_weights(model, 0)
    names, shapes = tuple(weights), tuple(tuple(t.shape) for t in weights.values())
    values = torch.cat([t.reshape(-1) for t in weights.values()])
    scenario = Scenario(model, TrainingConfig(), CompressionConfig(name="none"))
    save_observation(
        place / "seen", Observation(1, 0, scenario, weights, Update(names, shapes, None, values), 1)
    )
    truth = GroundTruth(1, 0, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), (4, 5))
    save_truth(place / "truth", truth)
    save_candidates(place / "seen", Candidates(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])))
    kinds: dict[str, Kind] = {}
    for what, load in (("seen", load_observations), ("truth", load_truths)):
        held = {str(p.relative_to(place / what)): p.read_bytes() for p in (place / what).rglob("round-*/*")}
        for name, data in held.items():
            label = f"{what} {name.partition('/')[2]}"
            beside = {f"{_folder(label)}/{other}": content for other, content in held.items()}
            kinds[label] = Kind(
                data,
                f"{_folder(label)}/{name}",
                lambda path, load=load: load(path.parents[1]),  # type: ignore[misc]
                beside=beside,
            )
    data = (place / "seen" / "candidates.safetensors").read_bytes()
    sealed.write_json(place / "round.json", {"loss": 0.5, "clients": [1, 2]}, "round 1")
    sealed.write_sealed(place / "state.safetensors", {"w": torch.ones(3)}, "state", None, {"examples": "3"})
    for name, read in (("round.json", "round 1"), ("state.safetensors", "state")):
        reader = sealed.read_json if name == "round.json" else sealed.read_sealed
        kinds[f"sealed {name}"] = Kind((place / name).read_bytes(), name, _of(reader, read))
    kinds["candidates"] = Kind(data, "candidates.safetensors", lambda path: load_candidates(path.parent))
    return kinds
