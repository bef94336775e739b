"""Distances in the feature space of a network that the user names: pair by pair, and of two sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedattack.errors import BadRequest, ConfigError, DataError, unknown_name
from fedattack.files import content_hash, load_tensors
from fedattack.metrics.base import ImageMetric, Need, Pairs
from fedattack.metrics.frechet import frechet_distance
from fedattack.metrics.perceptual import batches
from fedattack.metrics.pixels import pair_of
from fedattack.metrics.weights import sha256
from fedattack.reading import Unreadable
from fedattack.registry import Registry

Embed = Callable[[Tensor], Tensor]
"""Images (B, C, H, W), float32 in [0, 1], to features (B, D)."""

EMBEDDINGS: Registry[Any] = Registry(
    "embedding", {"lite-features": "fedattack.metrics.lite:LiteFeatures"}, group="fedattack.embeddings"
)
"""Embeddings by name: an :data:`Embed`, a torch module, or a class of either that is built without arguments.

Where one has an attribute `weights`, the path of a file, the file's SHA-256 stands in a run's records.
"""

CONTRACT = (
    "an embedding is a function, a torch module, or a class of either that is built without arguments: it takes "
    "images (B, C, H, W), float32 in [0, 1], and answers finite features (B, D)"
)


@dataclass
class Embedding:
    """An embedding ready for images of one size, and what must be known to have it again.

    Parameters
    ----------
    name : str
        For a table's heading.
    call : callable
        An :data:`Embed`.
    record : dict
        Name of the model, SHA-256 of its weights.
    """

    name: str
    call: Embed
    record: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of float (N, C, H, W), float64 (N, D)."""
        if isinstance(self.call, nn.Module):
            self.call.to(images.device)
        return torch.cat([self.call(images[part].float()) for part in batches(images) or [slice(0)]]).double()


