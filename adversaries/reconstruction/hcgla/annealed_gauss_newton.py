"""Damped Gauss-Newton on the entries that were sent: the best honest reconstruction we know from one update.

Gradient matching by a first-order optimiser stops far from what a sparse update really gives away. This solver
treats the update as what it is, a few thousand noiseless measurements of a few thousand pixels:

1. *Decouple through the head.* The head's gradient is r h^T and its bias' gradient is r = softmax(z) - e_y, so a
   kept entry of the label's row gives one feature exactly, h_j = gW[y, j] / gb[y]; an entry that was not sent is
   known to be small, h_j < tau / |gb[y]|. After the sigmoid is inverted, features are smooth functions of the
   image, and the convolutions' gradients depend on the head only through v = W^T r, which those features fix.
2. *Gauss-Newton.* Residuals are the known features before the sigmoid, (u_j(x) - logit h_j) / su, the kept
   entries of the convolutions' gradients, (g_i(x) - g_i) / (s tau), and the log-probabilities of the kept bias
   entries; a Gaussian prior on images joins as |z|^2 with x = mean + A z. Each step solves the damped normal
   equations by a dense Cholesky factorisation and is halved until the objective falls.
3. *Anneal.* s starts large, where the prior smooths the problem, and falls while the *certificate*, the objective
   per measured number, says that the measurements can be explained to the precision claimed (about 1 or
   less). Where it cannot, :func:`_anneal` tries again; if that fails (noise that was not declared), the last
   reconstruction that was explained is returned.
4. *Predict.* The certificate says that an answer explains the update, not that no other would: where few numbers
   measure the image, many do. The last normal equations say how far pixels are left open, and so the answer's PSNR.

For a batch all images are solved for jointly: rows of distinct labels still separate, the convolutions'
gradients are the mean over the batch, and each image is spanned by the largest modes of the prior.

Values rounded by a quantiser are believed to the size of its steps; features and probabilities are then the
image's own, not the rounded ones. What local steps add (simulated for every image that is tried, so that the
line search is the whole client's) and what earlier rounds held back is subtracted:
:mod:`adversaries.reconstruction.hcgla.memory`.

Yang et al., "Using Highly Compressed Gradients in Federated Learning for Data Reconstruction Attacks", IEEE
TIFS 2023 (the setting). Geiping et al., "Inverting Gradients", NeurIPS 2020 (inputs of a linear layer from
its gradient). Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021 (layer-wise linear
constraints). The joint Gauss-Newton solve and its certificate are this project's own.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence.one_gradient import accumulates
from adversaries.inversion.evidence.priors import GaussianPrior
from adversaries.inversion.gradients import closed_form
from adversaries.reconstruction.hcgla.least_squares import Anchor, Problem, State
from adversaries.reconstruction.hcgla.measurements import PLAIN, ROUNDING, Measurements, read_update
from adversaries.reconstruction.hcgla.memory import LocalSteps
from fedattack.config import Count, Positive, Strength
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Scenario, Update
from fedattack.registry import check_values
from fedattack.rng import torch_rng

MAX_BATCH = 16
MAX_PIXELS = 3 * 64 * 64
"""Numbers in one image: the prior's covariance is dense and takes their square, 1.2 GB at the limit."""
DOUBLE_BELOW = 0.3
"""Below this s the normal equations are too ill-conditioned for float32."""
MAX_WIDENING = 3.0
"""How many times as wide the prior becomes at most, at one retry, where an image turns out longer."""
DRAWS = 32
"""Errors drawn to predict the answer's."""


