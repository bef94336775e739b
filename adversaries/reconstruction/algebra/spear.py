"""SPEAR: whole batches, exactly, from the gradient of a linear layer before a ReLU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adversaries.base import Progress
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import FirstLayer, Player, dense_layer, first_layer, misfits
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.solvers.span import DEPENDENT, row_space
from adversaries.inversion.solvers.sparse_directions import Factors, Found, Method, Search, expected_draws
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import OneByOne, failed, status_of
from fedattack.config import Positive
from fedattack.errors import NotApplicable
from fedattack.observation import Observation, Reconstruction, Scenario, Update
from fedattack.rng import torch_rng

AGREEMENT = 0.95
"""Share of the neurons whose zeros and signs must agree before a set of directions is believed."""

_POLISH = 8


@dataclass
class Spear(OneByOne):
    """SPEAR: an honest-but-curious server solves for the batch behind a linear layer with ReLU.

    The gradient of the layer has the batch in its row space and, in the right basis, a zero wherever a neuron was
    inactive. :mod:`adversaries.inversion.solvers.sparse_directions` finds that basis; the bias's gradient fixes the
    scales; then the images are solved for once more by least squares with dL/dz played through the model, and the
    whole gradient is compared: "certified" where it is explained to 10^-5, and the labels come out of the head.

    Unlike the paper's, the search is guided by the weights, which takes it from an exponential number of draws to a
    few hundred; `method` "published" is the paper's.

    Parameters
    ----------
    method : {"guided", "published"}
    batch : int, optional
        Samples in the batch; None: read from the spectrum, or where noise hides that, the number declared.
    attempts : int
        Rounds of draws at most: 5 turns from max(64, 4 B) starts, or 20,000 draws of random rows.
    polish : bool
        Solve for the images again with the model's own dL/dz.

    References
    ----------
    Dimitrov, Baader, Mueller, Vechev, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning", NeurIPS
    2024.
    """

    needs: ClassVar[Needs] = Needs(
        update="gradient", entries="all", sums="dense", fresh=True, first_layer=True, activations=("relu",)
    )

    method: Method = "guided"
    batch: Positive | None = None
    attempts: Positive = 60
    polish: bool = True

    def needs_now(self, scenario: Scenario) -> Needs:
        """Two neurons for each sample, and fewer samples than pixels, whose span they would fill."""
        batch = self.batch or scenario.training.batch_size
        return dataclasses.replace(self.needs, images=math.prod(scenario.image_shape), width=2 * batch)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse a batch that random rows would never find."""
        batch = self.batch or scenario.training.batch_size
        draws = expected_draws(batch)
        if self.method == "published" and draws > 20_000 * self.attempts:
            raise NotApplicable(
                f"training.batch_size = {batch}: random rows need about {draws:.1e} draws, and spear.attempts = "
                f"{self.attempts} allow {20_000 * self.attempts:,}; use spear.method 'guided'"
            )

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Search, solve, label, certify."""
        progress(0.0, "SPEAR")
        self.check(observation.scenario)
        try:
            return _Victim(self, observation, seed, device).answer()
        except NotApplicable as reason:
            return failed("spear", observation, str(reason), residual=None)


class _Victim:
    """One observation."""

    def __init__(self, attack: Spear, observation: Observation, seed: int, device: torch.device) -> None:
        self._attack, self._observation, self._device = attack, observation, device
        self._layer: FirstLayer = first_layer(observation.scenario.model)
        self._update: Update = one_gradient.as_gradient(observation)
        self._generator = torch_rng(seed, "spear", observation.round, observation.client)
        self._notes: list[str] = []
        self._details: dict[str, Any] = {"kept": observation.update.kept}

    def answer(self) -> Reconstruction:
        """Search, solve, label, certify."""
        weight, bias = dense_layer(self._update, self._layer)
        assert bias is not None
        gradient = torch.cat([weight, bias[:, None]], 1).to(self._device)
        sent = {name: tensor.to(self._device) for name, tensor in self._observation.weights.items()}
        weights = torch.cat([sent[self._layer.weight], sent[self._layer.bias][:, None]], 1).double()
        factors = self._factors(gradient, weights)
        search = Search(factors, self._attack.method, self._generator)
        found = search.collect(self._attack.attempts, lambda some: _agreement(factors, some) >= AGREEMENT)
        self._details |= {
            "draws": search.draws,
            "zeros": found.zeros.sum(1).tolist(),
            "neurons": len(weights),
        }
        if len(found) < factors.samples:
            raise NotApplicable(
                f"{len(found)} of {factors.samples} samples told apart after {search.draws} draws; raise "
                "spear.attempts or --width, or lower --batch-size"
            )
        self._details["agreement"] = _agreement(factors, found)
        return self._solved(_inputs(factors, found)[:, :-1], gradient[:, :-1])

    def _factors(self, gradient: Tensor, weights: Tensor) -> Factors:
        """The gradient's factors, with the batch size that its spectrum shows."""
        if not bool(torch.isfinite(gradient).all()) or not float(gradient.norm()) > 0:
            raise NotApplicable(
                "the first layer's gradient is zero or not finite: nothing of the batch is in it"
            )
        declared = self._observation.num_examples
        # A spectrum that ends later than declared must show it.
        most = min(self._attack.batch or 2 * declared, *gradient.shape)
        span = row_space(gradient, most, self._generator)
        rank = self._attack.batch or span.rank(declared)
        if rank is None:
            rank = min(declared, len(span.values))
            self._notes.append(f"the spectrum has no clear end; the declared {declared} samples are believed")
        elif rank != declared:
            self._notes.append(f"{rank} samples in the spectrum, {declared} declared")
        scenario = self._observation.scenario
        training = scenario.training.model_copy(update={"batch_size": rank})
        self._attack.check(dataclasses.replace(scenario, training=training))
        if float(span.values[rank - 1]) < DEPENDENT * float(span.values[0]):
            raise NotApplicable(f"samples dependent: s_B / s_1 < {DEPENDENT:.0e} for B = {rank}")
        return Factors.of(gradient, weights, span.basis[:, :rank])

    def _solved(self, inputs: Tensor, gradient: Tensor) -> Reconstruction:
        player = Player(self._observation, self._layer.name, self._device)
        dense = {name: tensor.double() for name, tensor in self._update.dense().items()}
        best = self._explained(player, inputs, dense)
        for _ in range(_POLISH if self._attack.polish else 0):
            # With dL/dz from the model, every neuron is an equation for the images.
            again = torch.linalg.lstsq(best.back.T, gradient).solution
            if not bool(torch.isfinite(again).all()):
                break
            trial = self._explained(player, again, dense)
            if trial.residual >= best.residual:
                break
            best = trial
        return self._reported(best)

    def _explained(self, player: Player, inputs: Tensor, dense: dict[str, Tensor]) -> _Answer:
        """Labels of a batch, and how much of the update it explains."""
        residuals, logits = player.residuals(inputs, dense)
        shares = logits.softmax(1) - residuals
        labels = shares.argmax(1)
        wanted = torch.nn.functional.one_hot(labels, shares.shape[1])
        played = player.play(inputs, labels)
        parts = misfits(dense, played.gradients)
        return _Answer(inputs, labels, played.back, parts, float((shares - wanted).abs().max()))

    def _reported(self, found: _Answer) -> Reconstruction:
        declared = self._observation.num_examples
        status, reason = status_of(found.residual, vouched=len(found.inputs) == declared), ""
        if status == "approximate":
            self._notes.append(f"residual {found.residual:.0e}: not certified")
        elif status == "failed":
            reason = f"residual {found.residual:.0e}: the answer does not explain the update"
        labels = found.labels.cpu()
        images = found.inputs.cpu().reshape(-1, *self._observation.scenario.image_shape)
        return Reconstruction(
            images=images.clamp(0, 1).float(),
            labels=labels,
            loss=found.residual,
            label_confidence=max(0.0, 1 - 2 * found.doubt),
            method=f"spear ({self._attack.method})",
            floors=floors(self._observation, labels),
            details={
                "status": status,
                "reason": reason,
                "residual": found.residual,
                "residual_parts": found.parts,
                "batch": len(images),
                "notes": self._notes,
                **self._details,
            },
        )


@dataclass(frozen=True)
class _Answer:
    """Images (B, d) with labels, dL/dz of the first layer, misfit of each tensor, doubt about the labels."""

    inputs: Tensor
    labels: Tensor
    back: Tensor
    parts: dict[str, float]
    doubt: float

    @property
    def residual(self) -> float:
        return max(self.parts.values())


def _inputs(factors: Factors, found: Found) -> Tensor:
    """[x, 1] (B, d + 1): the directions' mixture undone, scaled so that the last entry is 1."""
    rows = torch.linalg.solve(found.directions.T, factors.values[:, None] * factors.right)
    last = rows[:, -1:]
    return rows / torch.where(last == 0, torch.full_like(last, 1e-300), last)


def _agreement(factors: Factors, found: Found) -> float:
    """Share of the neurons, at the worst sample, that are active there and have a gradient, or neither."""
    inside = torch.linalg.solve(found.directions.T, torch.diag(factors.values))
    rows = inside * torch.sign(inside @ factors.right[:, -1:])
    active = rows @ factors.neurons.T > 0
    return float((active != found.zeros).double().mean(1).min())
