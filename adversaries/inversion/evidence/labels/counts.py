"""Labels from what was sent of the last linear layer.

With residuals r_b = softmax(z_b) - e_{y_b}, row i of the head's weight gradient is the mean of r_b[i] h_b over the
batch and entry i of its bias gradient the mean of r_b[i]. Only a sample of class i makes them negative there (for
features that are not negative), and by about 1/B each: the sign names the classes, the size counts them.

Where compression leaves nothing of the label's row (small heads at small rates), the convolutions' gradients still
tell: they carry W^T r, in which the label's row of W enters. Each class is tried on public images, which vote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adversaries.inversion.evidence.evidence import VOTERS, Evidence, Expectation, Labels
from adversaries.inversion.evidence.head import HeadEntries
from adversaries.inversion.gradients import closed_form
from fedattack.errors import NotApplicable

NON_NEGATIVE = frozenset({"sigmoid", "relu", "softplus"})
"""Activations whose values are never negative."""

_TRIALS_AT_ONCE = 1024


def infer_labels(evidence: Evidence) -> Labels:
    """Labels of the batch, duplicates included, by signs and counts; entries that noise explains are passed over.

    Sign at batch 1: iDLG; counts: Wainakh et al.; see :func:`~.label_strategies.infer`.
    """
    head, expected = evidence.sure_head, evidence.expected
    mass = _missing_mass(head, expected)
    if evidence.batch > 1:
        if evidence.clips:
            mass = _unclipped(mass, expected.shares)
        return counted(mass, expected.shares, evidence.batch)
    if not bool((mass > 0).any()):
        return _vote(mass, evidence)
    return _one(head, mass, evidence.activation not in NON_NEGATIVE)


def _unclipped(mass: Tensor, shares: Tensor) -> Tensor:
    """Masses times what clipping took: those of the batch's classes add up to 1 less the shares of these classes."""
    missing = mass > 0
    if not bool(missing.any()):
        return mass
    return mass * (1 - shares.double()[missing].sum()).clamp(min=0.01) / mass[missing].sum().clamp(max=1.0)


def _missing_mass(head: HeadEntries, expected: Expectation) -> Tensor:
    """-mean_b r_b[i], float64 (classes,), from bias else weights on the expected features; NaN: nothing sent."""
    typical = expected.features.double()[head.cols]
    numerator = torch.zeros(head.classes, dtype=torch.float64)
    denominator = torch.zeros_like(numerator)
    numerator.index_add_(0, head.rows, head.values.double() * typical)
    denominator.index_add_(0, head.rows, typical.square())
    # Features that are expected to be zero cannot be divided by; the sign of the row's sum is still right.
    mass = -numerator / denominator
    plain = torch.zeros_like(numerator).index_add_(0, head.rows, head.values.double())
    sent = torch.zeros(head.classes, dtype=torch.bool)
    sent[head.rows] = True
    mass = torch.where(sent & ~(denominator > 0), -plain, mass)
    mass[head.bias_rows] = -head.bias_values.double()
    return mass


def _one(head: HeadEntries, mass: Tensor, signed: bool) -> Labels:
    """Batch 1: the only class whose residual p_y - 1 is negative."""
    missing = mass.nan_to_num(nan=0.0).clamp(min=0)
    label = int(missing.argmax())
    if not signed or bool((head.bias_rows == label).any()):
        return Labels(torch.tensor([label]), float(missing[label] / missing.sum()), "sign of the head's rows")
    # Features of either sign hide the residual's, but |r_y| is the sum of all others: the largest row is the label's.
    sizes = torch.zeros(head.classes, dtype=torch.float64)
    sizes = sizes.index_add_(0, head.rows, head.values.double().square()).sqrt()
    ordered = sizes.sort(descending=True).values
    label = int(sizes.argmax())
    return Labels(torch.tensor([label]), float(1 - ordered[1] / ordered[0]), "size of the head's rows")


@torch.no_grad()
def _vote(mass: Tensor, evidence: Evidence) -> Labels:
    """Batch 1, no negative row: each public image votes for the label under which its kept entries fit best."""
    candidates = torch.nonzero(mass.isnan())[:, 0]
    if len(candidates) == 0:
        return Labels(mass.argmax()[None], 0.0, "no negative row was sent")
    guess = Labels(candidates[:1], 1 / len(candidates), "no negative row was sent; one of the other classes")
    update, images = evidence.gradient, evidence.expected.images
    try:
        chain = closed_form.describe(evidence.observation.scenario.model)
    except NotApplicable:
        return guess
    sent = {
        name: (positions, values) for name, _, positions, values in update.layers() if name in chain.names
    }
    target = torch.cat([values for _, values in sent.values()])
    if len(target) == 0:
        return guess
    weights = {name: evidence.observation.weights[name].float() for name in update.names}
    votes = torch.zeros(len(mass), dtype=torch.int64)
    voters = images[:: max(1, len(images) // VOTERS)][:VOTERS]
    for image in voters:
        features = closed_form.features(chain, weights, image[None])
        scores = []
        for part in candidates.split(_TRIALS_AT_ONCE):
            residual = closed_form.head_residual(weights, features.expand(len(part), -1), part)
            pulled = closed_form.feature_gradient(weights, residual)
            found = closed_form.conv_gradients(chain, weights, image.expand(len(part), -1, -1, -1), pulled)
            entries = torch.cat([found[name].flatten(1)[:, where] for name, (where, _) in sent.items()], 1)
            scores.append(entries @ target / entries.norm(dim=1).clamp(min=1e-30))
        votes[candidates[torch.cat(scores).argmax()]] += 1
    label = votes.argmax()
    return Labels(
        label[None], float(votes[label]) / len(voters), "votes of public images on the convolutions"
    )


def counted(mass: Tensor, shares: Tensor, batch: int) -> Labels:
    """Batch > 1: one sample for each negative row, then one at a time for the largest unexplained count.

    The count of class i is B * (-mean r[i]) + sum_b p_b[i], from `mass`, float64 (classes,), an estimate of
    -mean_b r_b[i] (NaN where nothing was sent), and `shares`, the mean probabilities that are expected.
    """
    missing = mass.nan_to_num(nan=0.0).clamp(min=0)
    rows = torch.nonzero(missing)[:, 0]
    if len(rows) > batch:
        largest = missing.topk(batch).indices
        share = float(missing[largest].sum() / missing.sum())
        return Labels(largest.sort().values, share, "largest negative rows")
    counts = torch.zeros(len(mass), dtype=torch.int64)
    counts[rows] = 1
    expected = (batch * (mass + shares.double())).nan_to_num(nan=-torch.inf)
    unsent = mass.isnan()
    sure = float(len(rows))
    while int(counts.sum()) < batch:
        remainder = expected - counts
        row = int(remainder.argmax())
        if float(remainder[row]) < 0.5 and bool(unsent.any()):
            # Nothing that was sent asks for another sample: it is of a class of which nothing was sent.
            sure += 1 / int(unsent.sum())
            row = int(torch.nonzero(unsent)[0])
            unsent[row] = False
        else:
            sure += 1 - min(1.0, 2 * abs(float(remainder[row].clamp(max=1.0)) - 1))
        counts[row] += 1
    labels = torch.arange(len(mass)).repeat_interleave(counts)
    return Labels(labels, sure / batch, "signs and counts of the head's rows")
