"""The weights that a malicious server sends: Gaussian neurons, one direction in the head."""

from __future__ import annotations

import torch
from torch import Tensor

from adversaries.reconstruction.base import armable
from fedattack.errors import NotApplicable
from fedattack.models.armable.two_layer import TwoLayer
from fedattack.models.normalise import normaliser, shown
from fedattack.observation import Auxiliary, Scenario
from fedattack.rng import torch_rng

TYPICAL_MEAN, TYPICAL_DEVIATION = 0.3, 0.25
"""Of pixels, where no public images are granted (digits 0.13 and 0.31, photographs 0.45 and 0.25)."""

_SHRINK = 1e-2
_IMAGES = 2048


def armed(
    scenario: Scenario,
    weights: dict[str, Tensor],
    seed: int,
    auxiliary: Auxiliary | None,
    *,
    scale: float,
    signs: bool,
    strength: float | None,
    whiten: bool | None,
    spread: bool,
) -> dict[str, Tensor]:
    """The state dict that is sent instead of `weights`: stem as it was, wide layer and head replaced.

    The wide layer's rows are draws of N(0, sigma^2 I) with sigma such that w.x is about `scale` for a typical
    input, or of N(0, sigma^2 S^-1) with S the inputs' second moment, shrunk by a hundredth of its mean: images have
    much in common (their mean, above all), and neurons that look away from it see how they differ. The head is zero
    but for its first row: then the wide layer's gradient is that of a single output, and the softmax residuals of
    the classes cannot cancel in it (summed over all classes they do). `signs`: random ones in that row, whose
    output then stays of the size of sqrt(m) instead of m entries; `strength`: their size, None: 1 / m, or 1 /
    sqrt(m) with signs.

    `whiten`: by S of the public images, which must be granted. None: where the attack is inexact enough to need it
    (`spread`), by S of the public images or, without any, of grey noise.
    """
    module = armable(scenario, TwoLayer).eval()
    module.load_state_dict(weights)
    generator = torch_rng(seed, "tensor.arm")
    m, d = module.wide.weight.shape
    granted = auxiliary is not None and len(auxiliary) > 0
    if whiten and not granted:
        raise NotApplicable(
            "setting 'tensor.whiten_weights' = True needs public images (setting 'data.auxiliary_size')"
        )
    if granted:
        assert auxiliary is not None
        images = auxiliary.images[:_IMAGES]
    else:
        noise = torch.randn(_IMAGES, *scenario.image_shape, generator=generator)
        images = (TYPICAL_MEAN + TYPICAL_DEVIATION * noise).clamp(0, 1)
    with torch.no_grad():
        inputs = module.inputs(shown(images, scenario.model)).double()
    draws = torch.randn(m, d, generator=generator, dtype=torch.float64)
    if whiten or (whiten is None and spread):
        moment = inputs.T @ inputs / len(inputs)
        plain = isinstance(module.stem, torch.nn.Flatten) and normaliser(scenario.model) is None
        if not granted and plain:  # of noise, without its sampling error
            moment = torch.full((d, d), TYPICAL_MEAN**2, dtype=torch.float64)
            moment.diagonal().add_(TYPICAL_DEVIATION**2)
        moment.diagonal().add_(_SHRINK * moment.diagonal().mean())
        # Rows with covariance S^-1: Z L^-1 for S = L L'.
        factor = torch.linalg.cholesky(moment)
        draws = torch.linalg.solve_triangular(factor, draws, upper=False, left=False)
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
