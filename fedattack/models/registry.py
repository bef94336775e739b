"""Models by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedattack.config import ModelConfig
from fedattack.registry import Registry

Builder = Callable[[ModelConfig], nn.Module]

MODELS: Registry[Builder] = Registry(
    "model",
    {
        "lenet-zhu": "fedattack.models.classifiers.lenet:lenet_zhu",
        "resnet18": "fedattack.models.classifiers.resnet:resnet18",
        "resnet20": "fedattack.models.classifiers.resnet:resnet20",
        "resnet20-4": "fedattack.models.classifiers.resnet:resnet20_4",
        "resnet34": "fedattack.models.classifiers.resnet:resnet34",
        "tiny-cnn": "fedattack.models.classifiers.lenet:tiny_cnn",
        "convnet": "fedattack.models.classifiers.convnet:convnet",
        "cnn-mcmahan": "fedattack.models.classifiers.cnn:cnn_mcmahan",
        "cnn-flower": "fedattack.models.classifiers.cnn:cnn_flower",
        "mlp": "fedattack.models.classifiers.lenet:mlp",
        "logistic": "fedattack.models.classifiers.lenet:logistic",
        "lcodec-cnn": "fedattack.models.classifiers.lcodec:lcodec_cnn",
        "imprint": "fedattack.models.armable.imprint:imprint",
        "imprint-sparse": "fedattack.models.armable.imprint:imprint_sparse",
        "loki": "fedattack.models.armable.loki:loki",
        "two-layer": "fedattack.models.armable.two_layer:two_layer",
        "lenet-two-layer": "fedattack.models.armable.two_layer:lenet_two_layer",
        "wgan-gp": "fedattack.generative.nets:wgan_gp",
        "wgan-gp-mlp": "fedattack.generative.nets:wgan_gp_mlp",
    },
    group="fedattack.models",
    families={
        "torchvision": "fedattack.models.zoo:torchvision_model",
        "timm": "fedattack.models.zoo:timm_model",
    },
)
