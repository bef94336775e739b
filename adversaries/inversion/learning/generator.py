"""Init-Generation of HCGLA: a network that turns what an update gives away of the last layer into a start image.

Offline, auxiliary images with random labels go through the scenario's client and compressor, and a network
learns to go back from the label row that would have been intercepted. Online it is fed that row of the
intercepted update and nothing else.

Yang, Ge, Xiang, Li, "Using Highly Compressed Gradients in Federated Learning for Data Reconstruction
Attacks", IEEE TIFS 2023. Their released code feeds the private image through another network at batch size 1;
this one does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.base import Progress, no_progress, share_of
from adversaries.inversion.evidence import client as client_module
from adversaries.inversion.evidence.client import ImitatedClient, SignalPairs
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.head import RowSignals
from adversaries.inversion.learning import files, train
from fedattack.errors import ConfigError, DataError, NotApplicable, unknown_name
from fedattack.metrics.pixels import psnr
from fedattack.models.decoders.from_features import GENERATORS, WIDE, Deconv, RidgeConv, build_generator
from fedattack.models.decoders.from_latent import FeatureDecoder
from fedattack.observation import Auxiliary, Observation, Scenario
from fedattack.rng import torch_rng

KIND = "generator"
MEAN = "auxiliary.mean"
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Candidate ridge strengths, added to the Gram matrix of standardised inputs."""
FOLDS = 5
RANK = 512
BATCHES = {"ridge-conv": 64, "deconv": 16}
EPOCHS = {"ridge-conv": 4, "deconv": 10}
LEARNING_RATES = {"ridge-conv": 2e-3, "deconv": 1e-2}


@dataclass(frozen=True)
class Generator:
    """A trained generator, its auxiliary images' mean, float32 (C, H, W) (its floor), and what it was trained for."""

    module: nn.Module
    mean: Tensor
    metadata: dict[str, Any]

    @torch.no_grad()
    def start(self, observation: Observation, labels: Tensor) -> Tensor:
        """An image for each label of an observation, float32 (B, C, H, W) in [0, 1], on the CPU.

        Equal labels get the same image: their row is shared. NotApplicable as :meth:`check`.
        """
        self.check(observation)
        signals = Evidence(observation).rows(labels.cpu())
        return _apply(self.module, signals).clamp(0, 1)

    def check(self, observation: Observation) -> None:
        """NotApplicable for other weights, another scenario or another batch size than it was trained for."""
        client_module.check_memory(observation.scenario, observation.round)
        wanted = files.described(
            observation.scenario, observation.weights, observation.num_examples, observation.round
        )
        files.refuse_other(self.metadata["made_for"], wanted, KIND)


