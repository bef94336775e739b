"""Label counts by simulation: the client's local training imitated on public images whose labels are known.

Strategy "simulated" of :mod:`~.label_strategies`. Closed forms read one gradient; after several steps of a trained
network they say no more than the best constant answer. Simulated clients with known counts say how counts show in
what is sent of the head, whatever the steps, the momentum and the epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adversaries.inversion.evidence.client import ImitatedClient
from adversaries.inversion.evidence.evidence import Evidence, Labels
from adversaries.inversion.evidence.head import head_entries
from adversaries.inversion.evidence.labels.label_strategies import auto, check_strategy
from adversaries.inversion.solvers.linear_gaussian import LinearGaussian
from fedattack.defenses import ClientDefenses, build_defenses
from fedattack.observation import Auxiliary, Update
from fedattack.rng import adversary_seed, numpy_rng
from fedattack.training import batch_positions, local_update

SIMULATED = 200
"""Clients that are simulated for one round and one number of examples."""

_CONCENTRATIONS = (0.5, 2.0, 10.0)
"""Of the Dirichlet draws of their classes' shares: one class or two, some more, about all alike."""

_SCALES = tuple(2 * 2 ** (step / 2) for step in range(15))
"""How much more than multinomial draws counts may vary: 2 to 256 times; less gains nothing on simulated clients."""

_SHRINKAGES = (0.03, 0.1, 0.3, 1.0)
_FOLDS = 10
_EVERY = 5
"""Of so many simulated clients one is read by `auto` too."""


@dataclass(frozen=True)
class Simulated:
    """What the simulated clients of one round taught.

    `classes` int64 (K,): those of the public images, with their `shares` float64 (K,); `right` and `right_auto`:
    shares of labels that held-out simulated clients have right.
    """

    weights: Mapping[str, Tensor]
    classes: Tensor
    shares: Tensor
    features: Tensor  # mean features of the public images (F,)
    model: LinearGaussian
    right: float
    right_auto: float

    def counts(self, x: Tensor, batch: int) -> Tensor:
        """Counts int64 (n, K) of clients of `batch` examples, from :func:`signals` (n, 3 K)."""
        return _counts(self.model, x, self.shares, batch)


def simulated(evidence: Evidence) -> Labels:
    """Counts from a linear model of what simulated clients send, or those of `auto` where these are better on them.

    NotApplicable without labelled public images, in sums over clients, and in rounds whose updates hold residuals of
    earlier ones.
    """
    public = evidence.observation.auxiliary
    labelled = public is not None and public.labels is not None and len(public) > 0
    check_strategy("simulated", evidence.observation.scenario, evidence.batch, labelled)
    assert public is not None
    if evidence.batch == 1:  # nothing to count
        return auto(evidence)
    taught = _taught(evidence, public)
    if taught.right_auto > taught.right:
        found = auto(evidence)
        return Labels(found.values, found.confidence, f"{found.note}; simulated clients are read no better")
    seen = signals(evidence.observation.update, taught.classes, taught.features)[None]
    counts = taught.counts(seen, evidence.batch)[0]
    note = f"as of {SIMULATED} simulated clients, of whose labels {taught.right:.0%} are right ('auto': "
    return Labels(taught.classes.repeat_interleave(counts), taught.right, f"{note}{taught.right_auto:.0%})")


def signals(update: Update, classes: Tensor, features: Tensor) -> Tensor:
    """What was sent of the head's rows of `classes`, float64 (3 K,): bias, row on the mean features, row sum.

    Missing entries count as zero, for simulated clients lack them too.
    """
    head = head_entries(update)
    bias, along, sums = torch.zeros(3, head.classes, dtype=torch.float64)
    values, typical = head.values.double(), features.double()
    bias[head.bias_rows] = head.bias_values.double()
    along.index_add_(0, head.rows, values * (typical / typical.square().sum().clamp(min=1e-30))[head.cols])
    sums.index_add_(0, head.rows, values)
    return torch.cat([part[classes] for part in (bias, along, sums)])


def _counts(model: LinearGaussian, x: Tensor, shares: Tensor, batch: int) -> Tensor:
    covariance = batch * (torch.diag(shares) - shares[:, None] * shares)
    return rounded(model.posterior(x, batch * shares, covariance, _SCALES), batch)


