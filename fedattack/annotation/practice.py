"""Pictures to practise on: five screens whose answer is certain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from fedattack.annotation.pairs import RatedPair

_SIDE = 48
"""Of practice pictures that are not the originals."""


@dataclass(frozen=True)
class Case:
    """Pictures from left to right, whether yes is the answer, the class that they show, and why."""

    pictures: tuple[Image.Image, ...]
    yes: bool
    name: str
    why: str


def match_cases(first: RatedPair, other: RatedPair | None, rng: np.random.Generator) -> list[Case]:
    """Two pictures: an original beside itself, beside its distortions, and beside `other`'s, where there is one."""
    one = first.original.pixels()
    cases = [
        (one, True, "The right picture is the left one, unchanged."),
        (_noise(one, rng), False, "The right picture is noise: nothing of the left one can be seen in it."),
        (_blurred(one), True, "The right picture is the left one, blurred; it can still be told."),
        (_shuffled(one, rng), False, "The pixels are shuffled: nothing can be told any more."),
        (_moved(one), True, "The right picture is the left one, moved and paler; that does not matter."),
    ]
    if other is not None:
        cases[3] = (other.original.pixels(), False, "The right picture shows another image, however clearly.")
    return [Case((one, picture), yes, "", why) for picture, yes, why in cases]


def recognise_cases(colour: bool, rng: np.random.Generator) -> list[Case]:
    """One picture: two photographs that come with scikit-learn, and their distortions.

    Not the originals: who has seen one recognises it later in its reconstruction.
    """
    return _alone((_photograph("flower", colour), ""), (_photograph("china", colour), ""), rng)


def class_cases(first: RatedPair, other: RatedPair, rng: np.random.Generator) -> list[Case]:
    """One picture, of a class that can be chosen: two of the originals, and their distortions."""
    named = [(pair.original.pixels(), pair.told["class_label"]) for pair in (first, other)]
    return _alone(named[0], named[1], rng)


def _alone(
    first: tuple[Image.Image, str], other: tuple[Image.Image, str], rng: np.random.Generator
) -> list[Case]:
    (one, mine), (two, theirs) = first, other
    return [
        Case((one,), True, mine, "It is a picture, unchanged."),
        Case((_noise(one, rng),), False, "", "It is noise: nothing can be recognised."),
        Case((_blurred(two),), True, theirs, "It is a picture, blurred; it can still be told."),
        Case(
            (_shuffled(one, rng),), False, "", "The pixels are shuffled: nothing can be recognised any more."
        ),
        Case((_moved(two),), True, theirs, "It is a picture, moved and paler; that does not matter."),
    ]


def _photograph(name: str, colour: bool) -> Image.Image:
    from sklearn.datasets import load_sample_image

    whole = Image.fromarray(load_sample_image(f"{name}.jpg"))
    left, top = (whole.width - whole.height) // 2, 0
    square = whole.crop((left, top, left + whole.height, top + whole.height))
    small = square.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return small if colour else small.convert("L")


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, np.asarray(image).shape, dtype=np.uint8))


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(0.6, min(image.size) / 40)))


def _moved(image: Image.Image) -> Image.Image:
    """An eighth to the right, with half the contrast."""
    pixels = np.asarray(image).astype(np.float64)
    pixels = np.roll(pixels, max(1, image.width // 8), axis=1)
    return Image.fromarray((pixels.mean() + 0.5 * (pixels - pixels.mean())).round().astype(np.uint8))


def _shuffled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image)
    flat = pixels.reshape(image.width * image.height, -1)
    return Image.fromarray(rng.permutation(flat).reshape(pixels.shape))
