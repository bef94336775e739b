"""Labels from what was sent of the last linear layer.

With residuals r_b = softmax(z_b) - e_{y_b}, row i of the head's weight gradient is the mean of r_b[i] h_b over the
batch and entry i of its bias gradient the mean of r_b[i]. Only a sample of class i makes them negative there (for
features that are not negative), and by about 1/B each: the sign names the classes, the size counts them.

Where compression leaves nothing of the label's row (small heads at small rates), the convolutions' gradients still
tell: they carry W^T r, in which the label's row of W enters. Each class is tried on public images, which vote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adversaries.inversion.evidence import defences
from adversaries.inversion.evidence.head import Head, _beyond, head_entries, head_name
from adversaries.inversion.gradients import closed_form
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Observation, Update
from fedattack.rng import torch_rng
from fedattack.training import training_mode

NON_NEGATIVE = frozenset({"sigmoid", "relu", "softplus"})
"""Activations whose values are never negative."""

VOTERS = 32
_TRIALS_AT_ONCE = 1024


@dataclass(frozen=True)
class Labels:
    """Inferred labels of one batch.

    Attributes
    ----------
    values : Tensor
        int64 (B,), sorted.
    confidence : float
        In [0, 1], from the update alone: 1 where the signs leave no other answer.
    note : str
        How they were found.
    """

    values: Tensor
    confidence: float
    note: str


@dataclass(frozen=True)
class Expectation:
    """What the model does on images of this kind, before any update is seen.

    Attributes
    ----------
    features : Tensor
        float32 (F,): mean features.
    shares : Tensor
        float32 (classes,): mean predicted probabilities.
    images : Tensor
        float32 (N, C, H, W): the images.
    model : ModelConfig
    weights : mapping of str to Tensor
        State dict that was sent out.
    """

    features: Tensor
    shares: Tensor
    images: Tensor
    model: ModelConfig
    weights: Mapping[str, Tensor]


def public_images(auxiliary: Auxiliary | None, image_shape: tuple[int, int, int], count: int = 256) -> Tensor:
    """Up to `count` images (N, C, H, W) spread over the auxiliary ones; without any, flat random colours."""
    if auxiliary is not None and len(auxiliary):
        picked = torch.linspace(0, len(auxiliary) - 1, min(count, len(auxiliary))).round().long()
        return auxiliary.images[picked].float()
    channels = image_shape[0]
    colours = torch.rand(VOTERS, channels, 1, 1, generator=torch_rng(0, "flat-colours", channels))
    return (0.2 + 0.6 * colours).expand(-1, *image_shape)


def enough(model: ModelConfig) -> int:
    """Public images worth a forward pass: a deep network costs seconds for each."""
    return 16 if model.name.startswith("resnet") else 256


@torch.no_grad()
def expectation(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    images: Tensor,
    batch: int = 64,
    batch_norm: Literal["train", "eval"] = "train",
) -> Expectation:
    """Mean features and predictions of public images (N, C, H, W).

    BatchNorm takes its statistics from these images as it does from a client's batch, or uses the running ones.
    """
    module = training_mode(build_model(model), batch_norm)
    module.load_state_dict(dict(weights))
    last = module.get_submodule(head_name(*_parameters(module)))
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = [module(part) for part in images.float().split(batch)]
    handle.remove()
    return Expectation(torch.cat(seen).mean(0), torch.cat(logits).softmax(1).mean(0), images, model, weights)


def _parameters(module: torch.nn.Module) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    pairs = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    return tuple(n for n, _ in pairs), tuple(s for _, s in pairs)


def infer_labels(
    observation: Observation, update: Update, expected: Expectation, noise: float = 0.0
) -> Labels:
    """Labels of the batch, duplicates included.

    Parameters
    ----------
    observation : Observation
        For the declared number of examples (B) and the activation.
    update : Update
        The update as a gradient.
    expected : Expectation
        From :func:`expectation`: translates weight entries into residuals, and says what part of a residual is the
        prediction.
    noise : float
        Standard deviation of noise in the update's entries; those that it explains are passed over.

    Returns
    -------
    Labels

    References
    ----------
    Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020 (sign, batch 1); Wainakh et al., "User-Level Label
    Leakage from Gradients in Federated Learning", PoPETs 2022 (counts).
    """
    head = _beyond(head_entries(update), defences.doubtful_below(noise, update.numel))
    batch = observation.num_examples
    mass = _missing_mass(head, expected)
    if batch > 1:
        if defences.clips(observation.scenario):
            mass = _unclipped(mass, expected.shares)
        return counted(mass, expected.shares, batch)
    if not bool((mass > 0).any()):
        return _vote(mass, update, expected)
    return _one(head, mass, observation.scenario.model.activation not in NON_NEGATIVE)


def _unclipped(mass: Tensor, shares: Tensor) -> Tensor:
    """Masses times what clipping took: those of the batch's classes add up to 1 less the shares of these classes."""
    missing = mass > 0
    if not bool(missing.any()):
        return mass
    return mass * (1 - shares.double()[missing].sum()).clamp(min=0.01) / mass[missing].sum().clamp(max=1.0)


def _missing_mass(head: Head, expected: Expectation) -> Tensor:
    """Estimate of -mean_b r_b[i] per class, from the bias where it was sent, else from the weights.

    The weights' row i is a residual times features; projecting it on the expected features at the sent columns
    leaves the residual. Float64 (classes,); NaN where nothing of a class was sent.
    """
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


def _one(head: Head, mass: Tensor, signed: bool) -> Labels:
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
def _vote(mass: Tensor, update: Update, expected: Expectation) -> Labels:
    """Batch 1, no negative row: each public image names the class that would explain the convolutions' gradients.

    The score of a class is the cosine, over the sent entries, between what the image would have sent with that label
    and what was sent.
    """
    candidates = torch.nonzero(mass.isnan())[:, 0]
    if len(candidates) == 0:
        return Labels(mass.argmax()[None], 0.0, "no negative row was sent")
    try:
        chain = closed_form.describe(expected.model)
    except NotApplicable:
        return Labels(
            candidates[:1], 1 / len(candidates), "no negative row was sent; one of the other classes"
        )
    sent = {
        name: (positions, values) for name, _, positions, values in update.layers() if name in chain.names
    }
    target = torch.cat([values for _, values in sent.values()])
    if len(target) == 0:
        return Labels(
            candidates[:1], 1 / len(candidates), "no negative row was sent; one of the other classes"
        )
    weights = {name: expected.weights[name].float() for name in update.names}
    votes = torch.zeros(len(mass), dtype=torch.int64)
    voters = expected.images[:: max(1, len(expected.images) // VOTERS)][:VOTERS]
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

    The count of class i is B * (-mean r[i]) + sum_b p_b[i].

    Parameters
    ----------
    mass : Tensor
        float64 (classes,): an estimate of -mean_b r_b[i]; NaN where nothing of a class was sent.
    shares : Tensor
        float (classes,): the mean predicted probabilities that are expected.
    batch : int
        B, the labels to name.
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
