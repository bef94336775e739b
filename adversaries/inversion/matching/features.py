"""Images from what a hidden linear layer was given: the network below it inverted, with its own gradients beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence.one_gradient import as_gradient
from adversaries.inversion.evidence.whitening import Whitening
from adversaries.inversion.matching.below import Below, Weights
from adversaries.inversion.matching.positions import MOST_ENTRIES, Positions
from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation
from fedattack.rng import torch_rng
from fedattack.task import objective

Product = Callable[[Tensor], Tensor]

STEPS = 8
"""Gauss-Newton steps on the features alone."""

JOINT_STEPS = 6
"""Gauss-Newton steps on features and the lower layers' gradients, where there are no positions to tell."""

TURNS = 16
"""Of positions and images, where positions can be told."""

INNER, MOST_INNER, GROWTH = 60, 200, 1.5
"""Iterations of conjugate gradients in a step: at first, at most, and the factor after a step that used all.

That they end early is part of the prior: in whitened coordinates fine detail, which the layer hardly sees, comes
last.
"""

RATIO = 0.5
"""Noise level in units of the residual."""

KINK = 0.5
"""Width of kinks in units of the mean residual, and of the deviation of what comes into them."""

HALVINGS = 6
SOLVED = 1e-6
LEFT_OF_DRIFT = (0.3, 0.1, 0.05)
"""Noise of features at weights of known steps, in units of how far they drift: first on a line, then corrected."""

CORRECTIONS = 2
"""Times that weights of local steps are worked out anew from images that were found."""


@dataclass(frozen=True)
class LayerInputs:
    """What was read at one hidden linear layer.

    Attributes
    ----------
    layer : str
        Its module's name.
    features : Tensor
        float64 (B, n): its inputs, a row for each sample.
    back : Tensor
        float64 (B, m): each sample's part of the derivative of the batch's mean loss by the layer's outputs, so that
        ``back.T @ features`` is that by its weights.
    steps : Tensor, optional
        int64 (B,): each sample's local step, from 0; None: one gradient, or not known.
    """

    layer: str
    features: Tensor
    back: Tensor
    steps: Tensor | None = None


@dataclass(frozen=True)
class FeatureImages:
    """Images that a hidden layer's inputs came from.

    Attributes
    ----------
    images : Tensor
        float64 (B, C, H, W), on the CPU, not clamped.
    misfit : Tensor
        float64 (B,): |f(x) - z| / |z| of each.
    residual : float
        Largest relative error over the lower tensors' sent entries; inf where there are none to compare.
    """

    images: Tensor
    misfit: Tensor
    residual: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """Samples that met the same weights."""

    rows: Tensor
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _Lower:
    """The lower tensors' gradient as it was sent: dense values and 1 / rms where there is an entry, else 0."""

    names: tuple[str, ...]
    targets: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    count: int


