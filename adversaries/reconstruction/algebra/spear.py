"""SPEAR: whole batches, exactly, from the gradient of a linear layer before a ReLU, wherever the layer stands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress, share_of
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import FirstLayer, dense_layer, misfits
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.evidence.layers.from_layer import FromLayer, Steps
from adversaries.inversion.evidence.layers.hidden_layer import HiddenLayer, hidden_layers, layer_named
from adversaries.inversion.evidence.whitening import whitening
from adversaries.inversion.matching.features import TURNS, LayerInputs, invert_features
from adversaries.inversion.solvers.span import DEPENDENT, row_space
from adversaries.inversion.solvers.sparse_directions import Factors, Found, Method, Search, expected_draws
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import APPROXIMATE, OneByOne, failed, status_of
from fedattack.config import ModelConfig, Positive, TrainingConfig
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable
from fedattack.models.normalise import pixels, shown
from fedattack.observation import EVERYONE, Observation, Reconstruction, Scenario, Update
from fedattack.rng import torch_rng

AGREEMENT = 0.95
"""Share of the neurons whose zeros and signs must agree before a set of directions is believed."""

FOLLOWED = 0.02
"""Relative misfit of a sample's dL/dz up to which it is believed to be of a local step."""

BELIEVED = 1e-4
"""Misfit of the layer's gradient, and those above, below which no other sign of the directions is asked for."""

_POLISH = 8
_SMALL = 1e-4
_ROUNDING = 6.0
_TAIL = 2.0
_SILENT = 1e-5
"""An input below these is zero: in deviations of those below zero, units of the least of them, and of all inputs."""


@dataclass(frozen=True)
class Read:
    """What was read of an update at one layer.

    Attributes
    ----------
    layer : HiddenLayer
    inputs : Tensor
        (B, n), float64.
    steps : Steps
        Labels and steps, dL/dz and gradients as the model has them.
    followed : bool
        Whether the steps are known.
    parts : dict of str to float
        Misfit of each tensor's gradient from the layer on.
    """

    layer: HiddenLayer
    inputs: Tensor
    steps: Steps
    followed: bool
    parts: dict[str, float]

    @property
    def residual(self) -> float:
        """The largest of `parts`."""
        return max(self.parts.values(), default=math.inf)