@dataclass(frozen=True)
class GaussNewtonSettings:
    """Settings of the solver.

    Attributes
    ----------
    schedule : tuple of float or None
        Falling values of s; None: :func:`default_schedule`.
    modes : int or None
        Prior modes per image, throughout; None: :func:`default_modes` while s is at least `all_modes_below`, then
        all. The modes left out act as noise, which limits how far s can fall.
    max_objective : float
        Certificate above which annealing ends: objective per measured number.
    steps, last_steps : int
        Most Gauss-Newton steps per value of s (one is followed by another only while the certificate is above
        `max_objective` and still falling), and at the last (ended once one gains less than a percent).
    halvings, retries : int
        Times a step is halved before it is given up, and a level that the certificate refuses is tried again, half
        way between it and the last.
    feature_noise : float
        Standard deviation of a known feature before the sigmoid, as a share of s.
    weight_floor : float
        Smallest scale of a gradient entry's error at s = 1, as a share of the kept entries' root mean square: at high
        rates tau falls far below the error of truncating the prior to its modes.
    head_entries, chunk : int
        For batches, off-label entries of the head used, largest first; directions differentiated at once.
    """

    schedule: tuple[float, ...] | None = None
    modes: Positive | None = None
    all_modes_below: float = 0.1
    max_objective: Annotated[float, Field(gt=0)] = 1.5
    steps: Positive = 6
    last_steps: Positive = 1
    halvings: Count = 5
    retries: Count = 4
    feature_noise: Strength = 0.03
    weight_floor: Strength = 0.1
    head_entries: Count = 3000
    chunk: Positive = 256

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        check_values(self, "hcgla")
        levels = self.schedule
        if levels is not None and not (levels and all(a > b for a, b in itertools.pairwise((*levels, 0.0)))):
            raise ConfigError(
                f"setting 'schedule' = {levels!r}: give positive values that fall, as 1, 0.3, 0.1"
            )


@dataclass(frozen=True)
class GaussNewtonResult:
    """What the solver answers.

    Attributes
    ----------
    images : Tensor
        float32 (B, C, H, W), clamped to [0, 1], on the CPU, in the order of the labels.
    objective_per_number : float
        The certificate at the answer.
    history : list[float]
        After each step the certificate times s squared: what is unexplained, on one scale, so that it falls while
        annealing succeeds (the certificate itself is in units of s, and rises as s falls).
    explained : bool
        Whether the certificate stayed below its limit; False: not even the loosest noise model explains the update,
        and the answer is not to be trusted. It is no measure of leakage: where few numbers were sent, many images
        explain them.
    details : dict
        JSON-able: schedule, values of s reached, levels tried again, modes, unknowns, measurements of each kind, how
        many measure the images, the PSNR in dB that the answer should have, the prior's source.
    """

    images: Tensor
    objective_per_number: float
    explained: bool
    steps: int
    history: list[float] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)


def applies(
    scenario: Scenario,
    update: Update | None = None,
    *,
    round: int = 1,
    num_examples: int | None = None,
    labels: Tensor | None = None,
) -> None:
    """NotApplicable, in one sentence, for what the solver's model of an update does not cover.

    Without `update` what is known before the run starts is checked; under error feedback `round` 1 alone is the
    compressed gradient of one batch; `num_examples` None: the scenario's batch; `labels` int64 (B,), inferred.
    """
    closed_form.describe(scenario.model)
    model, training, compression = scenario.model, scenario.training, scenario.compression
    if model.activation != "sigmoid":
        raise NotApplicable(
            f"Gauss-Newton inverts the sigmoid of the features, but model.activation = {model.activation!r}; use "
            "method 'matching' or activation 'sigmoid'"
        )
    if training.protocol != "fedsgd" or (update is not None and update.kind != "gradient"):
        raise NotApplicable(
            "Gauss-Newton solves for entries of a (mean) gradient, but the update is a weight delta "
            f"(training.protocol = {training.protocol!r}); turn it into one first"
        )
    if compression.name not in ("none", "topk", "randomk", "dgc", *ROUNDING):
        raise NotApplicable(
            f"Gauss-Newton needs the sent entries' values, but compression.name = {compression.name!r} sends others; "
            "use topk, topk-qsgd, randomk, dgc, qsgd or none"
        )
    if compression.name in ROUNDING and compression.norm != "max":
        raise NotApplicable(
            f"Gauss-Newton needs the size of the quantiser's steps, which compression.norm = {compression.norm!r} "
            "hides; use 'max'"
        )
    if compression.name == "dgc" and compression.clip_norm is not None:
        raise NotApplicable(
            "Gauss-Newton needs the gradient's scale, which clipping hides "
            f"(compression.clip_norm = {compression.clip_norm:g}); leave clip_norm unset"
        )
    pixels = math.prod(scenario.image_shape)
    if pixels > MAX_PIXELS:
        raise NotApplicable(
            f"Gauss-Newton holds a dense covariance of at most {MAX_PIXELS:,} numbers an image, but one of shape "
            f"{scenario.image_shape} has {pixels:,}; use method 'matching' or a smaller data.image_size"
        )
    if accumulates(scenario) and round > 1:
        raise NotApplicable(
            f"in round {round} an update holds residuals of earlier rounds (error feedback or dgc): give the attack "
            "all rounds, so that it can peel them off, or attack round 1"
        )
    count = training.batch_size if num_examples is None else num_examples
    if count > MAX_BATCH:
        raise NotApplicable(
            f"Gauss-Newton solves for at most {MAX_BATCH} images at once, but the batch has {count}"
        )
    if count > 1 and "soteria" in scenario.defense.names:
        raise NotApplicable(
            f"defence 'soteria' prunes other features of each of the batch's {count} images, so that no row of the "
            "head is one image's; use training.batch_size 1"
        )
    if labels is not None and len(labels.unique()) < len(labels):
        raise NotApplicable(
            f"Gauss-Newton needs distinct labels, but {sorted(labels.tolist())} repeat, so that rows of the head mix "
            "several images"
        )


