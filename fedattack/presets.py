"""Whole set-ups by name: what is meant by settings that are left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCENARIOS: dict[str, dict[str, Any]] = {
    "federated": {},
    "central": {
        "training": {"protocol": "fedavg"},
        "compression": {"name": "none"},
        "federation": {"clients": 1},
        "engine": {"name": "inline"},
    },
}
"""Scenario -> the same: one who holds all data trains on it and is the server, so that nothing is sent."""


@dataclass(frozen=True)
class Preset:
    """A set-up: one line for lists, and nested settings."""

    summary: str
    settings: dict[str, Any]


def _central(
    data: dict[str, Any], model: str, training: dict[str, Any], rounds: int, **more: Any
) -> dict[str, Any]:
    return {
        "scenario": "central",
        "data": data,
        "model": {"name": model},
        "training": {"protocol": "fedavg", **training},
        "compression": {"name": "none"},
        "federation": {"rounds": rounds},
        **more,
    }


# A round is one pass over the data. The large ones are those of L-CODEC (Mehta et al., CVPR 2022: its scripts) and of
# the poisoning of it, whose logistic model takes learning rate 0.1 and whose small network 0.001; the cosine schedule
# of L-CODEC's learning rate is not followed, and momentum starts anew in every round. Of MNIST's 60,000 training
# images 10,000 are held out. The small ones have fewer images and rounds, and rates that suit these.
_MNIST = {"name": "mnist", "nonmembers": 10_000, "auxiliary_size": 0}
_SMALL = {"name": "mnist", "limit": 5_500, "nonmembers": 1_000, "auxiliary_size": 500}
_PUBLISHED = {"batch_size": 256, "local_steps": 196, "momentum": 0.9, "weight_decay": 0.01}

PRESETS: dict[str, Preset] = {
    "mnist-logistic": Preset(
        "Logistic regression on 50,000 MNIST images, one holder, 50 epochs (Mehta et al., 2022).",
        _central(_MNIST, "logistic", _PUBLISHED | {"learning_rate": 0.1}, 50),
    ),
    "mnist-logistic-small": Preset(
        "Logistic regression on 4,000 MNIST images, one holder, 10 epochs.",
        _central(
            _SMALL,
            "logistic",
            {"batch_size": 64, "local_steps": 63, "learning_rate": 0.1, "weight_decay": 0.001},
            10,
        ),
    ),
    "mnist-cnn": Preset(
        "L-CODEC's CNN on 50,000 MNIST images, one holder, 50 epochs (Mehta et al., 2022).",
        _central(_MNIST, "lcodec-cnn", _PUBLISHED | {"learning_rate": 0.001}, 50),
    ),
    "mnist-cnn-small": Preset(
        "L-CODEC's CNN on 4,000 MNIST images, one holder, 4 epochs.",
        _central(
            _SMALL,
            "lcodec-cnn",
            {
                "batch_size": 64,
                "local_steps": 63,
                "learning_rate": 0.05,
                "momentum": 0.9,
                "weight_decay": 0.001,
            },
            4,
        ),
    ),
    "cifar-resnet18": Preset(
        "ResNet-18 on 40,000 CIFAR-10 images, one holder, 200 epochs (Mehta et al., 2022).",
        _central(
            {"name": "cifar10", "nonmembers": 10_000, "auxiliary_size": 0},
            "resnet18",
            {
                "batch_size": 128,
                "local_steps": 313,
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
            },
            200,
        ),
    ),
    "cifar-resnet18-small": Preset(
        "ResNet-18 on 400 CIFAR-10 images of 16 x 16 pixels, one holder, 4 epochs.",
        _central(
            {"name": "cifar10", "image_size": 16, "limit": 1_000, "nonmembers": 500, "auxiliary_size": 100},
            "resnet18",
            {
                "batch_size": 50,
                "local_steps": 8,
                "learning_rate": 0.02,
                "momentum": 0.9,
                "weight_decay": 5e-4,
            },
            4,
            unlearning={"seeds": 2},
        ),
    ),
}
"""Preset -> what is meant where neither the person nor a file says."""
