"""From picture files and arrays to square uint8 images of one size."""

from __future__ import annotations

import io

import numpy as np
import psutil  # type: ignore[import-untyped]
from PIL import Image

from fedattack.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF")
_GREY_MODES = {"1", "L", "LA"}


def decode(data: bytes, name: str, image_size: int | None) -> Image.Image:
    """One picture, centre-cropped to a square, in mode "L" where it is grey and "RGB" otherwise.

    It is resized to `image_size` (antialiased bilinear) unless that is None. Raises DataError, with `name`, if it is
    not a readable picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"picture {name!r} has mode {picture.mode!r}; 8 bits a channel are read")
            square = picture.convert("L" if picture.mode in _GREY_MODES else "RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read picture {name!r}: {error}") from None
    side = min(square.size)
    if square.width != square.height:
        left, top = (square.width - side) // 2, (square.height - side) // 2
        square = square.crop((left, top, left + side, top + side))
    return square if image_size in (None, side) else _resized(square, image_size or side)


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BILINEAR)


def from_pictures(pictures: list[Image.Image], channels: int | None) -> np.ndarray:
    """uint8 (N, C, S, S) of square pictures of one size (else DataError); `channels` None: grey only if all are."""
    sides = sorted({picture.width for picture in pictures})
    if len(sides) > 1:
        raise DataError(
            f"pictures have different sizes ({sides[0]} to {sides[-1]} pixels): set 'data.image_size' (now None)"
        )
    mode = "L" if channels == 1 or (channels is None and all(p.mode == "L" for p in pictures)) else "RGB"
    depth, side = (1 if mode == "L" else 3), sides[0]
    stack = np.empty((len(pictures), depth, side, side), np.uint8)
    for row, picture in zip(stack, pictures, strict=True):
        pixels = np.asarray(picture.convert(mode))
        row[:] = pixels[None] if depth == 1 else pixels.transpose(2, 0, 1)
    return stack


def adapt(images: np.ndarray, channels: int | None, image_size: int | None) -> np.ndarray:
    """Change channels (ITU-R 601 luma, or grey repeated) and side (antialiased bilinear) of uint8 (N, C, H, W).

    What already fits is returned as it is; non-square images are centre-cropped.
    """
    depth, height, width = images.shape[1:]
    side = min(height, width)
    target, wanted = image_size or side, channels or depth
    if height != width:
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, :, top : top + side, left : left + side]
    if wanted == depth and target == side:
        return images
    require_memory(len(images), wanted, target)
    out = np.empty((len(images), wanted, target, target), np.uint8)
    for row, image in zip(out, images, strict=True):
        pixels = np.ascontiguousarray(image[0] if depth == 1 else image.transpose(1, 2, 0))
        picture = Image.fromarray(pixels).convert("L" if wanted == 1 else "RGB")
        changed = np.asarray(picture if target == side else _resized(picture, target))
        row[:] = changed[None] if wanted == 1 else changed.transpose(2, 0, 1)
    return out


def require_memory(count: int, channels: int, side: int) -> None:
    """Raise DataError if so many images cannot be held in this machine's free memory."""
    needed, free = count * channels * side * side, psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{count:,} images of {channels}x{side}x{side} need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB "
            "are free: set 'data.limit' or a smaller 'data.image_size'"
        )
