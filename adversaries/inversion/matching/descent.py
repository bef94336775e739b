"""Running a minimiser as the settings say: in stretches, with noise and clamping, kept in a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.inversion.matching.checkpoint import Checkpoint
from adversaries.inversion.matching.problem import Problem
from adversaries.inversion.matching.settings import Matching
from adversaries.inversion.solvers.first_order import Adam, Sgd
from adversaries.inversion.solvers.lbfgs import Lbfgs
from adversaries.inversion.solvers.minimiser import Evaluate, Minimiser, Outcome, Rules

Transform = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> images."""

Noise = Callable[[int], Tensor]
"""Iteration -> (rows, N), standard normal."""


def minimiser(problem: Problem, start: Tensor, settings: Matching, noise: Noise | None = None) -> Minimiser:
    """The minimiser that the settings ask for, at its start (rows, N)."""
    problem.rest([False] * len(start))
    kind = settings.optimiser.removeprefix("signed-")
    evaluate = _signed(problem.evaluate) if settings.optimiser != kind else problem.evaluate
    rules = Rules(
        learning_rate=settings.learning_rate,
        stop=settings.stop or -math.inf,
        patience=settings.patience,
        decay=settings.iterations if settings.decay else 0,
        project=problem.projection(settings.clamp),
        noise=noise,
        rest=problem.rest,
    )
    if kind == "lbfgs":
        return Lbfgs(evaluate, start, rules, settings.line_search, settings.memory, settings.block)
    return Adam(evaluate, start, rules) if kind == "adam" else Sgd(evaluate, start, rules, settings.momentum)


def _signed(evaluate: Evaluate) -> Evaluate:
    def signs(variables: Tensor) -> tuple[Tensor, Tensor]:
        losses, slopes = evaluate(variables)
        return losses, slopes.sign()

    return signs


def descend(
    problem: Problem,
    start: Tensor,
    settings: Matching,
    progress: Progress = no_progress,
    *,
    transform: Transform | None = None,
    noise: Noise | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Run the optimiser from variables (rows, N), in one go or in stretches with `transform` between them.

    The last stretch matches, and the history covers all; the decay of the learning rate begins anew in each.
    `transform`, `noise` and `checkpoint` are as for :func:`adversaries.inversion.matching.match.match`.
    """
    ends = _ends(settings, transform is not None)
    kept = checkpoint.load(start.device) if checkpoint is not None else None
    past = {
        "past.stretch": torch.tensor(0),
        "past.history": start.new_zeros(0, len(start)),
        "past.recoveries": torch.zeros(len(start), dtype=torch.int64, device=start.device),
    }
    past |= {name: kept[name] for name in past} if kept is not None else {}
    outcome: Outcome | None = None
    for stretch in range(int(past["past.stretch"]), len(ends)):
        begin = ends[stretch - 1] if stretch else 0
        if outcome is not None and transform is not None:
            found = problem.images(outcome.variables)
            cleaned = transform(found.flatten(0, 1)).reshape(found.shape).detach()
            held = outcome.variables
            start = problem.variables(cleaned, problem.logits(held), problem.points(held))
            past = _with(past, outcome)
        part = dataclasses.replace(settings, iterations=ends[stretch] - begin)
        runner = minimiser(problem, start, part, _later(noise, begin))
        if kept is not None:
            runner.restore(kept)
            kept = None

        def save(past: dict[str, Tensor] = past, runner: Minimiser = runner) -> None:
            if checkpoint is not None and checkpoint.due():
                checkpoint.save(runner.state() | past)

        def notify(
            iteration: int, losses: Tensor, begin: int = begin, save: Callable[[], None] = save
        ) -> None:
            if iteration % 10 == 0:
                share = (begin + iteration) / settings.iterations
                progress(share, f"matching {begin + iteration}/{settings.iterations}")
            save()

        outcome = runner.run(part.iterations, notify)
        if stretch == len(ends) - 1:
            save()
    assert outcome is not None
    past = _with(past, outcome)
    return dataclasses.replace(
        outcome, history=list(past["past.history"]), recoveries=past["past.recoveries"]
    )


def _ends(settings: Matching, transformed: bool) -> list[int]:
    """After how many iterations each stretch ends."""
    every = settings.transform_every if transformed else 0
    if not every:
        return [settings.iterations]
    return [*range(every, settings.iterations, every), settings.iterations]


def _later(noise: Noise | None, by: int) -> Noise | None:
    return None if noise is None else lambda iteration: noise(by + iteration)


def _with(past: dict[str, Tensor], outcome: Outcome) -> dict[str, Tensor]:
    """The number of stretches, their history and recoveries, with one more."""
    history, latest = past["past.history"], torch.stack(outcome.history)
    # A stretch begins where the one before ended, at images that were cleaned: its first loss belongs to no step.
    return {
        "past.stretch": past["past.stretch"] + 1,
        "past.history": torch.cat([history, latest[1:] if len(history) else latest]),
        "past.recoveries": past["past.recoveries"] + outcome.recoveries,
    }