def default_modes(size: int, batch: int) -> int:
    """Prior modes per image to begin with: all while the unknowns number at most 4,096, else D / (1 + B / 4)."""
    if batch == 1 or size * batch <= 4096:
        return size
    return min(size, max(4096 // batch, round(size / (1 + batch / 4))))


Kind = Literal["exact", "rounded", "carried", "stepped"]
"""Of an update: entries of one gradient; the same, quantised; with residuals of earlier rounds; of several steps."""

_SCHEDULES: dict[Kind, tuple[float, ...]] = {
    "exact": (1.0, 0.1, 0.01, 3e-4, 1e-5),
    "rounded": (1.0, 0.3, 0.1, 0.03, 0.01),
    "carried": (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5),
    "stepped": (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4),
}
"""For one image with more measurements than unknowns."""


def default_schedule(measurements: int, unknowns: int, batch: int, kind: Kind = "exact") -> tuple[float, ...]:
    """Falling values of s: fast where measurements outnumber unknowns, gentle elsewhere and for batches."""
    if batch == 1 and measurements >= unknowns:
        return _SCHEDULES[kind]
    if batch == 1:
        return (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    return (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


def least_feature_noise(measurements: int, unknowns: int, batch: int) -> float:
    """Standard deviation below which no feature is believed, before the sigmoid.

    Where fewer numbers were sent than there are unknowns, features believed more tightly lead to worse images.
    """
    if batch > 1:
        return 3e-3
    return 1e-5 if measurements >= unknowns else 1e-3


def solve(
    observation: Observation,
    labels: Tensor,
    prior: GaussianPrior,
    settings: GaussNewtonSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    steps: LocalSteps | None = None,
) -> GaussNewtonResult:
    """Reconstruct a batch from one observation, its update as a (mean) gradient; NotApplicable as :func:`applies`.

    `labels`, int64 (B,), are the inferred ones, distinct. The prior's factor is computed once and kept: share
    one prior between victims. `steps`: what the update carries beside one gradient; None: nothing.
    """
    settings = settings or GaussNewtonSettings()
    labels = labels.cpu()
    applies(
        observation.scenario,
        observation.update,
        round=observation.round,
        num_examples=len(labels),
        labels=labels,
    )
    chain = closed_form.describe(observation.scenario.model)

    def read(images: Tensor) -> Measurements:
        reading = PLAIN if steps is None else steps.reading(images)
        return read_update(chain, observation, labels, settings.weight_floor, settings.head_entries, reading)

    mean = prior.mean.reshape(1, *prior.image_shape).expand(len(labels), -1, -1, -1)
    measured = read(mean)
    batch = len(labels)
    most = min(settings.modes or prior.size, prior.size)
    few = most if settings.modes else default_modes(prior.size, batch)
    problem = Problem(
        chain,
        observation.weights,
        measured,
        prior.mean,
        prior.factor(None if few == prior.size else most),
        settings.feature_noise,
        least_feature_noise=least_feature_noise(measured.count, batch * most, batch),
        chunk=settings.chunk,
        device=torch.device(device),
        reread=read if steps is not None and (steps.several or steps.clipped) else None,
    )
    schedule = settings.schedule or default_schedule(
        measured.count, batch * most, batch, _kind(problem, steps)
    )
    levels = [(s, few if s >= settings.all_modes_below else most) for s in schedule]
    path = _anneal(problem, levels, settings, progress)
    details: dict[str, object] = {
        "schedule": list(schedule),
        "reached": path.reached,
        "retried": path.retried,
        "modes": path.modes,
        "unknowns": batch * path.modes,
        "measurements": measured.count,
        "measuring": measured.measuring,
        "predicted_psnr": path.predicted,
        "conv_entries": len(measured.conv_values),
        "features_known": int(measured.row_known.sum()),
        "prior": prior.source,
    }
    images = path.answer.clamp(0, 1).float().cpu()
    return GaussNewtonResult(
        images, path.certificate, path.explained, len(path.history), path.history, details
    )


def _kind(problem: Problem, steps: LocalSteps | None) -> Kind:
    if problem.rereads:
        return "stepped"
    if not problem.exact:
        return "rounded"
    return "carried" if steps is not None and steps.carries else "exact"


@dataclass
class _Path:
    """Where annealing has got to: the last accepted images, their certificate, the values of s that were accepted."""

    answer: Tensor
    modes: int
    certificate: float = math.inf
    explained: bool = False
    predicted: float = math.nan
    prior_variance: float = 1.0
    history: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    retried: int = 0


def _anneal(
    problem: Problem, levels: list[tuple[float, int]], settings: GaussNewtonSettings, progress: Progress
) -> _Path:
    """Lower s (and raise the number of modes) along `levels` while the certificate holds.

    Where it breaks, the step was too long or the image is longer than the prior's are: the level is tried
    again from the last answer that held, by way of one half between, under a prior as wide as that answer is
    long. A level that is refused for as much again is beyond what noise allows.
    """
    z = torch.zeros(problem.batch, levels[0][1], dtype=torch.float64, device=problem.device)
    anchor = problem.anchor(problem.evaluate(z, levels[0][0], problem.anchor()))
    last_steps = settings.steps if problem.rereads else settings.last_steps
    path = _Path(problem.images(z), z.shape[1])
    queue, retries = deque(levels), 0 if problem.rereads else settings.retries
    refused: dict[float, float] = {}
    while queue:
        s, modes = queue.popleft()
        reached = path.reached[-1] if path.reached else math.inf
        progress(sum(level >= reached for level, _ in levels) / len(levels), f"s = {s:g}")
        last = not queue
        z = torch.nn.functional.pad(z, (0, modes - z.shape[1]))
        for _ in range(last_steps if last else settings.steps):
            before = problem.evaluate(z, s, anchor)
            after, equations = _descend(problem, before, s, anchor, settings.halvings)
            z, anchor = after.z, problem.anchor(after)
            # Noise may leave nothing to measure.
            certificate = after.objective / max(1, problem.measured.count)
            path.history.append(certificate * s**2)
            good = certificate <= settings.max_objective
            stalled = after.objective > (0.99 if last else 0.9) * before.objective
            if stalled or (good and not last):
                break
        # Where not even the loosest level explains the update, its answer is still the best there is.
        if good or not path.reached:
            path.answer, path.modes = problem.images(z), modes
            path.certificate, path.explained = certificate, good
            if equations is not None:
                path.predicted, path.prior_variance = _spread(problem, after, equations)
            accepted = after
        if good:
            path.reached.append(s)
        elif path.reached and path.retried < retries and certificate < 0.9 * refused.get(s, math.inf):
            path.retried += 1
            refused[s] = certificate
            z, anchor = accepted.z, problem.anchor(accepted)
            z = z / problem.widen(min(max(1.0, math.sqrt(path.prior_variance)), MAX_WIDENING))
            queue.extendleft([(s, modes), (math.sqrt(s * reached), modes)])
        else:
            break
    progress(1.0, "done")
    return path


def _descend(
    problem: Problem, state: State, s: float, anchor: Anchor, halvings: int
) -> tuple[State, Equations | None]:
    """One Gauss-Newton step, halved until the objective falls; the old state where it never does."""
    equations = _equations(*problem.jacobian(state), double=s < DOUBLE_BELOW)
    if equations is None:
        return state, None
    scaled = state.feature_residual / state.feature_noise
    features = [row[active, None] for row, active in zip(scaled, state.active, strict=True)]
    others = (state.joint_residual / state.joint_noise)[:, None]
    step = equations.step(state.z[..., None], features, others)[..., 0]
    measured = problem.measured
    for halving in range(halvings + 1):
        z = state.z + step / 2**halving
        if problem.rereads:
            problem.read(z)
            anchor = problem.anchor(state)
        candidate = problem.evaluate(z, s, anchor)
        if candidate.objective < state.objective:
            return candidate, equations
    problem.measured = measured
    return state, equations


def _equations(per_image: list[Tensor], joint: Tensor, double: bool) -> Equations | None:
    """Factorised where it is cheaper, float32 where that suffices; None where absurd values leave no answer."""
    unknowns, rows = joint.shape
    on_unknowns = unknowns**2 * (rows + unknowns / 3)
    on_measurements = rows**2 * (unknowns + rows / 3)
    way = OnUnknowns if on_unknowns <= on_measurements else OnMeasurements
    for dtype in (torch.float64,) if double else (torch.float32, torch.float64):
        try:
            return way(per_image, joint, dtype)
        except torch.linalg.LinAlgError:
            continue
    return None


class OnUnknowns:
    """The normal equations (J^T J + I) dz = -(J^T residual + z), factorised: (B modes, B modes) of `dtype`.

    `per_image` and `joint` are from :meth:`Problem.jacobian`. torch.linalg.LinAlgError if the system is not
    positive definite in that precision.
    """

    def __init__(self, per_image: list[Tensor], joint: Tensor, dtype: torch.dtype) -> None:
        self.per_image, self.joint = per_image, joint
        system = torch.zeros(len(joint), len(joint), dtype=dtype, device=joint.device)
        _gram(joint, system)
        modes = len(joint) // len(per_image)
        for b, block in enumerate(per_image):
            own = slice(b * modes, (b + 1) * modes)
            _gram(block, system[own, own])
        self._system = _factor(system)

    def step(self, z: Tensor, features: list[Tensor], others: Tensor) -> Tensor:
        """dz (B, modes, k), from as many z and residuals of the features (active, k) and joint ones (m, k).

        Residuals are divided by their noise. Products with J are in the precision of `z`.
        """
        right = z + (self.joint.to(z.dtype) @ others).reshape(z.shape)
        for row, block, residual in zip(right, self.per_image, features, strict=True):
            row += block.to(z.dtype) @ residual
        return -_solve(self._system, right.flatten(0, 1)).reshape(z.shape)


class OnMeasurements:
    """The same, factorised on the joint measurements by the matrix inversion lemma, applied twice.

    With F_b an image's feature rows, C_b its part of the joint rows and P_b = I + F_b^T F_b, the new z is
    z0 + P^-1 C^T (I + sum_b C_b P_b^-1 C_b^T)^-1 (target - C z0), where z0 answers the features alone and
    P_b^-1 = I - F_b^T (I + F_b F_b^T)^-1 F_b needs a system of the features' number only.
    """

    def __init__(self, per_image: list[Tensor], joint: Tensor, dtype: torch.dtype) -> None:
        self.per_image, self.joint = per_image, joint
        self._parts = joint.chunk(len(per_image))
        system = torch.zeros(joint.shape[1], joint.shape[1], dtype=dtype, device=joint.device)
        _gram(joint.T, system)
        self._factors, self._crossed = [], []
        for block, part in zip(per_image, self._parts, strict=True):
            wide = block.to(dtype)
            factor = _factor(wide.T @ wide)
            cross = torch.linalg.solve_triangular(factor, wide.T @ part.to(dtype), upper=False)
            system.addmm_(cross.T, cross, alpha=-1)
            self._factors.append(factor)
            self._crossed.append(cross)
        self._system = _factor(system)

    def step(self, z: Tensor, features: list[Tensor], others: Tensor) -> Tensor:
        """See :meth:`OnUnknowns.step`."""
        target, starts = -others, []
        for b, (block, part) in enumerate(zip(self.per_image, self._parts, strict=True)):
            wide = block.to(z.dtype)
            starts.append(wide @ _solve(self._factors[b], wide.T @ z[b] - features[b]))
            target = target + part.T.to(z.dtype) @ (z[b] - starts[b])
        pull = _solve(self._system, target)
        moved = []
        for b, (block, part) in enumerate(zip(self.per_image, self._parts, strict=True)):
            crossed = self._crossed[b] @ pull.to(self._system.dtype)
            back = torch.linalg.solve_triangular(self._factors[b].T, crossed, upper=True)
            moved.append(starts[b] + part.to(z.dtype) @ pull - block.to(z.dtype) @ back.to(z.dtype))
        return torch.stack(moved) - z


Equations = OnUnknowns | OnMeasurements


def _spread(problem: Problem, state: State, equations: Equations) -> tuple[float, float]:
    """The PSNR in dB that the answer should have, and how many times the prior's variance its images show.

    The error of the linearised estimate, H^-1 (J^T e + z) with H = J^T J + I, is drawn. The fit shows the variance
    of e, by the residuals' squares over the numbers it leaves free, and of z, by |z|^2 over those it determines.
    """
    generator = torch_rng(0, "hcgla-spread")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(problem.device)

    images, modes = state.z.shape
    active = [block.shape[1] for block in equations.per_image]
    joint = equations.joint.shape[1]
    none = [torch.zeros(count, DRAWS, device=problem.device) for count in active]
    prior = equations.step(draw(images, modes, DRAWS), none, torch.zeros(joint, DRAWS, device=problem.device))
    noise = equations.step(
        torch.zeros(images, modes, DRAWS, device=problem.device),
        [draw(count, DRAWS) for count in active],
        draw(joint, DRAWS),
    )
    left = float((prior.square() + noise.square()).sum()) / DRAWS  # the trace of H^-1
    told = images * modes - left
    length = float(state.z.square().sum())
    of_noise = (state.objective - length) / max(1.0, sum(active) + joint - told)
    of_prior = length / max(1.0, told)
    factor = problem.factor32[:, :modes]

    def pixels(z: Tensor) -> Tensor:
        return (factor @ z).square().mean(2).sum(1)

    errors = (of_prior * pixels(prior) + of_noise * pixels(noise)) / len(factor) + problem.left_out(modes)
    return float((-10 * errors.log10()).mean()), of_prior


def _gram(rows: Tensor, into: Tensor) -> None:
    """Add rows rows^T to the lower triangle of `into`, in its precision, block by block."""
    size = max(256, -(-len(rows) // 8))
    for columns in rows.split(2048, 1):
        part = columns.to(into.dtype)
        for start in range(0, len(rows), size):
            block = part[start : start + size]
            into[start:, start : start + size].addmm_(part[start:], block.T)


def _factor(system: Tensor) -> Tensor:
    """Cholesky factor of system + I, system positive semi-definite and given by its lower triangle; overwrites it."""
    system.diagonal().add_(1)
    return torch.linalg.cholesky(system)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve (n, k) with a Cholesky factor, in its precision."""
    return torch.cholesky_solve(right.to(factor.dtype), factor).to(right.dtype)
