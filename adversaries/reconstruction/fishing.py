"""Fishing: a head under which one sample of the batch causes the whole body's gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adversaries import ATTACKS
from adversaries.base import Progress, ReconstructionAttack, build_attack, no_progress
from adversaries.reconstruction import engine
from adversaries.reconstruction.first_layer import dense_layer, first_layer, is_complete
from adversaries.reconstruction.floors import floors, prior_image
from adversaries.reconstruction.hcgla.labels import head_name
from adversaries.reconstruction.label_inference import infer
from adversaries.reconstruction.priors import smooth_prior
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario, Update
from fedattack.rng import torch_rng

_SATURATED = 1e3
"""Logits apart, at which a softmax is 0 or 1."""

CERTIFIED = 1e-4
"""Relative misfit of features up to which an image that was read off is what was caught."""

_COUNT_ERROR = 0.02
"""How far a count of samples may lie from an integer."""

_UNKNOWN_BATCH = 32
"""Samples expected of a client that trains on all it has, until it declares them."""

_FEW = 2
_IMAGES = 2048


@dataclass
class Fishing(ReconstructionAttack):
    """Fishing for user data: a malicious server sends a head that all samples of a batch but one leave without error.

    All rows of the head are zero but one, in a random direction of the features, so that only this class' residual
    reaches the body. "class": its bias is low, so that its probability is 0 for every sample, and the residual -1 for
    the samples of this class and 0 for the others. "feature": its logit is steep and crosses zero where on average
    one sample of a batch lies, so that its probability is 1 for that sample and 0 for the others. Samples of the
    class itself are caught on the other side, with the opposite sign; a class that the public labels lack is taken
    where there is one. What the body
    sends is then the gradient of what was fished alone, whatever the batch size; the head's bias counts it, to the
    integer, and its weight holds the features of the catch, by which the answer is checked. The image is read off a
    linear first layer, or searched for by another attack on the single gradient.

    Each armed round draws its class, direction and threshold anew and catches one sample or none; of "feature" in
    about 37 of 100 rounds it is one. The other places of the answer hold the prior.

    Parameters
    ----------
    mode : {"auto", "class", "feature"}
        "auto": "class" where a batch holds at most two samples of a class on average.
    target : int, optional
        Class whose row is used; None: drawn.
    quantile : float, optional
        "feature": share of samples below the threshold; None: 1 - 1 / batch size.
    attack : str
        Name of the attack that searches for the image where it cannot be read off; "gauss-newton", "ig", ...
    most : int
        Samples caught at once that are still searched for together.
    options : dict
        Settings of that attack.

    References
    ----------
    Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification", ICML 2022. There the threshold is found by bisection over rounds on one batch, within one class.
    """

    needs: ClassVar[str] = "a malicious server: it sends a head of its own; public images place the threshold"
    arms: ClassVar[bool] = True

    mode: Literal["auto", "class", "feature"] = "auto"
    target: int | None = None
    quantile: float | None = None
    attack: str = "gauss-newton"
    most: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ConfigError(f"setting 'fishing.quantile' = {self.quantile}: must be in (0, 1)")
        if self.most < 1:
            raise ConfigError(f"setting 'fishing.most' = {self.most}: must be at least 1")
        cls = ATTACKS.get(self.attack)
        if not issubclass(cls, ReconstructionAttack) or cls.arms:
            raise ConfigError(
                f"setting 'fishing.attack' = {self.attack!r}: must be an attack on an honest server's single update, "
                "as 'gauss-newton' or 'ig'"
            )

    def check(self, scenario: Scenario) -> None:
        """Refuse heads without bias, batch statistics, and updates that are not one complete gradient.

        Raises
        ------
        NotApplicable
        """
        engine.check_one_gradient(scenario)
        if not is_complete(scenario):
            compression = scenario.compression
            raise NotApplicable(
                f"compression.name = {compression.name!r} at rate {compression.rate:g} drops entries that the catch "
                "is counted and rebuilt by; use compression.name 'none' or 'qsgd'"
            )
        _head(scenario)
        classes = scenario.model.classes or 0
        if self.target is not None and not 0 <= self.target < classes:
            raise ConfigError(
                f"setting 'fishing.target' = {self.target}: the head has classes 0 to {classes - 1}"
            )
        module = build_model(scenario.model)
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
            raise NotApplicable(
                f"model.name = {scenario.model.name!r} normalises by batch statistics, in which all samples meet "
                "again; use a model without BatchNorm"
            )
        if not _readable(scenario):
            self._inner().check(_single(scenario, 1))

    def arm(
        self, scenario: Scenario, weights: dict[str, Tensor], seed: int, auxiliary: Auxiliary | None
    ) -> dict[str, Tensor]:
        """The global model with its head replaced: one row, and a bias that lets one sample through."""
        head = _head(scenario)
        generator = torch_rng(seed, "fishing.arm")
        row, bias = torch.zeros_like(weights[f"{head}.weight"]), torch.zeros_like(weights[f"{head}.bias"])
        known = [] if auxiliary is None or auxiliary.labels is None else auxiliary.labels.unique().tolist()
        batch = scenario.training.batch_size or _UNKNOWN_BATCH
        mode = self.mode
        if mode == "auto":
            mode = "class" if batch <= _FEW * (len(known) or len(bias)) else "feature"
        target = self._draw(mode, len(bias), generator, known)
        direction = torch.randn(row.shape[1], generator=generator)
        direction /= direction.norm()
        if mode == "class":
            row[target] = direction
            bias[target] = -_SATURATED
        else:
            seen = _features(scenario, weights, head, _public(scenario, auxiliary, generator)) @ direction
            share = 1 - 1 / max(batch, 2) if self.quantile is None else self.quantile
            threshold, deviation = torch.quantile(seen, share), seen.std().clamp_min(1e-12)
            row[target] = direction * (_SATURATED / deviation)
            bias[target] = -threshold * (_SATURATED / deviation)
        return dict(weights) | {f"{head}.weight": row, f"{head}.bias": bias}

    def _draw(self, mode: str, classes: int, generator: torch.Generator, known: list[int]) -> int:
        if self.target is not None:
            return self.target
        wanted = [label for label in range(classes) if (label in known) == (mode == "class")] or [
            *range(classes)
        ]
        return wanted[int(torch.randint(len(wanted), (1,), generator=generator))]

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        answers = []
        for number, observation in enumerate(observations):
            self.check(observation.scenario)

            def told(share: float, text: str, number: int = number) -> None:
                progress((number + share) / len(observations), text)

            answers.append(self._one(observation, seed, device, told))
        return answers

    def _inner(self) -> ReconstructionAttack:
        inner = build_attack(ATTACKS.get(self.attack), self.attack, self.options, {})
        assert isinstance(inner, ReconstructionAttack)
        return inner

    def _one(
        self, observation: Observation, seed: int, device: torch.device, told: Progress
    ) -> Reconstruction:
        try:
            catch = _haul(observation)
        except NotApplicable as refusal:
            return _answer(observation, None, None, {"status": "failed", "reason": str(refusal)})
        count = round(catch.count)
        figures: dict[str, Any] = {
            "class": catch.target,
            "caught": catch.count,
            "of the class": catch.sign < 0,
        }
        reason = self._spoilt(catch, count)
        if reason:
            return _answer(observation, catch, None, figures | {"status": "failed", "reason": reason})
        single = _caught(observation, catch, count)
        if count == 1 and _readable(observation.scenario):
            found = Reconstruction(
                _read(single)[None], torch.zeros(1, dtype=torch.int64), 0.0, method="read off"
            )
        else:
            (found,) = self._inner().run([single], seed, device, told)
        misfit = _misfit(observation, catch, found.images)
        if found.method == "read off" and misfit > CERTIFIED:
            reason = "what was read has other features than what was caught: samples of the class and of others mixed"
            return _answer(observation, catch, None, figures | {"status": "failed", "reason": reason})
        status = "certified" if found.method == "read off" else "approximate"
        figures |= {
            "status": status,
            "solver": found.method,
            "feature misfit": misfit,
            "search": found.details,
        }
        return _answer(observation, catch, dataclasses.replace(found, loss=misfit), figures)

    def _spoilt(self, catch: _Catch, count: int) -> str:
        """Why a catch cannot be used; empty: it can."""
        if abs(catch.count - count) > _COUNT_ERROR:
            return f"{catch.count:.3f} samples were caught, no integer: one lies at the threshold"
        if count < 1:
            return "nothing was caught, or as many of the class as of others"
        if count > self.most:
            return f"{count} samples were caught, more than fishing.most = {self.most}"
        return ""


@dataclass(frozen=True)
class _Catch:
    """What the armed head tells.

    Attributes
    ----------
    head : str
        Its name.
    target : int
        The class whose row is not zero.
    count : float
        How many samples it let through.
    sign : float
        Their residual: -1 for samples of the class, 1 for samples of others.
    features : Tensor
        float32 (F,): their mean features.
    """

    head: str
    target: int
    count: float
    sign: float
    features: Tensor


def _head(scenario: Scenario) -> str:
    """Name of the last linear layer, which must have a bias and more than one class."""
    pairs = [(name, tuple(p.shape)) for name, p in build_model(scenario.model).named_parameters()]
    names = tuple(name for name, _ in pairs)
    head = head_name(names, tuple(shape for _, shape in pairs))
    if f"{head}.bias" not in names:
        raise NotApplicable(
            f"model.name = {scenario.model.name!r}: its head has no bias, whose gradient counts the catch; use "
            "another model"
        )
    return head


def _readable(scenario: Scenario) -> bool:
    """Whether a single image can be read off the first layer."""
    try:
        return first_layer(scenario.model).biased
    except NotApplicable:
        return False


def _single(scenario: Scenario, count: int) -> Scenario:
    """The scenario in which `count` samples alone send one complete gradient."""
    training = scenario.training.model_copy(
        update={"protocol": "fedsgd", "batch_size": count, "local_steps": 1}
    )
    return dataclasses.replace(
        scenario, training=training, compression=scenario.compression.model_copy(update={"name": "none"})
    )


def _public(scenario: Scenario, auxiliary: Auxiliary | None, generator: torch.Generator) -> Tensor:
    """Images to place the threshold by: the public ones, or draws of a smooth prior."""
    if auxiliary is not None and len(auxiliary) > 1:
        return auxiliary.images[:_IMAGES]
    prior = smooth_prior(scenario.image_shape)
    draws = torch.randn(prior.size, 256, generator=generator, dtype=torch.float64)
    images = prior.mean[:, None] + prior.factor() @ draws
    return images.T.reshape(-1, *scenario.image_shape).clamp(0, 1).float()


@torch.no_grad()
def _features(scenario: Scenario, weights: dict[str, Tensor], head: str, images: Tensor) -> Tensor:
    """What the head sees of images (N, C, H, W), (N, F)."""
    module = build_model(scenario.model).eval()
    module.load_state_dict(weights)
    seen: list[Tensor] = []
    module.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in images.split(256):
        module(part)
    return torch.cat(seen)


def _haul(observation: Observation) -> _Catch:
    """Read the armed head's gradient.

    Raises
    ------
    NotApplicable
        If the head is not this attack's.
    """
    head = _head(observation.scenario)
    rows = torch.nonzero(observation.weights[f"{head}.weight"].abs().amax(1))[:, 0]
    if len(rows) != 1:
        raise NotApplicable(
            f"the head that was sent has {len(rows)} rows (an honest server's): all samples reach the body; let the "
            "server send the attack's weights (attack.names with 'fishing' arms the rounds in attack.rounds)"
        )
    target = int(rows[0])
    sent = engine.as_gradient(observation).dense()
    signed = observation.num_examples * float(sent[f"{head}.bias"][target])
    sign = 1.0 if signed > 0 else -1.0
    features = observation.num_examples * sent[f"{head}.weight"][target] / (signed or math.inf)
    return _Catch(head, target, abs(signed), sign, features)


def _caught(observation: Observation, catch: _Catch, count: int) -> Observation:
    """The observation as if the caught samples had been the whole batch, under a head with the same residuals.

    The body's gradient is theirs already, but for the batch size in the mean and the steepness of the row. The head's
    is written anew from their features, as other samples are in it too. In the new head the residual is constant, so
    that no search starts on the dark side of the threshold.
    """
    update, head, target = engine.as_gradient(observation), catch.head, catch.target
    classes = len(observation.weights[f"{head}.bias"])
    row = observation.weights[f"{head}.weight"]
    steep = float(row[target].norm())
    weights = dict(observation.weights)
    weights[f"{head}.weight"] = row / steep
    bias = torch.zeros(classes)
    bias[target] = catch.sign * _SATURATED
    weights[f"{head}.bias"] = bias
    residual = torch.full((classes,), 1 / (classes - 1)) if catch.sign < 0 else torch.zeros(classes)
    residual[target] = catch.sign
    if catch.sign > 0:
        residual[_guess(classes, target)] = -1.0
    scale = observation.num_examples / (count * steep)
    tensors = {name: tensor * scale for name, tensor in update.dense().items()}
    tensors[f"{head}.weight"] = torch.outer(residual, catch.features)
    tensors[f"{head}.bias"] = residual
    values = torch.cat([tensors[name].flatten() for name in update.names])
    single = Update(update.names, update.shapes, None, values, "gradient")
    return dataclasses.replace(
        observation,
        scenario=_single(observation.scenario, count),
        weights=weights,
        update=single,
        num_examples=count,
    )


def _guess(classes: int, target: int) -> int:
    """A label for what was fished by feature: it leaves no trace in the body, any other class will do."""
    return (target + 1) % classes


def _read(single: Observation) -> Tensor:
    """The image (C, H, W) in a first linear layer's gradient: all rows hold it, weighted by what their bias holds."""
    weight, bias = dense_layer(single.update, first_layer(single.scenario.model))
    assert bias is not None
    image = bias @ weight / bias.square().sum().clamp_min(1e-300)
    return image.reshape(single.scenario.image_shape).clamp(0, 1).float()


