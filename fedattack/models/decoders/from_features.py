"""Generators: from what an update gives away of its last layer to an image.

Both architectures take the features h of one label row, zero where they were not sent, and the mask of those that
were. :data:`GENERATORS` names them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedattack.errors import ConfigError
from fedattack.registry import Registry

GENERATORS: Registry[type[nn.Module]] = Registry(
    "generator",
    {
        "ridge-conv": "fedattack.models.decoders.from_features:RidgeConv",
        "deconv": "fedattack.models.decoders.from_features:Deconv",
        "fgla": "fedattack.models.decoders.from_latent:FeatureDecoder",
    },
    group="fedattack.generators",
)

WIDE = 4096
"""From this many inputs on, the linear map goes through principal directions instead of a full matrix."""


def build_generator(
    name: str,
    features: int,
    image_shape: tuple[int, int, int],
    activation: str,
    width: int | None = None,
    rank: int | None = None,
) -> nn.Module:
    """A fresh generator; its weights come from torch's global stream, so fork and seed that around the call.

    Parameters
    ----------
    name : str
        A key of :data:`GENERATORS`, or ``package.module:Class``.
    features : int
        Inputs of the head (768 for the LeNet of HCGLA at 32 x 32).
    image_shape : tuple of int
        (C, H, W), square, at least 4 x 4.
    activation : str
        The classifier's, which says what h is a function of: under "sigmoid" h is undone by the logit.
    width : int, optional
        Channels of the widest layer; None: the architecture's default.
    rank : int, optional
        Principal directions before the linear map ("ridge-conv" with very wide heads); None: none.
    """
    kind = GENERATORS.get(name)
    if image_shape[1] != image_shape[2] or image_shape[1] < 4:
        raise ConfigError(f"a generator makes square images of at least 4 x 4 pixels, not {image_shape[1:]}")
    return kind(features, image_shape, activation, width, rank)


class Deconv(nn.Module):
    """The transposed-convolution stack of HCGLA's Init-Generation (Yang et al. 2023).

    A row of F features is a 1 x 1 picture with F channels; ConvT(k4, s1) makes it 4 x 4, ConvT(k4, s2, p1) double it
    until it is at least twice the image's side, each followed by BatchNorm and ReLU (Sigmoid at the end), and
    max-pooling halves it. As published for 768 features and 3 x 32 x 32: 512, 256, 128, 64, 3 channels. Wider heads
    (32,768 features of HCGLA's ResNet) are first mapped to 768 channels.

    Unlike there the features are standardised first (`centre`, `spread`: (F,), each where it is known): those of a
    sigmoid network vary by a few per cent around means of their own, which BatchNorm over all positions drowns, and
    the stack learns little but the mean image.
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
        channels, side, _ = image_shape
        width = width or 512
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.squeeze = nn.Linear(features, 768) if features > WIDE else None
        doublings = max(1, math.ceil(math.log2(2 * side / 4)))
        widths = [max(width >> step, 8) for step in range(doublings)]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(768 if self.squeeze is not None else features, widths[0], 4),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        for inputs, outputs in zip(widths, [*widths[1:], channels], strict=True):
            last = len(layers) == 3 * doublings
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1),
                nn.BatchNorm2d(outputs),
                nn.Sigmoid() if last else nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(side))

    def forward(self, values: Tensor, sent: Tensor) -> Tensor:
        """Images (N, C, H, W) in (0, 1) of features (N, F), zero where not `sent` (bool, N, F)."""
        row = (values - self.centre) / self.spread * sent
        if self.squeeze is not None:
            row = self.squeeze(row)
        return self.body(row[:, :, None, None])


class Residual(nn.Module):
    """Two 3 x 3 convolutions added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
        return x + self.second(F.relu(self.first(x)))


class RidgeConv(nn.Module):
    """A linear map solved in closed form, and a small residual network that corrects its image.

    The inputs are the pre-activations of the known features (h undone by the activation where that is one-to-one),
    with the unknown ones at their mean (`centre`, (F,)), and the mask itself, standardised by `mean` and `scale`
    (2F,) and in the principal directions of `basis` (2F, rank), if any: in a convolutional classifier the
    pre-activation is linear in the layer before, so a linear map goes far. The correction works on the image folded
    to a quarter of its side, which makes it cheap; its last layer starts at zero, so that untrained it changes
    nothing.
    """

    centre: Tensor
    mean: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(
        self,
        features: int,
        image_shape: tuple[int, int, int],
        activation: str,
        width: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        channels, side, _ = image_shape
        width = width or 96
        self._undo = activation
        self._shape = image_shape
        self._fold = next(fold for fold in (4, 2, 1) if side % fold == 0)
        folded = channels * self._fold**2
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("mean", torch.zeros(2 * features))
        self.register_buffer("scale", torch.ones(2 * features))
        self.register_buffer("basis", torch.zeros(2 * features, rank or 0))
        self.linear = nn.Linear(rank or 2 * features, channels * side * side)
        self.enter = nn.Conv2d(folded, width, 3, padding=1)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.leave = nn.Conv2d(width, folded, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def undone(self, values: Tensor) -> Tensor:
        """Pre-activations (N, F) of features."""
        if self._undo == "sigmoid":
            return torch.logit(values.clamp(1e-6, 1 - 1e-6))
        if self._undo == "tanh":
            return torch.atanh(values.clamp(-1 + 1e-6, 1 - 1e-6))
        return values

    def standardised(self, values: Tensor, sent: Tensor) -> Tensor:
        """(N, 2F): pre-activations of known features, their mean elsewhere, and the mask; standardised."""
        known = sent.to(values.dtype)
        raw = torch.cat([(self.undone(values) - self.centre) * known, known], 1)
        return (raw - self.mean) / self.scale

    def inputs(self, values: Tensor, sent: Tensor) -> Tensor:
        """What the linear map takes: standardised, and in principal directions where there is a basis."""
        inputs = self.standardised(values, sent)
        return inputs @ self.basis if self.basis.shape[1] else inputs

    def correct(self, images: Tensor) -> Tensor:
        """The residual network on images (N, C, H, W)."""
        folded = F.pixel_unshuffle(images - 0.5, self._fold)
        correction = self.leave(self.blocks(F.relu(self.enter(folded))))
        return images + F.pixel_shuffle(correction, self._fold)

    def forward(self, values: Tensor, sent: Tensor) -> Tensor:
        """Images (N, C, H, W), not clamped, of features (N, F) and the mask of those that were sent (bool)."""
        return self.correct(self.linear(self.inputs(values, sent)).unflatten(1, self._shape))