@dataclass
class Spear(OneByOne):
    """SPEAR: an honest-but-curious server solves for the batch behind a linear layer with ReLU, first or hidden.

    The gradient of the layer has the batch's inputs in its row space and, in the right basis, a zero wherever a
    neuron was inactive. :mod:`adversaries.inversion.solvers.sparse_directions` finds that basis; the bias's gradient
    fixes the scales: each sample's inputs of the layer, and its dL/dz there, which the network above, played from
    these inputs, has for one label alone. On a layer that sees the pixels, these inputs are the images; below
    another layer the images are solved for, with the Gaussian prior of public images where these are granted and with
    the lower layers' gradients as further equations (:mod:`adversaries.inversion.matching.features`).
    Then the whole gradient is compared: "certified" where it is explained to 10^-5.

    Weight deltas of one pass over the client's samples (each in one local step) keep the zeros, and are read as one
    batch of all steps' samples, each with its inputs at its own step's weights. Which step is told from its dL/dz,
    one step after the other, since each gives the next one's weights from the layer on. A second pass adds as
    many samples again as directions, and is refused.

    Unlike the paper's, the search is guided by the weights, which takes it from an exponential number of draws to a
    few hundred; `method` "published" is the paper's. Hidden layers and local steps are not in the paper.

    Parameters
    ----------
    layer : str
        Module name of the linear layer; "auto": the one on the pixels, else the lowest that can hold the batch.
    method : {"guided", "published"}
    batch : int, optional
        Samples in the batch; None: read from the spectrum, or where noise hides that, the number declared.
    attempts : int
        Rounds of draws at most: 8 turns from max(64, 4 B) starts, or 20,000 draws of random rows.
    polish : bool
        Solve for the inputs again with the model's own dL/dz.
    turns : int
        Below a hidden layer behind pooling: turns at most in which the positions that pooling took are told and the
        images are solved for; the more, the nearer.

    References
    ----------
    Dimitrov, Baader, Mueller, Vechev, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning", NeurIPS
    2024.
    """

    needs: ClassVar[Needs] = Needs(
        update="steps", entries="all", undecayed="steps", sums="dense", fresh=True, hidden=True, helped=True
    )

    layer: str = "auto"
    method: Method = "guided"
    batch: Positive | None = None
    attempts: Positive = 60
    polish: bool = True
    turns: Positive = TURNS

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse several passes, a batch that no layer can hold, and one that random rows would never find."""
        training = scenario.training
        if facts.samples:
            training = training.of(max(facts.samples))
        if training.local_steps > 1 and hides_clients(scenario.defense):
            raise NotApplicable(
                f"training.local_steps = {training.local_steps} under defence 'secure-aggregation': each client's "
                "later steps start from weights of its own, and a sum does not tell clients apart; use local_steps 1"
            )
        refused = [_passes(training, samples) for samples in facts.samples or (0,)]
        if all(refused):
            raise NotApplicable(refused[0])
        self.check_samples(scenario.model, self.batch or _expected(training, facts.samples))

    def check_samples(self, model: ModelConfig, samples: int) -> HiddenLayer:
        """The layer that is read of a batch of so many samples; NotApplicable where there is none."""
        layer = chosen_layer(model, self.layer, samples)
        draws = expected_draws(samples)
        if self.method == "published" and draws > 20_000 * self.attempts:
            raise NotApplicable(
                f"{samples} samples in an update: random rows need about {draws:.1e} draws, and spear.attempts = "
                f"{self.attempts} allow {20_000 * self.attempts:,}; use spear.method 'guided'"
            )
        return layer

    def read(self, observation: Observation, seed: int, device: torch.device) -> Read:
        """The layer's inputs for each sample of an update, and no images; NotApplicable where they are not found."""
        self.check(observation.scenario)
        return _Victim(self, observation, seed, device, no_progress).read()

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Search, solve, label, certify."""
        progress(0.0, "SPEAR")
        self.check(observation.scenario)
        try:
            return _Victim(self, observation, seed, device, progress).answer()
        except NotApplicable as reason:
            return failed("spear", observation, str(reason), residual=None)


def chosen_layer(model: ModelConfig, name: str, samples: int) -> HiddenLayer:
    """The layer of a resolved model that is read: by name, or for "auto" on the pixels, or the lowest that fits."""
    if name != "auto":
        layers: Sequence[HiddenLayer] = (layer_named(model, name),)
    else:
        found = hidden_layers(model)
        layers = [layer for layer in found if layer.pixels] or found
    for layer in layers:
        if layer.neurons >= 2 * samples and layer.inputs >= samples:
            return layer
    widest = max(layers, key=lambda layer: layer.neurons)
    if widest.neurons < 2 * samples:
        raise NotApplicable(
            f"layer {widest.name!r} of model {model.name!r} has {widest.neurons} < {2 * samples}: too few neurons to "
            f"tell {samples} samples apart; raise --width, or lower --batch-size"
        )
    raise NotApplicable(
        f"layer {widest.name!r} of model {model.name!r} has {widest.inputs} inputs < {samples} samples, "
        "which fill the span of its gradient; lower --batch-size"
    )


def _passes(training: TrainingConfig, samples: int) -> str:
    """Why the steps of a client that has so many samples (0: not known) are more than one pass; "": they are not."""
    steps, size = training.local_steps, training.batch_size
    if steps == 1:
        return ""
    if size and (samples == 0 or samples > (steps - 1) * size) and (training.local_epochs or 1) == 1:
        return ""
    what = f"of the client's {samples} samples" if samples else "of all of a client's samples"
    return (
        f"training.local_steps = {steps} with training.batch_size = {size} {what}: samples are seen again at other "
        "weights, each time a direction more; this attack reads one pass; use --local-epochs 1, or fewer local_steps"
    )


def _expected(training: TrainingConfig, samples: Sequence[int]) -> int:
    """Samples in an update, as far as it is known before there is one."""
    all_of_one = min(samples, default=0)
    drawn = training.batch_size * training.local_steps
    return min(drawn, all_of_one) if drawn and all_of_one else drawn or all_of_one or 1


class _Victim:
    """One observation."""

    def __init__(
        self,
        attack: Spear,
        observation: Observation,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._attack, self._observation, self._device = attack, observation, device
        self._seed, self._progress = seed, progress
        self._training = observation.scenario.training
        self._declared = observation.num_examples
        if refused := _passes(self._training, self._declared):
            raise NotApplicable(refused)
        self._layer = attack.check_samples(observation.scenario.model, attack.batch or self._declared)
        self._update = _mean_gradient(observation)
        self._generator = torch_rng(seed, "spear", observation.round, observation.client)
        self._above = FromLayer(observation, self._layer.name, device)
        self._notes: list[str] = []
        self._details: dict[str, Any] = {"kept": observation.update.kept, "layer": self._layer.name}

    def answer(self) -> Reconstruction:
        """Search, solve, label, certify."""
        return self._reported(self.read())

    def read(self) -> Read:
        """The layer's inputs."""
        weight, bias = dense_layer(self._update, FirstLayer(self._layer.name, True))
        assert bias is not None
        gradient = torch.cat([weight, bias[:, None]], 1).to(self._device)
        factors = self._factors(gradient)
        search = Search(factors, self._attack.method, self._generator)
        reads: list[Read] = []
        seen: list[Tensor] = []

        def believed(found: Found) -> bool:
            found = self._with_last(factors, found)
            if len(found) < factors.samples or any(torch.equal(found.directions, one) for one in seen):
                return False
            seen.append(found.directions)
            read = self._told(_inputs(factors, found)[:, :-1], gradient)
            reads.append(self._polished(read, gradient) if read.followed else read)
            agreement = self._details["agreement"] = _agreement(factors, found)
            if self._training.local_steps > 1 or agreement < AGREEMENT:
                return reads[-1].followed and reads[-1].residual <= BELIEVED
            return True

        found = search.collect(self._attack.attempts, believed)
        if not reads:
            believed(found)  # of a single sample nothing was asked
        self._details |= {
            "draws": search.draws,
            "zeros": found.zeros.sum(1).tolist(),
            "neurons": self._layer.neurons,
        }
        if not reads:
            raise NotApplicable(
                f"{len(found)} of {factors.samples} samples told apart after {search.draws} draws; raise "
                "spear.attempts or --width, or lower --batch-size"
            )
        best = min(reads, key=lambda read: (not read.followed, read.residual))
        if not best.followed:
            raise NotApplicable(
                f"{factors.samples} samples of {self._training.local_steps} local steps were told apart, but no "
                "order of steps explains them, so that some are mixtures; raise spear.attempts, or lower --batch-size"
            )
        return best

    def _with_last(self, factors: Factors, found: Found) -> Found:
        """The directions, and where one alone is missing that which its inputs, known from the others, would have."""
        if len(found) != factors.samples - 1 or self._training.local_steps > 1 or not bool(found.firm.all()):
            return found
        inputs = factors.completed(found)
        slopes = self._above.slopes(inputs[:, :-1] / inputs[:, -1:])[0, :, factors.alive]
        inside = slopes @ factors.left
        q = inside[(inside.norm(dim=1) / slopes.norm(dim=1).clamp_min(1e-300)).argmax()]
        q = q / q.norm().clamp_min(1e-300)
        small = (factors.left @ q).abs() < _SMALL * (factors.left @ q).abs().median()
        return Found(
            torch.cat([found.directions, q[None]]),
            torch.cat([found.zeros, small[None]]),
            torch.cat([found.firm, found.firm[:1]]),
        )

    def _factors(self, gradient: Tensor) -> Factors:
        """The gradient's factors, with the batch size that its spectrum shows."""
        if not bool(torch.isfinite(gradient).all()) or not float(gradient.norm()) > 0:
            raise NotApplicable(
                f"the gradient of layer {self._layer.name!r} is zero or not finite: nothing of the batch is in it"
            )
        declared = self._declared
        # A spectrum that ends later than declared must show it.
        most = min(self._attack.batch or 2 * declared, *gradient.shape)
        span = row_space(gradient, most, self._generator)
        rank = self._attack.batch or span.rank(declared)
        if rank is None:
            rank = min(declared, len(span.values))
            self._notes.append(f"the spectrum has no clear end; the declared {declared} samples are believed")
        elif rank != declared:
            self._notes.append(f"{rank} samples in the spectrum, {declared} declared")
        self._attack.check_samples(self._observation.scenario.model, rank)
        if float(span.values[rank - 1]) < DEPENDENT * float(span.values[0]):
            raise NotApplicable(f"samples dependent: s_B / s_1 < {DEPENDENT:.0e} for B = {rank}")
        sent = {name: tensor.to(self._device).double() for name, tensor in self._observation.weights.items()}
        weights = torch.cat([sent[self._layer.weight], sent[self._layer.bias][:, None]], 1)
        if self._training.local_steps > 1:
            moved = gradient * one_gradient.gradient_unit(self._observation)
            weights = torch.stack([weights + moved / 2, weights, weights + moved])
        return Factors.of(gradient, weights, span.basis[:, :rank], self._layer.positive)

    def _sizes(self, samples: int) -> list[int]:
        """Samples in each local step; of one step all that were found."""
        steps, size = self._training.local_steps, self._training.batch_size
        if steps == 1:
            return [samples]
        return [size] * (steps - 1) + [samples - (steps - 1) * size]

    def _told(self, inputs: Tensor, gradient: Tensor) -> Read:
        """Labels and steps of a batch, and how much of the update above the layer it explains."""
        back = torch.linalg.lstsq(inputs.T, gradient[:, :-1].T).solution
        sizes = self._sizes(len(inputs))
        steps = None
        if sizes[-1] > 0 and (len(sizes) == 1 or self._observation.client != EVERYONE):
            steps = self._above.followed(inputs, back, sizes, self._training, FOLLOWED)
        followed = steps is not None
        if steps is None:  # as if all were in one step
            one = self._training.model_copy(update={"local_steps": 1})
            steps = self._above.followed(inputs, back, [len(inputs)], one, math.inf)
            assert steps is not None
        played, sent = steps.gradients, self._update.dense()
        if self._layer.pixels:
            played = {name: played.get(name, torch.zeros_like(tensor)) for name, tensor in sent.items()}
        sent = {name: tensor for name, tensor in sent.items() if name in played}
        return Read(self._layer, inputs, steps, followed, misfits(sent, played))

    def _polished(self, read: Read, gradient: Tensor) -> Read:
        """With dL/dz from the model, every neuron is an equation for the inputs."""
        for _ in range(_POLISH if self._attack.polish and read.followed else 0):
            again = torch.linalg.lstsq(read.steps.back.T, gradient[:, :-1]).solution
            if not bool(torch.isfinite(again).all()):
                break
            trial = self._told(again, gradient)
            if not trial.followed or trial.residual >= read.residual:
                break
            read = trial
        return read

    def _reported(self, read: Read) -> Reconstruction:
        steps, count = read.steps, len(read.inputs)
        scenario = self._observation.scenario
        labels = steps.labels
        parts, residual, exact = read.parts, read.residual, read.residual
        if self._layer.pixels:
            images = pixels(read.inputs.cpu().reshape(-1, *scenario.image_shape), scenario.model)
        else:
            images, parts = self._images(read)
            residual = max(parts.values(), default=math.inf)
            self._notes.append(
                f"inputs of layer {self._layer.name!r} explain its gradient and those above to {exact:.0e}"
            )
        status, reason = status_of(residual, vouched=count == self._declared), ""
        if status != "certified" and not self._layer.pixels and exact <= APPROXIMATE:
            status = "approximate"
        if status == "approximate":
            self._notes.append(f"residual {residual:.0e}: not certified")
        elif status == "failed":
            reason = f"residual {residual:.0e}: the answer does not explain the update"
        doubt = (steps.misfit / steps.second.clamp_min(1e-300)).max()
        return Reconstruction(
            images=images.clamp(0, 1).float(),
            labels=labels,
            loss=residual,
            label_confidence=max(0.0, 1 - float(doubt)),
            method=f"spear ({self._attack.method})",
            floors=floors(self._observation, labels),
            details={
                "status": status,
                "reason": reason,
                "residual": residual,
                "residual_parts": parts,
                "batch": count,
                "inputs_residual": exact,
                "misfits": steps.misfit.tolist(),
                "steps": steps.steps.tolist(),
                "notes": self._notes,
                **self._details,
            },
        )

    def _images(self, read: Read) -> tuple[Tensor, dict[str, float]]:
        """Images (B, C, H, W) whose inputs at a hidden layer are known, and each tensor's misfit."""
        observation, steps = self._observation, read.steps
        shape, model = observation.scenario.image_shape, observation.scenario.model
        public = observation.auxiliary
        if public is not None and len(public) and public.images.shape[1:] != shape:
            raise NotApplicable(
                f"public images are {tuple(public.images.shape[1:])}; the model's are {shape}"
            )
        known = steps.steps if self._training.local_steps > 1 else None
        given = LayerInputs(self._layer.name, _silenced(self._layer, read.inputs), steps.back, known)
        prior = whitening(public, shape, self._device, torch.float32)
        told = share_of(self._progress, 0.1, 1.0)
        found = invert_features(
            observation, given, prior, steps.labels, self._seed, self._device, told, self._attack.turns
        )
        self._notes += found.notes
        self._details["misfits_of_images"] = found.misfit.tolist()
        images = found.images.to(self._device)
        seen = shown(images.double().clamp(0, 1), model)
        played = self._above.replayed(seen, steps.labels, steps.steps, self._training)
        return images, misfits(self._update.dense(), played)


