"""Iterations a second of the matching engine, against the plain reference engine in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adversaries.inversion.gradients import Compile, gradient_model
from adversaries.inversion.matching.descent import minimiser
from adversaries.inversion.matching.pixels import PIXEL_DEVIATION, Standardised
from adversaries.inversion.matching.problem import Problem
from adversaries.inversion.matching.settings import Matching
from adversaries.inversion.solvers.minimiser import Minimiser
from fedattack.config import ModelConfig
from fedattack.errors import RunFailed
from fedattack.models import resolve
from simulations.bench.peers import installed
from simulations.bench.scenes import CLASSES, SIZE, Reference, Scene, memory, pictures, scene
from simulations.engine.environment import cpu_threads

VICTIMS = 8
_TV = 1e-2
_ROUNDS = 15


def lenet(quick: bool = False, data: Path | None = None, peers: bool = False) -> dict[str, Any]:
    """Inverting Gradients on the sigmoid LeNet of DLG, full gradient, batch 1: one victim and eight."""
    return _compare("lenet-zhu", 40, _ROUNDS, quick, data, 500, peers=peers)


def resnet20(quick: bool = False, data: Path | None = None, peers: bool = False) -> dict[str, Any]:
    """The same on ResNet-20 (ReLU, BatchNorm with stored statistics)."""
    return _compare("resnet20", 4, _ROUNDS, quick, data, 60, peers=peers)


def resnet18(quick: bool = False, data: Path | None = None, peers: bool = False) -> dict[str, Any]:
    """The same on ResNet-18, one victim, not compiled."""
    return _compare("resnet18", 2, 7, quick, data, 10, victims=1, compiled=False, peers=peers)


@dataclass
class _Contender:
    """One engine at work: `run` goes on for so many iterations, `seconds` are those of one in each turn.

    `start_s`: what the first took more than a later one, the compiler's; `grown_mib`: memory.
    """

    label: str
    victims: int
    run: Callable[[int], None]
    start_s: float = 0.0
    grown_mib: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def begin(self, iterations: int) -> None:
        """Run for the first time."""
        times = []
        with memory() as grown:  # before anything else has left room in the heap
            for count in (1, max(iterations, 3)):
                since = time.perf_counter()
                self.run(count)
                times.append((time.perf_counter() - since) / count)
        self.start_s, self.grown_mib = times[0] - times[1], grown[0] / 2**20

    def turn(self, iterations: int) -> None:
        """Measure so many iterations."""
        since = time.perf_counter()
        self.run(iterations)
        self.seconds.append((time.perf_counter() - since) / iterations)

    def figures(self, plain: _Contender) -> dict[str, Any]:
        """Speed, and its ratio to the plain engine, turn by turn."""
        ratios = [self.victims * r / t for r, t in zip(plain.seconds, self.seconds, strict=True)]
        return {
            f"{self.label}_iterations_s_each": self.victims / statistics.median(self.seconds),
            f"{self.label}_ratio": statistics.median(ratios),
            f"{self.label}_ratio_spread": [min(ratios), max(ratios)],
        }


def _compare(
    name: str,
    iterations: int,
    rounds: int,
    quick: bool,
    data: Path | None,
    descent: int,
    victims: int = VICTIMS,
    compiled: bool = True,
    peers: bool = False,
) -> dict[str, Any]:
    """Measure one model: the engines take turns, so that a busy machine slows all of them alike.

    `iterations` are those of each engine in each of the `rounds` turns; `descent` those from one start by both
    engines, whose final objectives are compared. RunFailed where they disagree about objective or gradient at the
    start.
    """
    if quick:
        iterations, rounds, descent = 1, 2, 4
    private = pictures(victims, data)
    model = resolve(ModelConfig(name=name, classes=CLASSES), 3, SIZE, CLASSES)
    everyone = scene(model, private)
    counts = sorted({1, victims})
    with cpu_threads(1):  # small networks gain nothing from more
        tiny = scene(resolve(ModelConfig(classes=CLASSES), 3, SIZE, CLASSES), pictures(1, None))
        _reference(tiny, 1).run(1)  # loads libraries
        length = iterations * (rounds + 2)
        plain = _Contender("reference", 1, _reference(everyone, length).run)
        ours = [_Contender(f"victims_{n}", n, _onward(_engine(everyone, n, length))) for n in counts]
        plain.begin(iterations)
        for contender in ours:
            contender.begin(iterations)
        others = {} if not peers else installed()
        for peer, prepare in others.items():
            contender = _Contender(peer, 1, prepare(everyone, _TV))
            contender.begin(iterations)
            ours.append(contender)
        agreement: dict[str, Any] = _agreement(everyone, *_problem(everyone, victims, _settings(1)))
        for count in counts if compiled and not quick else ():
            settings = _settings(length, "always")
            problem, start = _problem(everyone, count, settings)
            label = f"victims_{count}_compiled"
            contender = _Contender(label, count, _onward(minimiser(problem, start, settings)))
            contender.begin(iterations)
            if problem.compiled != "compiled":
                agreement[label] = problem.compiled
                continue
            ours.append(contender)
            compiled_errors = _agreement(everyone, problem, start)
            agreement |= {f"{label}_{name}": error for name, error in compiled_errors.items()}
        for _ in range(rounds):
            for contender in (plain, *ours):
                contender.turn(iterations)
        quality = _quality(everyone, descent)
    figures: dict[str, Any] = {
        "model": f"{name}, {model.activation}, {CLASSES} classes",
        "images": private.source,
        "reference_iterations_s": 1 / statistics.median(plain.seconds),
    }
    for contender in ours:
        figures |= contender.figures(plain)
    figures |= {f"{one.label}_memory_mib": one.grown_mib for one in (plain, *ours)}
    figures |= {f"{one.label}_compiler_s": one.start_s for one in ours if one.label.endswith("compiled")}
    return figures | agreement | quality | {"rounds": rounds, "iterations_a_turn": iterations, "threads": 1}


def _settings(iterations: int, compiled: Compile = "never") -> Matching:
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
        compile=compiled,
    )


def _engine(everyone: Scene, count: int, iterations: int) -> Minimiser:
    """The engine's own descent on the first `count` victims."""
    settings = _settings(iterations)
    return minimiser(*_problem(everyone, count, settings), settings)


def _problem(everyone: Scene, count: int, settings: Matching) -> tuple[Problem, torch.Tensor]:
    cpu = torch.device("cpu")
    seen, labels = everyone.observations[:count], everyone.labels[:count]
    gradients = gradient_model(seen, labels, batch_norm="eval", device=cpu)
    problem = Problem(gradients, Standardised(tuple(everyone.starts.shape[1:])), settings)
    return problem, problem.variables(everyone.starts[:count])


def _onward(descent: Minimiser) -> Callable[[int], None]:
    def run(iterations: int) -> None:
        descent.run(descent.iteration + iterations)

    return run


def _reference(everyone: Scene, iterations: int, victim: int = 0) -> Reference:
    seen, label, start = everyone.observations[victim], everyone.labels[victim], everyone.starts[victim]
    return Reference(seen, label, start, iterations, _TV)


def _agreement(everyone: Scene, problem: Problem, start: torch.Tensor) -> dict[str, float]:
    """Relative errors of objective and gradient, medians over victims: a ReLU at 0 may fall on either side in one."""
    losses, slopes = problem.evaluate(start)
    objectives, gradients = [], []
    for victim in range(len(start)):
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
