"""Forgetting by a step on the rows of the network that a sample's loss depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.unlearning.central import Central, Positions
from fedattack.unlearning.curvature import gauss_newton, solve
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.scrub.hypercolumn import Hypercolumn
from fedattack.unlearning.scrub.released import RankOne, released_hessian
from fedattack.unlearning.scrub.selection import Order, choose_rows

Positive = Annotated[float, Field(gt=0)]

_CHUNK = 256  # images in one pass of a network with convolutions
_DESTROYED = 0.05  # share of right answers that the noise may cost before a warning is due


@dataclass
class Scrub(Mechanism):
    """L-CODEC's scrub: a sample's loss is told by a few rows (linear outputs, filters), and a step is taken on them.

    A sample is shown `perturbations` times with noise; FOCI chooses the rows whose answers tell its loss; on their
    parameters alone w moves by ``+ (H + damping I)^-1 g / (n - 1)``, g the sample's gradient (Mehta, Pal, Singh and
    Ravi, "Deep unlearning via randomized conditionally independent Hessians", CVPR 2022). BatchNorm's own parameters
    are in no row and stay as they are. Should no sample be left, the answer is the initial model.

    Mode "published" does what the released code does, one sample after the other. Its H is the outer product of the
    difference of two epochs' gradients, and its sample's Hessian is zero, because both of the gradients that it
    subtracts are the first; beside the damping this H is next to nothing, so that the step is gradient ascent,
    ``g / (damping (n - 1))`` (``details["ascent_cosine"]``, the smallest over the samples). It has no L2 term.

    Mode "corrected" has the Hessian of the retained data, its L2 term included, in the Gauss-Newton form, which is
    exact where the logits are linear in the parameters; the rows of all samples of a request and the sum of their
    gradients (with their share of the L2 term) make one system, solved by conjugate gradients.

    Parameters
    ----------
    mode : str
        "published" or "corrected", as above.
    order : str
        How rows are chosen: "foci"; "lfoci", FOCI with noise of .01 on answers and losses; "codec", every row that
        tells of the loss by itself; "full", every row; "random", as many as FOCI chooses.
    perturbations : int
        How often a sample is shown with noise to choose its rows.
    scale : float
        Deviation of that noise on the pixels, which are in [0, 1].
    damping : float, optional
        By default .01 in mode "published", as released, where it stands for the L2 term too, and .001 beside that
        term in mode "corrected"; deep networks far from a minimum need more.
    removal : str
        "sekhari", as above; "cr", with H of the sample itself and without the division by n - 1; "bp", ``rate * g``.
    rate : float
        Step of removal "bp".
    tolerance : float
        Length of the residual, as a share, at which conjugate gradients stop.
    products : int
        Products with the Hessian after which they stop too; each costs two gradients of the retained data.
    noise : bool
        Gaussian noise on the chosen rows (:func:`noise_deviation`). The released code always adds it, which at most
        sizes leaves nothing of the model; ``details["warning"]`` says so.
    epsilon, delta
        What the noise is to promise.
    revert : float, optional
        Take a removal back, and forget nothing, where it costs more than this share of right answers on what is
        retained; the released code's is .05, on held-out data. ``details["reverted"]`` lists the samples.
    """

    keeps = frozenset({"checkpoints"})
    runs = "central"
    by_positions = False
    mode: Literal["published", "corrected"] = "corrected"
    order: Order = "foci"
    perturbations: Annotated[int, Field(ge=2)] = 1000
    scale: Positive = 0.1
    damping: Positive | None = None
    removal: Literal["sekhari", "cr", "bp"] = "sekhari"
    rate: Positive = 1.0
    tolerance: Positive = 1e-3
    products: Annotated[int, Field(ge=1)] = 100
    noise: bool = False
    epsilon: Positive = 0.1
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.01
    revert: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def damped(self) -> float:
        """The damping that is in force."""
        return self.damping or (0.01 if self.mode == "published" else 0.001)

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse a model without a row too."""
        super().check(name, scenario, clients)
        Hypercolumn(build_model(scenario.model))

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget the samples of `deletions`, in ascending order of their positions, then those that they bring."""
        central, excluded = trainer.central(), merged(history.excluded, deletions)
        gone = np.array(sorted(frozenset[int]().union(*(d.positions for d in deletions))), np.int64)
        for one in deletions:
            if one.images is not None and one.labels is not None:
                central, brought = central.joined(one.images, one.labels)
                gone = np.concatenate([gone, brought])
        retained = central.retained(excluded.get(0, frozenset()))
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, history.rounds)
        if not len(retained):
            return Forgotten(history.checkpoint(0), excluded, 0)
        if any(isinstance(part, nn.Conv2d) for part in central.model.modules()):
            # convolutions in float64 take six times as long
            central = replace(central, dtype=torch.float32, chunk=_CHUNK)
        work = _Work(self, central, history.weights, retained)
        if self.mode == "corrected":
            work.remove(gone, *self._corrected(work, gone))
        else:
            exact = self.removal == "sekhari"
            old = released_hessian(central, history) if exact else RankOne(work.flat, 0.0)
            for position in gone:
                sample = np.array([position])
                work.remove(sample, *self._published(work, sample, old))
        return Forgotten(central.weights(work.flat, work.base), excluded, start, details=work.told())

    def _published(self, work: _Work, sample: Positions, old: RankOne) -> tuple[Tensor, Tensor]:
        """Positions in the flat vector, and the step there."""
        rows = work.rows(sample)
        slope = work.central.gradient(work.flat, work.base, sample)[rows]
        if self.removal == "bp":
            return rows, self.rate * slope
        if self.removal == "cr":
            return rows, slope / self.damped
        others = len(work.central) - 1
        step = old.solve(slope / others, rows, self.damped, len(work.central) / others)
        if slope.any():
            work.cosines.append(float((step / step.norm()) @ (slope / slope.norm())))
        return rows, step

    def _corrected(self, work: _Work, gone: Positions) -> tuple[Tensor, Tensor]:
        """As :meth:`_published`, for all samples at once."""
        central, training = work.central, work.central.scenario.training
        rows = work.rows(gone)
        slope = central.gradient(work.flat, work.base, gone)
        if self.removal == "bp":
            return rows, self.rate * slope[rows]
        decay, data, count = 0.0, gone, 1
        if self.removal == "sekhari":
            decay = training.weight_decay if training.protocol == "fedavg" else 0.0
            data, count = work.retained, len(work.retained)
            slope = (slope + len(gone) * decay * work.flat) / count

        def product(vector: Tensor) -> Tensor:
            found = gauss_newton(central, work.flat, work.base, vector, data) / count
            return found + (decay + self.damped) * vector

        found = solve(product, slope, self.tolerance, self.products, rows)
        work.details |= {"products": found.products, "residual": found.residual}
        if found.residual > self.tolerance:
            work.warnings.append(
                f"the step is solved to {found.residual:.2g} of its right-hand side after {found.products} products; "
                "raise 'unlearning.products' or 'unlearning.damping'"
            )
        return rows, found.solution


@dataclass
class _Work:
    """The model on the way, and what is told of it."""

    settings: Scrub
    central: Central
    base: Weights
    retained: Positions
    cosines: list[float] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    reverted: list[int] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    lost: float = 0.0  # share of right answers on the retained that noise alone costs, without the steps

    def __post_init__(self) -> None:
        self.flat = self.central.flat(self.base)
        self.column = Hypercolumn(self.central.model)

    def rows(self, samples: Positions) -> Tensor:
        """The parameters of all rows that the samples depend on, (k,), ascending."""
        s, columns = self.settings, set[int]()
        how = s.order, s.perturbations, s.scale
        for position in samples.tolist():
            chosen = choose_rows(self.central, self.column, self.flat, self.base, position, *how)
            self.samples.append({"position": position, "rows": len(chosen)})
            columns |= set(chosen)
        return self.column.positions(sorted(columns))

    def remove(self, samples: Positions, rows: Tensor, step: Tensor) -> None:
        """Take a step, add the noise, note the losses; back again where it costs more than is allowed."""
        settings, before = self.settings, self.flat
        after = before.index_add(0, rows, step)
        if settings.noise:
            draws = self.central.rng("scrub noise", *samples[:1].tolist())
            drawn = torch.randn(len(rows), generator=draws, dtype=torch.float64)
            noise = self._sigma(len(samples)) * drawn.to(after)
            self.lost += self._right(before) - self._right(before.index_add(0, rows, noise))
            after = after.index_add(0, rows, noise)
        losses = [self.central.losses(flat, self.base, samples).tolist() for flat in (before, after)]
        for one, old, new in zip(self.samples[-len(samples) :], *losses, strict=True):
            one |= {"loss_before": old, "loss_after": new}
        if settings.revert is not None and self._right(before) - self._right(after) > settings.revert:
            self.reverted += samples.tolist()
        else:
            self.flat = after

    def told(self) -> dict[str, Any]:
        """The details of the answer."""
        settings, told = self.settings, {"samples": self.samples, **self.details}
        if self.cosines:
            told["ascent_cosine"] = min(self.cosines)
        if settings.revert is not None:
            told["reverted"] = self.reverted
        if settings.noise:
            sigma = self._sigma(len(self.samples) if settings.mode == "corrected" else 1)
            told |= {"sigma": sigma, "lost_to_noise": self.lost}
            if self.lost > _DESTROYED:
                self.warnings.append(
                    f"noise of deviation {sigma:.3g} on the scrubbed rows cost {100 * self.lost:.0f} points of "
                    f"accuracy on what is retained: {len(self.central)} samples are too few for epsilon "
                    f"{settings.epsilon:g}, delta {settings.delta:g} and damping {settings.damped:g}"
                )
        return told | ({"warning": "; ".join(self.warnings)} if self.warnings else {})

    def _sigma(self, removed: int) -> float:
        s = self.settings
        return noise_deviation(len(self.central), s.damped, s.epsilon, s.delta, removed)

    def _right(self, flat: Tensor) -> float:
        """Share of right answers on what is retained."""
        with torch.no_grad():
            right = [
                self.central.logits(flat, self.base, images).argmax(1) == labels
                for some in np.array_split(self.retained, -(-len(self.retained) // self.central.chunk))
                for images, labels in [self.central.samples(some)]
            ]
        return float(torch.cat(right).double().mean())


def noise_deviation(samples: int, damping: float, epsilon: float, delta: float, removed: int = 1) -> float:
    """Deviation of the noise with which a Newton step is (epsilon, delta)-unlearning, as the released code has it.

    ``gamma / epsilon * sqrt(2 ln(1.25 / delta))``, gamma = 2 M L^2 m^2 / (n^2 damping^3), m = `removed`, with the
    constants of the loss at M = 1/4, L = 1 (Sekhari, Acharya, Kamath and Suresh, NeurIPS 2021, algorithm 1). It
    promises something only where the loss has these constants and is strongly convex by `damping`.
    """
    gamma = 2 * 0.25 * removed**2 / (samples**2 * damping**3)
    return gamma / epsilon * math.sqrt(2 * math.log(1.25 / delta))