def _mean_gradient(observation: Observation) -> Update:
    """The update as the mean gradient over the round's steps, whose inputs are each step's own."""
    scenario = observation.scenario
    training = scenario.training.model_copy(update={"local_steps": 1})
    one_gradient.check_received(
        dataclasses.replace(observation, scenario=dataclasses.replace(scenario, training=training))
    )
    return one_gradient.mean_gradient(observation)


def _silenced(layer: HiddenLayer, inputs: Tensor) -> Tensor:
    """Inputs that cannot be below zero: zero where they are no larger than rounding, told by those that are below.

    An input that is taken for more than it is says that a neuron was at its kink, and one such equation spoils an
    image; of one that is taken for zero but is not, hardly anything is lost.
    """
    if not layer.positive:
        return inputs
    below = inputs.clamp_max(0)
    noise = (below.square().sum(1) / (below < 0).sum(1).clamp_min(1)).sqrt()
    size = inputs.square().mean(1).sqrt()
    silent = (_ROUNDING * noise).maximum(_TAIL * -below.amin(1)).maximum(_SILENT * size)
    return torch.where(inputs < silent[:, None], 0.0, inputs)


def _inputs(factors: Factors, found: Found) -> Tensor:
    """[x, 1] (B, d + 1): the directions' mixture undone, scaled so that the last entry is 1."""
    rows = torch.linalg.solve(found.directions.T, factors.values[:, None] * factors.right)
    last = rows[:, -1:]
    return rows / torch.where(last == 0, torch.full_like(last, 1e-300), last)


def _agreement(factors: Factors, found: Found) -> float:
    """Share of the neurons, at the worst sample, that are active there and have a gradient, or neither.

    Of several states of the weights, in that where most do.
    """
    inside = torch.linalg.solve(found.directions.T, torch.diag(factors.values))
    rows = inside * torch.sign(inside @ factors.right[:, -1:])
    active = rows @ factors.neurons.mT > 0
    return float((active != found.zeros).double().mean(2).amax(0).min())
