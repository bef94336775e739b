"""What forgetting leaks: from what was seen before and after a deletion to an ordinary observation of the forgotten.

Each function answers an :class:`~fedattack.observation.Observation` of k images, on which every reconstruction attack
runs as on any other: from a client's two updates at the same weights, from two global models, from two released
models. :func:`departures` says beforehand what makes the answer an approximation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, softmax

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence.first_layer import first_layer, is_complete
from adversaries.inversion.evidence.floors import prior_image
from adversaries.inversion.evidence.one_gradient import mean_gradient
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.refusals import normalises
from fedattack.errors import DataError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation, Reconstruction, Scenario, Update
from fedattack.rng import torch_rng
from fedattack.task import GradientStep, LossAndGradient, trained_parameters
from fedattack.training import batch_gradient, local_update, weight_step
from fedattack.unlearning.mechanism import Link

Weights = Mapping[str, Tensor]

_SPARE = 12
_GRID = 0.25
_MOST = 1e7
_GUESSED = 16
_CLEAR = -5.0
"""Logarithm of the share of a linear layer's energy beyond k directions below which k and N count as found."""
_DIP = 4.0
"""By how much it must lie below that of other N; a k that is too small by one dips by 3 at most."""


@dataclass(frozen=True)
class Departure:
    """What keeps a difference of updates from being the gradient of the forgotten; a sentence over t, c, m, n, d."""

    broken: Callable[[Scenario, int], bool]
    sentence: str


# fmt: off
DEPARTURES: tuple[Departure, ...] = (
    Departure(lambda s, n: 0 < s.training.batch_size < n,
        "training.batch_size = {t.batch_size} of {n} samples: the two updates are of two mini-batches, and what they "
        "differ by is mostly no gradient of the forgotten; exact with --batch-size 0"),
    Departure(lambda s, n: s.training.local_steps > 1,
        "training.local_steps = {t.local_steps}: from the second step on the two updates are taken at different "
        "weights; exact with --local-steps 1"),
    Departure(lambda s, n: normalises(s.model) and s.training.batch_norm == "train",
        "model.name = {m.name!r} normalises by its batch, so that the gradients of those that stay change too; exact "
        "with training.batch_norm 'eval'"),
    Departure(lambda s, n: not is_complete(s),
        "compression.name = {c.name!r} at rate {c.rate:g}: only what was sent both times can be compared; exact with "
        "--compressor none"),
    Departure(lambda s, n: s.compression.name in ("sign", "qsgd", "topk-qsgd"),
        "compression.name = {c.name!r}: updates are sent rounded, and the rounding is n/k times as large beside the "
        "forgotten; exact with --compressor none"),
    Departure(lambda s, n: bool(set(s.defense.names) - {"secure-aggregation"}),
        "defense.names = {d}: a defended update is no mean of its samples' gradients, or holds noise drawn anew; "
        "exact without"),
)
# fmt: on
"""Every departure that the settings tell of, in order."""

_MOVED = (
    "the client's next update is taken at other weights than its first: all gradients have changed with them, and "
    "the difference holds that too; exact where the server resumes from a checkpoint, as mechanism 'retrain' does"
)


def departures(scenario: Scenario, samples: int, *, moved: bool = False) -> list[str]:
    """Why the difference of two updates of a client with so many samples is only about the forgotten's gradient.

    A sentence each; empty: it is exactly that, up to the rounding of float32. `moved`: the second update was taken at
    other weights (:func:`same_weights`).
    """
    defended = ", ".join(scenario.defense.names)
    told = {
        "t": scenario.training,
        "c": scenario.compression,
        "m": scenario.model,
        "n": samples,
        "d": defended,
    }
    found = [one.sentence.format(**told) for one in DEPARTURES if one.broken(scenario, samples)]
    return [_MOVED] * moved + found