def rounded(counts: Tensor, batch: int) -> Tensor:
    """Counts of any sign and sum, float64 (n, K), as int64 with the sum `batch`, by largest remainders."""
    scaled = counts.clamp(min=0)
    total = scaled.sum(1, keepdim=True)
    scaled = torch.where(total > 0, scaled * batch / total, torch.full_like(scaled, batch / counts.shape[1]))
    whole = scaled.floor()
    order = (scaled - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    missing = (batch - whole.sum(1, keepdim=True)).round()
    return (whole + (order < missing)).long()


def _right(found: Tensor, truth: Tensor) -> Tensor:
    """Labels right, repeats counted, of counts (n, K)."""
    return torch.minimum(found, truth).sum(1).double()


class _DefendedClient(ImitatedClient):
    """With the agreed defences, as a client has them, and draws of its own."""

    def compute(self, images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
        """What the client computes from its images before compression."""
        training = self.scenario.training
        seed = adversary_seed(self.seed, "imitated client")  # never a real client's draws, whatever the seed
        defenses = list(build_defenses(self.scenario.defense).values())
        defended = ClientDefenses(defenses, seed, self.round, number)
        steps = batch_positions(len(labels), training, seed, self.round, number)
        shown = defended.images(images)
        found = local_update(self.module, self.weights, shown, labels, steps, training, defended.gradient)
        return defended.update(found.update)


def _taught(evidence: Evidence, public: Auxiliary) -> Simulated:
    """What simulated clients teach, once for the victims of a round that were sent the same and declare as much."""
    observation = evidence.observation
    key = f"simulated {evidence.batch} {observation.scenario.training.model_dump_json()}"
    known = evidence.shared.get(key)
    sent = observation.weights
    if known is None or any(not torch.equal(sent[name], tensor) for name, tensor in known.weights.items()):
        known = evidence.shared[key] = _simulate(evidence, public)
    return known


def _simulate(evidence: Evidence, public: Auxiliary) -> Simulated:
    observation, batch = evidence.observation, evidence.batch
    assert public.labels is not None
    classes, of_class, sizes = public.labels.unique(return_inverse=True, return_counts=True)
    shares, rng = sizes.double() / len(public), numpy_rng(0, "simulated labels", observation.round)
    places = [torch.nonzero(of_class == row)[:, 0].numpy() for row in range(len(classes))]
    client = _DefendedClient(observation.scenario, observation.weights, 0, observation.round)
    features = evidence.before.features
    x, y, right_auto = [], [], {}
    for number in range(SIMULATED):
        concentration = _CONCENTRATIONS[number % len(_CONCENTRATIONS)]
        drawn = rng.multinomial(batch, rng.dirichlet(np.full(len(classes), concentration)))
        chosen = [rng.choice(own, n, replace=n > len(own)) for own, n in zip(places, drawn, strict=True) if n]
        order = torch.from_numpy(rng.permutation(np.concatenate(chosen)))
        seen = client.observe(public.images[order], public.labels[order], number)
        x.append(signals(seen.update, classes, features))
        y.append(torch.from_numpy(drawn))
        if number % _EVERY == 0:
            found = torch.bincount(auto(Evidence(seen, like=evidence)).values, minlength=int(classes[-1]) + 1)
            right_auto[number] = float(_right(found[classes][None], y[-1][None]))
    seen_x, truth = torch.stack(x), torch.stack(y)
    right = {
        shrinkage: _held_out(seen_x, truth, shares, batch, shrinkage) / batch for shrinkage in _SHRINKAGES
    }
    best = max(_SHRINKAGES, key=lambda one: float(right[one].mean()))
    model = LinearGaussian.fit(seen_x, truth.double(), best)
    compared = float(right[best][list(right_auto)].mean())
    read = float(np.mean(list(right_auto.values()))) / batch
    return Simulated(dict(observation.weights), classes, shares, features, model, compared, read)


def _held_out(x: Tensor, y: Tensor, shares: Tensor, batch: int, shrinkage: float) -> Tensor:
    """Labels right (n,) of each simulated client, by a model that the clients of its fold have not taught."""
    found, fold = torch.zeros(len(x), dtype=torch.float64), torch.arange(len(x)) % _FOLDS
    for number in range(_FOLDS):
        rest, own = fold != number, fold == number
        model = LinearGaussian.fit(x[rest], y[rest].double(), shrinkage)
        found[own] = _right(_counts(model, x[own], shares, batch), y[own])
    return found
