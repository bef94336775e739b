"""Bins in front of a model: rows that measure an image alike, each with its own threshold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adversaries.inversion.evidence.first_layer import for_inputs
from adversaries.inversion.evidence.priors import smooth_prior
from adversaries.needs import Block, Facts, Needs
from adversaries.reconstruction.base import armable
from adversaries.reconstruction.malicious.base import UNKNOWN_BATCH, Reading, ReplayedClient, RowReading
from fedattack.config import Positive, Strength
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models.armable.imprint import CEILING, Imprinted
from fedattack.models.normalise import shown
from fedattack.observation import Auxiliary, Candidates, Scenario
from fedattack.rng import torch_rng

_FAR = 8.0
"""Standard deviations beyond which no measurement lies."""

_GRID = 8192
_STRENGTH = 0.01

_TURN = 0.3
"""Share of its bin that a row may turn in a round's local steps."""

_IMAGES = 4096

Functional = Literal["random", "cosine", "brightness"]


@dataclass
class BinReading(RowReading):
    """Base of the attacks that put bins in front of the model; see :class:`~.imprint.Imprint`.

    Parameters
    ----------
    functionals : int
        Independent measurements that the rows are shared out to; 1: as published.
    functional : {"random", "cosine", "brightness"}
        "random": Gaussian weights without mean; "cosine": the lowest frequencies, the first of which is the mean
        brightness; "brightness" is that one alone.
    scale : float
        Size of the ReLU block's rows, whose gradient is the larger against all others, and the less rounded in the
        client's new weights, the smaller they are themselves.
    strength : float, optional
        How far the block moves a pixel, about. None: 0.01, and under several local steps as little as keeps a row
        from turning by more than its bin.
    """

    needs: ClassVar[Needs] = dataclasses.replace(
        RowReading.needs, block=Block(Imprinted, "a block for bins", "imprint or imprint-sparse"), helped=True
    )

    functionals: Positive = 4
    functional: Functional = "random"
    scale: Strength = CEILING
    strength: Strength | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        if self.functional == "brightness" and self.functionals > 1:
            raise ConfigError(
                f"setting '{self.name}.functional' = 'brightness' is one measurement, '{self.name}.functionals' = "
                f"{self.functionals}; set that to 1"
            )

    def needs_now(self, scenario: Scenario) -> Needs:
        """Two bins for each measurement."""
        return dataclasses.replace(self.needs, width=2 * self.functionals)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse several local steps with the ReLU block, and more measurements than there are."""
        if scenario.training.local_steps > 1 and _adds(armable(scenario, Imprinted)):
            raise NotApplicable(
                f"training.local_steps = {scenario.training.local_steps}: the ReLU block's rows drift apart, and "
                "their differences hold all images; use --model imprint-sparse, whose rows hold their own bin's alone"
            )
        modes = math.prod(scenario.image_shape[1:])
        if self.functional == "cosine" and self.functionals > modes:
            raise NotApplicable(
                f"setting '{self.name}.functionals' = {self.functionals}: images of {modes} pixels have no so many "
                "cosine modes"
            )

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The global model with the block's rows replaced: rows of one measurement, thresholds at its quantiles.

        The columns of the block's way back are equal, so that one image counts alike in all rows, but for
        alternating signs, with which what neighbouring rows add to the image nearly cancels.
        """
        module = armable(scenario, Imprinted)
        generator = torch_rng(seed, "imprint.arm")
        width, pixels = module.measure.weight.shape
        reach = CEILING if isinstance(module.act, nn.Hardtanh) else self.scale
        rows, biases = [], []
        sizes = [len(part) for part in torch.arange(width).tensor_split(self.functionals)]
        for functional, size in zip(self._functionals(scenario, generator), sizes, strict=True):
            functional, edges = thresholds(functional, size, scenario.image_shape, auxiliary)
            # A clipped neuron rises from 0 to its ceiling across its bin.
            slopes = torch.full((size,), reach).double() if _adds(module) else reach / edges.diff()
            rows.append(slopes[:, None] * functional)
            biases.append(-slopes * edges[:-1])
        direction = torch.randn(pixels, generator=generator, dtype=torch.float64)
        signs = 1 - 2 * (torch.arange(width) % 2).double()
        strength = self.strength or _STRENGTH
        if self.strength is None and scenario.training.local_steps > 1:
            module.load_state_dict(weights)
            strength = _calm(module, scenario, direction / reach, generator, auxiliary)
        back = torch.outer(direction * strength / reach, signs)
        sent = dict(weights)
        wide, bias = for_inputs(scenario.model, torch.cat(rows), torch.cat(biases))
        sent["measure.weight"], sent["measure.bias"] = wide.float(), bias.float()
        sent["back.weight"] = back.float()
        return sent

    def _functionals(self, scenario: Scenario, generator: torch.Generator) -> list[Tensor]:
        channels, height, width = scenario.image_shape
        if self.functional == "random":
            drawn = [
                torch.randn(channels * height * width, generator=generator, dtype=torch.float64)
                for _ in range(self.functionals)
            ]
            return [one - one.mean() for one in drawn]
        modes = sorted(
            ((v, h) for v in range(height) for h in range(width)),
            key=lambda mode: ((mode[0] / height) ** 2 + (mode[1] / width) ** 2, mode),
        )
        return [
            torch.outer(_cosine(v, height), _cosine(h, width)).expand(channels, -1, -1).flatten()
            for v, h in modes[: self.functionals]
        ]

    def _reading(self, client: ReplayedClient) -> Reading:
        groups = bins(client)
        block = client.module
        assert isinstance(block, Imprinted)
        back = block.back.weight
        signs = (back * back[:, :1]).sum(0).sign()
        if float((back * signs - back[:, :1]).abs().max()) > 1e-4 * float(back.abs().max()):
            raise NotApplicable(
                "the block that was sent counts one image differently in its rows: it holds no bins"
            )
        if not _adds(block):
            return Reading(signs)
        following = torch.arange(1, len(client.bias) + 1, device=client.bias.device)
        for group in groups:
            following[group.stop - 1] = -1
        return Reading(signs, following)

    def _figures(self, client: ReplayedClient) -> dict[str, Any]:
        groups, rows = bins(client), len(client.bias)
        batch = client.observation.num_examples
        bound = alone_share(1 / rows, batch)
        figures: dict[str, Any] = {"bins": rows, "functionals": len(groups), "birthday_bound": bound}
        public = client.observation.auxiliary
        if public is not None and len(public) > 1:
            chances = figures["collision_chance"] = _collisions(client, groups, public.images)
            figures["alone_expected"] = 1 - math.prod(1 - alone_share(chance, batch) for chance in chances)
        return figures


