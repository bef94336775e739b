"""An update read as one gradient: what it may be read as, and what stands in the way."""

from __future__ import annotations

import torch

from adversaries.inversion.evidence import defences
from adversaries.inversion.evidence.first_layer import is_complete
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable
from fedattack.observation import EVERYONE, Observation, Scenario, Update

__all__ = ["accumulates", "as_gradient", "check_one_gradient", "check_sum"]


def check_one_gradient(scenario: Scenario, *, signs: bool = False) -> None:
    """Refuse a scenario in which the update is not (a known multiple of) entries of one gradient.

    Parameters
    ----------
    scenario : Scenario
    signs : bool
        Whether the attack can do with the gradient's signs (objective "sign", or a cosine).

    Raises
    ------
    NotApplicable
    """
    training, compression = scenario.training, scenario.compression
    check_sum(scenario)
    if training.protocol == "fedavg" and training.local_steps > 1:
        raise NotApplicable(
            f"training.local_steps = {training.local_steps}: the update is a sum of gradients at weights that were "
            "never sent, and this attack matches one gradient; use local_steps 1 or protocol 'fedsgd'"
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
    """Refuse sums over clients that left out different entries, or sent signs: no entry of them is a gradient's.

    Dense sums are: weighted by the clients' examples, they are the gradient over all their batches together.

    Raises
    ------
    NotApplicable
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
    return scenario.compression.error_feedback or scenario.compression.name == "dgc"


def as_gradient(observation: Observation, *, signs: bool = False) -> Update:
    """The update as entries of one gradient, or of its signs where these are all that was sent and `signs` is set.

    A weight delta of one plain SGD step is -lr * (gradient + weight decay * weights), whatever the momentum, whose
    buffer starts empty. That is undone exactly, entry by entry.

    Raises
    ------
    NotApplicable
        If the update is not made of one gradient.
    """
    scenario, update = observation.scenario, observation.update
    check_one_gradient(scenario, signs=signs)
    if observation.client == EVERYONE and update.kept < update.numel:
        raise _partial_sums(scenario.compression.name)
    if accumulates(scenario) and observation.round > 1:
        raise NotApplicable(
            f"round {observation.round} with error feedback: the update holds residuals of earlier gradients, and "
            "this attack matches one gradient; attack round 1"
        )
    if update.kind == "gradient":
        return update
    values = -update.values / scenario.training.learning_rate
    if scenario.training.weight_decay:
        flat = torch.cat([observation.weights[name].flatten() for name in update.names]).to(values)
        sent = flat if update.indices is None else flat[update.indices]
        values = values - scenario.training.weight_decay * sent
    return Update(update.names, update.shapes, update.indices, values, "gradient")


def mean_gradient(observation: Observation) -> Update:
    """The update as (an approximation of) the mean gradient over the round's local steps.

    A weight delta of T steps of SGD with momentum m is ``-lr * sum_t c_t (g_t + wd * w_t)`` with
    ``c_t = 1 + m + ... + m^(T-t)``. It is divided by ``-lr * sum_t c_t``, and w_t is taken for the mean of the
    weights before and after; exact for one step.

    Returns
    -------
    Update
        Of kind "gradient", the same entries.

    Raises
    ------
    NotApplicable
        If the update also holds what earlier rounds held back.
    """
    scenario, update = observation.scenario, observation.update
    if accumulates(scenario) and observation.round > 1:
        raise NotApplicable(
            f"round {observation.round} with error feedback: the update holds residuals of other batches, whose "
            "labels cannot be told from this one's; attack round 1"
        )
    if update.kind == "gradient":
        return update
    training = scenario.training
    steps, momentum = training.local_steps, training.momentum
    visits = sum(momentum**age for step in range(steps) for age in range(steps - step))
    values = -update.values / (training.learning_rate * visits)
    if training.weight_decay:
        flat = torch.cat([observation.weights[name].flatten() for name in update.names]).to(values)
        before = flat if update.indices is None else flat[update.indices]
        values = values - training.weight_decay * (before + update.values * (steps - 1) / (2 * steps))
    return Update(update.names, update.shapes, update.indices, values, "gradient")
