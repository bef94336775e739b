"""Distances of images by the activations of networks trained on ImageNet, none of them fetched unless allowed."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedattack.errors import BadRequest, DataError
from fedattack.metrics.base import ImageMetric, Need, Pairs
from fedattack.metrics.lite import SMALLEST, LiteFeatures, check_channels
from fedattack.metrics.pixels import pair_of
from fedattack.metrics.weights import Shelf, as_named, package_folder, read_state, sha256

_CHUNK = 2**18
"""Pixels that go through a network at once."""


@dataclass(frozen=True)
class Trunk:
    """A network of torchvision: name and file of its weights, and the smallest side that goes through it."""

    name: str
    file: str
    weights: str
    smallest: int

    def url(self) -> str:
        """Where torchvision has the weights from."""
        from torchvision import models

        return str(getattr(models, self.weights).IMAGENET1K_V1.url)


TRUNKS = {
    trunk.name: trunk
    for trunk in (
        Trunk("squeeze", "squeezenet1_1-b8a52dc0.pth", "SqueezeNet1_1_Weights", 17),
        Trunk("alex", "alexnet-owt-7be5be79.pth", "AlexNet_Weights", 31),
        Trunk("vgg", "vgg16-397923af.pth", "VGG16_Weights", 16),
    )
}


def batches(images: Tensor) -> list[slice]:
    """Slices of (N, C, H, W) that a network takes at once."""
    step = max(1, _CHUNK // max(1, images.shape[-1] * images.shape[-2]))
    return [slice(start, start + step) for start in range(0, len(images), step)]


@dataclass
class PerceptualMetric(ImageMetric):
    """Base of distances by a frozen network in float32; grey images are repeated to three channels."""

    higher: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("weights",)
    name: ClassVar[str]

    @cached_property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network with its weights; ConfigError or DataError as :meth:`check`."""

    @abstractmethod
    def distance(self, images: Tensor, truth: Tensor) -> Tensor:
        """(N,) of float32 (N, 3, H, W) in [0, 1]."""

    def ready(self) -> None:
        self.network  # noqa: B018 (loads it)

    def check(self, size: tuple[int, int, int]) -> None:
        """Refuse images that the network cannot take, and load it; ConfigError where a package or file is missing."""
        check_channels(size[0], f"metric {self.name!r}")
        if (smallest := self.smallest) > min(size[1:]):
            raise DataError(
                f"images of {size[1]} x {size[2]} pixels are too small for metric {self.name!r}: "
                f"at least {smallest} x {smallest}"
            )
        self.ready()

    @property
    def smallest(self) -> int:
        """Side in pixels of the smallest image that it takes."""
        return 1

    @torch.no_grad()
    def scores(self, pairs: Pairs) -> Tensor:
        images, truth = (x.float() for x in pair_of(pairs.images, pairs.truth))
        self.check((truth.shape[1], truth.shape[2], truth.shape[3]))
        images, truth = (x.expand(-1, 3, -1, -1) for x in (images, truth))
        self.network.to(images.device)
        found = [self.distance(images[part], truth[part]).reshape(-1).double() for part in batches(images)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


@dataclass
class LiteDistance(PerceptualMetric):
    """Distance of EfficientNet-Lite0's activations, each unit-normalised over its channels; 0 alike, 4 opposed.

    Made as LPIPS (Zhang et al., CVPR 2018) but with no weights fitted to people's judgements: squared differences
    summed over channels and averaged over positions, at five depths.

    Parameters
    ----------
    taps : str
        "all": mean over the five depths; "last": the deepest alone.
    side : int
        Images whose shorter side is below it are enlarged to it, bilinearly.
    """

    title: ClassVar[str] = "lite-features"
    name: ClassVar[str] = "lite-features"

    taps: Literal["all", "last"] = "all"
    side: Annotated[int, Field(ge=32, le=1024)] = SMALLEST

    @cached_property
    def network(self) -> LiteFeatures:
        return LiteFeatures(self.side)

    def distance(self, images: Tensor, truth: Tensor) -> Tensor:
        both = zip(self.network.taps(images), self.network.taps(truth), strict=True)
        found = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in both]
        return found[-1] if self.taps == "last" else torch.stack(found).mean(0)

    def record(self) -> dict[str, Any]:
        path = self.network.weights
        return {"weights": {path.name: sha256(path)}}


def _unit(activations: Tensor) -> Tensor:
    """Of length 1 over the channels; zero where there is nothing."""
    return activations / activations.norm(dim=1, keepdim=True).clamp(min=1e-10)


@dataclass
class _OnTrunk(PerceptualMetric):
    """Published heads, installed with a package, on a network of torchvision whose file the user has."""

    package: ClassVar[tuple[str, str]]
    weights_dir: str | None = None
    allow_download: bool = False

    @property
    @abstractmethod
    def trunk(self) -> Trunk:
        """The network that the heads stand on."""

    @property
    @abstractmethod
    def head(self) -> Path:
        """The heads' weight file."""

    @property
    def heading(self) -> str:
        """Says so where the trunk's weights are not those that the heads were fitted on."""
        try:
            other = "" if as_named(self.file) else ", other weights"
        except BadRequest:  # refused by `check`
            other = ""
        return f"{self.title}[{self.trunk.name}{other}]"

    @property
    def smallest(self) -> int:
        return self.trunk.smallest

    @cached_property
    def file(self) -> Path:
        """The trunk's weight file; ConfigError where it is missing."""
        package_folder(*self.package, f"metric {self.name!r}")
        shelf = Shelf(f"metric.{self.name}", self.weights_dir, self.allow_download)
        return shelf.find(self.trunk.file, self.trunk.url)

    def record(self) -> dict[str, Any]:
        return {
            "package": f"{self.package[1]} {version(self.package[1])}",
            "weights": {path.name: sha256(path) for path in (self.file, self.head)},
            "trunk as published": as_named(self.file),
        }