class _Problem:
    """The residuals, their Jacobian's products and how they are weighed."""

    def __init__(
        self, below: Below, groups: Sequence[_Group], features: Tensor, back: Tensor, lower: _Lower | None
    ) -> None:
        self.below, self.groups, self.lower = below, groups, lower
        self.features, self.back = features, back
        self.on = features > 0
        self.spread = float(features.std()) or 1.0
        self.products = 0

    def _values(self, images: Tensor, width: float) -> Tensor:
        if len(self.groups) == 1:
            return self.below.values(images, self.groups[0].weights, width)
        found = images.new_zeros(self.features.shape)
        for group in self.groups:
            part = self.below.values(images[group.rows], group.weights, width)
            found = found.index_copy(0, group.rows, part)
        return found

    def _misfit(self, values: Tensor) -> Tensor:
        """What is left of the features, in units of their deviation."""
        error = values - self.features
        if self.below.rectified:
            error = torch.where(self.on, error, values.clamp(min=0))
        return error / self.spread

    def _gradients(self, values: Tensor, images: list[Tensor], graph: bool) -> tuple[Tensor, ...]:
        assert self.lower is not None
        passed = values * self.on if self.below.rectified else values
        parameters = [self.groups[0].weights[name] for name in self.lower.names]
        total = (self.back * passed).sum()
        return torch.autograd.grad(total, [*images, *parameters], create_graph=graph)

    def left(self, images: Tensor) -> tuple[Tensor, float]:
        """Root mean squares of what is left of each sample's features (B,), and of the lower gradient."""
        if self.lower is None:
            with torch.no_grad():
                return self._misfit(self._values(images, 0.0)).square().mean(1).sqrt(), 0.0
        values = self._values(images, 0.0)
        found = self._gradients(values, [], False)
        squares = sum(
            float(((one - target) * scale).square().sum())
            for one, target, scale in zip(found, self.lower.targets, self.lower.scales, strict=True)
        )
        return self._misfit(values).detach().square().mean(1).sqrt(), math.sqrt(squares / self.lower.count)

    def largest(self, images: Tensor) -> float:
        """Largest relative error over the lower tensors."""
        assert self.lower is not None
        found = self._gradients(self._values(images, 0.0), [], False)
        errors = [0.0]
        for one, target, scale in zip(found, self.lower.targets, self.lower.scales, strict=True):
            kept = scale > 0
            if bool(kept.any()):
                errors.append(float((one - target)[kept].norm() / target[kept].norm()))
        return max(errors)

    def normal(
        self, images: Tensor, width: float, noise: Tensor, noise_below: float | Sequence[float]
    ) -> tuple[Tensor, Product]:
        """J^T N r and v -> J^T N J v at images, N the inverse noise variances."""
        images = images.detach().requires_grad_()
        values = self._values(images, width)
        residual = self._misfit(values)
        zero = torch.zeros_like(residual, requires_grad=True)
        (pulled,) = torch.autograd.grad(residual, images, zero, create_graph=True)
        precision = (1 / noise.square())[:, None]

        def pull(u: Tensor) -> Tensor:
            return torch.autograd.grad(residual, images, u, retain_graph=True)[0]

        right = pull(residual.detach() * precision)
        if self.lower is None:

            def product(v: Tensor) -> Tensor:
                self.products += 2
                (pushed,) = torch.autograd.grad(pulled, zero, v, retain_graph=True)
                return pull(pushed * precision)

            return right, product
        by_image, *by_weight = self._gradients(values, [images], True)
        parameters = [self.groups[0].weights[name] for name in self.lower.names]
        moving = [i for i, one in enumerate(by_weight) if one.requires_grad]
        levels = noise_below if isinstance(noise_below, Sequence) else [noise_below] * len(parameters)
        weighed = [(scale / level).square() for scale, level in zip(self.lower.scales, levels, strict=True)]

        def pull_below(parts: Sequence[Tensor]) -> Tensor:
            return torch.autograd.grad(
                [by_weight[i] for i in moving], images, [parts[i] for i in moving], retain_graph=True
            )[0]

        errors = [
            (one.detach() - target) * weight
            for one, target, weight in zip(by_weight, self.lower.targets, weighed, strict=True)
        ]
        right = right + pull_below(errors)

        def joint(v: Tensor) -> Tensor:
            self.products += 4
            (pushed,) = torch.autograd.grad(pulled, zero, v, retain_graph=True)
            below = torch.autograd.grad(by_image, parameters, v, retain_graph=True, materialize_grads=True)
            return pull(pushed * precision) + pull_below([b * w for b, w in zip(below, weighed, strict=True)])

        return right, joint


