"""A generator and a critic in one module, as they are sent."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError

DIGIT = (1, 28)
"""Channels and side of the images that the convolutional nets are made for."""


class Gan(nn.Module):
    """A generator, latents N(0, 1) (n, latent) to images (n, C, S, S) in [0, 1], and a critic, images to (n, 1).

    Its answer to images is the critic's. With `nets` "generator" the critic is no part of the state dict: each client
    has one of its own.
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, latent: int, nets: str | None) -> None:
        super().__init__()
        self.latent = latent
        self.generator = generator
        self._home: tuple[nn.Module, ...] = (
            critic,
        )  # a tuple, so that its parameters are not registered here
        if nets != "generator":
            self.scorer, self._home = critic, ()

    @property
    def critic(self) -> nn.Module:
        """The critic, sent or not."""
        return self._home[0] if self._home else self.scorer

    def forward(self, images: Tensor) -> Tensor:
        """The critic's scores of images (n, C, S, S) in [0, 1], (n, 1)."""
        scores: Tensor = self.critic(images)
        return scores

    def sample(self, count: int, draws: torch.Generator) -> Tensor:
        """Generated images (count, C, S, S), with their graph, from latents of the CPU generator `draws`."""
        latents = torch.randn(count, self.latent, generator=draws)
        images: Tensor = self.generator(latents.to(next(self.generator.parameters()).device))
        return images

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights uniformly with variance 4 / (inputs + outputs), biases zero."""
        for net in (self.generator, self.critic):
            initialise(net, generator)


@torch.no_grad()
def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Weights uniform with variance 4 / (inputs + outputs) (He et al. on both sides), biases zero."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            area = layer.weight[0, 0].numel()
            fans = area * (layer.weight.shape[0] + layer.weight.shape[1])
            layer.weight.uniform_(-((12.0 / fans) ** 0.5), (12.0 / fans) ** 0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


class ConvGenerator(nn.Module):
    """128 numbers to 28 x 28 by three transposed convolutions; `dim` 64: 1,554,177 parameters (Gulrajani et al.)."""

    def __init__(self, dim: int, latent: int) -> None:
        super().__init__()
        self.dim = dim
        self.first = nn.Linear(latent, 4 * 4 * 4 * dim)
        self.to_8 = _up(4 * dim, 2 * dim)
        self.to_14 = _up(2 * dim, dim)
        self.to_28 = _up(dim, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) in [0, 1]."""
        hidden = self.first(latents).relu().reshape(-1, 4 * self.dim, 4, 4)
        hidden = self.to_8(hidden).relu()[:, :, :7, :7]
        images: Tensor = self.to_28(self.to_14(hidden).relu()).sigmoid()
        return images


class ConvCritic(nn.Module):
    """28 x 28 to one number by three convolutions; `dim` 64: 1,030,145 parameters (Gulrajani et al.)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = (1, dim, 2 * dim, 4 * dim)
        self.layers = nn.ModuleList(
            nn.Conv2d(few, many, 5, stride=2, padding=2) for few, many in pairwise(sizes)
        )
        self.last = nn.Linear(4 * 4 * 4 * dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (n, 1)."""
        for layer in self.layers:
            images = leaky_relu(layer(images), 0.2)
        scores: Tensor = self.last(images.flatten(1))
        return scores


def _up(few: int, many: int) -> nn.ConvTranspose2d:
    """Doubles the side."""
    return nn.ConvTranspose2d(few, many, 5, stride=2, padding=2, output_padding=1)


def wgan_gp(model: ModelConfig) -> nn.Module:
    """The nets of Gulrajani et al. (2017) for digits; `model.width` is their DIM."""
    channels, side, _ = model.resolved
    if (channels, side) != DIGIT:
        raise ConfigError(
            f"setting 'model.name' = 'wgan-gp': made for 1 x 28 x 28 images, not {channels} x {side} x {side}; use "
            "--model wgan-gp-mlp, or --image-size 28 on grey images"
        )
    dim, latent = model.width or 64, 128
    return Gan(ConvGenerator(dim, latent), ConvCritic(dim), latent, model.nets)


def wgan_gp_mlp(model: ModelConfig) -> nn.Module:
    """Linear nets for any image: latent 32, `model.width` twice; the critic's second layer has half of it."""
    channels, side, _ = model.resolved
    pixels, width, latent = channels * side * side, model.width or 256, 32
    generator = nn.Sequential(
        *(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, pixels), nn.Sigmoid(), nn.Unflatten(1, (channels, side, side))),
    )
    half = max(1, width // 2)
    critic = nn.Sequential(
        *(nn.Flatten(), nn.Linear(pixels, width), nn.LeakyReLU(0.2)),
        *(nn.Linear(width, half), nn.LeakyReLU(0.2), nn.Linear(half, 1)),
    )
    return Gan(generator, critic, latent, model.nets)
