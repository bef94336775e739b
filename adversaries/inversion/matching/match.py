"""Gradient matching: find images whose gradient is the one that was sent.

An attack of this family is a choice (:class:`~adversaries.inversion.matching.settings.Matching`) and a call
of :func:`match`. Several victims are attacked in one batched optimisation, each with its own decisions;
restarts are compared by the attack's own loss alone.

The engine leaves torch's number of threads as it finds it. One thread is best for small networks (LeNet,
ResNet20), above all where several processes share a machine: a second one gains little when the machine is
quiet and costs an order of magnitude when it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.inversion.gradients import Moves, Schedule, Statistics, gradient_model
from adversaries.inversion.matching import pixels
from adversaries.inversion.matching.checkpoint import digest, open_checkpoint
from adversaries.inversion.matching.descent import Noise, Transform, descend
from adversaries.inversion.matching.pixels import Chart
from adversaries.inversion.matching.problem import Penalty, Problem
from adversaries.inversion.matching.regularisers import batch_norm_targets
from adversaries.inversion.matching.settings import Matching
from adversaries.inversion.solvers.minimiser import Outcome
from fedattack.errors import ConfigError, PayloadError
from fedattack.observation import Observation
from fedattack.rng import torch_rng


@dataclass(frozen=True)
class Match:
    """What matching found for one victim; tensors are on the CPU."""

    images: Tensor  # float32 (B, C, H, W), not clamped: the point of lowest loss that was met
    loss: float  # objective plus regularisers there; infinite where they never were finite: `images` is the start
    history: list[float]  # loss per iteration of the chosen restart
    restart: int  # which start was chosen, by its loss
    recoveries: int  # how often the optimiser had to go back to its best point as its loss was not finite
    labels: Tensor  # int64 (B,): those given, or the largest of the optimised logits under joint labels
    losses: list[float] = field(default_factory=list)  # lowest loss from each start
    variables: Tensor | None = None  # float32 (N,): what the chart drew `images` from
    point: float | None = None  # where a surrogate's gradient was taken; None: no surrogate
    compiled: str = "no"  # "compiled", "no", or why not


def match(
    observations: Sequence[Observation],
    labels: Tensor | None,
    starts: Tensor,
    settings: Matching,
    device: torch.device,
    progress: Progress = no_progress,
    *,
    transform: Transform | None = None,
    label_starts: Tensor | None = None,
    chart: Chart | None = None,
    unroll: Schedule | None = None,
    moves: Sequence[Moves] | None = None,
    penalty: Penalty | None = None,
    seed: int = 0,
) -> list[Match]:
    """Match the updates of V victims with the same batch size, from R starts each, in one batched optimisation.

    Within :func:`~adversaries.inversion.matching.checkpoint.checkpoints_in` its state is kept from time to
    time, and it goes on from what was kept; the answer is that of an unbroken run, bit for bit.

    Parameters
    ----------
    observations : sequence of Observation
        V victims with equal weights and scenario. Updates are gradients (:func:`as_gradient`), or deltas of several
        local steps with `unroll`. Auxiliary images of the first one make the basis of parametrisation "spectrum".
    labels : Tensor or None
        int64 (V, B); not looked at under joint labels.
    starts : Tensor
        float32 (R, V, B, C, H, W): images; or the variables of `chart`, (R, V, N).
    transform : callable, optional
        A denoiser, for `transform_every`.
    label_starts : Tensor, optional
        float32 (R, V, B, classes): logits, for joint labels.
    chart : Chart, optional
        Replaces the settings' parametrisation, as by a generator's latent space.
    unroll : Schedule, optional
        Which images are in each local step's batch.
    moves : sequence of mapping of str to Tensor, optional
        What each victim's local steps did to the weights; the updates, their mean gradients, are matched at a point
        between the weights before and after, which is found beside the images.
    penalty : Penalty, optional
        A term of the attack's own, in the units of the regularisers.
    seed : int
        Of the noise, under `settings.noise`; its stream depends on round, client, restart and iteration alone.

    Raises
    ------
    PayloadError
        If an update holds values that are not finite, or nothing but zeros.
    ConfigError, NotApplicable
        If settings and arguments do not fit together.
    """
    _check(observations, labels, starts, settings, label_starts, chart, unroll)
    restarts = len(starts)
    rows = [observation for _ in range(restarts) for observation in observations]
    logits = label_starts if settings.labels == "joint" else None
    gradients = gradient_model(
        rows,
        None if logits is not None or labels is None else labels.repeat(restarts, 1),
        layers=settings.layers,
        batch_norm=settings.batch_norm or rows[0].scenario.training.batch_norm,
        unroll=unroll,
        moves=None if moves is None else [*moves] * restarts,
        device=device,
    )
    targets: Statistics = ()
    if settings.regularisers.get("batch-norm"):
        batch = (labels if logits is None else logits[0]).shape[1]  # type: ignore[union-attr]
        targets = batch_norm_targets(rows, batch, device)
    problem = Problem(
        gradients,
        chart or pixels.chart(settings.parametrisation, tuple(starts.shape[2:]), rows[0].auxiliary, device),
        settings,
        restarts=restarts,
        label_shape=None if logits is None else (logits.shape[2], logits.shape[3]),
        targets=targets,
        penalty=penalty,
    )
    first = starts.flatten(0, 1).float().to(device)
    begin = problem.variables(first, None if logits is None else logits.flatten(0, 1).float().to(device))
    noise = _noise(rows, len(observations), problem.width(begin), seed, begin) if settings.noise else None

    def identity() -> str:
        words = [repr(settings), repr(unroll), type(chart).__name__, str(device), str(seed)]
        words += [] if moves is None else ["surrogate"]
        tensors = [tensor for tensor in (labels, starts, logits) if tensor is not None]
        tensors += observations[0].weights.values()
        for observation in observations:
            sent, indices = observation.update, observation.update.indices
            tensors += [sent.values, *([] if indices is None else [indices]), *observation.buffers.values()]
        return digest(words, tensors + (chart.tensors() if isinstance(chart, pixels.Drawn) else []))

    kept = open_checkpoint(identity)
    outcome = descend(problem, begin, settings, progress, transform=transform, noise=noise, checkpoint=kept)
    return _answers(problem, outcome, restarts, None if logits is not None else labels)


def _noise(rows: Sequence[Observation], victims: int, width: int, seed: int, like: Tensor) -> Noise:
    """Standard normal noise for the images' variables, each row from a stream of its own."""

    def noise(iteration: int) -> Tensor:
        drawn = torch.zeros(like.shape)
        for row, observation in enumerate(rows):
            keys = (observation.round, observation.client, row // victims, iteration)
            drawn[row, :width] = torch.randn(width, generator=torch_rng(seed, "matching noise", *keys))
        return drawn.to(like)

    return noise


def _answers(problem: Problem, outcome: Outcome, restarts: int, labels: Tensor | None) -> list[Match]:
    """For each victim what the restart of lowest loss found."""
    losses = outcome.losses.reshape(restarts, -1).cpu()
    history = torch.stack(outcome.history, 1).cpu()
    images = problem.images(outcome.variables).detach().cpu()
    logits, points = problem.logits(outcome.variables), problem.points(outcome.variables)
    found = []
    for v, restart in enumerate(losses.argmin(0).tolist()):
        row = restart * losses.shape[1] + v
        found.append(
            Match(
                images=images[row],
                loss=float(losses[restart, v]),
                history=history[row].tolist(),
                restart=restart,
                recoveries=int(outcome.recoveries[row]),
                labels=labels[v].cpu() if labels is not None else logits[row].argmax(1).cpu(),  # type: ignore[index]
                losses=losses[:, v].tolist(),
                variables=outcome.variables[row, : problem.width(outcome.variables)].detach().cpu(),
                point=None if points is None else float(points[row]),
                compiled=problem.compiled,
            )
        )
    return found


def _check(
    observations: Sequence[Observation],
    labels: Tensor | None,
    starts: Tensor,
    settings: Matching,
    label_starts: Tensor | None,
    chart: Chart | None,
    unroll: Schedule | None,
) -> None:
    """Refuse what cannot be matched, before anything is computed."""
    if chart is not None and settings.clamp:
        raise ConfigError("setting 'clamp' is for pixels, and a chart replaces them: leave it out")
    for observation in observations:
        values, client = observation.update.values, observation.client
        if not bool(values.isfinite().all()):
            broken = int((~values.isfinite()).sum())
            raise PayloadError(
                f"client {client}: {broken} of {values.numel()} values of the update are not finite, so that no "
                "images can match it"
            )
        if not bool(values.any()):
            raise PayloadError(
                f"client {client}: the update holds nothing but zeros, which any image matches"
            )
    if unroll is None and any(observation.update.kind != "gradient" for observation in observations):
        raise ValueError("updates are weight deltas: pass them through as_gradient, or give `unroll`")
    if starts.ndim != (6 if chart is None else 3):
        raise ValueError(
            f"starts have shape {tuple(starts.shape)}: (R, V, B, C, H, W), or (R, V, N) with a chart"
        )
    if settings.labels == "joint":
        if label_starts is None:
            raise ConfigError("setting 'labels' = 'joint' needs label starts")
    elif labels is None:
        raise ConfigError("setting 'labels' = 'given': no labels were given; infer them, or use 'joint'")