def _descend(
    problem: _Problem,
    prior: Whitening,
    z: Tensor,
    steps: int,
    kink: float,
    least: float,
    progress: Callable[[float], None],
    inner: int = INNER,
    conditioned: bool = False,
) -> Tensor:
    """Damped Gauss-Newton from whitened images z (B, C, H, W); noise never below `least`. Answers z."""
    inputs = problem.features.shape[1]

    def per(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    def images(z: Tensor) -> Tensor:
        return prior.mean + prior.turn(z)

    rms, rms_below = problem.left(images(z))
    noise, noise_below = (RATIO * rms).clamp(min=least), max(RATIO * rms_below, least)
    damping, joint = torch.zeros_like(noise), problem.lower is not None
    for step in range(steps):
        if float(rms.max()) < SOLVED and rms_below < SOLVED:
            break
        right, product = problem.normal(images(z), kink * float(rms.mean()), noise, noise_below)

        ridge = per(1 + damping)

        def system(v: Tensor, product: Product = product, ridge: Tensor = ridge) -> Tensor:
            return prior.back(product(prior.turn(v))) + ridge * v

        precondition = None
        if conditioned:
            signs = torch.randn(z.shape, generator=torch_rng(step, "probe")).sign().to(z)
            stiff = (signs * product(signs)).flatten(1).mean(1).clamp(min=1.0)
            diagonal = per(1 + damping) + per(stiff) * (prior.deviation * prior.bulk).square()
            precondition = diagonal.reciprocal().mul
        change, capped = conjugate_gradients(system, -prior.back(right) - z, inner, 0.05, precondition)
        before = _objective(rms, rms_below, z, noise, noise_below, inputs, problem.lower, joint)
        length, done = torch.ones_like(noise), torch.zeros_like(noise, dtype=torch.bool)
        moved = z.clone()
        for _ in range(HALVINGS):
            trial = torch.where(per(done), moved, z + per(length) * change)
            found, found_below = problem.left(images(trial))
            now = _objective(found, found_below, trial, noise, noise_below, inputs, problem.lower, joint)
            better = (now < before) & ~done
            moved[better], done = trial[better], done | better
            rms = torch.where(better, found, rms)
            rms_below = found_below if joint and bool(better.all()) else rms_below
            if bool(done.all()):
                break
            length = torch.where(done, length, length / 2)
        z = moved
        damping = torch.where(
            done, torch.where(damping > 0.1, damping / 3, 0.0), (3 * damping).clamp(min=0.3)
        )
        noise = torch.where(done, torch.minimum(noise, RATIO * rms), noise * 1.2).clamp(min=least)
        noise_below = max(min(noise_below, RATIO * rms_below), least)
        if capped and bool((length == 1).all()):
            inner = min(MOST_INNER, int(inner * GROWTH))
        progress((step + 1) / steps)
    return z


def _objective(
    rms: Tensor,
    rms_below: float,
    z: Tensor,
    noise: Tensor,
    noise_below: float,
    inputs: int,
    lower: _Lower | None,
    joint: bool,
) -> Tensor:
    """Of each sample (B,); of all together, for each, where the lower gradient ties them."""
    own = inputs * (rms / noise).square() + z.square().flatten(1).sum(1)
    if not joint or lower is None:
        return own
    return (own.sum() + lower.count * (rms_below / noise_below) ** 2).expand_as(own)


def _lower(
    observation: Observation, below: Below, weights: Weights, images: Tensor, back: Tensor
) -> _Lower | None:
    """The sent gradient of tensors below the layer; None where the update is no single gradient, or none came."""
    try:
        update = as_gradient(observation)
    except NotApplicable:
        return None
    leaves = {name: weights[name].detach().requires_grad_() for name in update.names}
    values = below.values(images[:1], {**weights, **leaves})
    total = (back[:1] * values).sum()
    if not total.requires_grad:
        return None
    used = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    names, targets, scales = [], [], []
    for (name, shape, positions, sent), gradient in zip(update.layers(), used, strict=True):
        size = float(sent.double().square().mean().sqrt()) if len(sent) else 0.0
        if gradient is None or not size > 0:
            continue
        target, scale = (torch.zeros(torch.Size(shape).numel(), dtype=images.dtype) for _ in range(2))
        target[positions] = sent.to(images.dtype).cpu()
        scale[positions] = 1 / size
        names.append(name)
        targets.append(target.view(shape).to(images.device))
        scales.append(scale.view(shape).to(images.device))
    if not names:
        return None
    return _Lower(tuple(names), tuple(targets), tuple(scales), sum(int((s > 0).sum()) for s in scales))


def _groups(
    weights: Weights, lower: tuple[str, ...], rows: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> list[_Group]:
    held = {n: t.to(device, dtype) if t.is_floating_point() else t.to(device) for n, t in weights.items()}
    for name in lower:
        held[name] = held[name].detach().requires_grad_()
    return [_Group(one, held) for one in rows]


def _moved(observation: Observation, share: float) -> dict[str, Tensor]:
    """The weights that share of the way along the update; those of a gradient do not move."""
    weights = dict(observation.weights)
    if observation.update.kind == "gradient":
        return weights
    for name, change in observation.update.dense().items():
        weights[name] = weights[name].double() + share * change.double()
    return weights


def _simulated(
    observation: Observation, images: Tensor, labels: Tensor, steps: Tensor, count: int
) -> list[dict[str, Tensor]]:
    """Weights before each local step, trained on images that were found, and bent so that they end where they did."""
    training = observation.scenario.training
    with torch.random.fork_rng(devices=[]):
        module = build_model(observation.scenario.model).double().eval()
    names = observation.update.names
    start = {n: t.double() if t.is_floating_point() else t for n, t in observation.weights.items()}
    held, velocity, path = dict(start), {name: torch.zeros(()).double() for name in names}, []
    for step in range(count):
        path.append(dict(held))
        rows = steps == step
        if not bool(rows.any()):
            continue
        leaves = {name: held[name].detach().requires_grad_() for name in names}
        logits = functional_call(module, {**held, **leaves}, (images[rows],))
        gradients = torch.autograd.grad(objective(module, logits, labels[rows]), list(leaves.values()))
        for name, gradient in zip(names, gradients, strict=True):
            velocity[name] = training.momentum * velocity[name] + gradient
            held[name] = held[name] - training.learning_rate * velocity[name]
    reached = observation.update.dense()
    for name in names:
        missing = start[name] + reached[name].double() - held[name]
        for step, weights in enumerate(path):
            weights[name] = weights[name] + missing * (step / count)
    return path


def invert_features(
    observation: Observation,
    given: LayerInputs,
    prior: Whitening,
    labels: Tensor | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = no_progress,
    turns: int = TURNS,
) -> FeatureImages:
    """Images whose values at a layer are those that were read there.

    Each image alone first: damped Gauss-Newton on ``|f(x) - z|^2 / s^2 + |S^-1 (x - mean)|^2``, with f the network
    below the layer, the noise level s following the misfit down, and the kinks of ReLU and max-pooling smoothed as
    widely as the image is unknown. Of one gradient the lower tensors' own entries follow: with ``c_i = W^T back_i``
    they are the derivative of ``sum_i <c_i, f(x_i)>`` by these tensors, which ties all images together. Where the
    layer follows 2x2 max-pooling of a convolution, that one's gradient tells which positions were the largest, and
    images and positions are found in turns (:mod:`adversaries.inversion.matching.positions`).

    Behind ReLU and pooling images come near, not exactly: positions in lower pooling layers are those of the images.

    After several local steps each image is inverted at the weights of its step: those are worked out by training on
    the images found so far where `labels` and `given.steps` are known, and else lie on the line between the weights
    that were sent and those that came back.

    Parameters
    ----------
    prior : Whitening
        Of float32; see :func:`adversaries.inversion.evidence.whitening.whitening`.
    labels : Tensor, optional
        int64 (B,), of the samples in their order.
    turns : int
        Of positions and images, at most, where the layer is below max-pooling.
    """
    device = device or torch.device("cpu")
    return _Inversion(observation, given, prior, labels, seed, device, progress, turns).run()


class _Inversion:
    def __init__(
        self,
        observation: Observation,
        given: LayerInputs,
        prior: Whitening,
        labels: Tensor | None,
        seed: int,
        device: torch.device,
        progress: Progress,
        turns: int,
    ) -> None:
        self._observation, self._given, self._labels, self._turns = observation, given, labels, turns
        self._prior, self._device, self._progress = prior, device, progress
        self._below = Below(observation.scenario, given.layer, device, torch.float32)
        self._seed = seed
        self._everyone = torch.arange(len(given.features), device=device)
        self._notes: list[str] = []
        training = observation.scenario.training
        several = observation.update.kind == "delta" and training.local_steps > 1
        self._count = training.local_steps if several else 1

    def run(self) -> FeatureImages:
        prior, device = self._prior, self._device
        shape = (len(self._everyone), *self._observation.scenario.image_shape)
        z = torch.zeros(shape, device=device)
        if self._count > 1:
            return self._along_steps(z)
        weights = self._observation.weights
        back = self._pulled_back(weights)
        features = self._given.features.float().to(device)
        problem = _Problem(self._below, self._at(weights), features, back, None)
        z = _descend(problem, prior, z, STEPS, KINK, 0.0, self._told(0.0, 0.3, "features"))
        lower = _lower(self._observation, self._below, weights, prior.mean + prior.turn(z), back)
        if lower is None:
            return self._answer(z, self._at(weights), None)
        joint = _Problem(self._below, self._at(weights, lower.names), features, back, lower)
        told = self._told(0.3, 1.0, "features and the gradient below")
        positions = self._positions(joint, prior.mean + prior.turn(z))
        if positions is not None:
            z = prior.whiten(
                positions.settle(prior, prior.mean + prior.turn(z), joint.left, self._turns, told)
            )
        else:
            z = _descend(joint, prior, z, JOINT_STEPS, 0.0, 0.0, told, MOST_INNER, conditioned=True)
        return self._answer(z, self._at(weights), lower)

    def _positions(self, joint: _Problem, images: Tensor) -> Positions | None:
        """Where the convolution below the layer is pooled, so that its gradient tells positions; else None."""
        weights, lower = joint.groups[0].weights, joint.lower
        pooling = self._below.last_pooling(images, weights)
        if lower is None or pooling is None or (name := f"{pooling.name}.weight") not in lower.names:
            return None
        if weights[name][0].numel() > MOST_ENTRIES:
            return None
        place = lower.names.index(name)
        sent = lower.targets[place].flatten(1), lower.scales[place].flatten(1) > 0
        return Positions(self._below, pooling, weights, joint.features, joint.back, *sent)

    def _told(self, low: float, high: float, text: str) -> Callable[[float], None]:
        return lambda share: self._progress(low + (high - low) * share, text)

    def _pulled_back(self, weights: Weights, dtype: torch.dtype = torch.float32) -> Tensor:
        """The derivative of the loss by each sample's inputs of the layer."""
        matrix = weights[f"{self._given.layer}.weight"]
        return (self._given.back.double() @ matrix.double().cpu()).to(self._device, dtype)

    def _at(self, weights: Weights, lower: tuple[str, ...] = ()) -> list[_Group]:
        return _groups(weights, lower, [self._everyone], self._device, torch.float32)

    def _along_steps(self, z: Tensor) -> FeatureImages:
        """Images of several local steps: each at the weights of its step, as well as these are known."""
        prior, steps = self._prior, self._given.steps
        features = self._given.features.float().to(self._device)
        spread = float(features.std()) or 1.0
        drift = self._drift(z) / spread
        rounds = 1 if steps is None or self._labels is None else 1 + CORRECTIONS
        groups = self._groups_of_steps(None)
        for attempt in range(rounds):
            if attempt:
                groups = self._groups_of_steps(prior.mean + prior.turn(z))
            least = drift * (1.0 if steps is None else LEFT_OF_DRIFT[min(attempt, len(LEFT_OF_DRIFT) - 1)])
            problem = _Problem(self._below, groups, features, torch.zeros_like(features), None)
            told = self._told(attempt / rounds, (attempt + 1) / rounds, "features")
            z = _descend(problem, prior, z, STEPS if not attempt else STEPS // 2, KINK, least, told)
        if steps is None:
            self._notes.append(
                "which local step saw which image is not known: inverted halfway along the update"
            )
        return self._answer(z, groups, None)

    def _drift(self, z: Tensor) -> float:
        """Deviation of the layer's inputs along the local steps, of draws from the prior."""
        generator = torch_rng(self._seed, "drift", self._observation.round, self._observation.client + 1)
        draws = torch.randn(16, *z.shape[1:], generator=generator).to(z)
        images = (self._prior.mean + self._prior.turn(draws)).clamp(0, 1)
        with torch.no_grad():
            ends = [
                self._below.inputs(images, self._at(_moved(self._observation, share))[0].weights)
                for share in (0.0, 1.0)
            ]
        return float((ends[1] - ends[0]).square().mean().sqrt()) / math.sqrt(12)

    def _groups_of_steps(self, images: Tensor | None) -> list[_Group]:
        """Samples by local step; on weights along the update, or of training on `images`."""
        steps, device = self._given.steps, self._device
        if steps is None:
            return _groups(_moved(self._observation, 0.5), (), [self._everyone], device, torch.float32)
        if images is None:
            path = [_moved(self._observation, step / self._count) for step in range(self._count)]
        else:
            assert self._labels is not None
            known = images.detach().double().cpu().clamp(0, 1)
            path = _simulated(self._observation, known, self._labels.cpu(), steps.cpu(), self._count)
        rows = [torch.nonzero(steps == step)[:, 0].to(device) for step in range(self._count)]
        return [
            group
            for weights, row in zip(path, rows, strict=True)
            if len(row)
            for group in _groups(weights, (), [row], device, torch.float32)
        ]

    def _answer(self, z: Tensor, groups: list[_Group], lower: _Lower | None) -> FeatureImages:
        """Figures in float64."""
        images = (self._prior.mean + self._prior.turn(z)).double()
        below = Below(self._observation.scenario, self._given.layer, self._device, torch.float64)
        wide = [
            _Group(g.rows, {n: t.double() if t.is_floating_point() else t for n, t in g.weights.items()})
            for g in groups
        ]
        features = self._given.features.double().to(self._device)
        misfit = torch.zeros(len(images), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for group in wide:
                left = below.inputs(images[group.rows], group.weights) - features[group.rows]
                misfit[group.rows] = left.norm(dim=1) / features[group.rows].norm(dim=1).clamp(min=1e-300)
        residual = math.inf
        if lower is not None:
            weights = {
                n: t.detach().requires_grad_() if n in lower.names else t for n, t in wide[0].weights.items()
            }
            exact = _Lower(
                lower.names,
                tuple(t.double() for t in lower.targets),
                tuple(t.double() for t in lower.scales),
                lower.count,
            )
            back = self._pulled_back(self._observation.weights, torch.float64)
            problem = _Problem(below, [_Group(self._everyone, weights)], features, back, exact)
            residual = problem.largest(images)
        self._progress(1.0, "done")
        return FeatureImages(images.detach().cpu(), misfit.cpu(), residual, self._notes)
