"""Per-sample gradients of a convolutional chain, written out as functions of the images.

Two passes of autograd keep the whole graph of the first alive, form the dense gradient of the head (7.8 million
numbers for a 10,177-class LeNet) and cannot be batched over samples. For convolutions with one elementwise activation
after each and one linear head the chain rule is a few lines of ordinary differentiable operations, through which
reverse mode, forward mode and ``torch.func.vmap`` pass.

With u_l the l-th convolution's output, a_l = phi(u_l) (a_0 = x), h = a_L flattened, z = W h + b and the
cross-entropy of label y::

    residual  r   = softmax(z) - e_y            dL/dW = r h^T          dL/db = r
    v             = W^T r  (= dL/dh)            delta_L = v * phi'(u_L)
    dL/dK_l       = delta_l correlated with a_{l-1}       dL/db_l = sum of delta_l over positions
    delta_{l-1}   = (K_l transposed applied to delta_l) * phi'(u_{l-1})

dL/dW is never formed: :func:`head_entries` gathers the entries that are asked for.
Weights are state dicts of the images' dtype and device throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.models.classifiers.lenet import ConvChain
from fedattack.models.normalise import Normaliser, normaliser

Weights = Mapping[str, Tensor]
Elementwise = Callable[[Tensor], Tensor]


def _sigmoid_slope(u: Tensor) -> Tensor:
    a = torch.sigmoid(u)
    return a * (1 - a)


def _sigmoid_bend(u: Tensor) -> Tensor:
    a = torch.sigmoid(u)
    return a * (1 - a) * (1 - 2 * a)


def _tanh_bend(u: Tensor) -> Tensor:
    a = torch.tanh(u)
    return -2 * a * (1 - a**2)


def normal_density(u: Tensor) -> Tensor:
    """Of the standard normal distribution."""
    return torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)


def _gelu_slope(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * normal_density(u)


@dataclass(frozen=True)
class Activation:
    """An elementwise phi with its first and second derivative; ReLU's second is zero, as autograd has it too."""

    value: Elementwise
    slope: Elementwise
    bend: Elementwise


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope, _sigmoid_bend),
    "tanh": Activation(torch.tanh, lambda u: 1 - torch.tanh(u) ** 2, _tanh_bend),
    "softplus": Activation(F.softplus, torch.sigmoid, _sigmoid_slope),
    "gelu": Activation(F.gelu, _gelu_slope, lambda u: normal_density(u) * (2 - u**2)),
    "relu": Activation(torch.relu, lambda u: (u > 0).to(u.dtype), torch.zeros_like),
}


@dataclass(frozen=True)
class Convolution:
    """A layer of the chain; pairs are (height, width), `output` is (channels, height, width)."""

    name: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    output: tuple[int, int, int]

    @property
    def weight(self) -> str:
        """State-dict name of the kernel, shape (outputs, inputs, kh, kw)."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """State-dict name of the bias, shape (outputs,)."""
        return f"{self.name}.bias"


@dataclass(frozen=True)
class Chain:
    """What the closed form needs of a :class:`~fedattack.models.classifiers.lenet.ConvChain`; no weights."""

    convolutions: tuple[Convolution, ...]
    activation: Activation
    image_shape: tuple[int, int, int]
    classes: int
    normaliser: Normaliser | None = None

    def shown(self, images: Tensor, *, tangents: bool = False) -> Tensor:
        """What the first convolution is given of images, or of directions in their space: (N, C, H, W) each."""
        if self.normaliser is None:
            return images
        mean, std = self.normaliser.columns(images)
        return images / std if tangents else (images - mean) / std

    @property
    def feature_count(self) -> int:
        """Inputs of the head (F)."""
        return math.prod(self.convolutions[-1].output)

    @property
    def names(self) -> list[str]:
        """State-dict names of the convolutions' tensors, in the model's order."""
        return [name for layer in self.convolutions for name in (layer.weight, layer.bias)]


def _convolution(name: str, layer: nn.Module, output: Tensor) -> Convolution:
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.dilation == (1, 1)
    if not isinstance(layer, nn.Conv2d) or not plain or layer.bias is None or layer.padding_mode != "zeros":
        raise NotApplicable(
            f"layer {name!r} is no plain convolution with a bias, as the closed-form gradients need it"
        )
    (kernel_h, kernel_w), (stride_h, stride_w) = layer.kernel_size, layer.stride
    pad_h, pad_w = (int(side) for side in layer.padding)
    channels, height, width = output.shape[1:]
    return Convolution(
        name, (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (channels, height, width)
    )


def describe(model: ModelConfig) -> Chain:
    """Read the chain off a resolved model configuration.

    NotApplicable if the model is no chain of plain convolutions with one activation after each and one linear head.
    """
    module = build_model(model)
    if not isinstance(module, ConvChain):
        raise NotApplicable(
            f"model.name = {model.name!r} is no chain of convolutions with one linear head, for which the "
            "closed-form gradients are written; use lenet-zhu or tiny-cnn"
        )
    channels, side, _ = model.resolved
    image_shape = (channels, side, side)
    activations = torch.zeros(1, *image_shape)
    layers: list[Convolution] = []
    for position, layer in enumerate(module.body):
        with torch.no_grad():
            activations = layer(activations)
        if position % 2 == 0:
            layers.append(_convolution(f"body.{position}", layer, activations))
    name = model.activation
    if name not in ACTIVATIONS:
        raise NotApplicable(
            f"model.activation = {name!r} has no closed-form derivatives; accepted: {', '.join(ACTIVATIONS)}"
        )
    return Chain(tuple(layers), ACTIVATIONS[name], image_shape, module.head.out_features, normaliser(model))


@dataclass(frozen=True)
class ForwardPass:
    """Inputs a_0 .. a_{L-1} and outputs u_1 .. u_L of the convolutions, each (N, channels, height, width)."""

    inputs: list[Tensor]
    outputs: list[Tensor]


def convolve(layer: Convolution, weights: Weights, inputs: Tensor, bias: bool = True) -> Tensor:
    """(N, inputs, H, W) -> (N, outputs, H', W'); without the bias it is the layer's action on tangents."""
    offset = weights[layer.bias] if bias else None
    return F.conv2d(inputs, weights[layer.weight], offset, layer.stride, layer.padding)


