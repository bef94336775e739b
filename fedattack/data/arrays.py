"""Images that somebody holds in memory: arrays, tensors, torch data sets; checked, and as the house has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.data.dataset import Listing, joined
from fedattack.data.pixels import adapt, require_memory
from fedattack.errors import DataError

Layout = Literal["NCHW", "NHWC"]


def as_images(
    value: Any, what: str = "images", layout: Layout | None = None, shape: tuple[int, int, int] | None = None
) -> Tensor:
    """Images float32 (N, C, S, S) in [0, 1] of an array or tensor of uint8 or of floats in [0, 1].

    Parameters
    ----------
    value
        (N, C, S, S), (N, S, S, C) or (N, S, S); with `shape` also a single image.
    layout : {"NCHW", "NHWC"}, optional
        Where the channels are; None: where there are 1 or 3 of them.
    shape
        (C, S, S) that is wanted.

    Raises
    ------
    DataError
        In one sentence that names `what`.
    """
    images = _pixels(value, what, layout, shape)
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise DataError(f"{what} are {_said(images.shape[1:])} each; the model takes {_said(shape)}")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _said(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)


def _pixels(value: Any, what: str, layout: Layout | None, shape: tuple[int, int, int] | None) -> Tensor:
    """uint8, or floats in [0, 1], (N, C, S, S)."""
    try:
        images = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} are no array of numbers ({type(value).__name__}: {error})") from None
    if shape is not None and images.ndim == 3 and len(shape) == 3 and tuple(images.shape) in _single(shape):
        images = images[None]
    if images.ndim == 3:
        images = images[:, None]
        layout = "NCHW"
    if images.ndim != 4 or not images.numel():
        raise DataError(
            f"{what} have shape {tuple(images.shape)}; accepted: (N, C, S, S), (N, S, S, C) or (N, S, S), one or more"
        )
    if layout is None:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first == last:
            raise DataError(
                f"{what} have shape {tuple(images.shape)}, in which the channels (1 or 3) cannot be told; say "
                "layout='NCHW' or layout='NHWC'"
            )
        layout = "NCHW" if first else "NHWC"
    if layout not in ("NCHW", "NHWC"):
        raise DataError(f"layout = {layout!r}: accepted: 'NCHW', 'NHWC'")
    if layout == "NHWC":
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise DataError(
            f"{what} are {_said(images.shape[1:])} (channels x height x width); square ones of 1 or 3 channels are "
            "accepted"
        )
    images = images.contiguous()
    if images.dtype == torch.uint8:
        if int(images.max()) <= 1:
            raise DataError(
                f"uint8 {what} run from 0 to {int(images.max())}; accepted: 0 to 255, or floats from 0 to 1"
            )
        return images
    if not images.is_floating_point():
        raise DataError(f"{what} are of type {images.dtype}; accepted: uint8, or floats in [0, 1]")
    if not bool(images.isfinite().all()):
        raise DataError(f"{what} hold {int((~images.isfinite()).sum())} NaN or infinite values")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise DataError(
            f"float {what} run from {low:g} to {high:g}; accepted: 0 to 1 (a mean and a deviation are taken off by "
            "mean= and std=)"
        )
    return images


def _single(shape: tuple[int, int, int]) -> set[tuple[int, ...]]:
    return {shape, (*shape[1:], shape[0])}


def as_labels(value: Any, count: int, classes: int | None = None, what: str = "labels") -> Tensor:
    """Labels int64 (N,) of `count` images, in ``range(classes)``; DataError in one sentence."""
    try:
        labels = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} are no array of numbers ({type(value).__name__}: {error})") from None
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim == 0:
        labels = labels[None]
    if labels.is_floating_point() and bool((labels == labels.round()).all()):
        labels = labels.long()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{what} are of type {labels.dtype}; whole numbers from 0 are accepted")
    if labels.shape != (count,):
        raise DataError(f"{what} have shape {tuple(labels.shape)}; {count} images need ({count},)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        bound = "" if classes is None else f" to {classes - 1}"
        raise DataError(f"{what} run from {low} to {high}; accepted: 0{bound}")
    return labels.long()


def listing_of(
    data: Any,
    layout: Layout | None = None,
    groups: Any = None,
    class_names: Sequence[str] | None = None,
) -> Listing:
    """A data set of what somebody holds in memory.

    Parameters
    ----------
    data
        A pair (images, labels) as :func:`as_images` and :func:`as_labels` take them, or a torch data set whose items
        are (image, label), the image a tensor as ``ToTensor`` makes it, an array, or a picture (PIL).
    groups
        Whose each sample is, (N,): whole numbers or names.
    class_names
        None: the numbers of the labels.

    Raises
    ------
    DataError
        In one sentence.
    """
    note = ""
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_sample(data[0]):
        pixels, labels = _pixels(data[0], "images", layout, None), data[1]
    else:
        pixels, labels, note = _collected(data, layout)
    if pixels.dtype != torch.uint8:
        exact = pixels * 255
        if bool((exact.round() - exact).abs().max() > 1e-3):
            note = joined(note, "floats are rounded to 8 bits")
        pixels = exact.round().to(torch.uint8)
    images: NDArray[np.uint8] = pixels.numpy()
    targets = as_labels(labels, len(images)).numpy()
    names = tuple(class_names) if class_names else tuple(str(n) for n in range(int(targets.max()) + 1))
    if int(targets.max()) >= len(names):
        raise DataError(f"labels run to {int(targets.max())}, and there are {len(names)} class names")
    whose, people = None, None
    if groups is not None:
        given = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
        if given.shape != (len(images),):
            raise DataError(f"groups have shape {given.shape}; {len(images)} images need ({len(images)},)")
        people, places = np.unique(given.astype(str), return_inverse=True)
        whose = places.astype(np.int64)
    return Listing(
        labels=targets,
        class_names=names,
        read=lambda ids, size: adapt(images[ids], None, size),
        groups=whose,
        group_names=None if people is None else tuple(people.tolist()),
        note=note,
    )


def _is_sample(value: Any) -> bool:
    """Whether it is an (image, label) of a list that stands for a data set."""
    return isinstance(value, tuple) and len(value) == 2 and np.ndim(value[1]) == 0


def _collected(data: Any, layout: Layout | None) -> tuple[Tensor, NDArray[np.int64], str]:
    """Images uint8 or float, labels and a note of a torch data set."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"data is a {type(data).__name__}; accepted: (images, labels), a torch Dataset with a length whose items "
            "are (image, label), or the name of a data set"
        )
    count = len(data)
    if not count:
        raise DataError("the data set holds no items")
    first: Tensor | None = None
    stack: Tensor | None = None
    labels = np.empty(count, np.int64)
    for number in range(count):
        try:
            item = data[number]
        except Exception as error:
            raise DataError(f"item {number} of the data set: {type(error).__name__}: {error}") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            what = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
            raise DataError(f"item {number} of the data set is {what}; (image, label) is accepted")
        image = _one(item[0], number, layout)
        labels[number] = int(as_labels(item[1], 1, what=f"label of item {number}")[0])
        if first is None or stack is None:
            first = image
            require_memory(count * image.element_size(), image.shape[0], image.shape[1])
            stack = image.new_empty(count, *image.shape)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise DataError(
                f"item {number} of the data set is {_said(image.shape)} of {image.dtype}, item 0 "
                f"{_said(first.shape)} of {first.dtype}; give all of one size and type"
            )
        stack[number] = image
    assert stack is not None
    return _pixels(stack, "images", "NCHW", None), labels, f"{type(data).__name__} of {count:,} items"


def _one(value: Any, number: int, layout: Layout | None) -> Tensor:
    """One image (C, H, W)."""
    picture = not isinstance(value, Tensor)
    try:
        image = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"image of item {number} is no array of numbers: {error}") from None
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise DataError(
            f"image of item {number} has shape {tuple(image.shape)}; (C, S, S) or (S, S, C) is accepted"
        )
    # Pictures and arrays have their channels last, tensors first, unless that cannot be.
    last = layout == "NHWC" or (
        layout is None and image.shape[2] in (1, 3) and (picture or image.shape[0] not in (1, 3))
    )
    return image.permute(2, 0, 1) if last else image
