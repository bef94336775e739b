"""Other people's gradient-matching engines, run beside this one where a user has them installed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch

from adversaries.inversion.matching.pixels import PIXEL_DEVIATION, PIXEL_MEAN
from fedattack.errors import ConfigError
from fedattack.models import build_model
from simulations.bench.scenes import Scene

Run = Callable[[int], None]
"""Goes on, or starts anew, for so many iterations."""


def breaching(everyone: Scene, tv: float) -> Run:
    """Inverting Gradients in *breaching* (Geiping et al.), on the first victim, label known, from the bench's start.

    Every turn is a new reconstruction, so that its preparations (a copy of the model) are counted too.
    """
    package = importlib.import_module("breaching")
    seen, label, start = everyone.observations[0], everyone.labels[0], everyone.starts[0]
    module = build_model(seen.scenario.model)
    module.load_state_dict(seen.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its configuration library, about itself
        changed = [f"regularization.total_variation.scale={tv}"]
        settings = package.get_attack_config("invertinggradients", changed)
    attacker = package.attacks.prepare_attack(module, torch.nn.CrossEntropyLoss(), settings)
    channels = seen.scenario.image_shape[0]
    mean, std = [PIXEL_MEAN] * channels, [PIXEL_DEVIATION] * channels
    metadata = SimpleNamespace(shape=seen.scenario.image_shape, mean=mean, std=std, modality="vision")
    parameters, buffers = list(module.parameters()), list(module.buffers())
    payload = {"parameters": parameters, "buffers": buffers, "metadata": metadata}
    about = {"num_data_points": len(label), "labels": label, "local_hyperparams": None}
    shared = {"gradients": list(seen.update.dense().values()), "buffers": None, "metadata": about}

    def run(iterations: int) -> None:
        settings.optim.max_iterations = iterations
        standardised = (start - PIXEL_MEAN) / PIXEL_DEVIATION
        attacker.reconstruct([payload], [shared], {}, initial_data=standardised)

    return run


PEERS: dict[str, Callable[[Scene, float], Run]] = {"breaching": breaching}
"""Package name -> its engine."""


def installed() -> dict[str, Callable[[Scene, float], Run]]:
    """The peers that can be imported; ConfigError where there is none."""
    found = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(name) is not None}
    if not found:
        raise ConfigError(f"option '--peers': none is installed; known are {', '.join(PEERS)}")
    return found