def _calm(
    module: Imprinted,
    scenario: Scenario,
    direction: Tensor,
    generator: torch.Generator,
    auxiliary: Auxiliary | None,
) -> float:
    """Strength at which one image's local steps, ``lr * steps * r x``, turn its row by a share of its bin."""
    training = scenario.training
    if auxiliary is not None and len(auxiliary):
        images = auxiliary.images[:64]
    else:
        images = torch.rand(64, *scenario.image_shape, generator=generator)
    labels = torch.randint(0, scenario.model.resolved[2], (len(images),), generator=generator)
    given = shown(images, scenario.model).clone().requires_grad_()
    loss = nn.functional.cross_entropy(module.rest(given), labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, given)
    steep = float((slope.flatten(1).double() @ direction).abs().median())
    size = float(given.detach().flatten(1).square().sum(1).mean())
    steps = training.learning_rate * training.local_steps / (training.batch_size or UNKNOWN_BATCH)
    return min(_STRENGTH, _TURN * CEILING / max(steps * steep * size, 1e-30))


def alone_share(chance: float, batch: int) -> float:
    """Expected share of a batch alone in its bin, where two images meet with a given chance: the birthday bound."""
    return (1 - chance) ** (batch - 1)


def thresholds(
    functional: Tensor, count: int, image_shape: tuple[int, int, int], auxiliary: Auxiliary | None
) -> tuple[Tensor, Tensor]:
    """A measurement (d,) in units of its standard deviation, and the edges (count + 1,) of its equally likely bins.

    The distribution is that of the public images' measurements, smoothed by a normal kernel (Silverman's width), or
    without any the normal of :func:`~adversaries.inversion.evidence.priors.smooth_prior`. The first and the last
    edge lie beyond what an image can reach.
    """
    if auxiliary is None or len(auxiliary) < 2:
        prior = smooth_prior(image_shape)
        centres = (functional @ prior.mean)[None]
        deviation = float((functional @ prior.covariance @ functional).sqrt())
        width = 1.0
    else:
        centres = auxiliary.images[:_IMAGES].double().flatten(1).cpu() @ functional
        deviation = float(centres.std())
        quartiles = torch.quantile(centres, torch.tensor([0.25, 0.75], dtype=torch.float64))
        spread = min(1.0, float(quartiles.diff()) / 1.349 / max(deviation, 1e-12)) or 1.0
        width = 0.9 * spread * len(centres) ** -0.2
    if not deviation > 1e-9:
        raise NotApplicable("the public images all measure alike: no threshold tells images apart")
    centres = centres / deviation
    grid = torch.linspace(float(centres.min()) - _FAR, float(centres.max()) + _FAR, _GRID).double()
    reached = torch.stack(
        [torch.special.ndtr((part[:, None] - centres) / width).mean(1) for part in grid.split(256)]
    )
    return functional / deviation, _inverse(grid, reached.flatten(), count)


