"""Attacks that let a network draw the images: GGL, GIFD and the deep image prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adversaries.inversion.learning import image_generator, train
from adversaries.inversion.learning.image_generator import TrainedGenerator
from adversaries.inversion.matching.charts import Latent, LatentBall, NetworkWeights
from adversaries.inversion.matching.match import Match
from adversaries.inversion.matching.settings import Matching
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.matching.base import OptimisationAttack, Task
from adversaries.reconstruction.matching.recipes import Recipe
from fedattack.config import Positive, Strength, Weight
from fedattack.errors import ConfigError
from fedattack.models.decoders.from_latent import ImageGenerator
from fedattack.observation import Scenario
from fedattack.rng import torch_rng

_TYPICAL = 64
_CODE = 64


def _adam(rate: float, iterations: int, objective: str = "cosine") -> Matching:
    return Matching(
        objective=objective, optimiser="adam", learning_rate=rate, iterations=iterations, decay=True
    )


@dataclass
class GGL(OptimisationAttack):
    """GGL: latent vectors of a generator whose images have the gradient that was sent (Li et al. 2022).

    The generator is trained on the auxiliary images (a small variational auto-encoder), or the user's own. Latent
    inputs are drawn from N(0, 1), pulled towards it, and found by Adam from several starts.

    Deviations: the paper's generators are BigGAN and StyleGAN, its default search is CMA-ES and its distance is the
    squared one (preset "squared"); here the search follows the gradient through the generator.

    Parameters
    ----------
    generator : str
        "small": trained on the auxiliary images; or ``package.module:Class``.
    generator_weights : str, optional
        Safetensors file for a generator of one's own.
    latent, width, epochs : int
        Sizes and training of "small".
    prior : float
        Weight of the pull towards N(0, 1).

    References
    ----------
    Li, Zhang, Liu, Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient Leakage", CVPR 2022.
    """

    needs: ClassVar[Needs] = dataclasses.replace(OptimisationAttack.needs, auxiliary=32)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(_adam(0.1, 400), restarts=4, note="latent search by Adam"),
        "squared": Recipe(
            _adam(0.1, 400, "masked-l2"), restarts=4, note="latent search by Adam, squared distance"
        ),
    }

    generator: str = "small"
    generator_weights: str | None = None
    latent: Positive = 64
    width: Positive = 32
    epochs: Positive = 20
    prior: Weight = 1e-3

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        if self.generator == "small" and self.generator_weights is not None:
            raise ConfigError(
                "setting 'generator_weights' is for a generator of one's own: name its class too"
            )

    def needs_now(self, scenario: Scenario) -> Needs:
        """A generator of the user's own needs no public images."""
        needs = super().needs_now(scenario)
        return needs if self.generator == "small" else dataclasses.replace(needs, auxiliary=0)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Also load a generator of the user's own."""
        super().probe(scenario, facts)
        if self.generator != "small":
            image_generator.given_generator(self.generator, self.generator_weights, scenario.image_shape)

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Search the latent space."""
        generator = self.obtain(task)
        chart = Latent(
            generator.module, generator.latent_shape, task.labels.shape[1], task.device, self.prior
        )
        return task.match(drawn(task, chart), chart), generator.figures

    def obtain(self, task: Task) -> TrainedGenerator:
        """The generator, trained once for all victims of a round."""
        first = task.observations[0]
        if self.generator != "small":
            return image_generator.given_generator(
                self.generator, self.generator_weights, first.scenario.image_shape
            )
        public = train.public_images(first, "ggl")
        sizes = (self.latent, self.width, self.epochs)
        key = ("image-generator", train.identity(public), task.seed, *sizes)
        return train.once(
            key,
            lambda: image_generator.train_image_generator(
                public, task.seed, *sizes, task.device, lambda _, text: task.progress(0.0, text)
            ),
        )


@dataclass
class GIFD(GGL):
    """GIFD: GGL's search, continued in the generator's feature maps (Fang et al. 2023).

    After the latent search the maps after each stage are searched in turn, inside an l1 ball around what the stage
    before found, so that images outside the generator's range come into reach while they stay near it. The answer is
    the one with the lowest loss over all stages.

    Parameters
    ----------
    radius : float
        Of the balls, in units of the usual l1 norm of the maps.
    stages : int
        Stages of the generator to go through.

    References
    ----------
    Fang, Chen, Wang, Wang, Xia, "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization",
    ICCV 2023.
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(_adam(0.1, 400), restarts=2, note="latent space, then feature maps")
    }

    radius: Strength = 0.5
    stages: Positive = 3

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Search the latent space, then the feature maps of one stage after the other."""
        generator = self.obtain(task)
        batch, shape = task.labels.shape[1], generator.latent_shape
        chart = Latent(generator.module, shape, batch, task.device, self.prior)
        matches = best = task.match(drawn(task, chart), chart)
        losses = [[match.loss for match in matches]]
        typical = torch.randn(_TYPICAL, *shape, generator=torch_rng(task.seed, "gifd-typical"))
        for stage in range(min(self.stages, generator.depth - 1)):
            found = torch.stack([match.variables for match in matches if match.variables is not None])
            centre = generator.step(stage, found.reshape(-1, *shape)).reshape(1, len(matches), -1)
            typical = generator.step(stage, typical)
            shape = tuple(typical.shape[1:])
            radius = self.radius * batch * float(typical.abs().sum()) / _TYPICAL
            ball = LatentBall(generator.tail(stage + 1), shape, batch, task.device, centre, radius)
            matches = task.match(centre, ball)
            losses.append([match.loss for match in matches])
            best = [a if a.loss <= b.loss else b for a, b in zip(best, matches, strict=True)]
        return best, generator.figures | {"mean loss by stage": [sum(some) / len(some) for some in losses]}


@dataclass
class DeepImagePrior(OptimisationAttack):
    """Deep image prior: the weights of an untrained network whose drawing has the gradient that was sent.

    The network draws from fixed noise; being convolutional it is quick at natural images and slow at noise, which
    takes the place of a prior, without any public data.

    Parameters
    ----------
    width : int
        Channels of the network's widest layer.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, "Deep Image Prior", CVPR 2018; weights as the chart of gradient inversion: Jeon,
    Kim, Lee, Oh, Ok, "Gradient Inversion with Generative Image Prior", NeurIPS 2021 (there a trained generator's).
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(_adam(0.01, 800), note="weights of an untrained decoder by Adam")
    }

    width: Annotated[int, Field(ge=4)] = 32

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Search the network's weights."""
        batch, shape = task.labels.shape[1], task.observations[0].scenario.image_shape
        network = train.initialised(lambda: ImageGenerator(_CODE, shape, self.width), task.seed, "dip")
        noise = torch.randn(batch, _CODE, generator=torch_rng(task.seed, "dip-noise"))
        chart = NetworkWeights(network, noise, task.device)
        return task.match(drawn(task, chart), chart), {"weights": chart.width}


def drawn(task: Task, chart: Latent | NetworkWeights) -> Tensor:
    """Starts (R, V, N) of a chart, each victim's from a stream of its own."""
    rows = []
    for observation in task.observations:
        stream = torch_rng(task.seed, "chart-start", observation.round, observation.client)
        rows.append(chart.start(stream, len(task.starts), 1))
    return torch.cat(rows, 1)
