"""From picture files and arrays to square uint8 images of one size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import psutil
from PIL import Image

from fedattack.errors import DataError
from fedattack.reading import Unreadable, open_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_GREY_MODES = {"1", "L", "LA"}
_ORIENTATION = 0x0112


def decode(
    data: bytes, name: str, image_size: int | None, remarks: Counter[str] | None = None
) -> Image.Image:
    """One picture, centre-cropped to a square, in mode "L" where it is grey and "RGB" otherwise.

    It is resized to `image_size` (antialiased bilinear) unless that is None. `remarks` counts what is in a picture
    and not read: further frames, transparency, a turn that EXIF asks for, bits beyond 8. Raises DataError, with
    `name`, if it is not a readable picture of at most :data:`~fedattack.reading.MOST_PIXELS` pixels.
    """
    try:
        with open_picture(data, name) as picture:
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"picture {name!r} has mode {picture.mode!r}; 8 bits a channel are read")
            if remarks is not None:
                remarks.update(_remarks(picture))
            square = _square(picture, "L" if picture.mode in _GREY_MODES else "RGB")
    except Unreadable as error:
        raise DataError(f"cannot read picture {name!r}: {error.reason}") from None
    return square if image_size in (None, square.width) else _resized(square, image_size or square.width)


def _square(picture: Image.Image, mode: str) -> Image.Image:
    """The central square in that mode, a picture of its own."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    converted = picture if picture.mode == mode else picture.convert(mode)
    return converted.crop((left, top, left + side, top + side))


def _remarks(picture: Image.Image) -> Iterable[str]:
    """What of a picture is not read, in words; before it is decoded."""
    if getattr(picture, "is_animated", False):
        yield "of several frames: the first is read"
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        yield "with transparency, which is dropped"
    if picture.mode == "CMYK":
        yield "in CMYK, turned into RGB without a colour profile"
    if any(_wide(tile[3]) for tile in getattr(picture, "tile", ())):
        yield "of 16 bits a channel, read as 8"
    # TIFF is turned by the decoder.
    if picture.format != "TIFF" and _orientation(picture) not in (None, 1):
        yield "that EXIF says to turn, read as they are stored"


def _wide(told: object) -> bool:
    """Whether what a decoder is told names 16 bits a channel: a raw mode "RGB;16B", or PPM's largest value."""
    return any(
        value > 255 if isinstance(value, int) else ";16" in str(value)
        for value in (told if isinstance(told, tuple) else (told,))
    )


def _orientation(picture: Image.Image) -> object:
    try:
        return picture.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata raises nearly anything, and the pixels may be sound
        return None


def remarked(remarks: Counter[str]) -> str:
    """What :func:`decode` remarked, as a note."""
    return "; ".join(f"{count:,} picture{'s' if count > 1 else ''} {what}" for what, count in remarks.items())


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BILINEAR)


def from_pictures(pictures: Iterable[Image.Image], count: int, channels: int | None) -> np.ndarray:
    """uint8 (N, C, S, S) of `count` square pictures of one size (else DataError), one in memory at a time.

    `channels` None: grey only if all are.
    """
    stack, side = np.empty((0, 1, 0, 0), np.uint8), 0
    for place, picture in enumerate(pictures):
        if not place:
            side = picture.width
            depth = channels or (1 if picture.mode == "L" else 3)
            require_memory(count, channels or 3, side)
            stack = np.empty((count, depth, side, side), np.uint8)
        if picture.width != side:
            low, high = sorted((side, picture.width))
            raise DataError(
                f"pictures have different sizes ({low} to {high} pixels): set 'data.image_size' (now None)"
            )
        if channels is None and picture.mode == "RGB" and stack.shape[1] == 1:
            stack = np.concatenate([stack] * 3, axis=1)
        pixels = np.asarray(picture.convert("L" if stack.shape[1] == 1 else "RGB"))
        stack[place] = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
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
