"""The first linear layer: the one whose inputs are the private pixels, and a model played through from it.

With z = W x + c its outputs and d_i = dL/dz_i, the gradients are ``dL/dW = sum_i d_i x_i'`` and
``dL/dc = sum_i d_i``: the batch spans the rows of the first, and the second fixes its scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.models.normalise import bare, per_pixel
from fedattack.observation import Observation, Scenario, Update
from fedattack.task import trained_parameters
from fedattack.training import training_mode


@dataclass(frozen=True)
class FirstLayer:
    """A linear layer on the flattened image: the module's `name`, and whether it has a bias."""

    name: str
    biased: bool

    @property
    def weight(self) -> str:
        """State-dict name of W, shape (m, d)."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """State-dict name of c, shape (m,)."""
        return f"{self.name}.bias"


@lru_cache(maxsize=16)
def first_layer(model: ModelConfig) -> FirstLayer:
    """The first layer of a resolved model, where it is linear and sees the pixels themselves; else NotApplicable.

    Pixels that the model normalises first count as such: :func:`~fedattack.models.normalise.pixels` takes it back.
    """
    with torch.random.fork_rng(devices=[]):
        module = build_model(bare(model)).eval()
    channels, side, _ = model.resolved
    probe = torch.linspace(0, 1, channels * side**2).reshape(1, channels, side, side)
    order: list[tuple[str, nn.Module, Tensor]] = []
    for name, part in module.named_modules():
        if list(part.parameters(recurse=False)):
            part.register_forward_hook(
                lambda part, inputs, _, name=name: order.append((name, part, inputs[0]))
            )
    with torch.no_grad():
        module(probe)
    name, part, seen = order[0]
    if not isinstance(part, nn.Linear) or not torch.equal(seen, probe.flatten(1)):
        raise NotApplicable(
            f"model.name = {model.name!r} begins with {name!r}, {type(part).__name__}: this attack reads a linear "
            "layer on the pixels; use --model mlp"
        )
    if not part.weight.requires_grad or (part.bias is not None and not part.bias.requires_grad):
        raise NotApplicable(
            f"model.name = {model.name!r}: its first layer {name!r} is frozen, and this attack reads its gradient"
        )
    return FirstLayer(name, part.bias is not None)


def for_inputs(model: ModelConfig, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (m, d) and biases (m,) that answer to what the first layer is given as these answer to pixels."""
    found = per_pixel(model, weight)
    return (weight, bias) if found is None else (weight * found[1], bias + weight @ found[0])


def for_pixels(model: ModelConfig, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (m, d) and biases (m,) that answer to pixels as those of the first layer answer to what it is given."""
    found = per_pixel(model, weight)
    return (weight, bias) if found is None else (weight / found[1], bias - (weight / found[1]) @ found[0])


def is_complete(scenario: Scenario) -> bool:
    """Whether every entry of an update is sent, as far as the settings tell."""
    compression = scenario.compression
    return compression.name not in ("topk", "randomk", "topk-qsgd", "dgc") or compression.rate >= 1


def dense_layer(update: Update, layer: FirstLayer) -> tuple[Tensor, Tensor | None]:
    """Gradients of W (m, d) and of c (m,), or None without a bias; float64. NotApplicable if entries are missing."""
    wanted = {layer.weight, layer.bias} if layer.biased else {layer.weight}
    found: dict[str, Tensor] = {}
    for name, shape, positions, values in update.layers():
        if name in wanted:
            size = torch.Size(shape).numel()
            if len(positions) < size:
                raise NotApplicable(
                    f"{len(positions)} of {size} entries of {name!r} were sent: this attack needs them all; use "
                    "compression.name 'none' or 'qsgd'"
                )
            found[name] = values.double().reshape(shape)
    return found[layer.weight], found.get(layer.bias)


@dataclass(frozen=True)
class Played:
    """What a batch does to a model: `gradients` of mean cross-entropy; `back`, (B, m), dL/dz of the first layer."""

    gradients: dict[str, Tensor]
    back: Tensor


class Player:
    """The model that was sent out, in float64 and in the client's mode; z are the outputs of module `first`.

    Inputs are what the first layer is given: pixels, or these normalised.
    """

    def __init__(self, observation: Observation, first: str, device: torch.device) -> None:
        self._module = build_model(bare(observation.scenario.model)).to(device)
        self._module.load_state_dict(observation.weights)
        self._module = training_mode(self._module.double(), observation.scenario.training.batch_norm)
        self._shape = observation.scenario.image_shape
        linear = [part for part in self._module.modules() if isinstance(part, nn.Linear)]
        names = [name for name, part in self._module.named_modules() if part is linear[-1]]
        if not linear[-1].weight.requires_grad:
            raise NotApplicable(f"the head {names[0]!r} is frozen, and labels are read off its gradient")
        self._head = f"{names[0]}.weight"
        self._first: list[Tensor] = []
        self._last: list[Tensor] = []
        self._module.get_submodule(first).register_forward_hook(lambda *a: self._first.append(a[2]))
        linear[-1].register_forward_pre_hook(lambda _, inputs: self._last.append(inputs[0]))

    def _forward(self, inputs: Tensor) -> Tensor:
        self._first.clear()
        self._last.clear()
        return self._module(inputs.unflatten(1, self._shape))

    @torch.no_grad()
    def residuals(self, inputs: Tensor, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Softmax residuals by least squares on the head's gradient, and the logits, both (B, classes).

        `inputs` are flat images, (B, d); `gradients` as they were sent: means over the batch.
        """
        logits = self._forward(inputs)
        features = self._last[0]
        scale = features.norm(dim=1, keepdim=True).clamp_min(1e-300)
        sent = gradients[self._head].to(features) * len(inputs)
        return torch.linalg.lstsq((features / scale).T, sent.T).solution / scale, logits

    def play(self, inputs: Tensor, labels: Tensor) -> Played:
        """Gradients of a batch: inputs (B, d) and labels int64 (B,)."""
        loss = nn.functional.cross_entropy(self._forward(inputs), labels.to(inputs.device))
        names, parameters = zip(*trained_parameters(self._module).items(), strict=True)
        *found, back = torch.autograd.grad(loss, [*parameters, self._first[0]], materialize_grads=True)
        return Played(dict(zip(names, found, strict=True)), back)


def misfits(sent: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor that is not zero in both."""
    errors = {}
    for name, tensor in sent.items():
        seen = tensor.to(found[name])
        size = float(seen.norm())
        wrong = float((seen - found[name]).norm())
        if size or wrong:
            errors[name] = wrong / max(size, 1e-300)
    return errors
