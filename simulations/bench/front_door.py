"""``fedattack.invert`` on networks that a user brings: how near the image comes, beside its floor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from skimage.data import astronaut
from skimage.transform import resize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from fedattack.errors import ConfigError
from fedattack.metrics import psnr
from simulations.front_door import invert

SIDE = 32


class OwnCNN(nn.Module):
    """Three convolutions of 16 channels and a head, the activation called as a function."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 16, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(16, 16, 5, padding=2)
        self.fc = nn.Linear(16 * (SIDE // 4) ** 2, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, 32, 32)."""
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.fc(self.act(self.conv3(x)).flatten(1))


def resnet18(gelu: bool) -> nn.Module:
    """torchvision's, untrained, with ten classes, in evaluation mode; its ReLUs exchanged for GELU where asked."""
    try:
        from torchvision.models import resnet18 as published
    except ImportError as error:
        raise ConfigError(f"case 'front-door' needs torchvision ({error})") from None
    module: nn.Module = published(num_classes=10).eval()
    for name, part in list(module.named_modules()):
        if gelu and isinstance(part, nn.ReLU):
            module.set_submodule(name, nn.GELU())
    return module


def photograph(side: int = SIDE) -> Tensor:
    """A face, (1, 3, S, S) in [0, 1]."""
    pixels = resize(astronaut()[20:220, 120:320], (side, side), anti_aliasing=True)
    return torch.tensor(pixels).permute(2, 0, 1)[None].float()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "own CNN, sigmoid": (lambda: OwnCNN(torch.sigmoid), 4000),
    "own CNN, ReLU": (lambda: OwnCNN(relu), 8000),
    "torchvision resnet18, GELU": (lambda: resnet18(True), 3000),
    "torchvision resnet18, ReLU": (lambda: resnet18(False), 3000),
}
"""Name -> network and Jacobian products."""


def run(*, quick: bool) -> dict[str, Any]:
    """PSNR of one photograph from one gradient, by gauss-newton, without public images."""
    images, labels = photograph(), torch.tensor([3])
    figures: dict[str, Any] = {}
    for name, (make, products) in NETWORKS.items():
        torch.manual_seed(0)
        net = make()
        sent = torch.autograd.grad(cross_entropy(net(images), labels), list(net.parameters()))
        started = time.perf_counter()
        found = invert(
            net,
            sent,
            image_shape=(3, SIDE, SIDE),
            attack="gauss-newton",
            options={"gauss-newton.products": 100 if quick else products},
        )
        figures |= {
            f"{name}: PSNR, dB": float(psnr(found.images, images)),
            f"{name}: floor, dB": float(psnr(found.floors["prior"], images)),
            f"{name}: residual": found.certificate,
            f"{name}: seconds": time.perf_counter() - started,
        }
    return figures
