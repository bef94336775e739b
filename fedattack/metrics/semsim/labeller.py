"""Classifiers that make proxy ratings: does a reconstruction still look like its class to a net?

A classifier that never saw other contrasts calls every pale image unrecognisable. So these are trained with changes
of contrast and brightness, shifts and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedattack.errors import ConfigError, DataError
from fedattack.files import content_hash
from fedattack.metrics.semsim.checkpoint import (
    Described,
    Name,
    Width,
    channel_statistics,
    fill,
    load_net,
    save_net,
)
from fedattack.metrics.semsim.network import SMALLEST, SmallCNN
from fedattack.models.classifiers.layers import kaiming_uniform
from fedattack.rng import torch_rng

KIND = "labeller"

HELD_OUT = 0.1
"""Share of the images on which its accuracy is measured."""

_CONTRAST = (0.1, 1.5)
_BRIGHTNESS = 0.4
_SHIFT = 0.2
_NOISE = 0.5
_BATCH = 64
_AT_ONCE = 512


class LabellerFacts(Described):
    """What a labeller's file says of itself.

    `name`: by which its ratings, and a SemSim that learned from them, are called; `source`: what it was trained on;
    `data_hash`: SHA-256 of those images and labels.
    """

    name: Name = Field(min_length=1)
    source: Name
    classes: int = Field(ge=2, le=10_000)
    class_names: tuple[Name, ...] = ()
    width: Width
    steps: int = Field(ge=1)
    data_hash: Name


@dataclass(frozen=True)
class Labeller:
    """A trained classifier, in evaluation mode, what is known of it, and the SHA-256 of its weights."""

    net: nn.Module
    facts: LabellerFacts
    hash: str

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of each class, float64 (N, classes), for images (N, C, H, W) in [0, 1]; DataError for another size."""
        self.facts.check_shape(tuple(images.shape[1:]), f"labeller {self.facts.name!r}")
        parts = [self.net(self.facts.scaled(part)) for part in images.split(_AT_ONCE)]
        logits = torch.cat(parts) if parts else images.new_zeros(0, self.facts.classes)
        return logits.double().softmax(dim=1)

    def true_class(self, images: Tensor, labels: Tensor) -> Tensor:
        """Probability of each image's class in `labels`, (N,), float64 (N,); DataError for a class it has not."""
        if labels.shape != (len(images),) or labels.is_floating_point():
            raise DataError(
                f"{len(images)} images need as many integer labels; got {labels.dtype} {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.facts.classes:
            raise DataError(
                f"labeller {self.facts.name!r} knows classes 0 to {self.facts.classes - 1}; the labels run from "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        return self.probabilities(images).gather(1, labels.long()[:, None].to(images.device))[:, 0]


def train_labeller(
    images: Tensor,
    labels: Tensor,
    name: str,
    seed: int,
    source: str = "",
    width: int = 16,
    steps: int = 600,
    class_names: tuple[str, ...] = (),
    classes: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Labeller:
    """Train a :class:`~.network.SmallCNN` on images (N, C, S, S) in [0, 1] with labels (N,).

    The same images and `seed` give the same one. A tenth of the images is held out for ``figures``: accuracy as they
    are and changed as in training. Adam, a cosine schedule, batches of 64.

    Raises
    ------
    DataError
        If images and labels do not fit, are too small or few, or are of one class.
    """
    _check(images, labels, name, width, steps)
    classes = max(int(labels.max()) + 1, classes or 0, len(class_names))
    order = torch.randperm(len(images), generator=torch_rng(seed, "labeller held out"))
    held = max(1, round(HELD_OUT * len(images)))
    test, train = order[:held], order[held:]
    mean, std = channel_statistics(images[train])
    facts = LabellerFacts(
        channels=images.shape[1], size=images.shape[-1], mean=mean, std=std, seed=seed, name=name, source=source,
        classes=classes, class_names=class_names, width=width, steps=steps,
        data_hash=content_hash({"images": images, "labels": labels}),
    )  # fmt: skip
    net = SmallCNN(facts.channels, width, classes)
    kaiming_uniform(net, torch_rng(seed, "labeller"))
    net.to(device).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draws = torch_rng(seed, "labeller training")
    for step in range(steps):
        chosen = train[torch.randint(len(train), (_BATCH,), generator=draws)]
        batch = augmented(images[chosen].float(), draws)
        loss = functional.cross_entropy(net(facts.scaled(batch.to(device))), labels[chosen].long().to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress((step + 1) / steps)
    net.cpu().eval().requires_grad_(False)
    trained = Labeller(net, facts, content_hash(net.state_dict()))
    changed = augmented(images[test].float(), torch_rng(seed, "labeller test"))
    figures = {
        "held_out": held,
        "accuracy": _accuracy(trained, images[test], labels[test]),
        "accuracy_changed": _accuracy(trained, changed, labels[test]),
    }
    return Labeller(net, facts.model_copy(update={"figures": figures}), trained.hash)


def save_labeller(path: Path, labeller: Labeller) -> None:
    """Write it whole or not at all (RunFailed)."""
    save_net(path, KIND, labeller.net.state_dict(), labeller.facts)


def load_labeller(path: str | Path) -> Labeller:
    """What :func:`save_labeller` wrote; DataError as :func:`~.checkpoint.load_net`, or if the tensors do not fit."""
    tensors, facts, digest = load_net(path, KIND, LabellerFacts)
    with torch.device("meta"):
        net = SmallCNN(facts.channels, facts.width, facts.classes)
    return Labeller(fill(net, tensors, f"{KIND} {str(path)!r}"), facts, digest)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image, (B, C, H, W) in [0, 1], with every one of four changes at a coin's throw, clamped.

    Contrast about its mean (times 0.1 to 1.5, uniform in the logarithm), brightness (by up to 0.4 either way), a
    shift by up to a fifth of the side (edges repeated), normal noise (deviation up to 0.5).
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    def coin() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < 0.5

    low, high = torch.tensor(_CONTRAST).log().tolist()
    factor = torch.where(coin(), uniform(low, high).exp(), torch.ones(()))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    lift = torch.where(coin(), uniform(-_BRIGHTNESS, _BRIGHTNESS), torch.zeros(()))
    images = (images - mean) * factor + mean + lift
    most = int(_SHIFT * min(height, width))
    reach = torch.randint(-most, most + 1, (2, count), generator=generator)
    reach = torch.where(coin().view(1, count), reach, 0)
    rows = (torch.arange(height) + reach[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width) + reach[1, :, None]).clamp(0, width - 1)
    images = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
    spread = torch.where(coin(), uniform(0, _NOISE), torch.zeros(()))
    return (images + spread * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _accuracy(labeller: Labeller, images: Tensor, labels: Tensor) -> float:
    return float((labeller.probabilities(images).argmax(1) == labels).double().mean())


def _check(images: Tensor, labels: Tensor, name: str, width: int, steps: int) -> None:
    """Refuse what no classifier can be trained on."""
    if not name or "[" in name or "]" in name:
        raise ConfigError(f"name of the labeller {name!r}: must be some text without brackets")
    if width < 1 or steps < 1:
        raise ConfigError(f"labeller {name!r}: width {width} and steps {steps} must be at least 1")
    if images.ndim != 4 or images.shape[-1] != images.shape[-2] or images.shape[-1] < SMALLEST:
        raise DataError(
            f"labeller {name!r}: images of shape {tuple(images.shape)}; accepted: (N, C, S, S), S at least {SMALLEST}"
        )
    if labels.shape != (len(images),) or labels.is_floating_point() or (labels < 0).any():
        raise DataError(
            f"labeller {name!r}: {len(images)} images need as many labels 0, 1, ...; got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if len(labels.unique()) < 2 or len(images) < 20:
        raise DataError(
            f"labeller {name!r}: {len(images)} images of {len(labels.unique())} classes; at least 20 of 2 are needed"
        )
