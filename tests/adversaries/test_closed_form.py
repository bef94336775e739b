"""The closed-form gradients against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adversaries.inversion.gradients import closed_form
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.models.classifiers.lenet import ConvChain


def model(
    name: str = "lenet-zhu", activation: str = "sigmoid", channels: int = 3, size: int = 32
) -> ModelConfig:
    return ModelConfig(name=name, classes=7, channels=channels, image_size=size, activation=activation)


def batch(config: ModelConfig, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    assert config.channels is not None
    assert config.image_size is not None
    images = torch.rand(count, config.channels, config.image_size, config.image_size, generator=generator)
    return images, torch.randint(7, (count,), generator=generator)


def worst_error(config: ModelConfig, dtype: torch.dtype) -> float:
    """Largest relative error over parameters and samples."""
    weights = {name: tensor.to(dtype) for name, tensor in initial_weights(config, 3).items()}
    module = build_model(config).to(dtype)
    assert isinstance(module, ConvChain)
    module.load_state_dict(weights)
    images, labels = batch(config)
    images = images.to(dtype)
    chain = closed_form.describe(config)
    features = closed_form.features(chain, weights, images)
    torch.testing.assert_close(features, module.features(images))
    residual = closed_form.head_residual(weights, features, labels)
    pulled = closed_form.feature_gradient(weights, residual)
    found = closed_form.conv_gradients(chain, weights, images, pulled)
    found |= {"head.weight": residual[:, :, None] * features[:, None], "head.bias": residual}
    errors = []
    for n in range(len(images)):
        module.zero_grad()
        F.cross_entropy(module(images[n : n + 1]), labels[n : n + 1]).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            errors.append(float((found[name][n] - parameter.grad).norm() / parameter.grad.norm()))
    return max(errors)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softplus", "gelu", "relu"])
@pytest.mark.parametrize(
    ("name", "channels", "size"), [("lenet-zhu", 3, 32), ("lenet-zhu", 1, 18), ("tiny-cnn", 3, 15)]
)
def test_equals_autograd(activation: str, name: str, channels: int, size: int) -> None:
    # torch's softplus is linear above 20, where its slope is off by up to 2e-9.
    bound = 1e-8 if activation == "softplus" else 1e-12
    assert worst_error(model(name, activation, channels, size), torch.float64) < bound


def test_equals_autograd_in_float32_to_rounding() -> None:
    assert worst_error(model(), torch.float32) < 4e-6  # sums are added in another order on every processor


def test_derivatives_equal_autograd_in_float64() -> None:
    u = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    for name, activation in closed_form.ACTIVATIONS.items():
        slope = torch.autograd.grad(activation.value(u).sum(), u, create_graph=True)[0]
        torch.testing.assert_close(activation.slope(u), slope, msg=name)
        if name != "relu":
            bend = torch.autograd.grad(slope.sum(), u)[0]
            torch.testing.assert_close(activation.bend(u), bend, msg=name)


@pytest.mark.slow
def test_reverse_forward_and_vmapped_derivatives_agree() -> None:
    config = model(channels=1, size=12)
    weights = {name: tensor.double() for name, tensor in initial_weights(config, 1).items()}
    chain = closed_form.describe(config)
    images, _ = batch(config, 1)
    images = images.double()
    gradient = torch.randn(1, chain.feature_count, generator=torch.Generator().manual_seed(2)).double()

    def kernels(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [g.flatten() for g in closed_form.conv_gradients(chain, weights, x, gradient).values()]
        )

    tangents = torch.randn(4, *images.shape, generator=torch.Generator().manual_seed(3)).double()
    reverse = torch.autograd.functional.jacobian(kernels, images).flatten(1)
    forward = torch.func.vmap(lambda t: torch.func.jvp(kernels, (images,), (t,))[1])(tangents)
    torch.testing.assert_close(forward, tangents.flatten(1) @ reverse.T)


def test_hand_written_tangents_equal_forward_mode() -> None:
    config = model(channels=3, size=11)
    weights = {name: tensor.double() for name, tensor in initial_weights(config, 1).items()}
    chain = closed_form.describe(config)
    images = batch(config, 1)[0].double()
    generator = torch.Generator().manual_seed(4)
    tangents = torch.randn(5, *images.shape[1:], generator=generator).double()
    fixed = torch.randn(1, chain.feature_count, generator=generator).double()

    def top_gradient(x: torch.Tensor) -> torch.Tensor:
        return fixed * torch.sin(closed_form.features(chain, weights, x))  # any smooth function of the image

    def kernels(x: torch.Tensor) -> torch.Tensor:
        found = closed_form.conv_gradients(chain, weights, x, top_gradient(x))
        return torch.cat([found[name].flatten() for name in chain.names])

    forward = closed_form.run_forward(chain, weights, images)
    outputs = closed_form.forward_tangents(chain, weights, forward, tangents)
    top = forward.outputs[-1]
    slope, bend = chain.activation.slope(top), chain.activation.bend(top)
    gradient = top_gradient(images).reshape(top.shape)
    gradient_tangents = torch.func.vmap(lambda t: torch.func.jvp(top_gradient, (images,), (t[None],))[1][0])(
        tangents
    )
    last_tangents = gradient_tangents.reshape(outputs[-1].shape) * slope + gradient * bend * outputs[-1]
    delta = closed_form.deltas(chain, weights, forward, gradient * slope)
    by_hand = closed_form.conv_gradient_tangents(
        chain, weights, forward, delta, tangents, outputs, last_tangents
    )
    expected = torch.func.vmap(lambda t: torch.func.jvp(kernels, (images,), (t[None],))[1])(tangents)
    assert list(by_hand) == chain.names
    torch.testing.assert_close(torch.cat([by_hand[name].flatten(1) for name in chain.names], 1), expected)


def test_head_entries_are_gathered() -> None:
    residual, features = torch.randn(2, 5), torch.rand(2, 4)
    rows, cols = torch.tensor([0, 4, 2]), torch.tensor([3, 0, 2])
    dense = residual[:, :, None] * features[:, None, :]
    torch.testing.assert_close(closed_form.head_entries(residual, features, rows, cols), dense[:, rows, cols])


def test_refuses_what_is_no_chain() -> None:
    with pytest.raises(NotApplicable, match="resnet18"):
        closed_form.describe(model("resnet18"))
