"""What the optimiser turns: pixels, standardised or in a box, or coefficients of a cosine basis."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import scipy.fft
import torch
from torch import Tensor

from fedattack.observation import Auxiliary

Parametrisation = Literal["pixels", "standardised", "box", "spectrum"]

PIXEL_MEAN, PIXEL_DEVIATION = 0.5, 0.25
"""What images are standardised by; CIFAR-10's own figures are .47 and .25 over all colours."""


class Chart(Protocol):
    """A map between variables (V, N) and images (V, B, C, H, W); row v depends on row v alone."""

    def images(self, variables: Tensor) -> Tensor: ...


@runtime_checkable
class ImageChart(Chart, Protocol):
    """A chart that can be inverted."""

    def variables(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Bounded(Chart, Protocol):
    """A chart whose variables must stay somewhere."""

    def project(self, variables: Tensor) -> Tensor:
        """The nearest variables (V, N) that are allowed, row by row."""
        ...


@runtime_checkable
class Priced(Chart, Protocol):
    """A chart some of whose variables are less likely than others."""

    def cost(self, variables: Tensor) -> Tensor:
        """What the variables (V, N) cost beside what their images do, (V,), in the units of the regularisers."""
        ...


@runtime_checkable
class Drawn(Chart, Protocol):
    """A chart that a network draws."""

    def tensors(self) -> list[Tensor]:
        """Everything numeric that its images depend on beside the variables."""
        ...


class Pixels:
    """Variables are pixels, unbounded."""

    limits = (0.0, 1.0)  # the variables of black and white, for clamping
    scale = 1.0  # pixels are a constant plus this times the variables

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def images(self, variables: Tensor) -> Tensor:
        return variables.unflatten(1, self._shape)

    def variables(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Standardised(Pixels):
    """Variables are (pixels - 0.5) / 0.25, unbounded: the scale that most papers' step lengths and starts are for."""

    limits = (-PIXEL_MEAN / PIXEL_DEVIATION, (1 - PIXEL_MEAN) / PIXEL_DEVIATION)
    scale = PIXEL_DEVIATION

    def images(self, variables: Tensor) -> Tensor:
        return PIXEL_MEAN + PIXEL_DEVIATION * super().images(variables)

    def variables(self, images: Tensor) -> Tensor:
        return super().variables((images - PIXEL_MEAN) / PIXEL_DEVIATION)


class Box(Pixels):
    """Variables are logits of pixels, which stay inside (0, 1)."""

    def images(self, variables: Tensor) -> Tensor:
        return super().images(torch.sigmoid(variables))

    def variables(self, images: Tensor) -> Tensor:
        return super().variables(torch.logit(images.clamp(0.01, 0.99)))


class Spectrum:
    """Variables are cosine coefficients of principal colours, each divided by the root of its usual deviation.

    Natural images have little power at high frequencies. Scaling a coefficient by the power s of its
    deviation is a preconditioner: s = 1 makes all coefficients equally likely and the gradient's high
    frequencies slow, s = 0 is the pixels' metric. Half way a first-order optimiser gains most (8 dB on faces
    after 200 L-BFGS iterations). The public images of `auxiliary` say what is usual; None: deviation falling
    as 1 / frequency, plain colour channels.
    """

    def __init__(
        self, shape: tuple[int, ...], auxiliary: Auxiliary | None, device: torch.device, exponent: float = 0.5
    ) -> None:
        _, channels, height, width = shape
        self._shape = shape
        self._down, self._across = _cosines(height), _cosines(width)
        if auxiliary is not None and len(auxiliary) > 1:
            centred = auxiliary.images.float().cpu()
            centred = centred - centred.mean(0)
            by_channel = centred.transpose(0, 1).flatten(1)
            self._colours = torch.linalg.eigh(by_channel @ by_channel.T)[1]
            deviation = self._analyse(centred).square().mean(0).sqrt()
        else:
            self._colours = torch.eye(channels)
            vertical, horizontal = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
            frequency = (vertical**2 + horizontal**2 + 1 / max(height, width) ** 2).sqrt()
            deviation = (1 / frequency).expand(channels, -1, -1)
        deviation = deviation / deviation.square().mean().sqrt()
        self._scale = (deviation + 1e-4).pow(exponent).to(device)
        self._colours, self._down, self._across = (
            t.to(device) for t in (self._colours, self._down, self._across)
        )

    def _analyse(self, images: Tensor) -> Tensor:
        """Coefficients (..., C, H, W) of images (..., C, H, W)."""
        coefficients = self._down @ images @ self._across.T
        return torch.einsum("...chw,cd->...dhw", coefficients, self._colours)

    def images(self, variables: Tensor) -> Tensor:
        coefficients = variables.unflatten(1, self._shape) * self._scale
        planes = torch.einsum("...dhw,cd->...chw", coefficients, self._colours)
        return self._down.T @ planes @ self._across

    def variables(self, images: Tensor) -> Tensor:
        return (self._analyse(images) / self._scale).flatten(1)


def _cosines(size: int) -> Tensor:
    """Orthonormal type-II cosine transform, float32 (size, size)."""
    return torch.from_numpy(scipy.fft.dct(torch.eye(size).double().numpy(), axis=0, norm="ortho")).float()


def chart(
    kind: Parametrisation, shape: tuple[int, ...], auxiliary: Auxiliary | None, device: torch.device
) -> ImageChart:
    """The chart of that name for images (B, C, H, W) = `shape`."""
    if kind == "spectrum":
        return Spectrum(shape, auxiliary, device)
    return {"box": Box, "standardised": Standardised}.get(kind, Pixels)(shape)