def transpose(layer: Convolution, weights: Weights, delta: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`convolve`: (N, outputs, H', W') -> (N, inputs, *size)."""
    spare = [
        size[i] - ((delta.shape[2 + i] - 1) * layer.stride[i] - 2 * layer.padding[i] + layer.kernel[i])
        for i in (0, 1)
    ]
    return F.conv_transpose2d(delta, weights[layer.weight], None, layer.stride, layer.padding, spare)


def patches(layer: Convolution, inputs: Tensor) -> Tensor:
    """Receptive fields (N, inputs * kh * kw, positions) of (N, inputs, H, W)."""
    return F.unfold(inputs, layer.kernel, padding=layer.padding, stride=layer.stride)


def run_forward(chain: Chain, weights: Weights, images: Tensor) -> ForwardPass:
    """All inputs and outputs of the convolutions for images (N, C, H, W)."""
    inputs = [chain.shown(images)]
    outputs = [convolve(chain.convolutions[0], weights, inputs[0])]
    for layer in chain.convolutions[1:]:
        inputs.append(chain.activation.value(outputs[-1]))
        outputs.append(convolve(layer, weights, inputs[-1]))
    return ForwardPass(inputs, outputs)


def features(chain: Chain, weights: Weights, images: Tensor) -> Tensor:
    """What the head sees of images (N, C, H, W): (N, F)."""
    return chain.activation.value(run_forward(chain, weights, images).outputs[-1]).flatten(1)


def head_residual(weights: Weights, features: Tensor, labels: Tensor) -> Tensor:
    """dL/dlogits of each sample's cross-entropy: softmax(W h + b) - e_y, shape (N, classes), from features (N, F).

    Labels are int64 (N,), or class probabilities (N, classes).
    """
    logits = F.linear(features, weights["head.weight"], weights["head.bias"])
    target = labels if labels.is_floating_point() else F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return logits.softmax(1) - target


def feature_gradient(weights: Weights, residual: Tensor) -> Tensor:
    """dL/dh = W^T r of each sample: (N, classes) -> (N, F)."""
    return residual @ weights["head.weight"]


def head_entries(residual: Tensor, features: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Entries (N, E) of each sample's head-weight gradient r h^T, without forming it.

    From residuals (N, classes), features (N, F), and int64 (E,) classes and features of the entries.
    """
    return residual[:, rows] * features[:, cols]


def deltas(chain: Chain, weights: Weights, forward: ForwardPass, last: Tensor) -> list[Tensor]:
    """dL/du_l of every convolution, first to last, from the last one's, shape (N, channels, H, W)."""
    found = [last]
    for position in range(len(chain.convolutions) - 1, 0, -1):
        below = forward.outputs[position - 1]
        size = (below.shape[2], below.shape[3])
        back = transpose(chain.convolutions[position], weights, found[0], size)
        found.insert(0, back * chain.activation.slope(below))
    return found


def correlate(layer: Convolution, delta: Tensor, fields: Tensor) -> Tensor:
    """Kernel gradient from dL/du (N, outputs, H', W') and receptive fields: (N, outputs, inputs, kh, kw)."""
    flat = delta.flatten(2) @ fields.transpose(1, 2)
    return flat.unflatten(2, (-1, *layer.kernel))


def correlate_directions(layer: Convolution, delta: Tensor, inputs: Tensor) -> Tensor:
    """:func:`correlate` of one delta (1, outputs, H', W') with many inputs (R, inputs, H, W), five times faster.

    Correlating with a fixed delta is a convolution whose kernel is that delta, dilated by the stride: no receptive
    field is ever copied out.
    """
    count, channels, height, width = inputs.shape
    planes = inputs.reshape(count * channels, 1, height, width)
    kernel = delta[0][:, None]
    found = F.conv2d(planes, kernel, padding=layer.padding, dilation=layer.stride)
    found = found[:, :, : layer.kernel[0], : layer.kernel[1]]
    return found.unflatten(0, (count, channels)).transpose(1, 2)


def conv_gradients(
    chain: Chain, weights: Weights, images: Tensor, feature_gradient: Tensor
) -> dict[str, Tensor]:
    """Per-sample gradients (N, *shape) of the convolutions' kernels and biases, by state-dict name.

    From images (N, C, H, W) and dL/dh (N, F) of :func:`feature_gradient`; differentiable in both.
    """
    forward = run_forward(chain, weights, images)
    top = forward.outputs[-1]
    last = feature_gradient.reshape(top.shape) * chain.activation.slope(top)
    return kernel_gradients(chain, forward, deltas(chain, weights, forward, last))


def kernel_gradients(chain: Chain, forward: ForwardPass, delta: Sequence[Tensor]) -> dict[str, Tensor]:
    """The last step of :func:`conv_gradients`, from a forward pass and its :func:`deltas`."""
    gradients: dict[str, Tensor] = {}
    for layer, inputs, dl_du in zip(chain.convolutions, forward.inputs, delta, strict=True):
        gradients[layer.weight] = correlate(layer, dl_du, patches(layer, inputs))
        gradients[layer.bias] = dl_du.flatten(2).sum(2)
    return gradients


def forward_tangents(chain: Chain, weights: Weights, forward: ForwardPass, tangents: Tensor) -> list[Tensor]:
    """Derivatives du_1 .. du_L of the convolutions' outputs at one image along R directions (R, C, H, W)."""
    found = [convolve(chain.convolutions[0], weights, chain.shown(tangents, tangents=True), bias=False)]
    for layer, below in zip(chain.convolutions[1:], forward.outputs, strict=False):
        found.append(convolve(layer, weights, found[-1] * chain.activation.slope(below), bias=False))
    return found


def conv_gradient_tangents(
    chain: Chain,
    weights: Weights,
    forward: ForwardPass,
    delta: Sequence[Tensor],
    tangents: Tensor,
    output_tangents: Sequence[Tensor],
    last_tangent: Tensor | None,
) -> dict[str, Tensor]:
    """Directional derivatives (R, *shape) of one sample's convolution gradients: columns of a Jacobian.

    Forward mode by hand: the tangents of a whole chunk of directions go through each convolution as one
    batch, which costs as much as that many forward and backward passes, without a graph.

    Parameters
    ----------
    forward, delta : ForwardPass, sequence of Tensor
        Of a single image, from :func:`run_forward` and :func:`deltas`.
    tangents, output_tangents : Tensor, sequence of Tensor
        Directions in image space (R, C, H, W), and what :func:`forward_tangents` makes of them.
    last_tangent : Tensor or None
        Derivative of delta_L, shape (R, channels, H', W'); None where delta_L does not move.
    """
    activation = chain.activation
    gradients: dict[str, Tensor] = {}
    moving = last_tangent
    for position in range(len(chain.convolutions) - 1, -1, -1):
        layer = chain.convolutions[position]
        if position > 0:
            below, below_tangent = forward.outputs[position - 1], output_tangents[position - 1]
            slope, bend = activation.slope(below), activation.bend(below)
            input_tangent = below_tangent * slope
        else:
            input_tangent = chain.shown(tangents, tangents=True)
        weight = correlate_directions(layer, delta[position], input_tangent)
        bias = torch.zeros(len(tangents), layer.output[0], dtype=tangents.dtype, device=tangents.device)
        if moving is not None:
            weight = weight + correlate(layer, moving, patches(layer, forward.inputs[position]))
            bias = moving.flatten(2).sum(2)
        gradients[layer.bias], gradients[layer.weight] = bias, weight
        if position > 0:
            size = (below.shape[2], below.shape[3])
            moving_below = transpose(layer, weights, delta[position], size) * bend * below_tangent
            if moving is not None:
                moving_below = moving_below + transpose(layer, weights, moving, size) * slope
            moving = moving_below
    return dict(reversed(gradients.items()))
