"""Gradient matching: find images whose gradient is the one that was sent.

An attack of this family is a choice of objective, regularisers, parametrisation, start and optimiser
(:class:`Matching`) and a call of :func:`match`. Several victims are attacked in one batched optimisation, each with
its own decisions; restarts are compared by the attack's own loss and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.reconstruction import optimise
from adversaries.reconstruction.gradients import GradientModel, Layers, Prediction, Sent, gradient_model
from adversaries.reconstruction.optimise import LineSearch, Outcome
from adversaries.reconstruction.parametrise import Chart, Parametrisation, chart
from fedattack.config import ModelConfig
from fedattack.errors import ConfigError, NotApplicable, unknown_name
from fedattack.observation import Auxiliary, Observation, Scenario, Update

Transform = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> images."""


def check_one_gradient(scenario: Scenario) -> None:
    """Refuse a scenario in which the update is not (a known multiple of) entries of one gradient.

    Raises
    ------
    NotApplicable
    """
    training, compression = scenario.training, scenario.compression
    if training.protocol == "fedavg" and training.local_steps > 1:
        raise NotApplicable(
            f"training.local_steps = {training.local_steps}: the update is a sum of gradients at weights that were "
            "never sent, and this attack matches one gradient; use local_steps 1 or protocol 'fedsgd'"
        )
    if compression.name == "sign":
        raise NotApplicable(
            "compression.name = 'sign': only signs are sent and there is no gradient to match; use 'none', 'topk', "
            "'randomk', 'qsgd' or 'dgc'"
        )
    if compression.name == "dgc" and compression.clip_norm is not None:
        raise NotApplicable(
            f"compression.clip_norm = {compression.clip_norm}: the update is the gradient times a factor that is not "
            "sent; leave clip_norm unset"
        )


def accumulates(scenario: Scenario) -> bool:
    """Whether updates after the first carry what earlier rounds held back (error feedback, DGC)."""
    return scenario.compression.error_feedback or scenario.compression.name == "dgc"


def as_gradient(observation: Observation) -> Update:
    """The update as entries of one gradient.

    A weight delta of one plain SGD step is -lr * (gradient + weight decay * weights), whatever the momentum, whose
    buffer starts empty. That is undone exactly, entry by entry.

    Raises
    ------
    NotApplicable
        If the update is not made of one gradient.
    """
    scenario, update = observation.scenario, observation.update
    check_one_gradient(scenario)
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


def masked_l2(prediction: Prediction, sent: Sent) -> Tensor:
    """Sum of squared differences over the entries that were sent, (V,)."""
    return ((prediction.entries - sent.values) * sent.valid).square().sum(1)


def full_l2(prediction: Prediction, sent: Sent) -> Tensor:
    """Sum of squared differences to the update with zeros where nothing was sent, (V,)."""
    assert prediction.square is not None
    kept = (prediction.entries * sent.valid).square().sum(1)
    return masked_l2(prediction, sent) + (prediction.square - kept)


def masked_cosine(prediction: Prediction, sent: Sent) -> Tensor:
    """One minus the cosine between the sent entries and their prediction, (V,)."""
    entries = prediction.entries * sent.valid
    norms = entries.norm(dim=1) * sent.values.norm(dim=1)
    return 1 - (entries * sent.values).sum(1) / norms.clamp(min=1e-30)


OBJECTIVES: dict[str, tuple[Callable[[Prediction, Sent], Tensor], bool]] = {
    "masked-l2": (masked_l2, False),
    "l2": (full_l2, True),
    "cosine": (masked_cosine, False),
}
"""Name -> (objective, whether it needs the norm of the whole predicted gradient)."""


