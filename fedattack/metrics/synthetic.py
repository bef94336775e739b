"""What synthetic images are worth: what a classifier learns from them, and how like real ones they are.

A generator without labels cannot say what its images show. A teacher, trained on real public images, labels them, so
that nothing here can be better than the teacher, and each figure stands beside the same of real images.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from fedattack.errors import DataError
from fedattack.metrics.frechet import frechet_distance
from fedattack.metrics.statistics import wilson
from fedattack.rng import numpy_rng

HIDDEN = 128
JUDGE = f"scikit-learn MLPClassifier, one hidden layer of {HIDDEN} ReLU, on pixels"
"""What judges images: its last hidden layer are the features of the Fréchet distance."""
SURE = 0.9
"""Probability of a class above which the teacher is sure."""
_BATCH, _EPOCHS, _STEPS = 64, 15, 1500


@dataclass(frozen=True)
class Labelled:
    """Real images, float32 (N, C, H, W) in [0, 1], and their labels, int64 (N,)."""

    images: Tensor
    labels: NDArray[np.int64]


class Judge:
    """The classifier :data:`JUDGE`, trained on some images; the same images and `seed` give the same one."""

    def __init__(self, images: Tensor, labels: NDArray[np.int64], seed: int) -> None:
        if len(np.unique(labels)) < 2:
            raise DataError(
                f"a classifier needs images of at least 2 classes, and {len(images)} of one are there"
            )
        epochs = max(_EPOCHS, -(-_STEPS * _BATCH // len(images)))
        batch = min(_BATCH, len(images))
        self._net = MLPClassifier((HIDDEN,), batch_size=batch, max_iter=epochs, tol=0.0, random_state=seed)
        with warnings.catch_warnings():  # so many epochs and no more are meant
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._net.fit(_flat(images), labels)

    def probabilities(self, images: Tensor) -> NDArray[np.float64]:
        """(N, classes seen)."""
        return np.asarray(self._net.predict_proba(_flat(images)), dtype=np.float64)

    def labels(self, images: Tensor) -> NDArray[np.int64]:
        """The likeliest class of each image, (N,)."""
        return np.asarray(self._net.predict(_flat(images)), dtype=np.int64)

    def features(self, images: Tensor) -> NDArray[np.float64]:
        """The hidden layer, (N, :data:`HIDDEN`)."""
        hidden = _flat(images) @ self._net.coefs_[0] + self._net.intercepts_[0]
        return np.maximum(hidden, 0).astype(np.float64)


def worth(synthetic: Tensor, public: Labelled, test: Labelled, seed: int) -> dict[str, Any]:
    """How much of the real images is in the synthetic ones, (M, C, H, W) in [0, 1]; JSON-able.

    Parameters
    ----------
    public, test : Labelled
        Real images nobody trained the generator on, disjoint: the teacher's, and those that accuracies are of.

    Returns
    -------
    dict
        "accuracy": of classifiers trained on as many ("trained on": n) synthetic and real images, of the teacher, and
        "chance", the share of the commonest class; each with "mean", "low", "high" (Wilson's, 95 %). "sure": share of
        synthetic and of real images of whose class the teacher is surer than :data:`SURE`. "classes": how many the
        teacher finds among the synthetic images, and "of" how many. "frechet": distance of synthetic from real
        images, and its "floor", of other real ones, "of" n images each; None with fewer than 4 real images.

    Raises
    ------
    DataError
        If there are no images of a kind, or those of `public` have fewer than 2 classes.
    """
    for name, images in (("synthetic", synthetic), ("public", public.images), ("test", test.images)):
        if not len(images):
            raise DataError(f"no {name} images to judge by")
    teacher = Judge(public.images, public.labels, seed)
    said, real = teacher.probabilities(synthetic), teacher.probabilities(test.images)
    given = teacher.labels(synthetic)
    count = min(len(synthetic), len(public.images))
    rng = numpy_rng(seed, "worth of synthetic images")
    drawn = rng.permutation(len(synthetic))
    accuracies: dict[str, Any] = {"trained on": count}
    found = np.unique(given[drawn[:count]])
    if len(found) > 1:
        student = Judge(synthetic[drawn[:count]], given[drawn[:count]], seed)
        accuracies["synthetic"] = _accuracy(student.labels(test.images), test.labels)
    else:  # of one class alone nothing is learnt
        accuracies["synthetic"] = _accuracy(np.full(len(test.labels), found[0]), test.labels)
    some = rng.permutation(len(public.images))[:count]
    peer = teacher if count == len(public.images) else Judge(public.images[some], public.labels[some], seed)
    accuracies["real"] = _accuracy(peer.labels(test.images), test.labels)
    accuracies["teacher"] = _accuracy(teacher.labels(test.images), test.labels)
    accuracies["chance"] = {"mean": float(np.bincount(test.labels).max() / len(test.labels))}
    half = min(len(synthetic), len(test.images) // 2)
    distance = None
    if half >= 2:
        order = rng.permutation(len(test.images))
        near, far = (teacher.features(test.images[part]) for part in (order[:half], order[half : 2 * half]))
        made = teacher.features(synthetic[drawn[:half]])
        distance = {
            "distance": frechet_distance(made, near),
            "floor": frechet_distance(far, near),
            "of": half,
        }
    return {
        "judge": {"model": JUDGE, "seed": seed, "training images": len(public.images)},
        "test images": len(test.labels),
        "synthetic images": len(synthetic),
        "accuracy": accuracies,
        "sure": {"above": SURE, "synthetic": _share(said), "real": _share(real)},
        "classes": {
            "found": len(np.unique(given)),
            "of": said.shape[1],
            "rarest": _rarest(given, said.shape[1]),
        },
        "frechet": distance,
    }


def _flat(images: Tensor) -> NDArray[np.float32]:
    return images.flatten(1).numpy().astype(np.float32)


def _share(probabilities: NDArray[np.float64]) -> float:
    return float((probabilities.max(1) > SURE).mean())


def _rarest(labels: NDArray[np.int64], classes: int) -> float:
    """Share of the rarest class, 0 where one is missing."""
    times = np.unique(labels, return_counts=True)[1]
    return float(times.min() / len(labels)) if len(times) == classes else 0.0


def _accuracy(found: NDArray[np.int64], labels: NDArray[np.int64]) -> Mapping[str, float]:
    held = wilson(int((found == labels).sum()), len(labels))
    return {"mean": held.mean, "low": held.low, "high": held.high}
