"""Labels of a client's batch, read from its update before any image is sought: one function per published way.

All of them read the last linear layer, whose gradient is the mean of r_b h_b^T with r_b =
softmax(z_b) - e_{y_b}: row i, and entry i of the bias gradient, is negative only for the classes in the batch (where
features h are not negative), and by about 1/B for each sample. :func:`infer` runs a strategy by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from adversaries.inversion.evidence.evidence import Evidence, Expectation, Labels
from adversaries.inversion.evidence.first_layer import is_complete
from adversaries.inversion.evidence.labels.counts import NON_NEGATIVE, counted, infer_labels
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable
from fedattack.observation import Scenario
from fedattack.registry import Registry
from fedattack.rng import torch_rng

NEVER_MUCH_BELOW_ZERO = NON_NEGATIVE | {"gelu"}
"""Activations for which signs and minima of rows mean what the papers say, who assume ReLU."""

_NOISE_IMAGES = 64
"""Random images from which LLG* estimates what the model does."""


def check_strategy(strategy: str, scenario: Scenario, batch: int, labelled: bool | None = None) -> None:
    """NotApplicable where `strategy` cannot work under a scenario, whatever is sent.

    `batch` 0: not known yet; `labelled`: whether labelled public images are granted, None: not known yet.
    """
    model = scenario.model
    if strategy == "simulated" and labelled is False:
        raise NotApplicable(
            "labels = 'simulated' needs labelled public images, and none were granted; use 'auto', or data.auxiliary "
            "with labels"
        )
    if strategy == "simulated" and hides_clients(scenario.defense):
        raise NotApplicable(
            "labels = 'simulated' imitates one client, and 'secure-aggregation' shows sums alone; use 'auto'"
        )
    if strategy == "idlg" and batch > 1:
        raise NotApplicable(
            f"labels = 'idlg' reads one label, and updates are of {batch} examples; use 'gradinversion', 'llg' or "
            "'auto'"
        )
    if strategy == "gradinversion" and batch > (model.classes or batch):
        raise NotApplicable(
            f"labels = 'gradinversion' names distinct classes, and updates are of {batch} examples of "
            f"{model.classes} classes; use 'llg' or 'auto'"
        )
    if strategy not in ("gradinversion", "llg", "llg-star", "llg-plus"):
        return
    if not is_complete(scenario):
        raise NotApplicable(
            f"labels = {strategy!r} needs every entry of the last linear layer's gradient, and compression "
            f"{scenario.compression.name!r} leaves entries out; use 'sparse-rows' or 'auto'"
        )
    if model.activation not in NEVER_MUCH_BELOW_ZERO:
        raise NotApplicable(
            f"labels = {strategy!r} needs features that are never negative, and activation "
            f"{model.activation!r} gives both signs; use 'sparse-rows' or 'auto'"
        )


def whole_rows(evidence: Evidence, strategy: str) -> Tensor:
    """The head's weight gradient, float64 (classes, features); NotApplicable if entries of it were not sent."""
    head = evidence.head
    if head.values.numel() != head.classes * head.features:
        raise NotApplicable(
            f"labels = {strategy!r} needs every entry of the last linear layer's gradient, and compression "
            f"{evidence.observation.scenario.compression.name!r} sent {head.values.numel()} of "
            f"{head.classes * head.features}; use 'sparse-rows' or 'auto'"
        )
    return head.values.double().reshape(head.classes, head.features)


def idlg(evidence: Evidence) -> Labels:
    """Batch 1: the class whose residual alone has the other sign (Zhao et al. 2020).

    With the bias gradient that is its only negative entry. Without it, row i of the weight gradient is r_i h, and
    r_y alone differs in sign from all others: the row whose inner products with all other rows are not positive,
    whatever the signs of h. Works from signs alone. NotApplicable where entries of both gradients are missing.
    """
    head = evidence.head
    if len(head.bias_rows) == head.classes:
        missing = (-head.bias_values.double()).clamp(min=0)
        label, note = int(missing.argmax()), "the only negative entry of the head's bias"
        confidence = float(missing[label] / missing.sum()) if float(missing.sum()) > 0 else 1 / head.classes
        return Labels(torch.tensor([label]), confidence, note)
    rows = whole_rows(evidence, "idlg")
    largest = int(rows.square().sum(1).argmax())
    along = rows @ rows[largest]
    # Rows are multiples of one vector, so one reference tells all signs. The label's stands alone on its side.
    same, other = along > 0, along < 0
    alone = same if int(same.sum()) <= int(other.sum()) else other
    label = int((along.abs() * alone).argmax())
    if head.classes == 2:
        # Two rows differ in sign whatever the label; only features that are not negative tell which is the label's.
        if evidence.activation not in NON_NEGATIVE:
            return Labels(
                torch.tensor([label]), 0.5, "two classes and features of either sign: no sign tells"
            )
        label = int(rows.sum(1).argmin())
        return Labels(torch.tensor([label]), 1.0, "the only negative row of the head")
    weight = (along.abs() * alone).sum()
    confidence = float(along[label].abs() / weight) if float(weight) > 0 else 1 / head.classes
    return Labels(torch.tensor([label]), confidence, "the only row of the head against all others")


def gradinversion(evidence: Evidence) -> Labels:
    """The B classes whose rows reach lowest: minimum over features, distinct labels (Yin et al. 2021, eq. 9)."""
    lowest = whole_rows(evidence, "gradinversion").amin(1)
    chosen = lowest.argsort(stable=True)[: evidence.batch]
    sure = float((lowest[chosen] < 0).float().mean())
    return Labels(chosen.sort().values, sure, "lowest rows of the head, taken as distinct")


