"""Arrays in .npz files, weights as torch saves them, models that outgrow their data, plug-ins that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedattack.config import Config, DataConfig, ModelConfig
from fedattack.data import build_world, load_dataset
from fedattack.errors import ConfigError, DataError
from fedattack.models import build_model, check_size, initial_weights, parameter_count, resolve

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(12) % 4


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": IMAGES, "labels": LABELS},
        {"x": IMAGES, "y": LABELS[:, None]},
        {"X": IMAGES.transpose(0, 3, 1, 2) / 255, "y": LABELS.astype(float)},
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:2], "y_test": LABELS[:2]},
        {"train_images": IMAGES, "train_labels": LABELS, "val_images": IMAGES[:1], "val_labels": LABELS[:1]},
    ],
)
def test_npz_under_the_names_that_people_use(tmp_path: Path, arrays: dict) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    dataset = load_dataset(DataConfig(name="npz", dir=str(tmp_path / "own.npz")), 0)
    assert (dataset.images == IMAGES.transpose(0, 3, 1, 2)).all()
    assert dataset.labels.tolist() == LABELS.tolist()
    assert f"read from {next(iter(arrays))} and" in dataset.note


def test_parts_and_people_of_an_npz(tmp_path: Path) -> None:
    parts = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:2], "y_test": LABELS[:2]}
    np.savez(tmp_path / "parts.npz", **parts)
    assert len(load_dataset(DataConfig(name="npz", dir=str(tmp_path), part="test"), 0)) == 2
    with pytest.raises(ConfigError, match="has train, test"):
        load_dataset(DataConfig(name="npz", dir=str(tmp_path), part="val"), 0)
    np.savez(tmp_path / "parts.npz", images=IMAGES, labels=LABELS, groups=np.arange(12) // 3)
    dataset = load_dataset(DataConfig(name="npz", dir=str(tmp_path)), 0)
    assert dataset.groups is not None
    assert dataset.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pixels": IMAGES}, "it holds pixels; wanted images and labels"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "12 images need"),
        ({"images": IMAGES[:, :5], "labels": LABELS}, "square ones"),
        ({"images": IMAGES / 100, "labels": LABELS}, "float images run from"),
        ({"images": np.array([{}]), "labels": LABELS}, "not a readable .npz file of plain arrays"),
    ],
)
def test_an_npz_that_cannot_be_used(tmp_path: Path, arrays: dict, said: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(DataError, match=said):
        load_dataset(DataConfig(name="npz", dir=str(tmp_path)), 0)


MLP = resolve(ModelConfig(name="mlp", width=8), 1, 8, 10)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_as_torch_saves_them(tmp_path: Path, wrap, prefix: str, dtype: torch.dtype) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in initial_weights(MLP, 7).items()}
    given = {prefix + name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save(wrap(given), tmp_path / "w.pt")
    save_file(given, tmp_path / "w.safetensors")
    for file in ("w.pt", "w.safetensors"):
        found = initial_weights(MLP.model_copy(update={"weights": str(tmp_path / file)}), 0)
        assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (
            {"1.weight": torch.zeros(8, 63)},
            r"do not fit the model: '1.weight' is \(8, 63\) there, and \(8, 64\)",
        ),
        ([torch.zeros(3)], "holds a list, no tensors by name"),
        ({"state_dict": {"1.weight": 3}}, "'1.weight' in it is a int, no tensor"),
        (build_model(MLP), "no readable state dict, or holds more than tensors"),
        ({}, "holds a dict, no tensors by name"),
    ],
)
def test_files_that_are_no_weights_of_the_model(tmp_path: Path, held: object, said: str) -> None:
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(DataError, match=said):
        initial_weights(MLP.model_copy(update={"weights": str(tmp_path / "w.pt")}), 0)


def test_a_model_that_outgrows_its_images_is_said_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    large = resolve(ModelConfig(name="lenet-zhu"), 3, 250, 5749)
    assert parameter_count(large) == 484_728_469
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 64 * 2**30})())
    said = check_size(large, as_stored=True)
    assert "484,728,469 parameters for images of 3 x 250 x 250 (as they are stored" in said
    assert "--image-size 32 (7,834,249)" in said
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 4 * 2**30})())
    with pytest.raises(ConfigError, match=r"takes about 10.8 GiB, and 4.0 GiB are free; --image-size 32"):
        check_size(large, as_stored=True)
    assert check_size(resolve(ModelConfig(), 3, 32, 10), as_stored=True) == ""


class NoReader:
    """Nothing that a data set could be."""


def no_listing(config: DataConfig) -> int:
    return 3


PAIR = (IMAGES, LABELS)
TORCH_SET = torch.utils.data.TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS))


@pytest.mark.parametrize("name", ["PAIR", "TORCH_SET"])
def test_arrays_and_torch_data_sets_by_name(name: str) -> None:
    assert (load_dataset(DataConfig(name=f"{__name__}:{name}"), 0).labels == LABELS).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"dataset": f"{__name__}:NoReader"},
            "a data-set plug-in is a function of a fedattack.config.DataConfig",
        ),
        ({"dataset": f"{__name__}:no_listing"}, "this one answers a int"),
        ({"model": f"{__name__}:NoReader"}, "it makes a NoReader; a model is an nn.Module"),
        ({"model": f"{__name__}:LABELS"}, "it is a ndarray; a model is an nn.Module"),
        ({"partition": f"{__name__}:NoReader"}, "a plug-in of this kind is a function .labels, groups"),
        ({"partition": f"{__name__}:no_listing"}, r"takes \(config"),
    ],
)
def test_plug_ins_of_the_wrong_kind_are_answered_with_the_contract(settings: dict, said: str) -> None:
    given = {"dataset": "digits", "model": "mlp", "clients": 2, "limit": 40}
    with pytest.raises(ConfigError, match=said):
        build_world(Config.from_mapping(given | settings))
