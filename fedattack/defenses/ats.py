"""Automatic Transformation Search: which policies of a :class:`Transform` leak little and cost little accuracy.

Candidates are lists of three operations (some of which may be none). Two scores rank them, neither of which runs an
attack or trains on transformed images:

* S_pri, of a network trained without a policy, lower is more private. With T(x) the transformed image, u uniform
  noise, and x_t = (t/20) T(x) + (1 - t/20) u for t = 0, ..., 20, s_t is the mean over parameter tensors of the cosine
  between the gradients at x_t and at T(x); S_pri is the area below s_t by the trapezoidal rule.
* S_acc, of an untrained network, higher is more accurate. With R the correlation matrix of the gradients of the
  logits' sum by the pixels of n transformed images and l its eigenvalues, S_acc = -sum(ln(l + k) + 1/(l + k)),
  k = 1e-5: at most -n, for independent images.

Kept are those of S_acc no less than a bound, in the order of 0.7 m + 0.3 v: mean and variance of S_pri over classes,
each rescaled to [0, 1] among those that were kept.

What the released code does otherwise, put right here:

* it draws indices from -1 to 50, and 50 is out of range: an IndexError (here: -1 to 49);
* its selection does not parse: the minus of the bound -85 is the character U+2212;
* a policy's operations have probabilities, which are ignored, so that they always act: the searched policies do so
  too, as :class:`Transform` does, and it is said;
* "100 images" are the first of each class among 100, some 63 for its 100 classes. The bound is one of a sum over
  images, so that -85 is -1.34 an image; 100 images have at most -100 and could never reach it. Here n is what is
  asked for, and the bound is an image's;
* eigenvalues of the symmetric matrix are those of a general one, which may be complex or negative beyond k, so that
  the score is NaN; here they are those of a symmetric one, and at least 0;
* transformed images are drawn anew for each use of an image, at the state of a global stream; here by seed.

The bound belongs to the network: on 63 images of CIFAR-10 an untrained ResNet20-4 has -1.17 an image without a
policy, -1.33 under 43-18-18 and -1.57 under 3-1-7; a CNN of two layers has -2.6, -4.6 and -5.6.

References
----------
Gao et al., Privacy-preserving Collaborative Learning with Automatic Transformation Search, 2021. The second score is
that of Mellor et al., Neural Architecture Search without Training, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fedattack.defenses.transform import SUB_POLICIES, Transform
from fedattack.errors import ConfigError, DataError
from fedattack.rng import numpy_rng, torch_rng
from fedattack.task import trained_parameters

STEPS = 20
"""Parts of the way from noise to the image."""

K = 1e-5

LEAST_ACCURACY = -1.34
"""Bound of S_acc an image: the published -85 over the 63.4 classes that 100 draws from 100 classes hold."""

WEIGHTS = 0.7, 0.3
"""Of the mean of S_pri and of its variance, in the order of candidates."""

_NONE = -1


@dataclass(frozen=True)
class Candidate:
    """A policy with its scores: S_pri of each class, and S_acc of each batch, a sum over `images` images."""

    policy: str
    privacy: tuple[float, ...]
    accuracy: tuple[float, ...]
    images: int

    @property
    def mean_privacy(self) -> float:
        """Mean of S_pri over the classes; lower is more private."""
        return float(np.mean(self.privacy))

    @property
    def variance(self) -> float:
        """Variance of S_pri between the classes."""
        return float(np.var(self.privacy))

    @property
    def accuracy_per_image(self) -> float:
        """Mean of S_acc over the batches, an image; at most -1."""
        return float(np.mean(self.accuracy)) / self.images


def candidates(count: int, seed: int, length: int = 3) -> list[str]:
    """That many different policies of up to `length` operations, drawn uniformly with "none" among the operations.

    The policy without any operation, ``""``, may be among them. Raises ConfigError where there are not so many.
    """
    kinds = len(SUB_POLICIES) + 1
    if not 1 <= count <= kinds**length // 2:
        raise ConfigError(f"{count} candidates: 1 to {kinds**length // 2:,} are accepted")
    rng = numpy_rng(seed, "ats candidates")
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = rng.integers(_NONE, len(SUB_POLICIES), size=length)
        found["-".join(str(index) for index in drawn if index != _NONE)] = None
    return list(found)


def privacy_score(
    model: nn.Module, image: Tensor, label: Tensor, noise: Tensor, transform: Transform, draws: Generator
) -> float:
    """S_pri of one image (1, C, H, W), its label (1,) and a noise image of the same shape; `model` as it is to be.

    The image is transformed once. Parameters whose gradient is zero have no direction and count as 0.
    """
    shown = transform.images(image, draws)
    wanted = _gradient(model, shown, label)
    similar = []
    for step in range(STEPS + 1):
        share = step / STEPS
        found = _gradient(model, share * shown + (1 - share) * noise, label)
        cosines = [
            cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(found, wanted, strict=True)
        ]
        similar.append(float(torch.stack(cosines).double().mean()))
    return float(np.trapezoid(similar, dx=1 / STEPS))


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    loss = cross_entropy(model(images), labels)
    parameters = list(trained_parameters(model).values())
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def accuracy_score(model: nn.Module, images: Tensor) -> float:
    """S_acc of transformed images (n, C, H, W); DataError where an image has no slope to be correlated.

    `model` in evaluation mode, so that an image's slope is its own.
    """
    shown = images.clone().requires_grad_(True)
    (slopes,) = torch.autograd.grad(model(shown).sum(), shown)
    rows = slopes.flatten(1).double()
    if bool((rows.std(1) == 0).any()) or not bool(rows.isfinite().all()):
        raise DataError(
            "an image has no gradient that varies over its pixels: it cannot be correlated with others"
        )
    values = torch.linalg.eigvalsh(torch.atleast_2d(torch.corrcoef(rows))).clamp(min=0) + K
    return -float((values.log() + 1 / values).sum())


@dataclass(frozen=True)
class Search:
    """What is searched on, and how much of it is looked at.

    Parameters
    ----------
    trained, untrained : nn.Module
        In evaluation mode: trained without a policy on a tenth of the data in the publication, and at its start.
    images, labels : Tensor
        float32 (N, C, H, W) in [0, 1] and int64 (N,); the first ones of each class are used for S_pri.
    per_class : int
        Images of each class for S_pri.
    batches, batch : int
        Batches for S_acc, and images of each, in the order of `images` after those of S_pri where there are enough.
    least_accuracy : float
        Smallest S_acc an image.
    """

    trained: nn.Module
    untrained: nn.Module
    images: Tensor
    labels: Tensor
    per_class: int = 5
    batches: int = 10
    batch: int = 100
    least_accuracy: float = LEAST_ACCURACY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batches * self.batch > len(self.images):
            raise DataError(
                f"{self.batches} batches of {self.batch} images for S_acc: there are {len(self.images)} images"
            )
        counts = torch.bincount(self.labels)
        if int(counts[counts > 0].min()) < self.per_class:
            raise DataError(
                f"{self.per_class} images of each class for S_pri: a class has {int(counts[counts > 0].min())}"
            )

    def score(self, policy: str) -> Candidate:
        """Both scores of one policy; what is drawn for it depends on the seed and the image alone."""
        transform = Transform(policy=policy, crop=False)
        privacy = []
        for label in self.labels.unique().tolist():
            own = (self.labels == label).nonzero().flatten()[: self.per_class].tolist()
            found = []
            for place in own:
                noise = torch.rand(
                    self.images[place : place + 1].shape, generator=self._draws("noise", place)
                )
                image, truth = self.images[place : place + 1], self.labels[place : place + 1]
                draws = self._draws("transformation", place)
                found.append(privacy_score(self.trained, image, truth, noise, transform, draws))
            privacy.append(float(np.mean(found)))
        accuracy = []
        for number in range(self.batches):
            some = self.images[len(self.images) - (number + 1) * self.batch :][: self.batch]
            accuracy.append(
                accuracy_score(self.untrained, transform.images(some, self._draws("batch", number)))
            )
        return Candidate(policy, tuple(privacy), tuple(accuracy), self.batch)

    def _draws(self, purpose: str, key: int) -> Generator:
        return torch_rng(self.seed, f"ats {purpose}", key)

    def run(
        self, policies: Sequence[str], shown: Callable[[int, Candidate], None] = lambda number, found: None
    ) -> list[Candidate]:
        """All candidates scored, in their order; `shown` is told of each as it comes."""
        found = []
        for number, policy in enumerate(policies):
            found.append(self.score(policy))
            shown(number, found[-1])
        return found


def ranked(
    found: Sequence[Candidate], least_accuracy: float = LEAST_ACCURACY
) -> list[tuple[Candidate, float]]:
    """Those that are accurate enough, the best first, with what they are ordered by: 0 is best, 1 worst."""
    kept = [one for one in found if one.accuracy_per_image >= least_accuracy]
    if not kept:
        return []
    means = _unit([one.mean_privacy for one in kept])
    variances = _unit([one.variance for one in kept])
    scored = zip(kept, WEIGHTS[0] * means + WEIGHTS[1] * variances, strict=True)
    return sorted(((one, float(score)) for one, score in scored), key=lambda pair: pair[1])


def _unit(values: Sequence[float]) -> np.ndarray:
    """Rescaled to [0, 1]; all 0 where they are alike."""
    found = np.asarray(values, np.float64)
    reach = found.max() - found.min()
    return (found - found.min()) / reach if reach > 0 else np.zeros_like(found)