def llg(evidence: Evidence) -> Labels:
    """Counts from the update alone (LLG, Wainakh et al. 2022, algorithm 1).

    Every class with a negative row sum g_i is present. One sample's impact is estimated as the sum of the negative
    g_i times (1 + 1/classes) / B; then the class with the most negative remainder gets the next sample. Batches
    that hold most classes leave few negative sums and a far too small estimate: use LLG* or LLG+ there.
    """
    sums = whole_rows(evidence, "llg").sum(1)
    per_batch = -sums.clamp(max=0).sum() * (1 + 1 / len(sums))
    if float(per_batch) <= 0:
        return _nothing_negative(evidence)
    found = counted(-sums / per_batch, torch.zeros(len(sums)), evidence.batch)
    return replace(found, note="negative row sums (LLG)")


def llg_star(evidence: Evidence) -> Labels:
    """LLG with impact and offsets from the weights on random images (LLG*, Wainakh et al. 2022)."""
    shape = evidence.observation.scenario.image_shape
    noise = torch.rand(_NOISE_IMAGES, *shape, generator=torch_rng(0, "llg-noise", *shape))
    return _llg_from(evidence, evidence.expected_on(noise), "llg-star")


def llg_plus(evidence: Evidence) -> Labels:
    """LLG with impact and offsets from auxiliary images (LLG+, Wainakh et al. 2022); NotApplicable without."""
    auxiliary = evidence.observation.auxiliary
    if auxiliary is None or not len(auxiliary):
        raise NotApplicable(
            "labels = 'llg-plus' needs auxiliary images, and none were granted; use 'llg-star'"
        )
    return _llg_from(evidence, evidence.expected, "llg-plus")


def _llg_from(evidence: Evidence, expected: Expectation, strategy: str) -> Labels:
    """Impact: minus the expected sum of features over B. Offset of a class: its probability times that sum."""
    sums = whole_rows(evidence, strategy).sum(1)
    total = float(expected.features.double().sum())
    return replace(counted(-sums / total, expected.shares, evidence.batch), note=f"row sums ({strategy})")


def auto(evidence: Evidence) -> Labels:
    """iDLG for one image where the head came whole, else signs and counts of what was sent."""
    head = evidence.head
    whole = len(head.bias_rows) == head.classes or head.values.numel() == head.classes * head.features
    if evidence.batch == 1 and whole:
        return idlg(evidence)
    if evidence.signs_only:
        return _from_signs(evidence)
    return infer_labels(evidence)


def _from_signs(evidence: Evidence) -> Labels:
    """Batch > 1, signs alone: the classes with negative residuals. Signs do not count: repeats are spread evenly."""
    head = evidence.head
    if len(head.bias_rows):
        lowness = -head.bias_values.double().sign()
    else:
        if evidence.activation not in NEVER_MUCH_BELOW_ZERO:
            raise NotApplicable(
                f"labels: without the head's bias, signs name classes only where features are never negative, and "
                f"activation {evidence.activation!r} gives both signs"
            )
        lowness = -whole_rows(evidence, "auto").sign().mean(1)
    present = torch.nonzero(lowness > 0)[:, 0]
    if len(present) == 0:
        return _nothing_negative(evidence)
    ranked = present[lowness[present].argsort(descending=True, stable=True)]
    repeats = -(-evidence.batch // len(ranked))
    values = ranked.repeat(repeats)[: evidence.batch]
    sure = min(1.0, len(ranked) / evidence.batch)
    return Labels(values.sort().values, sure, "signs of the head's rows, repeats spread evenly")


def _nothing_negative(evidence: Evidence) -> Labels:
    """No row is negative, and the update does not say who is there: the lowest rows' classes, with no confidence."""
    head = evidence.head
    sums = torch.zeros(head.classes, dtype=torch.float64).index_add_(0, head.rows, head.values.double())
    ranked = sums.argsort(stable=True).repeat(-(-evidence.batch // head.classes))
    return Labels(ranked[: evidence.batch].sort().values, 0.0, "no row of the head is negative")


STRATEGIES: Registry[Callable[[Evidence], Labels]] = Registry(
    "label strategy",
    {
        "auto": auto,
        "idlg": idlg,
        "gradinversion": gradinversion,
        "llg": llg,
        "llg-star": llg_star,
        "llg-plus": llg_plus,
        "sparse-rows": infer_labels,
        "simulated": "adversaries.inversion.evidence.labels.simulated_labels:simulated",
    },
    group="fedattack.label_strategies",
)


def infer(strategy: str, evidence: Evidence) -> Labels:
    """Labels of a client's batch by a name of :data:`STRATEGIES` or ``package.module:function``; kept.

    Those that the client declares are believed.

    ConfigError if there is no such strategy; NotApplicable if it does not apply to the observation, or the
    model has no linear layer.

    Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020; Yin et al., "See through
    Gradients: Image Batch Recovery via GradInversion", CVPR 2021; Wainakh et al., "User-Level Label Leakage
    from Gradients in Federated Learning", PoPETs 2022.
    """
    chosen = STRATEGIES.get(strategy)
    declared = evidence.observation.labels
    if declared is not None:
        return Labels(declared.sort().values, 1.0, "declared by the client")
    if strategy not in evidence.inferred:
        check_strategy(strategy, evidence.observation.scenario, evidence.batch)
        evidence.inferred[strategy] = chosen(evidence)
    return evidence.inferred[strategy]
