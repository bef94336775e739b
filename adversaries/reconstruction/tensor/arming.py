"""The weights that a malicious server sends: Gaussian neurons, one direction in the head."""

from __future__ import annotations

import torch
from torch import Tensor

from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.models.two_layer import TwoLayer
from fedattack.observation import Auxiliary, Scenario
from fedattack.rng import torch_rng

TYPICAL_PIXEL_SQUARE = 0.15
"""Mean squared pixel that is assumed where no public images are granted (digits 0.1, photographs 0.25)."""

_SHRINK = 1e-2
_IMAGES = 2048


def _stem(scenario: Scenario, weights: dict[str, Tensor]) -> TwoLayer:
    module = build_model(scenario.model)
    if not isinstance(module, TwoLayer):
        raise NotApplicable(
            f"model.name = {scenario.model.name!r} has no wide two-layer head; use two-layer or lenet-two-layer"
        )
    module.load_state_dict(weights)
    return module.eval()


def armed(
    scenario: Scenario,
    weights: dict[str, Tensor],
    seed: int,
    auxiliary: Auxiliary | None,
    *,
    scale: float,
    signs: bool,
    strength: float | None,
    whiten: bool,
) -> dict[str, Tensor]:
    """The state dict that is sent instead of `weights`: stem as it was, wide layer and head replaced.

    The wide layer's rows are draws of N(0, sigma^2 I) with sigma such that w.x is about `scale` for a typical input,
    or of N(0, sigma^2 S^-1) with S the public inputs' second moment, shrunk by a hundredth of its mean. The head is zero but
    for its first row, a constant: then the wide layer's gradient is that of a single output, and the softmax
    residuals of the classes cannot cancel in it (summed over all classes they do).

    Parameters
    ----------
    scale : float
        Typical |w.x|.
    signs : bool
        Random signs in the head's row: its output then stays of the size of sqrt(m) instead of m entries.
    strength : float or None
        Size of the entries; None: 1 / m, or 1 / sqrt(m) with signs.
    whiten : bool
        Needs `auxiliary`.
    """
    module = _stem(scenario, weights)
    generator = torch_rng(seed, "tensor.arm")
    m, d = module.wide.weight.shape
    channels, height, width = scenario.image_shape
    if auxiliary is not None and len(auxiliary):
        images = auxiliary.images[:_IMAGES]
    else:
        # Grey with the typical energy: enough to know how long an input is.
        images = torch.full((1, channels, height, width), TYPICAL_PIXEL_SQUARE**0.5)
    with torch.no_grad():
        inputs = module.inputs(images).double()
    draws = torch.randn(m, d, generator=generator, dtype=torch.float64)
    if whiten:
        if auxiliary is None or not len(auxiliary):
            raise NotApplicable(
                "setting 'tensor.whiten_weights' = True needs public images (setting 'data.auxiliary_size')"
            )
        moment = inputs.T @ inputs / len(inputs)
        moment.diagonal().add_(_SHRINK * moment.diagonal().mean())
        values, vectors = torch.linalg.eigh(moment)
        draws = draws @ (vectors / values.sqrt()) @ vectors.T
    typical = (inputs @ draws.T).square().mean().sqrt()
    wide = draws * (scale / typical)
    size = strength if strength is not None else (m**-0.5 if signs else 1.0 / m)
    row = torch.full((m,), size, dtype=torch.float64)
    if signs:
        row *= torch.randint(0, 2, (m,), generator=generator) * 2 - 1
    head = torch.zeros(module.head.out_features, m, dtype=torch.float64)
    head[0] = row
    sent = dict(weights)
    sent["wide.weight"], sent["head.weight"] = wide.float(), head.float()
    return sent
