"""A network up to the inputs of one of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from adversaries.inversion.gradients.products import RELUS, SmoothedReLU
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.rng import torch_rng

Weights = Mapping[str, Tensor]


class _Reached(Exception):
    """Carries the layer's inputs out of a forward pass that need not go on."""


class _Kinks(TorchFunctionMode):
    """Smooths ReLUs and max-pooling as widely as `width` says, and leaves the ReLU of number `skip` out.

    `pooled` is what the pooling behind that one was given, with its settings.
    """

    def __init__(self, width: float, skip: int | None) -> None:
        super().__init__()
        self._relu, self._width, self._skip = SmoothedReLU(width), width, skip
        self.relus = 0
        self.pooled: tuple[Any, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RELUS:
            self.relus += 1
            given = args[0] if args else kwargs["input"]
            return given if self.relus - 1 == self._skip else self._relu(given)
        pools = func in (F.max_pool2d, torch.max_pool2d)
        if pools and self._skip is not None and self.relus > self._skip:
            self.pooled = args, kwargs
        if pools and self._width > 0:
            pooled = _pool(self._width, *args, **kwargs)
            if pooled is not None:
                return pooled
        return func(*args, **kwargs)


def _pool(
    width: float,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """Mean over each window, weighted by its softmax over `width` deviations; None for windows that overlap."""
    high, wide = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    plain = (
        stride in (None, [], kernel_size, (high, wide)) and padding in (0, (0, 0)) and dilation in (1, (1, 1))
    )
    if not plain or return_indices or input.shape[-2] % high or input.shape[-1] % wide:
        return None
    spread = width * float(input.detach().std(correction=0))
    if spread <= 0:
        return None
    rows, columns = input.shape[-2] // high, input.shape[-1] // wide
    windows = input.unflatten(-1, (columns, wide)).unflatten(-3, (rows, high)).transpose(-3, -2).flatten(-2)
    return (windows * torch.softmax(windows / spread, -1)).sum(-1)


@dataclass(frozen=True)
class PooledConvolution:
    """A convolution by its module's name, whose outputs (O, H, W) are pooled 2 by 2 before a layer.

    `settings` are its stride, padding and dilation.
    """

    name: str
    outputs: tuple[int, int, int]
    settings: dict[str, Any]


class Below:
    """A network up to a layer's inputs, sample by sample.

    Where nothing but pooling stands between the last ReLU and the layer (`rectified`), values are those before that
    ReLU: of an input that is zero they tell how far below zero it stands, which a step needs to know.

    NotApplicable where a sample's inputs depend on others (BatchNorm in training).
    """

    def __init__(self, scenario: Scenario, layer: str, device: torch.device, dtype: torch.dtype) -> None:
        with torch.random.fork_rng(devices=[]):
            module = build_model(scenario.model)
        if scenario.training.batch_norm == "train" and any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()
        ):
            raise NotApplicable(
                "training.batch_norm = 'train': below the hidden layer samples are normalised by their batch, and "
                "none can be inverted alone; use batch_norm 'eval'"
            )
        self._module = module.to(device, dtype).eval()
        self._layer, self._shape = layer, scenario.image_shape
        self._skip: int | None = None
        self.rectified = self._is_rectified(device, dtype)

    def values(self, images: Tensor, weights: Weights, width: float = 0.0) -> Tensor:
        """(B, n) of images (B, C, H, W), with a graph; kinks as wide as `width`."""
        return self._run(images, weights, width)[0].flatten(1)

    def given_to(self, name: str, images: Tensor, weights: Weights) -> Tensor:
        """What another module, below the layer, is given: (B, ...) of images, with a graph."""
        return self._run(images, weights, 0.0, name)[0]

    def inputs(self, images: Tensor, weights: Weights) -> Tensor:
        """The layer's inputs (B, n)."""
        found = self.values(images, weights)
        return found.relu() if self.rectified else found

    @torch.no_grad()
    def last_pooling(self, images: Tensor, weights: Weights) -> PooledConvolution | None:
        """The convolution whose largest values the layer is given, at images; None where nothing of the kind is."""
        if not self.rectified:
            return None
        seen: list[tuple[str, nn.Conv2d, Tensor]] = []
        hooks = [
            part.register_forward_hook(lambda part, given, out, name=name: seen.append((name, part, out)))
            for name, part in self._module.named_modules()
            if isinstance(part, nn.Conv2d)
        ]
        try:
            found, kinks = self._run(images, weights, 0.0)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen or kinks.pooled is None:
            return None
        name, part, out = seen[-1]
        args, kwargs = kinks.pooled
        size = args[1] if len(args) > 1 else kwargs.get("kernel_size")
        plain = part.groups == 1 and part.padding_mode == "zeros" and not isinstance(part.padding, str)
        if not plain or args[0] is not out or size not in (2, (2, 2)):
            return None
        if not torch.equal(F.max_pool2d(out, 2).flatten(1), found.flatten(1)):
            return None
        settings = {"stride": part.stride, "padding": part.padding, "dilation": part.dilation}
        channels, height, width = out.shape[1:]
        return PooledConvolution(name, (channels, height, width), settings)

    def _run(
        self, images: Tensor, weights: Weights, width: float, at: str | None = None
    ) -> tuple[Tensor, _Kinks]:
        def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            raise _Reached(given[0])

        kinks = _Kinks(width, self._skip)
        hook = self._module.get_submodule(at or self._layer).register_forward_pre_hook(stop)
        try:
            with kinks:
                functional_call(self._module, dict(weights), (images,))
        except _Reached as reached:
            return reached.args[0], kinks
        finally:
            hook.remove()
        raise NotApplicable(f"layer {self._layer!r} takes no part in the network's forward pass")

    @torch.no_grad()
    def _is_rectified(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Try whether the last ReLU can be left out and made up for at the end, as before max-pooling it can."""
        noise = torch.rand(4, *self._shape, generator=torch_rng(0, "rectified")).to(device, dtype)
        exact, kinks = self._run(noise, {}, 0.0)
        relus = kinks.relus
        if not relus:
            return False
        self._skip = relus - 1
        without = self._run(noise, {}, 0.0)[0]
        if torch.equal(without.relu(), exact) and bool((without < 0).any()):
            return True
        self._skip = None
        return False
