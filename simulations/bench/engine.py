"""Iterations a second of the matching engine, against the plain reference engine in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adversaries.reconstruction.descent import minimiser
from adversaries.reconstruction.gradients import gradient_model
from adversaries.reconstruction.optimise import Minimiser
from adversaries.reconstruction.parametrise import PIXEL_DEVIATION, Standardised
from adversaries.reconstruction.problem import Problem
from adversaries.reconstruction.settings import Matching
from fedattack.config import ModelConfig
from fedattack.errors import RunFailed
from fedattack.models import resolve
from simulations.bench.scenes import CLASSES, SIZE, Reference, Scene, memory, one_thread, pictures, scene

VICTIMS = 8
_TV = 1e-2
_ROUNDS = 15


def lenet(quick: bool = False, data: Path | None = None) -> dict[str, Any]:
    """Inverting Gradients on the sigmoid LeNet of DLG, full gradient, batch 1: one victim and eight."""
    return _compare("lenet-zhu", 40, _ROUNDS, quick, data, 500)


def resnet20(quick: bool = False, data: Path | None = None) -> dict[str, Any]:
    """The same on ResNet-20 (ReLU, BatchNorm with stored statistics)."""
    return _compare("resnet20", 4, _ROUNDS, quick, data, 60)


def resnet18(quick: bool = False, data: Path | None = None) -> dict[str, Any]:
    """The same on ResNet-18, one victim."""
    return _compare("resnet18", 2, 7, quick, data, 10, victims=1)


def _compare(
    name: str,
    iterations: int,
    rounds: int,
    quick: bool,
    data: Path | None,
    descent: int,
    victims: int = VICTIMS,
) -> dict[str, Any]:
    """Measure one model.

    Parameters
    ----------
    name : str
    iterations : int
        In each turn of each engine.
    rounds : int
        Turns; the engines take turns, so that a busy machine slows all of them alike.
    quick : bool
    data : Path, optional
    descent : int
        Iterations of a descent from the same start by both engines, whose final objectives are compared.
    victims : int
        In the batch.

    Raises
    ------
    RunFailed
        If the engines disagree about objective or gradient at the start.
    """
    if quick:
        iterations, rounds, descent = 1, 2, 4
    private = pictures(victims, data)
    model = resolve(ModelConfig(name=name, classes=CLASSES), 3, SIZE, CLASSES)
    everyone = scene(model, private)
    used: dict[str, float] = {}
    contenders: dict[str, Callable[[int], None]] = {}
    with one_thread():
        _reference(scene(resolve(ModelConfig(classes=CLASSES), 3, SIZE, CLASSES), pictures(1, None)), 1).run(
            1
        )  # loads libraries
        length = iterations * (rounds + 2)
        for count in sorted({0, 1, victims}):
            label = "reference" if count == 0 else f"{count} victim{'s' * (count > 1)}"
            with memory() as grown:  # before anything else has left room in the heap
                run = _onward(_engine(everyone, count, length)) if count else _reference(everyone, length).run
                run(max(iterations, 3))
            contenders[label], used[label] = run, grown[0] / 2**20
        agreement = _agreement(everyone)
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for _ in range(rounds):
            for label, run in contenders.items():
                begin = time.perf_counter()
                run(iterations)
                times[label].append((time.perf_counter() - begin) / iterations)
        quality = _quality(everyone, descent)
    seconds = {label: statistics.median(values) for label, values in times.items()}
    figures: dict[str, Any] = {
        "model": f"{name}, {model.activation}, {CLASSES} classes",
        "images": private.source,
        "reference_iterations_s": 1 / seconds["reference"],
    }
    for count in sorted({1, victims}):
        label = f"{count} victim{'s' * (count > 1)}"
        plain = f"victims_{count}"
        ratios = [count * r / t for r, t in zip(times["reference"], times[label], strict=True)]
        figures[f"{plain}_iterations_s_each"] = count / seconds[label]
        figures[f"{plain}_ratio"] = statistics.median(ratios)
        figures[f"{plain}_ratio_spread"] = [min(ratios), max(ratios)]
    figures |= {f"memory_mib_{label.replace(' ', '_')}": value for label, value in used.items()}
    return figures | agreement | quality | {"rounds": rounds, "iterations_a_turn": iterations, "threads": 1}


def _settings(iterations: int) -> Matching:
    return Matching(
        objective="cosine",
        parametrisation="standardised",
        # The papers measure standardised pixels.
        regularisers={"tv1": _TV / PIXEL_DEVIATION},
        optimiser="signed-adam",
        learning_rate=0.1,
        iterations=iterations,
        clamp=True,
        batch_norm="eval",
    )


def _engine(everyone: Scene, count: int, iterations: int) -> Minimiser:
    """The engine's own descent on the first `count` victims."""
    problem, start = _problem(everyone, count, iterations)
    return minimiser(problem, start, _settings(iterations))


def _problem(everyone: Scene, count: int, iterations: int) -> tuple[Problem, torch.Tensor]:
    cpu = torch.device("cpu")
    gradients = gradient_model(
        everyone.observations[:count], everyone.labels[:count], batch_norm="eval", device=cpu
    )
    problem = Problem(gradients, Standardised(tuple(everyone.starts.shape[1:])), _settings(iterations))
    return problem, problem.variables(everyone.starts[:count])


def _onward(descent: Minimiser) -> Callable[[int], None]:
    def run(iterations: int) -> None:
        descent.run(descent.iteration + iterations)

    return run


def _reference(everyone: Scene, iterations: int, victim: int = 0) -> Reference:
    seen, label, start = everyone.observations[victim], everyone.labels[victim], everyone.starts[victim]
    return Reference(seen, label, start, iterations, _TV)


def _agreement(everyone: Scene) -> dict[str, float]:
    """Relative difference of objective and gradient between the engines, median over the victims.

    A ReLU whose input is zero to the last digit may fall on either side, which changes one victim's gradient by a
    per cent; all of them at once do not.
    """
    count = len(everyone.observations)
    problem, start = _problem(everyone, count, 1)
    losses, slopes = problem.evaluate(start)
    objectives, gradients = [], []
    for victim in range(count):
        loss, slope = _reference(everyone, 1, victim).slope()
        objectives.append(abs(float(losses[victim] / loss) - 1))
        gradients.append(float((slopes[victim] - slope.flatten()).norm() / slope.norm()))
    objective, gradient = statistics.median(objectives), statistics.median(gradients)
    if objective > 1e-4 or gradient > 1e-3:
        raise RunFailed(
            f"the engine and the reference disagree: objective by {objective:.2g}, gradient by {gradient:.2g} "
            "(relative, median over the victims; at most 1e-4 and 1e-3)"
        )
    return {"objective_error": objective, "gradient_error": gradient, "worst_gradient_error": max(gradients)}


def _quality(everyone: Scene, iterations: int) -> dict[str, float]:
    """Objective of the first victim after the same iterations by both engines, from the same start."""
    plain = _reference(everyone, iterations)
    plain.run(iterations)
    ours = _engine(everyone, 1, iterations).run(iterations)
    return {"reference_final_loss": float(plain.slope()[0]), "engine_final_loss": float(ours.history[-1][0])}