def tv_l2(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, vertical plus horizontal: (V, B, C, H, W) -> (V,)."""
    down, across = images.diff(dim=3), images.diff(dim=4)
    return down.square().flatten(1).mean(1) + across.square().flatten(1).mean(1)


def tv_l1(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, vertical plus horizontal: (V, B, C, H, W) -> (V,)."""
    down, across = images.diff(dim=3), images.diff(dim=4)
    return down.abs().flatten(1).mean(1) + across.abs().flatten(1).mean(1)


REGULARISERS: dict[str, Callable[[Tensor], Tensor]] = {"tv2": tv_l2, "tv1": tv_l1}


@dataclass(frozen=True)
class Matching:
    """How to match.

    Attributes
    ----------
    objective : str
        A key of :data:`OBJECTIVES`.
    regularisers : dict of str to float
        Keys of :data:`REGULARISERS` and their weights, in units of the sent entries' squared norm (of 1 under
        "cosine"), so that a weight means the same whatever the model and the compression.
    layers : {"all", "last"}
        Which tensors are matched.
    parametrisation : {"pixels", "box", "spectrum"}
        What the optimiser turns; see :mod:`adversaries.reconstruction.parametrise`.
    optimiser : {"lbfgs", "adam", "signed-adam"}
    line_search : {"none", "armijo", "wolfe"}
        For L-BFGS; "none" steps as ``torch.optim.LBFGS`` does.
    learning_rate : float
    iterations : int
        Evaluations of objective and gradient after the first; 0 answers the start.
    memory : int
        Pairs that L-BFGS keeps.
    block : int
        See :func:`adversaries.reconstruction.optimise.lbfgs`.
    stop : float
        A victim below this objective has finished.
    transform_every : int
        Apply `transform` to the images after each this many iterations and start the optimiser afresh; 0: never.
    """

    objective: str = "masked-l2"
    regularisers: dict[str, float] = field(default_factory=dict)
    layers: Layers = "all"
    parametrisation: Parametrisation = "pixels"
    optimiser: Literal["lbfgs", "adam", "signed-adam"] = "lbfgs"
    line_search: LineSearch = "armijo"
    learning_rate: float = 1.0
    iterations: int = 400
    memory: int = 20
    block: int = 0
    stop: float = 0.0
    transform_every: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        for name in self.regularisers:
            if name not in REGULARISERS:
                raise unknown_name("regulariser", name, REGULARISERS)
        if self.iterations < 0:
            raise ConfigError(f"setting 'iterations' = {self.iterations}: must not be negative")


@dataclass(frozen=True)
class Match:
    """What matching found for one victim.

    Attributes
    ----------
    images : Tensor
        float32 (B, C, H, W) on the CPU, not clamped: the point of lowest loss that was met.
    loss : float
        Objective plus regularisers there.
    history : list of float
        Loss per iteration of the chosen restart.
    restart : int
        Which start was chosen, by its loss.
    recoveries : int
        How often the optimiser had to go back to its best point because its loss was not finite.
    """

    images: Tensor
    loss: float
    history: list[float]
    restart: int
    recoveries: int


class Problem:
    """Objective and gradient of V victims as a function of the optimiser's variables (V, N)."""

    def __init__(self, gradients: GradientModel, chart: Chart, settings: Matching) -> None:
        self._gradients = gradients
        self._chart = chart
        self._objective, self._whole = OBJECTIVES[settings.objective]
        self._regularisers = [(REGULARISERS[name], w) for name, w in settings.regularisers.items() if w]
        relative = settings.objective == "cosine"
        size = gradients.sent.values.square().sum(1)
        self._unit = torch.ones_like(size) if relative else size
        self.images, self.variables = chart.images, chart.variables

    def evaluate(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (V,) and their gradients (V, N)."""
        victims = len(variables)
        parts = [slice(0, victims)] if self._gradients.joint else [slice(v, v + 1) for v in range(victims)]
        losses, slopes = zip(*(self._part(variables[part], part) for part in parts), strict=True)
        return torch.cat(losses), torch.cat(slopes)

    def _part(self, variables: Tensor, victims: slice) -> tuple[Tensor, Tensor]:
        variables = variables.detach().requires_grad_()
        images = self._chart.images(variables)
        prediction = self._gradients.predict(images, victims, self._whole)
        losses = self._objective(prediction, self._gradients.sent[victims])
        for regulariser, weight in self._regularisers:
            losses = losses + weight * self._unit[victims] * regulariser(images)
        (slope,) = torch.autograd.grad(losses.sum(), variables)
        return losses.detach(), slope


def match(
    model: ModelConfig,
    weights: dict[str, Tensor],
    updates: Sequence[Update],
    labels: Tensor,
    starts: Tensor,
    settings: Matching,
    device: torch.device,
    progress: Progress = no_progress,
    transform: Transform | None = None,
    auxiliary: Auxiliary | None = None,
) -> list[Match]:
    """Match the updates of V victims with the same batch size, from R starts each, in one batched optimisation.

    Parameters
    ----------
    model : ModelConfig
        Resolved.
    weights : dict of str to Tensor
        The weights that were sent out, float32.
    updates : sequence of Update
        V gradients, from :func:`as_gradient`.
    labels : Tensor
        int64 (V, B).
    starts : Tensor
        float32 (R, V, B, C, H, W).
    settings : Matching
    device : torch.device
    progress : Progress
    transform : callable, optional
        A denoiser, for `transform_every`.
    auxiliary : Auxiliary, optional
        Public images, for parametrisation "spectrum".

    Returns
    -------
    list of Match
        In the order of `updates`.
    """
    restarts, victims = starts.shape[:2]
    everyone = [update for _ in range(restarts) for update in updates]
    gradients = gradient_model(model, weights, everyone, labels.repeat(restarts, 1), settings.layers, device)
    coordinates = chart(settings.parametrisation, tuple(starts.shape[2:]), auxiliary, device)
    problem = Problem(gradients, coordinates, settings)
    outcome = _minimise(problem, starts.flatten(0, 1).float().to(device), settings, progress, transform)
    losses = outcome.losses.reshape(restarts, victims)
    history = torch.stack(outcome.history, 1).cpu()
    images = problem.images(outcome.variables).cpu()
    found = []
    for v, restart in enumerate(losses.argmin(0).tolist()):
        row = restart * victims + v
        found.append(
            Match(
                images[row],
                float(losses[restart, v]),
                [float(loss) for loss in history[row]],
                restart,
                int(outcome.recoveries[row]),
            )
        )
    return found


def _minimise(
    problem: Problem, images: Tensor, settings: Matching, progress: Progress, transform: Transform | None
) -> Outcome:
    """Run the optimiser in one go, or in stretches with `transform` between them; the last stretch matches."""
    every = settings.transform_every if transform is not None else 0
    stretches = [settings.iterations]
    if every:
        whole, rest = divmod(settings.iterations, every)
        stretches = [every] * whole + ([rest] if rest else [])
    history: list[Tensor] = []
    done = 0
    outcome = None
    for stretch in stretches:
        if outcome is not None and transform is not None:
            found = problem.images(outcome.variables)
            images = transform(found.flatten(0, 1)).reshape(found.shape).detach()

        def notify(iteration: int, losses: Tensor, before: int = done) -> None:
            if iteration % 10 == 0:
                share = (before + iteration) / settings.iterations
                progress(share, f"matching {before + iteration}/{settings.iterations}")

        previous = outcome
        outcome = _run(problem, problem.variables(images), settings, stretch, notify)
        history += outcome.history if previous is None else outcome.history[1:]
        if previous is not None:
            outcome.recoveries = outcome.recoveries + previous.recoveries
        done += stretch
    assert outcome is not None
    outcome.history = history
    return outcome


def _run(
    problem: Problem, start: Tensor, settings: Matching, iterations: int, notify: optimise.Notify
) -> Outcome:
    if settings.optimiser == "lbfgs":
        return optimise.lbfgs(
            problem.evaluate,
            start,
            iterations,
            line_search=settings.line_search,
            learning_rate=settings.learning_rate,
            memory=settings.memory,
            stop=settings.stop,
            block=settings.block,
            notify=notify,
        )
    return optimise.adam(
        problem.evaluate,
        start,
        iterations,
        learning_rate=settings.learning_rate,
        signed=settings.optimiser == "signed-adam",
        stop=settings.stop,
        notify=notify,
    )