def of_updates(before: Observation, after: Observation | None, samples: int, forgotten: int) -> Observation:
    """A client's updates before and after, as an update of the forgotten alone: ``(n g - (n-k) g') / k``.

    g and g' are mean gradients over the client's n = `samples`, and over those that are left when k = `forgotten` are
    taken out. Exact where :func:`departures` finds nothing, and handed on as one gradient in any case; of compressed
    updates, the entries that were sent both times. `after` None: the client has left, and g is of the forgotten.

    Raises
    ------
    NotApplicable
        If the two are of different clients, nothing was sent both times, or updates after the first hold what earlier
        rounds held back.
    """
    if not 0 < forgotten <= samples:
        raise DataError(f"{forgotten} of {samples} samples forgotten; accepted: 1 to {samples}")
    first = mean_gradient(before)
    if after is None or forgotten == samples:
        return _observed(before, first, before.num_examples)
    if before.client != after.client:
        raise NotApplicable(
            f"updates of clients {before.client} and {after.client}; two of one client differ"
        )
    return _observed(before, _mixed(first, mean_gradient(after), samples, forgotten), forgotten)


def same_weights(first: Weights, second: Weights) -> bool:
    """Whether two state dicts agree in every parameter and buffer."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def of_models(
    seat: Observation,
    before: Weights,
    after: Weights,
    forgotten: int | None = None,
    samples: int | None = None,
) -> Observation:
    """Two global models after one round from the same weights, as an update of the forgotten: another client's seat.

    FedAvg's steps from w_0 are ``-lr`` times the mean gradient over all N samples, and over the N - k left; so
    :func:`of_updates` holds with N in the place of n. `seat`: what the client knows: the `weights` w_0 that it was
    sent, the scenario, its public images, and as `client` whose deletion this is thought to be; its update is not
    read. `forgotten`, `samples`: k and N. None, where the clients are not told: the fewest k, and for it the N, that
    leave the widest linear layer a gradient of rank k (NotApplicable where there are none up to k = 16).
    """
    first, second = _step(seat, seat.weights, before), _step(seat, seat.weights, after)
    if samples is None or forgotten is None:
        forgotten, samples = _counts(seat.scenario, first, second, _GUESSED)
    return _observed(seat, _mixed(first, second, samples, forgotten), forgotten)


def of_releases(
    seat: Observation,
    after: Weights,
    samples: int,
    forgotten: int,
    *,
    decay: float | None = None,
    link: Link = "softmax",
) -> Observation:
    """Two released models trained to convergence, as an update of the forgotten at the first of them.

    Removing k of n samples from ``sum of losses + lambda n/2 |w|^2`` moves the minimiser by w' - w with ``H' (w' - w)
    = sum of the forgotten's gradients + k lambda w`` up to second order, H' the Hessian of what is left (Bertran et
    al., "Reconstruction Attacks on Machine Unlearning", NeurIPS 2024). A linear term of the objective, certified
    removal's noise, drops out where both share it. H' is taken from the public images: their Gauss-Newton matrix,
    which needs no labels and is the Hessian of a linear model, times (n-k)/m, plus lambda (n-k). Of a model that is
    one linear layer the gradient has rank k at most, and is cut to that.

    Parameters
    ----------
    seat : Observation
        `weights`: the first release w; the scenario, the public images, whose deletion it is; its update is not read.
    samples, forgotten : int
        n and k.
    decay : float, optional
        lambda; None: the scenario's weight decay.
    link : {"softmax", "logistic", "ridge"}
        Whether classes are told by one softmax, each from the rest, or by squares.
    """
    public, scenario = seat.auxiliary, seat.scenario
    if public is None or not len(public):
        raise NotApplicable(
            "setting 'data.auxiliary_size': 0 public images, from which the Hessian is estimated"
        )
    model = build_model(scenario.model).double().eval()
    names = list(trained_parameters(model))
    held = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in seat.weights.items()
    }
    moved = {name: after[name].double() - held[name] for name in names}
    left, penalty = samples - forgotten, scenario.training.weight_decay if decay is None else decay
    curved = curvature(model, held, moved, public.images.double(), link)
    gradient = {
        name: (left / len(public) * curved[name] + penalty * (left * moved[name] - forgotten * held[name]))
        / forgotten
        for name in names
    }
    return _observed(seat, _flat(_cut(scenario, gradient, forgotten)), forgotten)


def curvature(
    model: torch.nn.Module, weights: Weights, vector: Weights, images: Tensor, link: Link = "softmax"
) -> dict[str, Tensor]:
    """Gauss-Newton matrix of the summed loss over `images` (N, C, H, W), times a vector by name.

    ``J' A J v``, J of the answers, A the loss's second derivative by them (Schraudolph, "Fast Curvature Matrix-Vector
    Products for Second-Order Gradient Descent", Neural Computation 2002).
    """
    free = {name: weights[name] for name in vector}
    fixed = {name: tensor for name, tensor in weights.items() if name not in vector}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, {**fixed, **parameters}, (images,))
        return found

    answers: Tensor
    turned: Tensor
    answers, turned = jvp(logits, (free,), (dict(vector),))  # type: ignore[misc]
    if link == "softmax":
        shares = softmax(answers, 1)
        turned = shares * (turned - (shares * turned).sum(1, keepdim=True))
    elif link == "logistic":
        turned = answers.sigmoid() * (-answers).sigmoid() * turned
    product: dict[str, Tensor] = vjp(logits, free)[1](turned)[0]
    return product


def _mixed(first: Update, second: Update, samples: int, forgotten: int) -> Update:
    """``(n g - (n-k) g') / k`` on the entries that both hold, worked out in float64."""
    indices, mine, others = first.indices, first.values.double(), second.values.double()
    if indices is not None and second.indices is not None:
        both = torch.isin(indices, second.indices), torch.isin(second.indices, indices)
        indices, mine, others = indices[both[0]], mine[both[0]], others[both[1]]
    elif indices is not None:
        others = others[indices]
    elif second.indices is not None:
        indices, mine = second.indices, mine[second.indices]
    if not len(mine):
        raise NotApplicable("the two updates were compressed, and no entry was sent both times")
    values = (samples * mine - (samples - forgotten) * others) / forgotten
    return dataclasses.replace(first, indices=indices, values=values.float(), kind="gradient")


def _observed(seen: Observation, gradient: Update, count: int) -> Observation:
    """One gradient of `count` images, as a client that takes no other step would have sent it."""
    training = seen.scenario.training.model_copy(
        update={
            "protocol": "fedsgd",
            "batch_size": count,
            "local_steps": 1,
            "momentum": 0.0,
            "weight_decay": 0.0,
        }
    )
    scenario = dataclasses.replace(seen.scenario, training=training)
    return dataclasses.replace(
        seen, scenario=scenario, update=gradient, num_examples=count, wire_bytes=0, buffers={}
    )


def _step(seat: Observation, before: Weights, after: Weights) -> Update:
    """The mean gradient that takes one global model to the next, without weight decay."""
    training = seat.scenario.training
    names = list(trained_parameters(build_model(seat.scenario.model)))
    step = -training.learning_rate if training.protocol == "fedavg" else weight_step(training, "gradient")
    change = {name: (after[name].double() - before[name].double()) / step for name in names}
    if training.protocol == "fedavg" and training.weight_decay:
        change = {name: one - training.weight_decay * before[name].double() for name, one in change.items()}
    return _flat(change)


def _flat(gradient: Weights) -> Update:
    """Tensors by name as a complete update, float64."""
    shapes = tuple(tuple(tensor.shape) for tensor in gradient.values())
    values = torch.cat([tensor.flatten() for tensor in gradient.values()])
    return Update(tuple(gradient), shapes, None, values, "gradient")


def _cut(scenario: Scenario, gradient: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The gradient of a model that is one linear layer with bias, to its leading singular pairs; others' as it is."""
    try:
        layer = first_layer(scenario.model)
    except NotApplicable:
        return gradient
    if gradient.keys() != {layer.weight, layer.bias}:
        return gradient
    left, values, right = torch.linalg.svd(
        torch.cat([gradient[layer.weight], gradient[layer.bias][:, None]], 1), full_matrices=False
    )
    both = (left[:, :rank] * values[:rank]) @ right[:rank]
    return {layer.weight: both[:, :-1], layer.bias: both[:, -1]}


def _counts(scenario: Scenario, before: Update, after: Update, most: int) -> tuple[int, int]:
    """k and N of two mean gradients: the fewest k, up to `most`, for which an N leaves only k directions."""
    sizes = {
        min(shape): name for name, shape in zip(before.names, before.shapes, strict=True) if len(shape) == 2
    }
    if not sizes:
        raise NotApplicable(
            f"model.name = {scenario.model.name!r} has no linear layer, the rank of whose gradient would tell how "
            "many were forgotten, of how many; use --model mlp or lenet-zhu"
        )
    widest = max(sizes)
    one, other = (update.dense()[sizes[widest]].double() for update in (before, after))
    sketch = torch.randn(one.shape[1], most + _SPARE, dtype=torch.float64, generator=torch_rng(0, "sketch"))
    kept, gained = other @ sketch, (one - other) @ sketch
    grid = [step * _GRID for step in range(int(math.log(_MOST) / _GRID))]
    left = 0.0
    for count in range(1, min(most, widest - 2) + 1):  # the rows of a head sum to zero

        def beyond(log_ratio: float, count: int = count) -> float:
            values = torch.linalg.svdvals(kept + math.exp(log_ratio) * gained).square()
            return float((values[count:].sum() / values.sum()).clamp_min(1e-30).log10())

        # It falls as the square of the distance to N / k, over a width of about N / k itself.
        shares = [beyond(ratio) for ratio in grid]
        start = grid[int(np.argmin(shares))]
        found = minimize_scalar(beyond, bounds=(max(0.0, start - _GRID), start + _GRID), method="bounded")
        total = max(count + 1, round(count * math.exp(float(found.x))))
        left = beyond(math.log(total / count))
        if left <= min(_CLEAR, float(np.median(shares)) - _DIP):
            return count, total
    raise NotApplicable(
        f"no number of samples makes the two global models differ by the gradients of {min(most, widest - 2)} or "
        f"fewer: {10**left:.1%} of a linear layer's lies beyond them; clients take more than one step, or not on all "
        "their samples, or forgot more"
    )


def _one_against_the_rest(squared: bool) -> GradientStep:
    """Gradient of a batch's mean of losses of each class against the rest; two classes share one linear model."""

    def gradient(model: torch.nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        logits = model(images)
        truth = one_hot(labels, logits.shape[1]).to(logits)
        if squared:
            reach = 0.5 if logits.shape[1] == 2 else 1.0
            loss = (logits - reach * (2 * truth - 1)).square().sum() / 2
        else:
            loss = binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        parameters = list(trained_parameters(model).values())
        return loss, torch.autograd.grad(loss / len(labels), parameters, materialize_grads=True)

    return gradient


_GRADIENTS: dict[Link, GradientStep] = {
    "softmax": batch_gradient,
    "logistic": _one_against_the_rest(squared=False),
    "ridge": _one_against_the_rest(squared=True),
}

UNEXPLAINED = 0.9
"""Relative residual from which the answer to a difference is no answer; two mini-batches leave .97 and more."""


def believed(observation: Observation, answer: Reconstruction, link: Link = "softmax") -> Reconstruction:
    """An attack's answer to a difference, or its prior where the answer's own gradient leaves 90 % of it unexplained.

    The difference of two updates that are no gradients of the same samples is many times as long as a gradient of
    the forgotten, and no images explain it. `link`: of the loss, as in :func:`of_releases`.
    """
    training, count = observation.scenario.training, len(answer.labels)
    if not count:
        return answer
    model, batches = build_model(observation.scenario.model), [np.arange(count)]
    given = observation.weights, answer.images, answer.labels, batches, training, _GRADIENTS[link]
    own = local_update(model, *given).update
    found, sent = torch.cat([t.flatten() for t in own.values()]).double(), observation.update.values.double()
    if observation.update.indices is not None:
        found = found[observation.update.indices]
    residual = float((found - sent).norm() / sent.norm().clamp_min(1e-300))
    details = {**answer.details, "share of the difference unexplained": residual}
    if residual < UNEXPLAINED:
        return dataclasses.replace(answer, details=details)
    why = f"its images leave {residual:.0%} of the difference unexplained, and the prior is answered instead"
    public = observation.auxiliary
    # In float64, as the auditor takes the mean: a prior that is a rounding below it would count as worse.
    mean = prior_image(observation) if not public else public.images.double().mean(0).float()
    prior = mean.expand(count, -1, -1, -1).clone()
    return dataclasses.replace(answer, images=prior, method="prior", details={**details, "notes": why})


class OnDifference(ReconstructionAttack):
    """An attack as it is run on differences: :func:`believed`."""

    def __init__(self, attack: ReconstructionAttack, link: Link = "softmax") -> None:
        self.attack, self.link = attack, link

    def needs_now(self, scenario: Scenario) -> Needs:
        """Those of the attack."""
        return self.attack.needs_now(scenario)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """That of the attack."""
        self.attack.probe(scenario, facts)

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Answer as the attack does, where its answers explain what was seen."""
        answers = self.attack.run(observations, seed, device, progress)
        return [believed(seen, answer, self.link) for seen, answer in zip(observations, answers, strict=True)]