def _inverse(grid: Tensor, reached: Tensor, count: int) -> Tensor:
    """Quantiles 0, 1 / count, ..., 1 of the distribution function `reached` on `grid`."""
    wanted = torch.arange(1, count, dtype=torch.float64) / count
    place = torch.searchsorted(reached, wanted).clamp(1, len(grid) - 1)
    low, high = reached[place - 1], reached[place]
    share = (wanted - low) / (high - low).clamp_min(1e-300)
    inner = grid[place - 1] + share * (grid[place] - grid[place - 1])
    return torch.cat([grid[:1], inner, grid[-1:]])


def bins(client: ReplayedClient) -> list[range]:
    """The neurons of each measurement, thresholds ascending; NotApplicable for weights that are no bins."""
    weight, bias = client.weight, client.bias
    unit = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-300)
    same = (unit[1:] - unit[:-1]).abs().amax(1) < 1e-4
    ends = [0, *(torch.nonzero(~same)[:, 0] + 1).tolist(), len(weight)]
    groups = [range(start, stop) for start, stop in itertools.pairwise(ends)]
    edges = -bias / weight.norm(dim=1).clamp_min(1e-300)
    ordered = all(
        bool((edges[group.start + 1 : group.stop] >= edges[group.start : group.stop - 1]).all())
        for group in groups
    )
    if len(groups) > len(weight) // 2 or not ordered:
        raise NotApplicable(
            "the block that was sent holds no bins (an honest server's): its rows measure differently; let the "
            "server send the attack's weights (attack.names with 'imprint' arms the rounds in attack.rounds)"
        )
    return groups


def _collisions(client: ReplayedClient, groups: list[range], public: Tensor) -> list[float]:
    """For each measurement the chance that two public images share a bin."""
    given = shown(public.double(), client.observation.scenario.model)
    images = given.flatten(1).to(client.bias.device)
    above = images @ client.weight.T + client.bias > 0
    chances = []
    for group in groups:
        counts = torch.bincount(above[:, group.start : group.stop].sum(1)).double()
        chances.append(float((counts * (counts - 1)).sum() / (len(images) * (len(images) - 1))))
    return chances


def _cosine(frequency: int, size: int) -> Tensor:
    steps = torch.arange(size, dtype=torch.float64) + 0.5
    return torch.cos(math.pi * frequency * steps / size)


def _adds(module: Imprinted) -> bool:
    """Whether a row is moved by all images above its threshold, and not by its own bin's alone."""
    return isinstance(module.act, nn.ReLU)
