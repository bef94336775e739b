"""Ways in which a reconstruction may differ from its image: what scores are tried on where the answer is known.

Each is a function of images, float (N, C, H, W) in [0, 1], and a generator, and returns as many of the same shape, in
[0, 1]. They were chosen to tell scores apart, and are no sample of what attacks produce.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional
from torchvision.transforms.functional import gaussian_blur

Degradation = Callable[[Tensor, Generator], Tensor]


def noise(images: Tensor, generator: Generator, deviation: float) -> Tensor:
    """Normal noise."""
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, generator: Generator, deviation: float) -> Tensor:
    """Gaussian blur, the filter cut at three deviations or at the image's side."""
    reach = min(round(3 * deviation), min(images.shape[-2:]) - 1)
    return gaussian_blur(images, [2 * reach + 1] * 2, [deviation] * 2)


def shift(images: Tensor, generator: Generator, pixels: int) -> Tensor:
    """So many pixels along both axes, each image in one of the four directions; edges are repeated."""
    count, _, height, width = images.shape
    signs = torch.randint(2, (2, count), generator=generator) * 2 - 1
    rows = (torch.arange(height) + pixels * signs[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width) + pixels * signs[1, :, None]).clamp(0, width - 1)
    return images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def contrast(images: Tensor, generator: Generator, factor: float) -> Tensor:
    """About each image's mean."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * factor + mean).clamp(0, 1)


def brightness(images: Tensor, generator: Generator, amount: float) -> Tensor:
    """Added to every pixel."""
    return (images + amount).clamp(0, 1)


def blend_mean(images: Tensor, generator: Generator, share: float) -> Tensor:
    """That share of the mean of all images."""
    return images.lerp(images.mean(dim=0, keepdim=True).expand_as(images), share)


def blend_other(images: Tensor, generator: Generator, share: float) -> Tensor:
    """That share of another of the images; 1: another image."""
    count = len(images)
    distance = int(torch.randint(1, max(count, 2), (), generator=generator))
    return images.lerp(images.roll(distance, dims=0), share)


def jpeg(images: Tensor, generator: Generator, quality: int) -> Tensor:
    """Written as JPEG and read again."""
    done = []
    for image in (images * 255).round().to(torch.uint8):
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
        read = torch.from_numpy(np.asarray(Image.open(stream)).copy()).float() / 255
        done.append(read[None] if read.ndim == 2 else read.permute(2, 0, 1))
    return torch.stack(done)


def mosaic(images: Tensor, generator: Generator, block: int) -> Tensor:
    """Every block of pixels is its mean."""
    size = images.shape[-2:]
    means = functional.avg_pool2d(images, block, ceil_mode=True, count_include_pad=False)
    return means.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., : size[0], : size[1]]


def shuffle_patches(images: Tensor, generator: Generator, side: int) -> Tensor:
    """Patches of that side in another order, each image in its own; what is left over at the edges stays."""
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    done = images.clone()
    for image, out in zip(images, done, strict=True):
        order = torch.randperm(rows * columns, generator=generator)
        if torch.equal(order, torch.arange(len(order))):
            order = order.roll(1)
        cut = image[:, : rows * side, : columns * side].unfold(1, side, side).unfold(2, side, side)
        moved = cut.flatten(1, 2)[:, order].unflatten(1, (rows, columns))
        out[:, : rows * side, : columns * side] = moved.permute(0, 1, 3, 2, 4).reshape(
            -1, rows * side, columns * side
        )
    return done


def blur_and_noise(images: Tensor, generator: Generator) -> Tensor:
    """A blur of 1 pixel, then noise of 0.3."""
    return noise(blur(images, generator, 1), generator, 0.3)


def salt(images: Tensor, generator: Generator, share: float) -> Tensor:
    """That share of the pixels is white."""
    shape = (len(images), 1, *images.shape[-2:])
    return torch.where(torch.rand(shape, generator=generator) < share, torch.ones(()), images)


ARMS: tuple[tuple[str, Degradation], ...] = (
    *((f"noise {x}", partial(noise, deviation=x)) for x in (0.1, 0.3, 0.7, 1.2)),
    *((f"blur {x}", partial(blur, deviation=x)) for x in (1, 2.5, 5)),
    *((f"shift {x}", partial(shift, pixels=x)) for x in (3, 6)),
    *((f"contrast {x}", partial(contrast, factor=x)) for x in (0.3, 0.1)),
    ("brightness +0.4", partial(brightness, amount=0.4)),
    *((f"blend with mean {x}", partial(blend_mean, share=x)) for x in (0.6, 0.85)),
    *((f"blend with another {x}", partial(blend_other, share=x)) for x in (0.4, 0.6)),
    ("another image", partial(blend_other, share=1.0)),
    ("jpeg 5", partial(jpeg, quality=5)),
    *((f"mosaic {x}", partial(mosaic, block=x)) for x in (4, 8)),
    *((f"shuffled patches {x}", partial(shuffle_patches, side=x)) for x in (8, 16)),
    ("blur 1 and noise 0.3", blur_and_noise),
    ("salt 0.4", partial(salt, share=0.4)),
)
"""Name and function of each, 24."""
