"""Pictures and victims for the benchmark, and the plain reference engine it compares with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.matching.pixels import PIXEL_DEVIATION, PIXEL_MEAN
from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.data.dataset import ImageDataset
from fedattack.data.load import load_dataset
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation, Scenario, Update
from fedattack.rng import numpy_rng, torch_rng

SIZE, CLASSES = 32, 10
_PLACES = {
    "mnist": ("MNIST",),
    "fashion-mnist": ("FashionMNIST",),
    "usps": ("USPS",),
    "cifar10": ("CIFAR10/cifar-10-subset-python.tar.xz", "CIFAR10"),
}
_LOOKS = 0.002
"""Seconds between two looks at the process's memory."""


@dataclass(frozen=True)
class Pictures:
    """Private images float32 (N, 3, 32, 32) in [0, 1], their labels int64 (N,), and where they are from."""

    images: Tensor
    labels: Tensor
    source: str


def data_set(name: str, data: Path | None, limit: int | None = None) -> ImageDataset:
    """A data set by name, embedded or from its place below the folder `data`."""
    settings: dict[str, Any] = {"dataset": name, "limit": limit}
    if name in _PLACES:
        assert data is not None
        places = [data / place for place in _PLACES[name]]
        settings["data-dir"] = str(next((place for place in places if place.exists()), places[-1]))
    return load_dataset(Config.from_mapping(settings).data, 0)


def pictures(count: int, data: Path | None) -> Pictures:
    """Colour pictures of 32x32: CIFAR-10 below `data`, or tiles of four photographs that scikit-image brings."""
    if data is not None:
        dataset = data_set("cifar10", data)
        chosen = numpy_rng(0, "bench.engine").permutation(len(dataset))[:count]
        images, labels = dataset.tensors(chosen)
        return Pictures(images, labels, "CIFAR-10")
    import skimage.data

    tiles = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 255
        side = min(photo.shape[2:])
        small = F.interpolate(photo[:, :, :side, :side], size=(4 * SIZE, 4 * SIZE), mode="area")
        cut = small.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)
        tiles.append(cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    spread, source = torch.stack(tiles, 1).flatten(0, 1), "photographs of scikit-image, tiles of 32x32"
    return Pictures(spread[:count], torch.arange(count) % CLASSES, source)


@dataclass(frozen=True)
class Scene:
    """Victims of one model, each with one image and its full gradient in evaluation mode, as it was published."""

    observations: list[Observation]
    labels: Tensor
    starts: Tensor


def scene(model: ModelConfig, private: Pictures, seed: int = 7) -> Scene:
    """The victims' gradients at the model's initial weights, and a random start for each."""
    weights = initial_weights(model, seed)
    module = build_model(model).eval()
    module.load_state_dict(weights)
    names, parameters = zip(*module.named_parameters(), strict=True)
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    public = Scenario(model, TrainingConfig(), CompressionConfig(name="none"))
    seen = []
    for client, (image, label) in enumerate(zip(private.images, private.labels, strict=True)):
        gradients = torch.autograd.grad(F.cross_entropy(module(image[None]), label[None]), parameters)
        update = Update(names, shapes, None, torch.cat([gradient.flatten() for gradient in gradients]))
        seen.append(Observation(1, client, public, weights, update, 1))
    drawn = torch.randn(len(seen), 1, *public.image_shape, generator=torch_rng(seed, "bench.start"))
    return Scene(seen, private.labels[:, None], PIXEL_MEAN + PIXEL_DEVIATION * drawn)


class Reference:
    """Inverting Gradients the plain way: automatic differentiation twice, one victim, nothing kept but the iterate.

    `label` int64 (1,), `start` (1, C, H, W); the learning rate falls over `iterations`, `tv` weighs total
    variation.
    """

    def __init__(self, seen: Observation, label: Tensor, start: Tensor, iterations: int, tv: float) -> None:
        self._module = build_model(seen.scenario.model).eval()
        self._module.load_state_dict(seen.weights)
        self._parameters = list(self._module.parameters())
        self._target = list(seen.update.dense().values())
        self._label, self._tv = label, tv
        self.x = ((start - PIXEL_MEAN) / PIXEL_DEVIATION).clone().requires_grad_()
        self._optimiser = torch.optim.Adam([self.x], lr=0.1)
        milestones = [iterations * eighths // 8 for eighths in (3, 5, 7)]
        self._schedule = torch.optim.lr_scheduler.MultiStepLR(self._optimiser, milestones, gamma=0.1)

    @property
    def images(self) -> Tensor:
        """The current images in [0, 1]."""
        return PIXEL_MEAN + PIXEL_DEVIATION * self.x.detach()

    def loss(self) -> Tensor:
        """One minus the cosine, plus total variation."""
        own = F.cross_entropy(self._module(PIXEL_MEAN + PIXEL_DEVIATION * self.x), self._label)
        predicted = torch.autograd.grad(own, self._parameters, create_graph=True)
        product = predicted_square = target_square = torch.zeros(())
        for ours, theirs in zip(predicted, self._target, strict=True):
            product = product + (ours * theirs).sum()
            predicted_square = predicted_square + ours.square().sum()
            target_square = target_square + theirs.square().sum()
        down, across = self.x.diff(dim=2), self.x.diff(dim=3)
        smooth = down.abs().mean() + across.abs().mean()
        return 1 - product / (predicted_square.sqrt() * target_square.sqrt()) + self._tv * smooth

    def slope(self) -> tuple[Tensor, Tensor]:
        """Loss and its gradient at the (standardised) pixels."""
        loss = self.loss()
        return loss.detach(), torch.autograd.grad(loss, self.x)[0]

    def run(self, iterations: int) -> None:
        """Go on for so many iterations."""
        low, high = -PIXEL_MEAN / PIXEL_DEVIATION, (1 - PIXEL_MEAN) / PIXEL_DEVIATION
        for _ in range(iterations):
            self.x.grad = self.slope()[1].sign_()
            self._optimiser.step()
            self._schedule.step()
            with torch.no_grad():
                self.x.clamp_(low, high)


@contextmanager
def memory() -> Iterator[list[int]]:
    """Bytes that the process grew by at most, in the list's only place when the block has ended."""
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    grown = [0]

    def watch() -> None:
        while not ended.wait(_LOOKS):
            grown[0] = max(grown[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield grown
    finally:
        ended.set()
        watcher.join()
