"""DLF: data leakage in federated averaging, with images of its own for each pass over the client's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from adversaries.inversion.gradients import epochs_for
from adversaries.inversion.matching.match import Match
from adversaries.inversion.matching.pixels import PIXEL_DEVIATION, PIXEL_MEAN
from adversaries.inversion.matching.problem import Penalty
from adversaries.inversion.matching.settings import Matching
from adversaries.reconstruction.matching.base import OptimisationAttack, Task
from adversaries.reconstruction.matching.recipes import Recipe
from fedattack.config import Weight
from fedattack.errors import ConfigError
from fedattack.rng import torch_rng

_FEATURES = 96
"""Random 3 x 3 convolutions under the prior."""

_PRIOR = {"published": 6.075, "cosine": 0.1}
"""Weight of the prior in each preset."""

_ADAM: dict[str, Any] = {
    "parametrisation": "standardised",
    "optimiser": "adam",
    "learning_rate": 0.1,
    "decay": False,
    "iterations": 400,
    "clamp": True,
}


@dataclass
class DLF(OptimisationAttack):
    """DLF: local passes simulated, each with images of its own, tied by what no order changes (Dimitrov et al. 2022).

    A client that goes through its data several times shuffles anew each time, and which image is in which batch of
    which pass is not sent. So each pass gets an image tensor of its own. A prior says that the passes hold the same
    images in another order: 96 random 3x3 convolutions, their maximum over the images of a pass, and its mean squared
    difference between passes. At the end the images of all passes are matched to those of the first, each to one of
    its label, and averaged. With one pass, or batches of all data, it is plain simulation.

    Presets: "published", squared distance over layers that weigh less by a factor e each, Adam, learning rate 0.1,
    400 iterations, total variation 2e-4; "cosine", ours: one minus the cosine,
    total variation 0.1, from the mean of public images.

    Three passes of two batches of 5 CIFAR-10 images, untrained "tiny-cnn", learning rate 0.01, three clients: 13.8 dB
    under "cosine", 13.9 without the prior; one tensor for all passes (``ig`` with the same weights) 14.0, floor 11.6.
    So the passes' order costs nothing at such steps, and the prior brings nothing there.

    Deviations: weights are in units of the update's squared norm (or the cosine's 1) and do not change over the
    iterations; pixels are clamped to their range, where the paper prices those outside by 10; labels are counted as
    by all attacks here; all passes start from the same images. The order of the labels is drawn once, and is the same
    in each pass, as in the authors' code.

    Parameters
    ----------
    prior : float, optional
        Weight of the prior that ties the passes; None: 6.075 under "published", 0.1 under "cosine".

    References
    ----------
    Dimitrov, Balunović, Konstantinov, Vechev, "Data Leakage in Federated Averaging", TMLR 2022.
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(Matching(objective="masked-l2", layer_weights="exponential", **_ADAM), tv=2e-4),
        "cosine": Recipe(Matching(objective="cosine", **_ADAM), tv=0.1, start="mean"),
    }

    prior: Weight | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        if self.recipe().labels == "joint":
            raise ConfigError(
                "setting 'labels' = 'joint': images of several passes are matched by their labels; use 'auto' or "
                "another strategy"
            )

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Match with images for each pass, and make one answer of them."""
        victims, images = task.labels.shape
        schedule, passes = epochs_for(task.observations[0].scenario, images)
        if task.options["unroll"] is None or passes == 1:
            return task.match(), {"passes": 1}
        labels = torch.stack([_shuffled(task, victim) for victim in range(victims)])
        several = dataclasses.replace(
            task,
            labels=labels.repeat(1, passes)[:, : schedule.images],
            starts=task.starts.repeat(1, 1, passes, 1, 1, 1)[:, :, : schedule.images],
            options=task.options
            | {"unroll": schedule, "penalty": self._ties(task, schedule.images // images)},
        )
        found = [together(one, images) for one in several.match()]
        return [_in_order(one, given) for one, given in zip(found, task.labels, strict=True)], {
            "passes": passes
        }

    def _ties(self, task: Task, passes: int) -> Penalty | None:
        """The prior over the whole `passes`; a last one that is broken off lacks images."""
        weight = _PRIOR[self.preset] if self.prior is None else self.prior
        if not weight or passes < 2:
            return None
        _, _, images, channels, *_ = task.starts.shape
        spread = (9 * channels) ** -0.5
        kernels = (
            torch.randn(_FEATURES, channels, 3, 3, generator=torch_rng(task.seed, "dlf-features")) * spread
        )
        kernels = kernels.to(task.device)

        def penalty(drawn: Tensor, shares: Tensor | None, rows: slice) -> Tensor:
            del shares, rows
            whole = drawn[:, : passes * images].unflatten(1, (passes, images))
            return weight * disagreement((whole - PIXEL_MEAN) / PIXEL_DEVIATION, kernels)

        return penalty


def disagreement(images: Tensor, kernels: Tensor) -> Tensor:
    """Mean squared difference between two passes' largest features, over all pairs; whatever order images are in.

    `images` are (V, passes, B, C, H, W), `kernels` (F, C, 3, 3); (V,).
    """
    features = F.conv2d(images.flatten(0, 2), kernels, padding=1).unflatten(0, images.shape[:3])
    largest = features.amax(2)
    return 2 * largest.var(1, correction=0).mean((1, 2, 3))


def together(found: Match, images: int) -> Match:
    """One match with `images` images of those of several passes: the mean, in the order of the first pass."""
    first, labels = found.images[:images], found.labels
    total, count = first.clone(), torch.ones(images)
    for start in range(images, len(found.images), images):
        part = slice(start, start + images)
        distances = (found.images[part, None] - first).square().flatten(2).mean(2)
        # Farther than any image of its own label.
        distances += (labels[part, None] != labels[:images]) * (1 + distances.max())
        rows, places = linear_sum_assignment(distances.numpy())
        total[places] += found.images[part][rows]
        count[places] += 1
    return dataclasses.replace(found, images=total / count[:, None, None, None], labels=labels[:images])


def _shuffled(task: Task, victim: int) -> Tensor:
    """One victim's labels in an order of the attacker's own."""
    observation = task.observations[victim]
    stream = torch_rng(task.seed, "dlf-labels", observation.round, observation.client)
    return task.labels[victim][torch.randperm(task.labels.shape[1], generator=stream)]


def _in_order(found: Match, labels: Tensor) -> Match:
    """The match with its images as `labels` (sorted) has theirs."""
    return dataclasses.replace(found, images=found.images[found.labels.argsort(stable=True)], labels=labels)
