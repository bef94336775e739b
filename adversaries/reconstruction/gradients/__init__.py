"""The ways to compute what a client with given images would have sent.

A back-end holds what V victims sent (:class:`Sent`) and predicts the same entries from candidate images,
differentiably (:class:`GradientModel`). :class:`ChainGradients` does it in closed form for a chain of convolutions
and never forms the head's gradient where that is sparse; :class:`AutogradGradients` differentiates any model twice,
and :class:`UnrolledGradients` several local steps of one, one victim at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adversaries.reconstruction import closed_form
from adversaries.reconstruction.closed_form import Weights
from adversaries.reconstruction.gradients.autograd import AutogradGradients, UnrolledGradients
from adversaries.reconstruction.gradients.chain import ChainGradients
from adversaries.reconstruction.gradients.schedule import Schedule, schedule_for
from adversaries.reconstruction.gradients.sent import (
    BatchNormMode,
    GradientModel,
    Layers,
    Prediction,
    Segment,
    Sent,
    Statistics,
)
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.observation import Observation, Update


def gradient_model(
    observations: Sequence[Observation],
    labels: Tensor | None,
    *,
    layers: Layers = "all",
    batch_norm: BatchNormMode = "train",
    unroll: Schedule | None = None,
    device: torch.device,
) -> GradientModel:
    """The back-end for these victims.

    Parameters
    ----------
    observations : sequence of Observation
        One per victim, with equal weights and scenario. Their updates are gradients (``engine.as_gradient``), or
        weight deltas as they came under `unroll`.
    labels : Tensor or None
        int64 (V, B); None where every call of `predict` brings soft targets.
    layers : {"all", "last"}
        Which tensors take part; "last" is the last linear layer's weight.
    batch_norm : {"train", "eval"}
        Whether the clients' BatchNorm used their batch's statistics or the running ones.
    unroll : Schedule, optional
        Simulate these local steps (:func:`schedule_for`).
    device : torch.device

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
        return UnrolledGradients(
            model, weights, updates, labels, layers, device, batch_norm, training, unroll
        )
    return _choose(model, weights, updates, labels, layers, batch_norm, device)


def _choose(
    model: ModelConfig,
    weights: Weights,
    updates: Sequence[Update],
    labels: Tensor | None,
    layers: Layers,
    batch_norm: BatchNormMode,
    device: torch.device,
) -> GradientModel:
    try:
        chain = closed_form.describe(model)
    except NotApplicable:
        return AutogradGradients(model, weights, updates, labels, layers, device, batch_norm)
    return ChainGradients(chain, weights, updates, labels, layers, device)


__all__ = [
    "AutogradGradients",
    "BatchNormMode",
    "ChainGradients",
    "GradientModel",
    "Layers",
    "Prediction",
    "Schedule",
    "Segment",
    "Sent",
    "Statistics",
    "UnrolledGradients",
    "gradient_model",
    "schedule_for",
]
