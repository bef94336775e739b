"""One iteration of HCGLA's gradient matching: the sparse closed form against the dense double backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.inversion.gradients import gradient_model
from adversaries.inversion.matching.match import Matching, Problem
from adversaries.inversion.matching.pixels import Pixels
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation, Scenario, Update
from fedattack.rng import torch_rng

CLASSES, RATE, VICTIMS = 10_177, 0.001, 32
MODEL = ModelConfig(name="lenet-zhu", classes=CLASSES, channels=3, image_size=32, activation="sigmoid")

Evaluation = Callable[[], tuple[Tensor, Tensor]]


def run(quick: bool = False) -> dict[str, Any]:
    """Objective and gradient of HCGLA at 0.1 % of a 10,177-class LeNet, sparse against dense.

    The dense reference is the objective as published: the whole gradient with ``create_graph``, masked, compared
    and differentiated again. Both evaluate the same victims at the same points in the same run, in turns.
    Milliseconds, medians: one victim dense, one sparse, each of 32 victims in one batch, the two ratios, and the
    largest relative difference. RunFailed where the two disagree by more than 1e-4 in the objective or 1e-3 in its
    gradient.
    """
    victims = 4 if quick else VICTIMS
    weights = initial_weights(MODEL, 7)
    module = build_model(MODEL)
    module.load_state_dict(weights)
    generator = torch_rng(7, "bench")
    private = _smooth_images(victims, generator)
    candidates = (private + 0.1 * torch.randn(private.shape, generator=generator)).clamp(0, 1)
    labels = torch.randperm(CLASSES, generator=generator)[:victims]
    updates = [_send(module, private[v : v + 1], labels[v : v + 1]) for v in range(victims)]

    dense = _dense(module, updates[0], candidates[:1], labels[:1])
    single = _sparse(weights, updates[:1], candidates[:1], labels[:1])
    batch = _sparse(weights, updates, candidates, labels)
    objective_error = gradient_error = 0.0
    for v in range(min(victims, 4)):
        reference = _dense(module, updates[v], candidates[v : v + 1], labels[v : v + 1])()
        for found in (single() if v == 0 else batch(), batch()):
            place = v if len(found[0]) > 1 else 0
            objective_error = max(objective_error, _error(found[0][place], reference[0][0]))
            gradient_error = max(gradient_error, _error(found[1][place], reference[1][0]))
    if objective_error > 1e-4 or gradient_error > 1e-3:
        raise RunFailed(
            f"the closed form and the double backward disagree: objective by {objective_error:.2g}, gradient by "
            f"{gradient_error:.2g} (relative; at most 1e-4 and 1e-3)"
        )

    repeats = 3 if quick else 30
    seconds = _interleaved({"dense": dense, "single": single, "batch": batch}, repeats)
    per_victim = seconds["batch"] / victims
    return {
        "dense_ms_per_victim": 1e3 * seconds["dense"],
        "sparse_ms_per_victim": 1e3 * seconds["single"],
        "batched_ms_per_victim": 1e3 * per_victim,
        "victims_in_batch": victims,
        "speedup_one_victim": seconds["dense"] / seconds["single"],
        "speedup_batched": seconds["dense"] / per_victim,
        "objective_error": objective_error,
        "gradient_error": gradient_error,
        "sent_entries": updates[0].kept,
        "repeats": repeats,
    }


def _smooth_images(count: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True).clamp(0, 1)


def _send(module: nn.Module, images: Tensor, labels: Tensor) -> Update:
    """Exact global top-k of the gradient."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), parameters)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    indices = flat.abs().topk(round(RATE * flat.numel())).indices.sort().values
    return Update(names, tuple(tuple(p.shape) for p in parameters), indices, flat[indices])


def _dense(module: nn.Module, update: Update, images: Tensor, labels: Tensor) -> Evaluation:
    """The published formulation, with float32 masks."""
    parameters = list(module.parameters())
    targets = list(update.dense().values())
    masks = [(target != 0).float() for target in targets]

    def evaluate() -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        gradients = torch.autograd.grad(F.cross_entropy(module(x), labels), parameters, create_graph=True)
        pieces = zip(gradients, masks, targets, strict=True)
        objective = torch.stack([(g * mask - target).square().sum() for g, mask, target in pieces]).sum()
        (slope,) = torch.autograd.grad(objective, x)
        return objective.detach()[None], slope.flatten()[None]

    return evaluate


def _sparse(weights: dict[str, Tensor], updates: list[Update], images: Tensor, labels: Tensor) -> Evaluation:
    """What HCGLA evaluates."""
    scene = Scenario(MODEL, TrainingConfig(), CompressionConfig(rate=RATE))
    seen = [Observation(1, client, scene, weights, update, 1) for client, update in enumerate(updates)]
    gradients = gradient_model(seen, labels[:, None], device=torch.device("cpu"))
    problem = Problem(gradients, Pixels((1, *images.shape[1:])), Matching())
    variables = images.flatten(1)
    return lambda: problem.evaluate(variables)


def _interleaved(evaluations: dict[str, Evaluation], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a busy machine slows all alike."""
    for evaluate in evaluations.values():
        evaluate()
    times: dict[str, list[float]] = {name: [] for name in evaluations}
    for _ in range(repeats):
        for name, evaluate in evaluations.items():
            begin = time.perf_counter()
            evaluate()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def _error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())
