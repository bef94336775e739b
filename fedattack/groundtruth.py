"""What only the auditor knows. No module of `adversaries` may import this one; a test holds that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedattack.observation import observation_name


@dataclass(frozen=True)
class GroundTruth:
    """The private batch behind one observation."""

    round: int
    client: int
    images: Tensor  # float32 (B, C, H, W), in [0, 1]
    labels: Tensor  # int64 (B,)
    sample_ids: tuple[int, ...]  # positions in the data set, for the record
    shown: Tensor | None = None  # as `images`: what the model was shown where a defence transforms them

    @property
    def key(self) -> str:
        """The same name as the observation's."""
        return observation_name(self.round, self.client)


@dataclass(frozen=True)
class MembershipTruth:
    """Who is behind what a membership question asks about: N samples, or people.

    `ids`, `owner` (the client, -1: held out), `labels` and `groups` are int64 (N,), of a person those of one sample.
    `asked` says of each target what counts: arrays of one length by name ("places" in the list, "is_member",
    "others": other clients' members). `accuracy` and `chance_accuracy`, in [0, 1], are the last global model's on
    `test_samples` held-out samples, and the share of their commonest class.
    """

    ids: NDArray[np.int64]
    owner: NDArray[np.int64]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    asked: Mapping[int, Mapping[str, NDArray[Any]]]
    accuracy: float | None
    chance_accuracy: float
    test_samples: int