def train_generator(
    scenario: Scenario,
    weights: Mapping[str, Tensor],
    auxiliary: Auxiliary,
    out: str | Path | None,
    seed: int,
    architecture: str = "ridge-conv",
    batch_size: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    passes: int = 2,
    mirror: bool = False,
    width: int | None = None,
    held_out: float = 0.1,
    round: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> tuple[Generator, dict[str, Any]]:
    """Train a generator on auxiliary images alone.

    Returns it and, JSON-able, "psnr" in dB on held-out auxiliary images of the generator ("generator"), of
    its linear map alone ("linear", where it has one) and of the training images' mean ("mean", the floor);
    counts and seconds.

    Parameters
    ----------
    out : str, Path or None
        File to write (safetensors); None: keep it in memory.
    architecture : str
        A name of :data:`fedattack.models.decoders.from_features.GENERATORS`.
        Others than "ridge-conv" must answer in (0, 1).
    batch_size : int, optional
        Images per client; None: the scenario's.
    epochs, learning_rate, optional
        Passes of stochastic training (0 leaves "ridge-conv" linear) and Adam's first rate; None: the architecture's.
    passes : int
        How often each image is put through the client (with another label and other company).
    mirror : bool
        Flip every second pass left to right: right for faces, wrong for digits.
    width : int, optional
        Channels of the widest layer.
    held_out : float
        Share of people (or images, where the auxiliary data names nobody) kept for the figures.
    round : int
        1-based round whose compression is imitated (matters under DGC's warm-up).
    """
    began = time.monotonic()
    if architecture not in GENERATORS:
        raise unknown_name("generator", architecture, GENERATORS.names())
    train.check_shapes(scenario, auxiliary)
    size = client_module.batch_size_of(scenario, batch_size)
    seen, unseen = train.hold_out(auxiliary, held_out, seed)
    client = ImitatedClient(scenario, weights, seed, round, device)
    pairs = client_module.simulate_rows(
        client, auxiliary.images, seen, size, seed, passes, mirror, share_of(progress, 0.0, 0.4)
    )
    test = client_module.simulate_rows(client, auxiliary.images, unseen, size, seed + 1)
    activation = str(scenario.model.activation)
    count = EPOCHS.get(architecture, 10) if epochs is None else epochs
    rate = LEARNING_RATES.get(architecture, 1e-3) if learning_rate is None else learning_rate
    rank = min(RANK, len(pairs.images) // 2) if 2 * client.head.features > 2 * WIDE else None
    sizes = (client.head.features, scenario.image_shape, activation, width, rank)
    module = train.initialised(lambda: build_generator(architecture, *sizes), seed, "generator.initialise")
    figures: dict[str, float] = {}
    fitting, told = share_of(progress, 0.4, 0.6), share_of(progress, 0.6, 1.0)
    notes: dict[str, Any] = {}
    if isinstance(module, RidgeConv):
        groups = auxiliary.groups if auxiliary.groups is not None else torch.arange(len(auxiliary))
        # The regression is done in float64, which not every accelerator has.
        module = module.to(device if torch.device(device).type == "cuda" else "cpu")
        drafts, notes = fit_linear(module, pairs, groups[pairs.positions], fitting)
        module, drafts = module.to(device), drafts.to(device)
        figures["linear"] = _mean_psnr(_apply(module, test.signals), test.images)
        refine(module, drafts, pairs.images, count, rate, seed, told)
    else:
        module = module.to(device)
        train_by_steps(module, pairs, count, rate, seed, told)
    module.eval().requires_grad_(False)
    figures["generator"] = _mean_psnr(_apply(module, test.signals), test.images)
    mean = auxiliary.images[seen].mean(0, keepdim=True)
    figures["mean"] = _mean_psnr(mean.expand_as(test.images), test.images)
    sent = float(test.signals.sent.float().sum(1).mean())
    result = {
        "psnr": figures,
        "held_out_images": len(test.images),
        "held_out_by": "people" if auxiliary.groups is not None else "images",
        "trained_on": len(pairs.images),
        "features_sent": sent,
        "features": client.head.features,
        "seconds": time.monotonic() - began,
        **notes,
    }
    metadata = {
        "kind": KIND,
        "architecture": architecture,
        "features": client.head.features,
        "image_shape": list(scenario.image_shape),
        "activation": activation,
        "width": width,
        "rank": rank,
        "made_for": files.described(scenario, weights, size, round),
        "auxiliary": {"source": auxiliary.source, "images": len(auxiliary)},
        "seed": seed,
        "settings": {
            "epochs": count,
            "learning_rate": rate,
            "passes": passes,
            "mirror": mirror,
            "held_out": held_out,
        },
        # Seconds are left out: the same seed writes the same file.
        "figures": {key: value for key, value in result.items() if key != "seconds"},
    }
    if out is not None:
        files.save_learned(out, module.state_dict() | {MEAN: mean[0]}, metadata)
    progress(1.0, f"generator: {figures['generator']:.2f} dB held out, mean image {figures['mean']:.2f} dB")
    return Generator(module.cpu(), mean[0], metadata), result


def load_generator(path: str | Path, scenario: Scenario) -> Generator:
    """Read a generator; its weights and batch size are compared when it is used, in :meth:`Generator.start`.

    DataError if the file is missing or malformed; NotApplicable if it was trained for another model, rate,
    scope, compressor or protocol.
    """
    tensors, metadata = files.load_learned(path, KIND)
    shape = scenario.image_shape
    try:
        made_for = dict(metadata["made_for"])
        name, features, activation = (metadata[key] for key in ("architecture", "features", "activation"))
        width, rank = metadata["width"], metadata["rank"]
        wanted = files.described(scenario, {}, 0, 1)
        later = {key: wanted[key] for key in ("weights", "batch_size")}
        files.refuse_other(made_for | later, wanted, KIND, str(path), round_free=True)
        # A file may name what is registered, not what is to be imported.
        if name not in GENERATORS:
            raise DataError(
                f"{str(path)!r} names the architecture {name!r}; known: {', '.join(GENERATORS.names())}"
            )
        with torch.device("meta"):
            module = build_generator(name, features, shape, activation, width, rank)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{str(path)!r}: its description of the generator is malformed ({error!r})") from None
    mean = tensors.pop(MEAN, None)
    if mean is None or mean.shape != shape:
        raise DataError(f"{str(path)!r}: its mean image is missing or not of shape {shape}")
    return Generator(files.fill(module, tensors, path), mean, metadata)


def obtain_generator(
    setting: str,
    observation: Observation,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    **settings: Any,
) -> Generator:
    """The generator that a setting asks for: the path of a trained one, or "train" for one trained on the spot.

    `observation` is any victim of the round: for the scenario, the weights, the batch size and the auxiliary
    images, without which "train" is NotApplicable; `settings` are those of :func:`train_generator`. That
    takes a minute or more for thousands of images.
    """
    if setting != "train":
        return load_generator(setting, observation.scenario)
    if observation.auxiliary is None or not len(observation.auxiliary):
        raise NotApplicable(
            "generator = 'train' needs auxiliary images, and none were granted; name the file of a trained generator"
        )
    return train_generator(
        observation.scenario,
        observation.weights,
        observation.auxiliary,
        None,
        seed,
        batch_size=observation.num_examples,
        round=observation.round,
        device=device,
        progress=progress,
        **settings,
    )[0]


def test_generator(
    path: str | Path,
    scenario: Scenario,
    weights: Mapping[str, Tensor],
    images: Auxiliary,
    seed: int,
    round: int = 1,  # noqa: PT028 (not a pytest function, whatever its name)
    device: torch.device | str = "cpu",  # noqa: PT028
) -> dict[str, Any]:
    """Score a generator's file on images of nobody that it was trained on (the caller's care).

    Returns "psnr": mean dB of "generator" and of the training images' mean ("mean", the floor); "per_image"
    dB of the generator; "images", "features_sent".
    """
    train.check_shapes(scenario, images)
    generator = load_generator(path, scenario)
    size = int(generator.metadata["made_for"]["batch_size"])
    wanted = files.described(scenario, weights, size, round)
    files.refuse_other(generator.metadata["made_for"], wanted, KIND, str(path))
    client = ImitatedClient(scenario, weights, seed, round, device)
    pairs = client_module.simulate_rows(client, images.images, torch.arange(len(images)), size, seed)
    scores = psnr(_apply(generator.module, pairs.signals), pairs.images)
    return {
        "psnr": {
            "generator": float(scores.mean()),
            "mean": _mean_psnr(generator.mean.expand_as(pairs.images), pairs.images),
        },
        "per_image": scores.tolist(),
        "images": len(pairs.images),
        "features_sent": float(pairs.signals.sent.float().sum(1).mean()),
    }


test_generator.__test__ = False  # type: ignore[attr-defined]


def fit_linear(
    module: RidgeConv, pairs: SignalPairs, groups: Tensor, progress: Progress = no_progress
) -> tuple[Tensor, dict[str, Any]]:
    """Solve the linear map of a "ridge-conv" generator by ridge regression, into its buffers and linear layer.

    The strength ("ridge") is the one with the least error in five-fold cross-validation over people, `groups`
    (N,). Also returned is each training image, (N, C, H, W), as the folds without it predict it: see
    :func:`refine`.
    """
    device = module.mean.device
    signals = RowSignals(pairs.signals.values.to(device), pairs.signals.sent.to(device))
    known = signals.sent.float()
    centre, spread = _moments(module.undone(signals.values), known)
    share = known.mean(0)
    module.centre.copy_(centre)
    module.mean.copy_(torch.cat([torch.zeros_like(share), share]))
    module.scale.copy_(torch.cat([spread, _floored((share * (1 - share)).sqrt())]))
    if module.basis.shape[1]:
        module.basis.copy_(
            _principal(module.standardised(signals.values, signals.sent), module.basis.shape[1])
        )
    inputs = module.inputs(signals.values, signals.sent).double()
    targets = pairs.images.to(device).flatten(1).double()
    names, codes = groups.unique(return_inverse=True)
    folds = codes.to(device) % min(FOLDS, len(names))
    if len(names) < 2:
        raise DataError("all training images are of one person; a generator needs at least two people")
    errors = torch.zeros(len(STRENGTHS), dtype=torch.float64)
    solved = []
    for fold in folds.unique().tolist():
        progress(fold / FOLDS, f"ridge regression, fold {fold + 1}")
        away = folds == fold
        ridge = _Ridge(inputs[~away], targets[~away])
        solved.append((away, ridge))
        turned = ridge.turn(inputs[away])
        for i, strength in enumerate(STRENGTHS):
            errors[i] += float((ridge.predict(turned, strength) - targets[away]).square().sum())
    strength = STRENGTHS[int(errors.argmin())]
    drafts = torch.empty_like(targets, dtype=torch.float32)
    for away, ridge in solved:
        drafts[away] = ridge.predict(ridge.turn(inputs[away]), strength).float()
    ridge = _Ridge(inputs, targets)
    slope, offset = ridge.coefficients(strength)
    with torch.no_grad():
        module.linear.weight.copy_(slope.T)
        module.linear.bias.copy_(offset)
    return drafts.unflatten(1, pairs.images.shape[1:]), {"ridge": strength}


def _moments(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of features (N, F) where they are known: a rare one is not blown up."""
    times = known.sum(0).clamp(min=1)
    centre = (values * known).sum(0) / times
    return centre, _floored((((values - centre) * known).square().sum(0) / times).sqrt())


def _floored(spread: Tensor) -> Tensor:
    """Deviations, those of features that hardly vary raised to a thousandth of the largest."""
    return spread.clamp(min=max(1e-3 * float(spread.max()), 1e-6))


class _Ridge:
    """Ridge regression with an intercept for many strengths: one eigendecomposition, of the smaller Gram matrix."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._mean, self._centre = inputs.mean(0), targets.mean(0)
        x = inputs - self._mean
        if len(x) < x.shape[1]:
            values, vectors = torch.linalg.eigh(x @ x.T)
            # Centring leaves directions in which nothing varies.
            kept = values > 1e-10 * values[-1].clamp(min=1e-10)
            self._values = values[kept]
            self._vectors = x.T @ (vectors[:, kept] / self._values.sqrt())
        else:
            self._values, self._vectors = torch.linalg.eigh(x.T @ x)
        self._turned = self._vectors.T @ (x.T @ (targets - self._centre))

    def turn(self, inputs: Tensor) -> Tensor:
        """Centred inputs in the eigenbasis."""
        return (inputs - self._mean) @ self._vectors

    def predict(self, turned: Tensor, strength: float) -> Tensor:
        """Targets for inputs that went through :meth:`turn`."""
        return turned @ self._shrunk(strength) + self._centre

    def coefficients(self, strength: float) -> tuple[Tensor, Tensor]:
        """Slope (inputs, targets) and offset (targets,)."""
        slope = self._vectors @ self._shrunk(strength)
        return slope, self._centre - self._mean @ slope

    def _shrunk(self, strength: float) -> Tensor:
        return self._turned / (self._values.clamp(min=0) + strength)[:, None]


def _principal(inputs: Tensor, rank: int) -> Tensor:
    """The first `rank` principal directions (D, rank) of standardised inputs (N, D), by their N x N Gram matrix."""
    gram = (inputs @ inputs.T).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].clamp(min=1e-9), vectors[:, -rank:]
    return inputs.T @ (vectors / values.sqrt()).to(inputs.dtype)


def refine(
    module: RidgeConv,
    drafts: Tensor,
    images: Tensor,
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: Progress = no_progress,
) -> None:
    """Train the correction of a "ridge-conv" generator on out-of-fold drafts, by mean squared error.

    Drafts of images that the linear map was fitted to would look better than any it will meet.
    """
    parts = [module.enter, module.blocks, module.leave]
    parameters = [parameter for part in parts for parameter in part.parameters()]

    def loss(chosen: Tensor) -> Tensor:
        return F.mse_loss(module.correct(drafts[chosen]), images[chosen].to(drafts.device))

    stream = torch_rng(seed, "generator.batches")
    train.descend(
        parameters, loss, len(images), epochs, learning_rate, stream, progress, BATCHES["ridge-conv"]
    )


def train_by_steps(
    module: nn.Module,
    pairs: SignalPairs,
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: Progress = no_progress,
) -> None:
    """Train a generator that answers in (0, 1), by binary cross-entropy as published."""
    if epochs < 1:
        raise ConfigError(f"setting 'epochs' = {epochs}: this architecture needs at least 1")
    module.train()
    parameters = list(module.parameters())
    device = parameters[0].device
    if isinstance(module, Deconv | FeatureDecoder):
        centre, spread = _moments(pairs.signals.values, pairs.signals.sent.float())
        module.centre.copy_(centre)
        module.spread.copy_(spread)

    def loss(chosen: Tensor) -> Tensor:
        signals = pairs.signals[chosen]
        made = module(signals.values.to(device), signals.sent.to(device))
        return F.binary_cross_entropy(made, pairs.images[chosen].to(device))

    stream = torch_rng(seed, "generator.batches")
    train.descend(
        parameters, loss, len(pairs.images), epochs, learning_rate, stream, progress, BATCHES["deconv"]
    )


@torch.no_grad()
def _apply(module: nn.Module, signals: RowSignals) -> Tensor:
    """Images (N, C, H, W) on the CPU, in evaluation mode."""
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    made = [
        module(values.to(device), sent.to(device)).cpu()
        for values, sent in zip(signals.values.split(256), signals.sent.split(256), strict=True)
    ]
    module.train(was_training)
    return torch.cat(made)


def _mean_psnr(images: Tensor, truth: Tensor) -> float:
    return float(psnr(images, truth).mean())
