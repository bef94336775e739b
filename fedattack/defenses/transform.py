"""Transformation policies: the model is shown augmented images, so that what leaks is not the private image."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torchvision.transforms.v2.functional as T
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode

from fedattack.defenses.base import Defense
from fedattack.errors import ConfigError

SUB_POLICIES: tuple[tuple[str, int], ...] = (
    ("invert", 7), ("contrast", 6), ("rotate", 2), ("translate_x", 9), ("sharpness", 1),
    ("sharpness", 3), ("shear_y", 2), ("translate_y", 2), ("autocontrast", 5), ("equalize", 2),
    ("shear_y", 5), ("posterize", 5), ("color", 3), ("brightness", 5), ("sharpness", 9),
    ("brightness", 9), ("equalize", 5), ("equalize", 1), ("contrast", 7), ("sharpness", 5),
    ("color", 5), ("translate_x", 5), ("equalize", 7), ("autocontrast", 8), ("translate_y", 3),
    ("sharpness", 6), ("brightness", 6), ("color", 8), ("solarize", 0), ("invert", 0),
    ("equalize", 0), ("autocontrast", 0), ("equalize", 8), ("equalize", 4), ("color", 5),
    ("equalize", 5), ("autocontrast", 4), ("solarize", 4), ("brightness", 3), ("color", 0),
    ("solarize", 1), ("autocontrast", 0), ("translate_y", 3), ("translate_y", 3), ("autocontrast", 1),
    ("solarize", 1), ("equalize", 5), ("invert", 0), ("translate_y", 3), ("autocontrast", 1),
)  # fmt: skip
"""The operation and magnitude index (0 to 9) of each of the 50 indices of a policy, as ATS and SemSim number them."""

_GREY = 128.0
_LARGEST = {"translate_x": 0.453, "translate_y": 0.453, "shear_y": 0.3, "rotate": 30.0}
_PADDING = 4


@dataclass
class Transform(Defense):
    """Show the model transformed images: random crop and flip, then one of the policy's lists of operations.

    Each image is transformed once a round. Operations work on 8-bit pixels as their PIL originals do; what is shifted
    in is grey. Rotations go one way only and all other directions are drawn, as in the source.

    Parameters
    ----------
    policy : str
        Lists of indices into :data:`SUB_POLICIES`: ``"3-1-7+43-18-18"`` are two lists of three, of which each image
        draws one; its operations are applied in order, always (the published code ignores their probabilities).
        Empty: none.
    crop : bool
        First pad by 4 pixels, crop at random to the old size and flip with chance 1/2, as published for 32x32 images.

    References
    ----------
    Gao et al., Privacy-preserving Collaborative Learning with Automatic Transformation Search, 2021 (ATS), whose best
    policies on CIFAR-100 are 3-1-7 and 43-18-18; Sun et al., Privacy Assessment on Reconstructed Images: Are Existing
    Evaluation Metrics Faithful to Human Perception?, 2023 (SemSim).
    """

    draws: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    generates: ClassVar[bool] = False  # it would learn to draw transformed images

    policy: str = "3-1-7+43-18-18"
    crop: bool = True

    def __post_init__(self) -> None:
        self._lists = parse_policy(self.policy)

    def images(self, images: Tensor, generator: Generator) -> Tensor:
        """The transformed images, on 1/255 steps."""
        shown = [self._one(image, generator) for image in (images * 255).round().to(torch.uint8)]
        return torch.stack(shown).to(images.dtype) / 255

    def _one(self, image: Tensor, generator: Generator) -> Tensor:
        if self.crop:
            image = _crop_and_flip(image, generator)
        if self._lists:
            for index in self._lists[_drawn(len(self._lists), generator)]:
                name, magnitude = SUB_POLICIES[index]
                sign = 1 if _drawn(2, generator) else -1
                image = _OPERATIONS[name](image, magnitude / 9, sign)
        return image


def parse_policy(text: str) -> tuple[tuple[int, ...], ...]:
    """The lists of a policy such as ``"3-1-7+43-18-18"``, indices 0 to 49."""
    if not text:
        return ()
    if not re.fullmatch(r"\d+(-\d+)*(\+\d+(-\d+)*)*", text):
        raise ConfigError(
            f"setting 'defense.transform.policy' = {text!r}: expected lists such as 3-1-7+43-18-18"
        )
    lists = tuple(tuple(int(index) for index in part.split("-")) for part in text.split("+"))
    wrong = [index for part in lists for index in part if index >= len(SUB_POLICIES)]
    if wrong:
        raise ConfigError(
            f"setting 'defense.transform.policy' = {text!r}: index {wrong[0]}; accepted: 0 to {len(SUB_POLICIES) - 1}"
        )
    return lists


def _drawn(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _crop_and_flip(image: Tensor, generator: Generator) -> Tensor:
    height, width = image.shape[-2:]
    top, left = _drawn(2 * _PADDING + 1, generator), _drawn(2 * _PADDING + 1, generator)
    cropped = T.pad(image, [_PADDING])[:, top : top + height, left : left + width]
    return cropped.flip(2) if _drawn(2, generator) else cropped


def _moved(image: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    shift = [round(x * image.shape[2]), round(y * image.shape[1])]
    return T.affine(image, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0], fill=[_GREY])


def _sheared_y(image: Tensor, strength: float, sign: int) -> Tensor:
    degrees = float(torch.rad2deg(torch.atan(torch.tensor(sign * strength * _LARGEST["shear_y"]))))
    return T.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, degrees], fill=[_GREY],
                    interpolation=InterpolationMode.BILINEAR)  # fmt: skip


def _enhanced(adjust: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float, int], Tensor]:
    return lambda image, strength, sign: adjust(image, 1 + sign * 0.5 * strength)


_OPERATIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "translate_x": lambda image, m, sign: _moved(image, x=sign * m * _LARGEST["translate_x"]),
    "translate_y": lambda image, m, sign: _moved(image, y=sign * m * _LARGEST["translate_y"]),
    "shear_y": _sheared_y,
    "rotate": lambda image, m, sign: T.rotate(
        image, m * _LARGEST["rotate"], InterpolationMode.BILINEAR, fill=[_GREY]
    ),
    "color": _enhanced(T.adjust_saturation),
    "contrast": _enhanced(T.adjust_contrast),
    "sharpness": _enhanced(T.adjust_sharpness),
    "brightness": _enhanced(T.adjust_brightness),
    "posterize": lambda image, m, sign: T.posterize(image, 8 - round(4 * m)),
    "solarize": lambda image, m, sign: torch.where(image >= 256 * (1 - m), 255 - image, image),
    "autocontrast": lambda image, m, sign: T.autocontrast(image),
    "equalize": lambda image, m, sign: T.equalize(image),
    "invert": lambda image, m, sign: T.invert(image),
}
