"""An update read as one gradient: what it may be read as, and what stands in the way.

A client that goes from w to w + d in T local steps sends d, a sum of gradients at weights that nobody else sees. The
surrogate takes d for a multiple of the one gradient of all its images at ``w + a d``, where a in [0, 1] is found
beside the images: what inverts one gradient inverts this one, and no step is simulated (Zhu, Yao, Blaschko,
"Surrogate model extension (SME): A fast and accurate weight update attack on federated learning", ICML 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from adversaries.inversion.evidence import defences
from adversaries.inversion.evidence.first_layer import is_complete
from adversaries.inversion.gradients.schedule import step_weights
from adversaries.inversion.gradients.sent import Moves
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable, PayloadError
from fedattack.observation import EVERYONE, Observation, Scenario, Update

FIRST_POINT = 0.5
"""Where the search for a surrogate's a begins (Zhu et al. 2023)."""

Reading = Literal["surrogate"]


def check_one_gradient(scenario: Scenario, *, signs: bool = False) -> None:
    """NotApplicable where the update is not (a known multiple of) entries of one gradient, or of its `signs`."""
    training, compression = scenario.training, scenario.compression
    check_sum(scenario)
    if training.protocol == "fedavg" and training.local_steps > 1:
        raise NotApplicable(
            f"training.local_steps = {training.local_steps}: the update is a sum of gradients at weights that were "
            "never sent, and this attack matches one gradient; use local_steps 1 or protocol 'fedsgd', or an attack "
            "with a setting local_steps 'surrogate' (gauss-newton, ig)"
        )
    if compression.name == "sign" and not signs:
        raise NotApplicable(
            "compression.name = 'sign': only signs are sent and there is no gradient to match; use 'none', 'topk', "
            "'randomk', 'qsgd' or 'dgc'"
        )
    if compression.name == "dgc" and compression.clip_norm is not None:
        raise NotApplicable(
            f"compression.clip_norm = {compression.clip_norm}: the update is the gradient times a factor that is not "
            "sent; leave clip_norm unset"
        )


def check_sum(scenario: Scenario) -> None:
    """NotApplicable for sums over clients that left out different entries, or sent signs.

    Dense sums will do: weighted by the clients' examples, they are the gradient over all their batches together.
    """
    compression = scenario.compression
    if not hides_clients(scenario.defense):
        return
    if not is_complete(scenario):
        raise _partial_sums(compression.name)
    if defences.prunes(scenario):
        raise NotApplicable(
            "defence 'prune' under 'secure-aggregation': each entry is the sum over those clients that kept it, and "
            "no entry of one gradient; attack a federation without one of the two"
        )
    if compression.name == "sign":
        raise NotApplicable(
            "compression.name = 'sign' under defence 'secure-aggregation': the sum of the clients' signs is neither "
            "a gradient nor its signs; use compression.name 'none' or 'qsgd'"
        )


def _partial_sums(compressor: str) -> NotApplicable:
    return NotApplicable(
        f"compression.name = {compressor!r} under defence 'secure-aggregation': each entry is the sum over those "
        "clients that sent it, and no entry of one gradient; use compression.name 'none' or 'qsgd'"
    )


def accumulates(scenario: Scenario) -> bool:
    """Whether updates after the first carry what earlier rounds held back (error feedback, DGC)."""
    compression = scenario.compression
    return compression.name == "dgc" or (compression.error_feedback and compression.name != "none")


def check_received(observation: Observation, *, signs: bool = False) -> None:
    """:func:`check_one_gradient`, and what only the update tells."""
    scenario, update = observation.scenario, observation.update
    check_one_gradient(scenario, signs=signs)
    if observation.client == EVERYONE and update.kept < update.numel:
        raise _partial_sums(scenario.compression.name)
    _check_first(observation)