def _misfit(observation: Observation, catch: _Catch, images: Tensor) -> float:
    """Relative difference between the features of what was found and of what was caught: the attack's own check."""
    found = _features(observation.scenario, observation.weights, catch.head, images).mean(0)
    return float((found - catch.features).norm() / catch.features.norm().clamp_min(1e-12))


def _answer(
    observation: Observation, catch: _Catch | None, found: Reconstruction | None, figures: dict[str, Any]
) -> Reconstruction:
    """The catch first; the other places hold the prior, and the details say so."""
    batch = observation.num_examples
    images = prior_image(observation).expand(batch, -1, -1, -1).clone()
    caught = 0 if found is None else len(found.images)
    labels = infer("auto", observation).values
    known = 0
    if found is not None and catch is not None:
        images[:caught] = found.images.clamp(0, 1).float()
        if catch.sign < 0:
            known = caught
            named = torch.full((caught,), catch.target, dtype=torch.int64)
            labels = torch.cat([named, labels[labels != catch.target], labels])[:batch]
    notes = [f"{batch - caught} of {batch} places hold the prior: fishing answers for its catch alone"]
    return Reconstruction(
        images=images,
        labels=labels,
        loss=math.inf if found is None else found.loss,
        label_confidence=max(known, 1) / batch,
        method="fishing",
        history=[] if found is None else found.history,
        floors=floors(observation, labels),
        details={
            "k": observation.update.kept,
            "recovered": caught,
            "batch": batch,
            "notes": notes,
            **figures,
        },
    )
