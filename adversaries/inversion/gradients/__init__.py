"""The ways to compute what a client with given images would have sent.

A back-end holds what V victims sent (:class:`Sent`) and predicts the same entries from candidate images,
differentiably (:class:`GradientModel`). :func:`gradient_model` chooses it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from adversaries.inversion.gradients import closed_form
from adversaries.inversion.gradients.autograd import AutogradGradients, SurrogateGradients, UnrolledGradients
from adversaries.inversion.gradients.chain import ChainGradients
from adversaries.inversion.gradients.compiled import Compile, CompiledSlope
from adversaries.inversion.gradients.explicit import ExplicitGradients
from adversaries.inversion.gradients.schedule import Schedule, epochs_for, schedule_for
from adversaries.inversion.gradients.sent import (
    BatchNormMode,
    DirectGradients,
    GradientModel,
    Layers,
    Moves,
    Prediction,
    Segment,
    Sent,
    Statistics,
    lay_out,
)
from fedattack.errors import NotApplicable
from fedattack.observation import Observation, Update

LOG = logging.getLogger("fedattack.attacks")

_SPARSE_SHARE = 0.5
"""Below this sent share a chain's head is gathered rather than formed."""


def gradient_model(
    observations: Sequence[Observation],
    labels: Tensor | None,
    *,
    layers: Layers = "all",
    batch_norm: BatchNormMode = "train",
    unroll: Schedule | None = None,
    moves: Sequence[Moves] | None = None,
    device: torch.device,
) -> GradientModel:
    """The back-end for these victims, V of equal weights and scenario.

    Parameters
    ----------
    observations : sequence of Observation
        Their updates are gradients, or weight deltas as they came under `unroll`.
    labels : Tensor or None
        int64 (V, B); None where every call of `predict` brings soft targets.
    layers : {"all", "last"}
        Which tensors take part; "last" is the last linear layer's weight.
    batch_norm : {"train", "eval"}
        Whether the clients' BatchNorm used their batch's statistics or the running ones.
    unroll : Schedule, optional
        Simulate these local steps (:func:`schedule_for`).
    moves : sequence of mapping of str to Tensor, optional
        What each victim's local steps did to the weights: the gradient is at a point between.

    Raises
    ------
    NotApplicable
        If `layers` is "last" and the model has no linear layer.
    """
    first = observations[0]
    model, weights = first.scenario.model, first.weights
    updates = [observation.update for observation in observations]
    if unroll is not None:
        training = first.scenario.training
        unit = -training.learning_rate * unroll.steps
        updates = [Update(u.names, u.shapes, u.indices, u.values / unit, "gradient") for u in updates]
    layout = lay_out(updates, layers, device)
    if unroll is not None:
        return UnrolledGradients(model, weights, layout, labels, batch_norm, training, unroll)
    if moves is not None:
        return SurrogateGradients(model, weights, layout, labels, batch_norm, moves)
    if layers == "last" or max(update.kept for update in updates) < updates[0].numel * _SPARSE_SHARE:
        with contextlib.suppress(NotApplicable):
            return ChainGradients(closed_form.describe(model), weights, layout, labels)
    try:
        return ExplicitGradients(model, weights, layout, labels, batch_norm)
    except NotApplicable as reason:
        LOG.info("gradients of model %r by automatic differentiation, twice: %s", model.name, reason)
    return AutogradGradients(model, weights, layout, labels, batch_norm)


__all__ = [
    "AutogradGradients",
    "BatchNormMode",
    "ChainGradients",
    "Compile",
    "CompiledSlope",
    "DirectGradients",
    "ExplicitGradients",
    "GradientModel",
    "Layers",
    "Moves",
    "Prediction",
    "Schedule",
    "Segment",
    "Sent",
    "Statistics",
    "SurrogateGradients",
    "UnrolledGradients",
    "epochs_for",
    "gradient_model",
    "schedule_for",
]
