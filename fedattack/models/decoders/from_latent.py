"""Networks that draw images: from a latent vector, from fixed noise, or from a gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Double the side: nearest neighbour, 3 x 3 convolution, group norm, ReLU."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(min(4, outputs), outputs),
        nn.ReLU(),
    )


class Cropped(nn.Module):
    """A 3 x 3 convolution to image channels, sigmoid, and the middle `side` x `side` pixels."""

    def __init__(self, inputs: int, channels: int, side: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(inputs, channels, 3, padding=1)
        self._side = side

    def forward(self, maps: Tensor) -> Tensor:
        """Images (N, C, side, side) in (0, 1)."""
        top, left = ((size - self._side) // 2 for size in maps.shape[2:])
        drawn = torch.sigmoid(self.last(maps))
        return drawn[:, :, top : top + self._side, left : left + self._side]


class ImageGenerator(nn.Module):
    """A small decoder of images, without running statistics; `width` channels in the widest layer.

    What generative attacks ask of any generator: `latent_shape`, and for those that search feature maps, `stages`
    that are applied one after the other: latent -> maps of an eighth of the side, a quarter, half, all of it ->
    image.
    """

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, side, _ = image_shape
        start = -(-side // 8)
        self.latent_shape = (latent,)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(latent, width * start**2), nn.Unflatten(1, (width, start, start)), nn.ReLU()
                ),
                _block(width, width),
                _block(width, max(4, width // 2)),
                _block(max(4, width // 2), max(4, width // 4)),
                Cropped(max(4, width // 4), channels, side),
            ]
        )

    def forward(self, latent: Tensor) -> Tensor:
        """(N, *latent_shape) -> images (N, C, H, W) in (0, 1)."""
        for stage in self.stages:
            latent = stage(latent)
        return latent


class ImageEncoder(nn.Module):
    """Images to mean and log-variance of their latent vectors: the other half of a variational auto-encoder."""

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, side, _ = image_shape
        layers: list[nn.Module] = []
        inputs = channels
        for outputs in (max(4, width // 2), width, width):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
            side, inputs = side // 2, outputs
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side**2, 2 * latent))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> mean and log-variance, both (N, latent)."""
        mean, spread = self.body(images).chunk(2, dim=1)
        return mean, spread


class FeatureDecoder(nn.Module):
    """FGLA's decoder: what an update gives away of the head's input, to an image.

    A fully connected layer spreads the features over a small map, and :class:`ImageGenerator`'s stages draw from it.
    Unknown features are at their mean. Constructor, call, `centre` and `spread` as of
    :class:`~fedattack.models.decoders.from_features.Deconv`.
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        features: int,
        image_shape: tuple[int, int, int],
        activation: str,
        width: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.body = ImageGenerator(features, image_shape, width or 128)

    def forward(self, values: Tensor, sent: Tensor) -> Tensor:
        """Images (N, C, H, W) in (0, 1) of features (N, F), zero where not `sent` (bool, N, F)."""
        return self.body((values - self.centre) / self.spread * sent)


class GradientMLP(nn.Module):
    """Learning-to-Invert's network (published: 3 hidden layers of 3,000): a gradient, to the images of its batch."""

    def __init__(
        self, inputs: int, batch: int, image_shape: tuple[int, int, int], hidden: int, layers: int
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        parts: list[nn.Module] = []
        size = inputs
        for _ in range(layers):
            parts += [nn.Linear(size, hidden), nn.ReLU()]
            size = hidden
        self.last = nn.Linear(size, batch * channels * height * width)
        self.body = nn.Sequential(*parts)
        self._shape = (batch, *image_shape)

    @torch.no_grad()
    def begin_at(self, mean: Tensor) -> None:
        """Answer, before any training, about this image (C, H, W) whatever the gradient."""
        self.last.weight.mul_(0.1)
        self.last.bias.copy_(torch.logit(mean.clamp(0.01, 0.99)).expand(self._shape).flatten())

    def forward(self, gradients: Tensor) -> Tensor:
        """(N, inputs) -> (N, B, C, H, W) in (0, 1)."""
        return torch.sigmoid(self.last(self.body(gradients))).unflatten(1, self._shape)
