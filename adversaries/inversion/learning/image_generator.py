"""Generators of images trained on public ones: the prior of attacks that search in a latent space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adversaries.base import Progress, no_progress
from adversaries.inversion.learning import train
from adversaries.inversion.learning.train import initialised
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.files import load_tensors
from fedattack.metrics.pixels import psnr
from fedattack.models.decoders.from_latent import ImageEncoder, ImageGenerator
from fedattack.observation import Auxiliary
from fedattack.reading import Unreadable
from fedattack.registry import Registry
from fedattack.rng import torch_rng

IMAGE_GENERATORS: Registry[type[nn.Module]] = Registry(
    "image generator",
    {"small": "fedattack.models.decoders.from_latent:ImageGenerator"},
    group="fedattack.image_generators",
)
_NOISE = 0.1
_BATCH = 32


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator of images in evaluation mode, and JSON-able figures about it."""

    module: nn.Module
    latent_shape: tuple[int, ...]
    figures: dict[str, Any]

    def tail(self, stage: int) -> nn.Sequential:
        """What comes after the first `stage` stages; NotApplicable if the generator has none."""
        return nn.Sequential(*self._stages()[stage:])

    def step(self, stage: int, inputs: Tensor) -> Tensor:
        """What one stage makes of its inputs (N, ...)."""
        with torch.no_grad():
            return self._stages()[stage](inputs)

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self._stages())

    def _stages(self) -> list[nn.Module]:
        stages = getattr(self.module, "stages", None)
        if stages is None:
            raise NotApplicable(
                f"the generator {type(self.module).__name__} has no 'stages', between which feature maps are "
                "searched; use attack 'ggl', or a generator with a ModuleList of that name"
            )
        return list(stages)


def train_image_generator(
    auxiliary: Auxiliary,
    seed: int,
    latent: int,
    width: int,
    epochs: int,
    device: torch.device,
    progress: Progress = no_progress,
) -> TrainedGenerator:
    """The decoder of a variational auto-encoder of public images, so that N(0, 1) inputs draw likely images.

    `latent` and `width` are sizes of :class:`fedattack.models.decoders.from_latent.ImageGenerator`. Its
    figures: PSNR in dB of held-out public images through the auto-encoder ("generator", what it can draw at
    best without a search) and of the training images' mean ("mean"). Kingma and Welling, "Auto-Encoding
    Variational Bayes", ICLR 2014.
    """
    seen, unseen = train.hold_out(auxiliary, 0.1, seed)
    channels, height, side = auxiliary.images.shape[1:]
    shape = (channels, height, side)
    images = auxiliary.images[seen].to(device)
    decoder = initialised(lambda: ImageGenerator(latent, shape, width), seed, "image-generator").to(device)
    encoder = initialised(lambda: ImageEncoder(latent, shape, width), seed, "image-encoder").to(device)
    stream = torch_rng(seed, "image-generator.noise")

    def loss(chosen: Tensor) -> Tensor:
        clean = images[chosen]
        mean, spread = encoder(clean)
        noise = torch.randn(mean.shape, generator=stream).to(device)
        drawn = decoder(mean + (0.5 * spread).exp() * noise)
        error = (drawn - clean).square().sum() / (2 * _NOISE**2)
        divergence = 0.5 * (mean.square() + spread.exp() - spread - 1).sum()
        return (error + divergence) / len(chosen)

    train.descend(
        [*decoder.parameters(), *encoder.parameters()],
        loss,
        len(images),
        epochs,
        2e-3,
        torch_rng(seed, "image-generator.batches"),
        progress,
        _BATCH,
    )
    decoder.eval().requires_grad_(False)
    held = auxiliary.images[unseen]
    with torch.no_grad():
        drawn = decoder(encoder(held.to(device))[0]).cpu()
    mean = auxiliary.images[seen].mean(0, keepdim=True).expand_as(held)
    figures = {
        "generator": "variational auto-encoder trained on the auxiliary images",
        "generator's held-out PSNR": float(psnr(drawn, held).mean()),
        "mean image's held-out PSNR": float(psnr(mean, held).mean()),
    }
    return TrainedGenerator(decoder.cpu(), (latent,), figures)


def given_generator(target: str, weights: str | None, image_shape: tuple[int, int, int]) -> TrainedGenerator:
    """A generator of the user's own.

    ConfigError or DataError if it cannot be loaded, lacks the attribute, or draws images of another shape or
    range.

    Parameters
    ----------
    target : str
        ``package.module:Class``, called without arguments; the module has an attribute `latent_shape` and turns
        (N, *latent_shape) into images (N, C, H, W) in [0, 1].
    weights : str or None
        Safetensors file of its state dict; None: it brings its own.
    """
    module = IMAGE_GENERATORS.get(target)()
    latent_shape = getattr(module, "latent_shape", None)
    if not isinstance(module, nn.Module) or latent_shape is None:
        raise ConfigError(
            f"setting 'generator' = {target!r}: needs an nn.Module with the attribute 'latent_shape'"
        )
    if weights is not None:
        try:
            module.load_state_dict(load_tensors(weights)[0])
        except Unreadable as error:
            raise DataError(f"setting 'generator_weights' = {weights!r}: {error.reason}") from None
        except RuntimeError as error:
            raise DataError(f"setting 'generator_weights' = {weights!r}: does not fit ({error})") from None
    module.eval().requires_grad_(False)
    with torch.no_grad():
        drawn = module(torch.randn(8, *latent_shape, generator=torch_rng(0, "generator-probe")))
    if tuple(drawn.shape[1:]) != image_shape or not bool((drawn >= 0).all() and (drawn <= 1).all()):
        raise ConfigError(
            f"setting 'generator' = {target!r}: draws {tuple(drawn.shape[1:])} in [{float(drawn.min()):.3g}, "
            f"{float(drawn.max()):.3g}]; images of {image_shape} in [0, 1] are needed"
        )
    shape = tuple(int(size) for size in latent_shape)
    return TrainedGenerator(module, shape, {"generator": target, "latent size": math.prod(shape)})
