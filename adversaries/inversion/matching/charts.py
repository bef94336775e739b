"""Charts that networks draw: the latent space of a generator, and the weights of an untrained network.

They cannot be inverted: `start` draws variables, float32 (R, V, N) on the CPU, which go to
:func:`adversaries.inversion.matching.match.match` as its `starts`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedattack.errors import ConfigError


class Latent:
    """Variables are the inputs of a frozen generator (copied, in evaluation mode), one for each image.

    Parameters
    ----------
    generator : nn.Module
        (N, *latent_shape) -> images (N, C, H, W) in [0, 1].
    latent_shape : tuple of int
        Of one image's input: a latent vector, or an intermediate feature map of a generator's tail (GIFD).
    batch : int
        Images per victim (B).
    prior : float
        Weight of the inputs' mean square, which keeps them where a generator trained on N(0, 1) knows its way, in the
        units of the regularisers.

    References
    ----------
    Li, Zhang, Liu, Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient Leakage", CVPR 2022;
    Fang et al., "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization", ICCV 2023.
    """

    def __init__(
        self,
        generator: nn.Module,
        latent_shape: tuple[int, ...],
        batch: int,
        device: torch.device,
        prior: float = 0.0,
    ) -> None:
        self._generator = copy.deepcopy(generator).to(device).eval().requires_grad_(False)
        self._shape, self._batch, self._prior = latent_shape, batch, prior

    @property
    def width(self) -> int:
        """Variables of one victim (N)."""
        return self._batch * math.prod(self._shape)

    def start(self, rng: torch.Generator, restarts: int, victims: int) -> Tensor:
        """Standard normal variables."""
        return torch.randn(restarts, victims, self.width, generator=rng)

    def images(self, variables: Tensor) -> Tensor:
        drawn = self._generator(variables.reshape(-1, *self._shape))
        return drawn.unflatten(0, (-1, self._batch))

    def tensors(self) -> list[Tensor]:
        return list(self._generator.state_dict().values())

    def cost(self, variables: Tensor) -> Tensor:
        """What unlikely variables (V, N) cost, (V,)."""
        return self._prior * variables.square().mean(1)


class LatentBall(Latent):
    """A latent space of which only l1 balls of `radius` around the starts `centre` (R, V, N) are allowed, as in GIFD.

    The norm is over one victim's variables.
    """

    def __init__(
        self,
        generator: nn.Module,
        latent_shape: tuple[int, ...],
        batch: int,
        device: torch.device,
        centre: Tensor,
        radius: float,
        prior: float = 0.0,
    ) -> None:
        super().__init__(generator, latent_shape, batch, device, prior)
        if not radius > 0:
            raise ConfigError(f"setting 'radius' = {radius}: must be positive")
        self._centre, self._radius = centre.flatten(0, 1).to(device), radius

    def start(self, rng: torch.Generator, restarts: int, victims: int) -> Tensor:
        """The centres; nothing is drawn."""
        return self._centre.unflatten(0, (restarts, victims)).cpu()

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self._centre, torch.tensor(self._radius)]

    def project(self, variables: Tensor) -> Tensor:
        return self._centre + project_l1(variables - self._centre, self._radius)


def project_l1(x: Tensor, radius: float) -> Tensor:
    """The nearest point with l1 norm at most `radius`, row by row (Duchi et al. 2008): (V, N) -> (V, N)."""
    size = x.abs()
    ordered = size.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - radius) / torch.arange(1, x.shape[1] + 1, device=x.device)
    # The threshold is the excess at the last place that it does not swallow.
    kept = (ordered > excess).sum(1, keepdim=True)
    threshold = excess.gather(1, (kept - 1).clamp(min=0)).clamp(min=0)
    return x.sign() * (size - threshold).clamp(min=0)


class NetworkWeights:
    """Variables are the weights of a network that draws a victim's images from fixed noise: a deep image prior.

    Parameters
    ----------
    network : nn.Module
        (B, ...) -> images (B, C, H, W) in [0, 1], whose layers have ``reset_parameters`` and no running statistics.
    noise : Tensor
        (B, ...): its input, the same for all victims.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, "Deep Image Prior", CVPR 2018.
    """

    def __init__(self, network: nn.Module, noise: Tensor, device: torch.device) -> None:
        if any(True for _ in network.buffers()):
            raise ConfigError(
                "a deep image prior must not keep running statistics: use GroupNorm or no normalisation at all"
            )
        self._network = copy.deepcopy(network).to(device).requires_grad_(False)
        self._shapes = {name: parameter.shape for name, parameter in self._network.named_parameters()}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._noise = noise.to(device)
        self._draw = vmap(self._draw_one)

    @property
    def width(self) -> int:
        """Variables of one victim (N)."""
        return sum(self._sizes)

    def start(self, rng: torch.Generator, restarts: int, victims: int) -> Tensor:
        """Weights as the layers draw them."""
        fresh = copy.deepcopy(self._network).cpu()
        rows = []
        for seed in torch.randint(2**62, (restarts * victims,), generator=rng).tolist():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for part in fresh.modules():
                    reset = getattr(part, "reset_parameters", None)
                    if callable(reset):
                        reset()
            rows.append(torch.cat([parameter.detach().flatten() for parameter in fresh.parameters()]))
        return torch.stack(rows).unflatten(0, (restarts, victims))

    def images(self, variables: Tensor) -> Tensor:
        return self._draw(variables)

    def tensors(self) -> list[Tensor]:
        return [self._noise]

    def _draw_one(self, weights: Tensor) -> Tensor:
        pieces = zip(self._shapes.items(), weights.split(self._sizes), strict=True)
        named = {name: piece.reshape(shape) for (name, shape), piece in pieces}
        return functional_call(self._network, named, (self._noise,))