class HeadInput(nn.Module):
    """What the last linear layer of a classifier sees, (B, in_features)."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self._seen: list[Tensor] = []
        head.register_forward_pre_hook(lambda _, given: self._seen.append(given[0]))

    def forward(self, images: Tensor) -> Tensor:
        self._seen.clear()
        self.model(images)
        return self._seen.pop().flatten(1)


def last_linear(model: nn.Module, name: str) -> tuple[str, nn.Linear]:
    """The classifier's last linear layer and its name; ConfigError where it has none."""
    found = [(key, part) for key, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not found:
        raise ConfigError(f"model {name!r} has no linear layer, whose input would be its features")
    return found[-1]


@dataclass
class FeatureMetric(ImageMetric):
    """Base of metrics in the feature space of `model`, beside the images' own size.

    Parameters
    ----------
    model : str
        "lite-features" (EfficientNet-Lite0, what its classifier sees), a model of `fedattack list models`, or an
        embedding by ``module:Class``: images (B, C, H, W), float32 in [0, 1], to features (B, D).
    weights : str, optional
        Safetensors file of the model's weights, which a model of the list needs: its features are the input of its
        last linear layer.
    activation, width : optional
        Of a model of the list; None: its default.
    side : int, optional
        Side in pixels that images are resized to, bilinearly; None: as they are.
    """

    higher: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("weights",)
    name: ClassVar[str]

    model: str = "lite-features"
    weights: str | None = None
    activation: Literal["sigmoid", "relu", "tanh", "gelu", "softplus", "poly3"] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    side: Annotated[int, Field(ge=1, le=4096)] | None = None

    @property
    def heading(self) -> str:
        return f"{self.title}[{self.short_name}]"

    @property
    def short_name(self) -> str:
        """The model's name for a table: of ``module:Class`` the class."""
        return self.model.rpartition(":")[2]

    def check(self, size: tuple[int, int, int]) -> None:
        """Load the model and show it two images of that size; ConfigError or DataError where it cannot take them."""
        self.embedding(size)

    def record(self) -> dict[str, Any]:
        return next(iter(self._ready.values())).record if self._ready else {}

    @cached_property
    def _ready(self) -> dict[tuple[int, int, int], Embedding]:
        return {}

    def embedding(self, size: tuple[int, int, int]) -> Embedding:
        """The embedding for images of that (C, H, W), loaded once."""
        if self.side is not None:
            size = (size[0], self.side, self.side)
        if size not in self._ready:
            found = self._load(size)
            self._try(found.call, size)
            self._ready[size] = found
        return self._ready[size]

    def features(self, images: Tensor) -> Tensor:
        """Features of (N, C, H, W), resized where `side` is given; float64 (N, D)."""
        embedding = self.embedding((images.shape[1], images.shape[2], images.shape[3]))
        if self.side is not None:
            size = (self.side, self.side)
            images = functional.interpolate(
                images.float(), size, mode="bilinear", align_corners=False, antialias=True
            )
        return embedding.features(images)

    @property
    def _setting(self) -> str:
        return f"setting 'metric.{self.name}.model' = {self.model!r}"

    def _load(self, size: tuple[int, int, int]) -> Embedding:
        from fedattack.models import MODELS

        if ":" in self.model or self.model in EMBEDDINGS:
            return self._plugin()
        if self.model not in MODELS:
            raise unknown_name("embedding", self.model, [*EMBEDDINGS, *MODELS])
        return self._classifier(size)

    def _classifier(self, size: tuple[int, int, int]) -> Embedding:
        """A model of the registry with the weights of a file, which also says how many classes it tells apart."""
        from fedattack.config import ModelConfig
        from fedattack.models import build_model, read_weights, resolve

        place = f"metric.{self.name}.weights"
        if self.weights is None:
            raise ConfigError(
                f"setting {place!r} is not set: {self._setting} needs a safetensors file of trained weights, since "
                "features of random ones say nothing"
            )
        channels, height, width = size
        if height != width:
            raise ConfigError(
                f"{self._setting} takes square images, not {height} x {width}: set 'metric.{self.name}.side'"
            )
        given = ModelConfig(name=self.model, activation=self.activation, width=self.width)
        config = resolve(given, channels, height, classes=1)
        with torch.random.fork_rng(devices=[]):
            name, _ = last_linear(build_model(config), self.model)
            with suppress(Unreadable):  # said below
                head_weights, _ = load_tensors(self.weights, (f"{name}.weight",))
                for tensor in head_weights.values():
                    if tensor.ndim and len(tensor):
                        config = config.model_copy(update={"classes": len(tensor)})
            model = build_model(config)
        model.load_state_dict(read_weights(self.weights, model, place))
        path = Path(self.weights)
        record = {"model": self.model, "weights": {path.name: sha256(path)}}
        head = last_linear(model, self.model)[1]
        return Embedding(self.model, HeadInput(model, head).requires_grad_(False).eval(), record)

    def _plugin(self) -> Embedding:
        """What is registered, or is at ``module:Class``; ConfigError where it is no embedding."""
        target = EMBEDDINGS.get(self.model)
        call = self._instance(target) if inspect.isclass(target) else target
        if not callable(call):
            raise ConfigError(f"{self._setting} is a {type(call).__name__}; {CONTRACT}")
        record: dict[str, Any] = {"model": self.model}
        if isinstance(call, nn.Module):
            if self.weights is not None:
                from fedattack.models import read_weights

                call.load_state_dict(read_weights(self.weights, call, f"metric.{self.name}.weights"))
            call.requires_grad_(False).eval()
            record["state sha256"] = content_hash(call.state_dict())
        elif self.weights is not None:
            raise ConfigError(
                f"setting 'metric.{self.name}.weights' = {self.weights!r}: {self._setting} is no torch module, "
                "into which they could be loaded"
            )
        path = self.weights or getattr(call, "weights", None)
        if isinstance(path, (str, Path)) and Path(path).is_file():
            record["weights"] = {Path(path).name: sha256(Path(path))}
        return Embedding(self.model, call, record)

    def _instance(self, target: type[Any]) -> Any:
        """One of the class; ConfigError where it cannot be built, or is a module that draws its weights at random."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                found = target()
                if self.weights is None and isinstance(found, nn.Module) and found.state_dict():
                    torch.default_generator.manual_seed(1)
                    same = content_hash(target().state_dict()) == content_hash(found.state_dict())
                else:
                    same = True
        except BadRequest:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self._setting} cannot be built without arguments ({type(error).__name__}: {error}); {CONTRACT}"
            ) from error
        if not same:
            raise ConfigError(
                f"{self._setting} draws its weights at random, and such features say nothing: load them in its "
                f"constructor, or name a safetensors file by 'metric.{self.name}.weights'"
            )
        return found

    def _try(self, call: Embed, size: tuple[int, int, int]) -> None:
        """Show it two images; ConfigError where it does not answer finite features."""
        images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                found: object = call(images)
        except BadRequest:
            raise
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{self._setting} fails on images of shape {tuple(images.shape)} ({type(error).__name__}: {text}); "
                f"{CONTRACT}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2 or not found.shape[1]:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ConfigError(
                f"{self._setting} answers {what} to images of shape {tuple(images.shape)}; {CONTRACT}"
            )
        if not found.is_floating_point() or not bool(found.isfinite().all()):
            raise ConfigError(
                f"{self._setting} answers features that are NaN, infinite or no floats; {CONTRACT}"
            )


@dataclass
class FeatureDistance(FeatureMetric):
    """Distance of the features of the two images, in a network that is named.

    Parameters
    ----------
    distance : str
        "euclidean", or "cosine": 1 - cosine.
    """

    title: ClassVar[str] = "feature distance"
    name: ClassVar[str] = "feature-distance"

    distance: Literal["euclidean", "cosine"] = "euclidean"

    @property
    def heading(self) -> str:
        return f"{self.title}[{self.short_name}{', cosine' if self.distance == 'cosine' else ''}]"

    def scores(self, pairs: Pairs) -> Tensor:
        a, b = (self.features(x) for x in pair_of(pairs.images, pairs.truth))
        if self.distance == "cosine":  # of no features at all there is none
            a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
            return 1 - (a * b).sum(1)
        return (a - b).norm(dim=1)


@dataclass
class FrechetDistance(FeatureMetric):
    """Fréchet distance of all reconstructions from all private images, in the features of a network that is named.

    Never the "FID", which is that of Inception's features, and biased upwards the more the fewer images there are.
    """

    title: ClassVar[str] = "frechet"
    name: ClassVar[str] = "frechet"
    pooled: ClassVar[bool] = True

    def scores(self, pairs: Pairs) -> Tensor:
        images, truth = pair_of(pairs.images, pairs.truth)
        if len(truth) < 2:
            raise DataError(f"Fréchet distance of {len(truth)} pair: at least 2 are needed")
        sets = [self.features(x) for x in (images, truth)]
        if not all(bool(x.isfinite().all()) for x in sets):
            raise DataError("Fréchet distance of images, or features, that are NaN or infinite")
        return torch.tensor(frechet_distance(*(x.cpu().numpy() for x in sets)), dtype=torch.float64)
