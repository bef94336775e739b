"""The attack: labels, then images by matrix-free Gauss-Newton, one victim after another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adversaries.base import Effort, Progress, no_progress, share_of
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.evidence import Evidence, Labels
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.evidence.labels import label_strategies
from adversaries.inversion.evidence.whitening import Whitening, whitening
from adversaries.inversion.gradients import BatchNormMode
from adversaries.inversion.gradients.products import Network, prepare
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.reconstruction.gauss_newton.solver import Settings, Solution, solve
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.rng import torch_rng

CAUTION = "a residual that falls is no evidence of a reconstruction: compare with the floor"


def default_products(images: int, *, surrogate: bool = False) -> int:
    """Jacobian products for a batch: 4,000 an image, but what two images get for one, which converges further.

    Of a surrogate 200 an image: more only fit what it leaves out of the client's steps.
    """
    return 200 * max(2, images) if surrogate else 4000 * max(2, images)


@dataclass
class GaussNewton(ReconstructionAttack):
    """Matrix-free Gauss-Newton on the sent entries of the gradient, for any differentiable network.

    Labels are inferred first. Images are then a Gaussian prior's mean plus whitened coefficients, which damped
    Gauss-Newton steps move until the gradient is the one that was sent; each step is solved by conjugate gradients
    with two double backward passes an iteration. The noise that is granted to the residual falls with it. Behind
    smooth activations (sigmoid, tanh, softplus, GELU) a full gradient gives its image to 40 dB and more within
    seconds on a LeNet. ReLU's kinks, where the gradient jumps, are smoothed as widely as the image is still unknown;
    several starts and shaken descents are compared by their residual.

    The certificate is the root mean square residual over the sent entries, each in units of its tensor's root mean
    square. With deep ReLU networks and with few sent entries it falls far while the images stay at the floor. Behind
    a GELU ResNet-20 one or two CIFAR-10 images in four came out, to 20 dB and more; the others stayed at the floor.

    Parameters
    ----------
    products : int, optional
        Jacobian products to spend on each victim, over all starts: the budget, so that a run can be repeated to the
        bit. One costs half to one first-order iteration. None: :func:`default_products`.
    starts : int
        The prior's mean, then draws from the prior, tried until one comes to a small residual.
    labels : str
        Label strategy; see :mod:`adversaries.inversion.evidence.labels.label_strategies`.
    batch_norm : {"train", "eval"}, optional
        Whether the clients' BatchNorm used their batch's statistics, as it does in training, or the running ones;
        None: as declared.
    noise : float, optional
        Noise level in units of the residual; None: 0.5, or 1.4 behind ReLU.
    kink : float
        How widely ReLU's kinks are smoothed, in units of the noise level and of the deviation of the layer's inputs;
        0: not at all, as in plain automatic differentiation.
    hybrid_below : float
        Residual (root mean square, 1 for an image without gradient) under which a single image behind smooth
        activations is no longer pulled to the prior; 0: never.
    hop : float
        How far the best image is shaken once a descent has stalled, in units of its residual and of the prior; 0:
        never, and what is left of the budget is not spent.
    local_steps : {"surrogate"}, optional
        "surrogate": a weight delta of several local steps is read as one gradient at a point between the weights
        before and after, found beside the images (:mod:`adversaries.inversion.evidence.one_gradient`); None: several
        steps are refused. Where a network was trained before, some images come out and the others stay below the
        floor: 14.3 dB on three clients with 5 steps of 3 CIFAR-10 images (best 23.8, floor 12.2), of whose labels 14
        in 45 were inferred wrongly.

    References
    ----------
    The products are Pearlmutter's, "Fast Exact Multiplication by the Hessian", Neural Computation 1994, for the mixed
    derivative; the step is Levenberg's and Marquardt's. The attack itself is this project's.
    """

    needs: ClassVar[Needs] = Needs(
        update="gradient", unclipped=True, sums="dense", fresh=True, labels="auto", helped=True
    )

    products: int | None = None
    starts: int = 3
    labels: str = "auto"
    batch_norm: BatchNormMode | None = None
    noise: float | None = None
    kink: float = 1.0
    hybrid_below: float = 0.05
    hop: float = 1.0
    local_steps: one_gradient.Reading | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        label_strategies.STRATEGIES.get(self.labels)
        self._settings(1)

    def _settings(self, images: int, several: bool = False) -> Settings:
        usual = default_products(images, surrogate=several)
        return Settings(
            products=usual if self.products is None else self.products,
            starts=self.starts,
            noise=self.noise,
            kink=self.kink,
            hybrid_below=self.hybrid_below,
            hop=self.hop,
        )

    def needs_now(self, scenario: Scenario) -> Needs:
        """The labels are read as asked, and so are several local steps."""
        several = self._several(scenario)
        update: Literal["gradient", "steps"] = "steps" if several else "gradient"
        return dataclasses.replace(self.needs, labels=self.labels, update=update)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse models whose gradient is random."""
        prepare(scenario.model, None, self._batch_norm(scenario))

    def effort(self, scenario: Scenario, images: int) -> Effort:
        """Its budget of products."""
        several = self._several(scenario)
        return Effort(products=self._settings(images, several).products, whole=several)

    def _several(self, scenario: Scenario) -> bool:
        return one_gradient.reads_surrogate(self.local_steps, scenario)

    def _batch_norm(self, scenario: Scenario) -> BatchNormMode:
        return self.batch_norm or scenario.training.batch_norm

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        if not observations:
            return []
        first = observations[0]
        self.check(first.scenario)
        prior = whitening(first.auxiliary, first.scenario.image_shape, device, torch.float32)
        answers = []
        for position, evidence in enumerate(Evidence.of_round(observations)):
            total = len(observations)
            prefix = f"victim {position + 1}/{total}: "
            told = share_of(progress, position / total, (position + 1) / total, prefix)
            labels = label_strategies.infer(self.labels, evidence)
            solution = self.solve(evidence.observation, labels.values, prior, seed, device, told)
            answers.append(self._answer(evidence.observation, labels, solution, prior))
        progress(1.0, "done")
        return answers

    def solve(
        self,
        observation: Observation,
        labels: Tensor,
        prior: Whitening,
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> Solution:
        """Images of one victim whose labels are known or inferred, int64 (B,)."""
        several = self._several(observation.scenario)
        network = Network(
            observation.scenario.model,
            observation.weights,
            one_gradient.mean_gradient(observation) if several else one_gradient.as_gradient(observation),
            labels,
            self._batch_norm(observation.scenario),
            device,
            moves=one_gradient.moves(observation) if several else None,
        )
        generator = torch_rng(seed, "gauss-newton", observation.round, observation.client + 1)
        shape = (len(labels), *observation.scenario.image_shape)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        return solve(network, prior, draw, self._settings(len(labels), several), progress)

    def _answer(
        self, observation: Observation, labels: Labels, solution: Solution, prior: Whitening
    ) -> Reconstruction:
        pixels = len(labels.values) * math.prod(observation.scenario.image_shape)
        details: dict[str, Any] = {
            "kept": observation.update.kept,
            "kept per pixel": observation.update.kept / pixels,
            "labels": labels.note,
            "iterations": solution.products,
            "start": solution.start,
            "residuals of starts and hops": solution.residuals,
            "hops": solution.hops,
            "hops kept": solution.hops_kept,
            "prior": prior.source,
            **({"point": solution.point} if self._several(observation.scenario) else {}),
            "notes": CAUTION,
        }
        return Reconstruction(
            solution.images.clamp(0, 1).float().cpu(),
            labels.values,
            loss=solution.rms,
            label_confidence=labels.confidence,
            certificate=solution.rms,
            method="gauss-newton",
            history=solution.history,
            floors=floors(observation, labels.values),
            details=details,
        )