def _trunk_state(path: Path, wanted: dict[str, str]) -> dict[str, Tensor]:
    """Own name -> tensor, of own name -> name in torchvision's file; DataError where the file has no such tensor."""
    state = read_state(path)
    if absent := next((name for name in wanted.values() if name not in state), None):
        raise DataError(f"weight file {path} is not torchvision's: it holds no {absent!r}")
    return {own: state[name] for own, name in wanted.items()}


def _load(module: nn.Module, state: dict[str, Tensor], path: Path, assign: bool = False) -> None:
    try:
        module.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"weight file {path} does not fit the network: {reason}") from None


# A metric is built anew for each attack that it is checked for: its network is not.
@lru_cache(maxsize=1)
def _lpips(net: str, path: Path, digest: str) -> nn.Module:
    """The library's network; `digest` is the trunk's."""
    import lpips

    # The library's own way to a trunk is a download; built with a random one, it is given this file's at once.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    wanted = {name: "features." + name.split(".", 1)[1] for name in found.net.state_dict()}
    _load(found.net, _trunk_state(path, wanted), path)
    return found.requires_grad_(False).eval()


@dataclass
class LearnedPerceptual(_OnTrunk):
    """LPIPS 0.1: activations weighted as people judged (Zhang et al., CVPR 2018), of images mapped to [-1, 1].

    Parameters
    ----------
    net : str
        Network: "squeeze", "alex" or "vgg".
    weights_dir : str, optional
        Folder of its weight file, under torchvision's name; None: environment variable FEDATTACK_WEIGHTS.
    allow_download : bool
        Fetch the file where it is missing.
    """

    title: ClassVar[str] = "LPIPS"
    name: ClassVar[str] = "lpips"
    package: ClassVar[tuple[str, str]] = ("lpips", "lpips")

    net: Literal["squeeze", "alex", "vgg"] = "squeeze"

    @property
    def trunk(self) -> Trunk:
        return TRUNKS[self.net]

    @property
    def head(self) -> Path:
        return package_folder(*self.package, f"metric {self.name!r}") / "weights" / "v0.1" / f"{self.net}.pth"

    @cached_property
    def network(self) -> nn.Module:
        return _lpips(self.net, self.file, sha256(self.file))

    def distance(self, images: Tensor, truth: Tensor) -> Tensor:
        return self.network(images, truth, normalize=True)


@dataclass
class StructureTexture(_OnTrunk):
    """DISTS: structure and texture of activations (Ding et al., TPAMI 2020), on VGG16; 0 alike.

    Parameters
    ----------
    weights_dir : str, optional
        Folder of the network's weight file, under torchvision's name; None: environment variable FEDATTACK_WEIGHTS.
    allow_download : bool
        Fetch the file where it is missing.
    """

    title: ClassVar[str] = "DISTS"
    name: ClassVar[str] = "dists"
    package: ClassVar[tuple[str, str]] = ("DISTS_pytorch", "DISTS-pytorch")

    @property
    def trunk(self) -> Trunk:
        return TRUNKS["vgg"]

    @property
    def smallest(self) -> int:
        return 1  # its pooling is padded

    @property
    def head(self) -> Path:
        return package_folder(*self.package, f"metric {self.name!r}") / "weights.pt"

    @cached_property
    def network(self) -> nn.Module:
        return _dists(self.head, self.file, sha256(self.file))

    def distance(self, images: Tensor, truth: Tensor) -> Tensor:
        return self.network(images, truth)


def _layers(network: nn.Module) -> list[tuple[str, str, str]]:
    """Stage, layer and kind of each tensor of the trunk."""
    names = (name.split(".") for name, _ in network.named_parameters() if name.startswith("stage"))
    return [(stage, layer, part) for stage, layer, part in names]


@lru_cache(maxsize=1)
def _dists(head: Path, path: Path, digest: str) -> nn.Module:
    """The library's network; `digest` is the trunk's. Not by its constructor, which downloads one."""
    from DISTS_pytorch.DISTS_pt import DISTS, L2pooling
    from torchvision.models import vgg16

    with torch.device("meta"):
        layers = vgg16(weights=None, init_weights=False).features
    found = DISTS.__new__(DISTS)
    nn.Module.__init__(found)
    channels = (3, 64, 128, 256, 512, 512)
    for stage, (start, end) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))):
        parts = nn.Sequential()
        if start:  # in place of the maximum
            parts.add_module(str(start), L2pooling(channels=channels[stage]))
        for index in range(start + bool(start), end):
            parts.add_module(str(index), layers[index])
        found.add_module(f"stage{stage + 1}", parts)
    for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
        found.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))
    found.chns = list(channels)
    for name, tensor in read_state(head).items():
        found.register_parameter(name, nn.Parameter(tensor))
    wanted = {f"{stage}.{layer}.{part}": f"features.{layer}.{part}" for stage, layer, part in _layers(found)}
    _load(found, {**found.state_dict(), **_trunk_state(path, wanted)}, path, assign=True)
    return found.requires_grad_(False).eval()
