"""How well a mechanism forgets single samples, asked of shadow trainings: statistics of the auditor.

Scores are log-odds of a sample's label, ``log p_y - log(1 - p_y)``, of models that were trained and made to forget by
the same recipe: (T, K), a row per training, NaN where a training has nothing to say about a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedattack.errors import DataError
from fedattack.metrics import Interval, bootstrap_mean, pooled_auc
from fedattack.metrics.membership import auc, bar_at_fpr

Scores = NDArray[np.float64]
Pairs = tuple[NDArray[Any], ...]

MARGIN_AUC = 0.55
"""An AUC surely below this is no trace."""
MAX_FPR = 0.01
_FEWEST = 4  # trainings of a kind in each half: fewer fit no Gaussian
_LEAST_SPREAD = 1e-6
_BINS, _CLIP, _SMOOTH = 20, 100.0, 1e-5
_WIDTH, _DELTA = 0.5, 1e-5


@dataclass(frozen=True)
class Ranking:
    """What a test says of each training and sample that it is asked about, all flat, (n,): higher is "unlearned"."""

    scores: Scores
    unlearned: NDArray[np.bool_]
    target: NDArray[np.int64]  # which sample
    training: NDArray[np.int64]  # and of which training

    def of(self, targets: NDArray[np.bool_]) -> Ranking:
        """The same of some samples alone; `targets` (K,)."""
        kept = targets[self.target]
        return Ranking(self.scores[kept], self.unlearned[kept], self.target[kept], self.training[kept])

    @cached_property
    def auc(self) -> Interval:
        """Pooled over samples, with an interval over samples and trainings; see ``pooled_auc``."""
        return pooled_auc(self.scores, self.unlearned, self.training, self.target)

    def tpr(self, seed: int) -> Interval:
        """Share of the unlearned above the bar that 1 % of the others pass; interval over samples."""
        hits = self.scores > bar_at_fpr(self.scores, self.unlearned, MAX_FPR)
        return bootstrap_mean(hits[self.unlearned].astype(float), seed, self.target[self.unlearned])

    def each(self, targets: int) -> Scores:
        """AUC of each sample alone, (K,)."""
        every = (self.of(np.arange(targets) == one) for one in range(targets))
        return np.array([auc(one.scores, one.unlearned) for one in every])


def population_test(unlearned: Scores, others: Scores) -> Ranking:
    """One threshold for all samples on the score itself: what looks forgotten to whoever knows no other training."""
    return _joined([_pairs(unlearned, True, 0)], [_pairs(others, False, 0)])


def u_lira(unlearned: Scores, others: Scores) -> Ranking:
    """Likelihood ratio of two Gaussians per sample (Hayes et al., Inexact unlearning needs more careful evaluations
    to avoid a false sense of privacy, 2024, algorithm 2).

    Parameters
    ----------
    unlearned : ndarray of float64
        (T, K): scores after a sample was forgotten; NaN in trainings that never had it.
    others : ndarray of float64
        (T', K): scores of models that never saw it, or were retrained without it; NaN elsewhere.

    Notes
    -----
    Gaussians of the first half of the trainings judge the second, and the other way round, so that each score is
    judged by trainings apart from its own. DataError where a half has fewer than 4 trainings of a kind.
    """
    if unlearned.shape[1:] != others.shape[1:] or unlearned.ndim != 2:
        raise DataError(f"scores of shapes {unlearned.shape} and {others.shape} are not of the same samples")
    sides: tuple[list[Pairs], list[Pairs]] = ([], [])
    for fold in (0, 1):
        fitted = [_half(scores, 1 - fold) for scores in (unlearned, others)]
        fewest = min(int((~np.isnan(one)).sum(0).min()) for one in fitted)
        if fewest < _FEWEST:
            raise DataError(
                f"a half of the trainings has {fewest} with or without one of the samples; {_FEWEST} are needed: "
                "train more shadows"
            )
        (m_in, s_in), (m_out, s_out) = (
            (np.nanmean(one, 0), np.maximum(np.nanstd(one, 0, ddof=1), _LEAST_SPREAD)) for one in fitted
        )
        for side, scores, found in zip(sides, (unlearned, others), (True, False), strict=True):
            tested = _half(scores, fold)
            ratio = stats.norm.logpdf(tested, m_in, s_in) - stats.norm.logpdf(tested, m_out, s_out)
            side.append(_pairs(ratio, found, fold * (len(scores) // 2)))
    return _joined(*sides)


def _half(scores: Scores, fold: int) -> Scores:
    middle = len(scores) // 2
    return scores[middle:] if fold else scores[:middle]


def _pairs(scores: Scores, found: bool, first: int) -> Pairs:
    """Score, side, sample and training of all that is no NaN."""
    training, target = np.nonzero(~np.isnan(scores))
    return scores[training, target], np.full(len(target), found), target, training + first


def _joined(inside: list[Pairs], outside: list[Pairs]) -> Ranking:
    scores, unlearned, target, training = (
        np.concatenate(part) for part in zip(*inside, *outside, strict=True)
    )
    return Ranking(scores, unlearned, target, training)


def klom(
    unlearned: Scores, retrained: Scores, density: Literal["gaussian", "histogram"] = "gaussian"
) -> Scores:
    """KL divergence of margins, of the retrained from the unlearned models, each sample's, (K,), in nats.

    (Georgiev et al., Attribute-to-delete: machine unlearning via datamodel matching, 2024.) `density`: a Gaussian
    fitted to either side, or 20 bins over both, scores clipped to [-100, 100] and 1e-5 added to every share.
    """
    if density == "gaussian":
        mean, spread = np.nanmean(unlearned, 0), np.maximum(np.nanstd(unlearned, 0, ddof=1), _LEAST_SPREAD)
        m, s = np.nanmean(retrained, 0), np.maximum(np.nanstd(retrained, 0, ddof=1), _LEAST_SPREAD)
        return np.log(spread / s) + (s**2 + (m - mean) ** 2) / (2 * spread**2) - 0.5
    found = []
    for one, two in zip(unlearned.T, retrained.T, strict=True):
        ours, theirs = (np.clip(side[~np.isnan(side)], -_CLIP, _CLIP) for side in (one, two))
        bins = np.histogram_bin_edges(np.concatenate([ours, theirs]), _BINS)
        q, p = (np.histogram(side, bins)[0] / len(side) + _SMOOTH for side in (ours, theirs))
        found.append(float(stats.entropy(p, q)))
    return np.array(found)


@dataclass(frozen=True)
class ChallengeEpsilon:
    """The NeurIPS 2023 challenge's empirical epsilon of each sample; see :func:`challenge_epsilon`."""

    epsilon: Scores  # (K,); inf where a threshold tells all apart
    cap: float  # no finite epsilon can be larger with so many models: log(N - 1)

    @property
    def score(self) -> float:
        """Mean over samples of ``2 ** -floor(epsilon / 0.5)``: 1 where nothing tells, 0 where all is told."""
        return float(np.mean(2.0 ** -np.floor(np.maximum(self.epsilon, 0.0) / _WIDTH)))


def challenge_epsilon(unlearned: Scores, retrained: Scores, delta: float = _DELTA) -> ChallengeEpsilon:
    """How surely the best threshold, or pair of them, tells a sample's unlearned from its retrained models.

    ``max(log((1 - delta - FPR) / FNR), log((1 - delta - FNR) / FPR))``, largest over all thresholds on the score;
    those with one rate at 0 are left out, both at 0 are infinite (Triantafillou et al., Are we making progress in
    unlearning? Findings from the first NeurIPS unlearning competition, 2024). The challenge multiplies the mean score
    by the ratios of retained and test accuracy to retraining's; here they stand beside it.
    """
    found, most = [], 0
    for one, two in zip(unlearned.T, retrained.T, strict=True):
        ours, theirs = one[~np.isnan(one)], two[~np.isnan(two)]
        found.append(_epsilon(ours, theirs, delta))
        most = max(most, len(ours), len(theirs))
    return ChallengeEpsilon(np.array(found), math.log(max(most - 1, 1)))


def _epsilon(ours: Scores, theirs: Scores, delta: float) -> float:
    """Of one sample: every interval between two values, and everything outside it, is a guess "unlearned"."""
    values = np.unique(np.concatenate([ours, theirs]))
    # of each side, the share below each border between values
    below = [np.append(np.searchsorted(np.sort(side), values) / len(side), 1.0) for side in (ours, theirs)]
    hit, false = (side[None, :] - side[:, None] for side in below)
    upper = np.triu_indices(len(values) + 1, 1)
    fnr, fpr = (
        np.concatenate([1 - hit[upper], hit[upper]]),
        np.concatenate([false[upper], 1 - false[upper]]),
    )
    fnr, fpr = np.where(fnr < 1e-12, 0.0, fnr), np.where(fpr < 1e-12, 0.0, fpr)
    if ((fnr == 0) & (fpr == 0)).any():
        return math.inf
    kept = (fnr > 0) & (fpr > 0)
    fnr, fpr = fnr[kept], fpr[kept]
    if not len(fnr):
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.concatenate([np.log((1 - delta - fpr) / fnr), np.log((1 - delta - fnr) / fpr)])
    return max(0.0, float(np.nanmax(both)))


def tug_of_war(unlearned: Scores, retrained: Scores) -> Scores:
    """Product over the forgotten, the retained and the held-out samples of ``1 - |difference of accuracies|``, (T,).

    Accuracies in [0, 1], (T, 3). (Zhao et al., What makes unlearning hard and what to do about it, 2024.)
    """
    return np.prod(1 - np.abs(unlearned - retrained), axis=1)


def nan_where(scores: Scores, left_out: NDArray[np.bool_]) -> Scores:
    """The scores, NaN where they are left out."""
    return np.where(left_out, np.nan, scores)
