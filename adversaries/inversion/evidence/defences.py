"""What a server knows of an update from the defences that were declared: clipping, noise, entries set to zero.

Names and parameters of a run's defences are public (``Scenario.defense``), their draws are not.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from adversaries.inversion.gradients.schedule import step_weights
from fedattack.defenses import ClientDefenses, build_defenses
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.defenses.prune import Prune
from fedattack.defenses.soteria import Soteria
from fedattack.observation import Observation, Scenario

_VERBATIM = ("none", "topk", "randomk", "dgc")
"""Compressors that send an entry as it is: a zero among those sent was a zero before."""

DIRECTIONS = frozenset({"cosine", "layer-cosine", "row-cosine", "sign"})
"""Matching objectives that do not depend on the gradient's length."""


def _clip_noise(scenario: Scenario) -> ClipNoise | None:
    found = build_defenses(scenario.defense).values()
    return next((defense for defense in found if isinstance(defense, ClipNoise)), None)


def clips(scenario: Scenario) -> bool:
    """Whether the update, or each sample's gradient, may have been scaled by a factor that is not sent."""
    defense = _clip_noise(scenario)
    return defense is not None and defense.clip_norm is not None


def clipping(scenario: Scenario) -> ClientDefenses | None:
    """The client's clipping without its noise, to be imitated on a guess of the images; None where nothing clips."""
    defense = _clip_noise(scenario)
    if defense is None or defense.clip_norm is None:
        return None
    return ClientDefenses([dataclasses.replace(defense, noise=0.0)], seed=0, round=0, client=0)


def noise(received: Observation) -> float:
    """Standard deviation of the Gaussian noise in each entry, in units of the mean gradient; 0: none is declared."""
    defense, training = _clip_noise(received.scenario), received.scenario.training
    if defense is None:
        return 0.0
    deviation, weights = defense.noise * (defense.clip_norm or 1.0), step_weights(training)
    if defense.unit == "sample":  # drawn anew in every step
        batch = min(training.batch_size or received.num_examples, received.num_examples)
        return deviation / batch * (math.hypot(*weights) / sum(weights))
    one = received.update.kind == "gradient"
    return deviation if one else deviation / (training.learning_rate * sum(weights))


def doubtful_below(noise: float, count: int) -> float:
    """Size that noise alone reaches in the largest of `count` entries: smaller ones may have been sent for it."""
    return noise * math.sqrt(2 * math.log(max(count, 2)))


def prunes(scenario: Scenario) -> bool:
    """Whether clients set the smallest entries of their updates to zero."""
    return any(isinstance(defense, Prune) for defense in build_defenses(scenario.defense).values())


def known_entries(received: Observation) -> Observation:
    """The observation without the zeros that pruning put there: nothing is known of such an entry but its bound.

    Pruning alone is top-k in its own scope. Features that Soteria pruned from the head's gradient have no
    bound; the scenario then names the compressor whose unsent entries could have any size.
    """
    scenario, update = received.scenario, received.update
    pruning = [d for d in build_defenses(scenario.defense).values() if isinstance(d, Prune | Soteria)]
    if not pruning or scenario.compression.name not in _VERBATIM:
        return received
    there = update.values != 0
    indices = (torch.arange(update.numel) if update.indices is None else update.indices)[there]
    changes: dict[str, str] = {}
    if any(isinstance(defense, Soteria) for defense in pruning):
        changes["name"] = "randomk"
    elif scenario.compression.name == "none":
        changes = {"name": "topk", "scope": next(d.scope for d in pruning if isinstance(d, Prune))}
    compression = scenario.compression.model_copy(update=changes)
    return dataclasses.replace(
        received,
        update=dataclasses.replace(update, indices=indices, values=update.values[there]),
        scenario=dataclasses.replace(scenario, compression=compression),
    )
