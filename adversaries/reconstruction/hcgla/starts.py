"""Where matching starts from; the expensive parts are made once for all victims."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import prior_image
from adversaries.inversion.evidence.labels.counts import NON_NEGATIVE
from adversaries.inversion.gradients import closed_form
from adversaries.inversion.learning.ridge import FeatureRegression
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.observation import Auxiliary, Observation
from fedattack.reading import LARGEST_PICTURE, Unreadable, open_picture, read_bytes
from fedattack.rng import torch_rng

Start = Literal["auto", "ridge", "generator", "mean", "grey", "random", "red", "same-label", "image"]

_RESTART_DEVIATION = 0.1
"""Standard deviation, in pixel values, of what is added to a fixed start for each further restart."""


def check_start(start: Start, image: str | None, generator: str | None) -> None:
    """ConfigError for a start that lacks the file it needs."""
    if start == "image" and not image:
        raise ConfigError("setting 'hcgla.start' = 'image' needs 'hcgla.start_image', the path of a picture")
    if start == "generator" and not generator:
        raise ConfigError(
            "setting 'hcgla.start' = 'generator' needs 'hcgla.generator', the path of trained weights"
        )


class Starts:
    """Makes starts for victims that share the weights and the auxiliary images.

    Parameters
    ----------
    start : str
        One of :data:`Start`; "auto" (:attr:`name` says what it came to): ridge where there are auxiliary
        images and a chain of convolutions, else the auxiliary mean, else grey.
    reference : Observation
        Any of the victims: for the weights, the scenario and the auxiliary images.
    image : str, optional
        File for "image".
    generator : callable, optional
        (observation, labels) -> images (B, C, H, W), for "generator".
    """

    def __init__(
        self,
        start: Start,
        reference: Observation,
        seed: int,
        image: str | None = None,
        generator: Callable[[Observation, Tensor], Tensor] | None = None,
    ) -> None:
        self._reference, self._seed = reference, seed
        self._image_path, self._generator = image, generator
        self._shape = reference.scenario.image_shape
        self.name: Start = self._resolve() if start == "auto" else start
        if self.name in ("ridge", "mean", "same-label") and self._auxiliary is None:
            raise NotApplicable(
                f"hcgla.start = {self.name!r} needs auxiliary images, and none were granted; use 'grey' or 'random'"
            )

    @property
    def _auxiliary(self) -> Auxiliary | None:
        auxiliary = self._reference.auxiliary
        return auxiliary if auxiliary is not None and len(auxiliary) else None

    def _resolve(self) -> Start:
        if self._auxiliary is None:
            return "grey"
        try:
            closed_form.describe(self._reference.scenario.model)
        except NotApplicable:
            return "mean"
        return "ridge" if len(self._auxiliary) >= 10 else "mean"

    @cached_property
    def _regression(self) -> FeatureRegression:
        assert self._auxiliary is not None
        chain = closed_form.describe(self._reference.scenario.model)
        weights = {name: tensor.float().cpu() for name, tensor in self._reference.weights.items()}
        images = self._auxiliary.images.float().cpu()
        with torch.no_grad():
            features = torch.cat([closed_form.features(chain, weights, part) for part in images.split(512)])
        return FeatureRegression(features, images)

    @cached_property
    def _given_image(self) -> Tensor:
        assert self._image_path is not None
        return read_start_image(self._image_path, self._shape)

    def make(self, observation: Observation, labels: Tensor, restarts: int) -> Tensor:
        """`restarts` starts of one victim, its update as a gradient: float32 (R, B, C, H, W).

        The first is the start itself; further ones are other draws of "random", or the start with noise added.
        """
        generator = torch_rng(self._seed, "hcgla-start", observation.round, observation.client)
        shape = (restarts, len(labels), *self._shape)
        if self.name == "random":
            return torch.randn(shape, generator=generator)
        first = self._batch(observation, labels)
        noise = _RESTART_DEVIATION * torch.randn(shape, generator=generator)
        noise[0] = 0.0
        for position, label in enumerate(labels.tolist()):
            if label in labels[:position].tolist() and torch.equal(
                first[position], first[labels.tolist().index(label)]
            ):
                # Equal images with equal labels have equal gradients and would stay equal for ever.
                noise[0, position] = _RESTART_DEVIATION * torch.randn(self._shape, generator=generator)
        return first + noise

    def _batch(self, observation: Observation, labels: Tensor) -> Tensor:
        if self.name == "ridge":
            return torch.stack([self._ridge(observation, label) for label in labels])
        if self.name == "generator":
            assert self._generator is not None
            return self._generator(observation, labels).float().cpu()
        if self.name == "same-label":
            return torch.stack([self._same_label(int(label)) for label in labels])
        if self.name == "mean":
            one = prior_image(self._reference)
        elif self.name == "image":
            one = self._given_image
        elif self.name == "red":
            one = torch.zeros(self._shape)
            if self._shape[0] == 3:
                one[0] = 1.0
        else:
            one = torch.full(self._shape, 0.5)
        return one.expand(len(labels), *self._shape).clone()

    def _ridge(self, observation: Observation, label: Tensor) -> Tensor:
        """Ridge regression from the features that the label's row gives away."""
        assert self._auxiliary is not None
        evidence = Evidence(observation, followed=True)
        rows = evidence.rows(label[None])
        known, values = rows.sent[0], rows.values[0]
        if not bool(known.any()):
            return prior_image(self._reference)
        scenario, update = observation.scenario, observation.update
        bounded = scenario.compression.name in ("topk", "dgc") and scenario.model.activation in NON_NEGATIVE
        if bounded and update.indices is not None:
            head = evidence.head
            bias = head.row(int(label))[2]
            sent = head.values if scenario.compression.scope == "layer" else update.values
            residual = abs(bias) if bias is not None else 1 / observation.num_examples
            caps: Tensor | float = float(sent.abs().min()) / residual
        else:
            # An unsent feature may have any value: shut it out by a bound that none exceeds.
            caps = torch.where(known, -1e6, 1e6)
        return self._regression.predict(values, known, caps)

    def _same_label(self, label: int) -> Tensor:
        assert self._auxiliary is not None
        if self._auxiliary.labels is None:
            raise NotApplicable(
                "hcgla.start = 'same-label' needs auxiliary images with labels, and these have none"
            )
        there = torch.nonzero(self._auxiliary.labels == label)[:, 0]
        if len(there) == 0:
            raise DataError(f"hcgla.start = 'same-label': no auxiliary image has the inferred label {label}")
        return self._auxiliary.images[int(there[0])].float()


def read_start_image(path: str, shape: tuple[int, int, int]) -> Tensor:
    """A picture as float32 (C, H, W) in [0, 1], resized."""
    channels, height, width = shape
    try:
        with open_picture(read_bytes(path, LARGEST_PICTURE), path) as picture:
            resized = picture.convert("L" if channels == 1 else "RGB").resize(
                (width, height), Image.Resampling.BICUBIC
            )
            pixels = np.asarray(resized, dtype=np.float32) / 255
    except Unreadable as error:
        what = error.reason if error.absent else f"not a readable picture ({error.reason})"
        raise ConfigError(f"setting 'hcgla.start_image' = {path!r}: {what}") from None
    planes = torch.from_numpy(pixels).reshape(height, width, -1).permute(2, 0, 1)
    return planes.expand(channels, -1, -1).contiguous()