def check_declared(observation: Observation) -> None:
    """PayloadError for a client that declares more examples than were agreed."""
    training = observation.scenario.training
    most = training.batch_size * training.local_steps
    if observation.num_examples < 1 or (most and observation.num_examples > most):
        raise PayloadError(
            f"client {observation.client} declares {observation.num_examples} examples; 1 to "
            f"{most or 'all of its own'} were agreed"
        )


def _check_first(observation: Observation) -> None:
    if accumulates(observation.scenario) and observation.round > 1:
        raise NotApplicable(
            f"round {observation.round} with error feedback: the update holds residuals of earlier gradients, and "
            "this attack matches one gradient; attack round 1"
        )


def as_gradient(observation: Observation, *, signs: bool = False) -> Update:
    """The update as entries of one gradient, or of its signs where these are all that was sent and `signs` is set.

    NotApplicable as :func:`check_received`.
    """
    check_received(observation, signs=signs)
    return mean_gradient(observation)


def gradient_unit(observation: Observation) -> float:
    """What the update is of the mean gradient over the round's local steps: 1, or ``-lr * sum_t c_t`` for a delta.

    T steps of SGD with momentum m move the weights by ``-lr * sum_t c_t (g_t + wd * w_t)`` with
    ``c_t = 1 + m + ... + m^(T-t)``.
    """
    if observation.update.kind == "gradient":
        return 1.0
    training = observation.scenario.training
    return -training.learning_rate * sum(step_weights(training))


def rescaled(observation: Observation) -> Update:
    """The update over :func:`gradient_unit`: the mean gradient, and whatever else the update holds."""
    update = observation.update
    if update.kind == "gradient":
        return update
    return dataclasses.replace(update, values=update.values / gradient_unit(observation), kind="gradient")


def beside_gradient(observation: Observation, carried: Tensor | None = None) -> Tensor | None:
    """What :func:`rescaled` holds beside the mean gradient, float64 (numel,); None: nothing.

    Weight decay, where w_t is taken for the mean of the weights before and after the round (exact for one
    step, and for entries that were sent), and `carried`, what earlier rounds held back, in the same units.
    """
    training, update = observation.scenario.training, observation.update
    if update.kind == "gradient" or not training.weight_decay:
        return carried
    weights = torch.cat([observation.weights[name].double().flatten() for name in update.names]).to(
        update.values.device
    )
    if training.local_steps > 1:
        halfway = update.values.double() * ((training.local_steps - 1) / (2 * training.local_steps))
        weights[slice(None) if update.indices is None else update.indices] += halfway
    decay = training.weight_decay * weights
    return decay if carried is None else decay + carried


def mean_gradient(
    observation: Observation, carried: Tensor | None = None, *, followed: bool = False
) -> Update:
    """The update as (an approximation of) the mean gradient over the round's local steps; exact for one step.

    `carried`, float64 (numel,), is what earlier rounds held back, in units of the mean gradient; `followed`:
    that, or nothing, is all of it. NotApplicable if it is not followed and there is some.
    """
    if not followed:
        _check_first(observation)
    update, beside = rescaled(observation), beside_gradient(observation, carried)
    if beside is None:
        return update
    values = update.values.double() - (beside if update.indices is None else beside[update.indices])
    return dataclasses.replace(update, values=values.float())


def reads_surrogate(how: str | None, scenario: Scenario) -> bool:
    """Whether an attack whose setting `local_steps` is `how` reads a surrogate; one step is a gradient already."""
    return how == "surrogate" and scenario.training.local_steps > 1


def check_moves(scenario: Scenario) -> None:
    """NotApplicable where the weights after a client's steps cannot be told."""
    if scenario.compression.name == "sign":
        raise NotApplicable(
            "setting 'local_steps' = 'surrogate' with compression.name = 'sign': only signs are sent, and not how "
            "far the weights moved; use local_steps 'unrolled' or another compression"
        )


def moves(observation: Observation) -> Moves:
    """What the client's steps did to each tensor, in its shape; zero where nothing was sent."""
    return {name: change.float().cpu() for name, change in observation.update.dense().items()}
