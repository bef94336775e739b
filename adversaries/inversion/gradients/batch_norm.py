"""BatchNorm as four plain passes, and the statistics of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adversaries.inversion.gradients.convolution import Fold
from adversaries.inversion.gradients.layers import Directions, Layer, Maybe, Saved, add


class BatchNorm(Layer):
    """Normalisation over a victim's batch and positions, or by the running statistics.

    With n the normalised input, s the deviation and P v = v - mean(v) - n mean(n v) the projection that normalising
    applies to tangents::

        n' = P x' / s        dL/dx = (gamma / s) P delta        P' delta = -n' mean(n delta) - n mean(n' delta)

    Running statistics are constants: then P is the identity and s does not move.
    """

    def __init__(self, name: str, layer: nn.Module, weights: dict[str, Tensor], train: bool) -> None:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        gamma, beta = f"{name}.weight", f"{name}.bias"
        self.names = (gamma, beta) if layer.affine else ()
        like = next(iter(weights.values())).new_empty(layer.num_features)
        self._gamma = weights[gamma] if layer.affine else torch.ones_like(like)
        self._beta = weights[beta] if layer.affine else torch.zeros_like(like)
        self._eps = layer.eps
        self._train = train or layer.running_mean is None
        if not self._train:
            self._mean = weights[f"{name}.running_mean"]
            self._scale = (weights[f"{name}.running_var"] + self._eps).rsqrt()
            self._gain = self._gamma * self._scale
            self._offset = self._beta - self._mean * self._gain

    def fold(self) -> Fold | None:
        """What a convolution needs to take this layer in; None where it cannot."""
        if self._train or not self.names:
            return None
        return Fold(self.names, self._beta, self._mean, self._scale, self._gain)

    def moments(self, saved: Saved) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (V, channels) of the input over each victim's batch."""
        if "mean" not in saved:
            blocks = _blocks(saved["x"], saved["victims"])
            saved["mean"] = blocks.mean((1, 3), keepdim=True)
            saved["var"] = (blocks - saved["mean"]).square().mean((1, 3), keepdim=True)
        return saved["mean"][:, 0, :, 0], saved["var"][:, 0, :, 0]

    def moments_adjoint(self, saved: Saved, mean: Maybe, variance: Maybe) -> Maybe:
        """Gradient at the input of a function of :meth:`moments`."""
        blocks = _blocks(saved["x"], saved["victims"])
        count = blocks.shape[1] * blocks.shape[3]
        found = None
        if variance is not None:
            found = (blocks - saved["mean"]) * (2 / count * variance[:, None, :, None])
        if mean is not None:
            found = add(found, (mean[:, None, :, None] / count).expand_as(blocks))
        return None if found is None else found.reshape(saved["x"].shape)

    def forward(self, saved: Saved, victims: int, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        saved["x"], saved["victims"] = x, victims
        if not self._train:
            return torch.addcmul(_channels(self._offset, x), x, _channels(self._gain, x))
        self.moments(saved)
        scale = (saved["var"] + self._eps).rsqrt()
        normal = (_blocks(x, victims) - saved["mean"]) * scale
        saved["scale"], saved["normal"] = scale, normal
        found = torch.addcmul(self._beta[:, None], normal, self._gamma[:, None])
        return found.reshape(x.shape)

    def backward(self, saved: Saved, delta: Tensor) -> Sequence[Tensor]:
        if not self._train:
            return [delta * _channels(self._gain, delta)]
        projected = self._project(saved, _blocks(delta, saved["victims"]))
        saved["projected"] = projected
        return [(projected * (self._gamma[:, None] * saved["scale"])).reshape(delta.shape)]

    def gradients(self, saved: Saved, delta: Tensor, out: Sequence[Tensor]) -> None:
        blocks = _blocks(delta, saved["victims"])
        total = blocks.sum((1, 3))
        if self._train:
            torch.sum(blocks * saved["normal"], (1, 3), out=out[0])
        else:
            along = (blocks * _blocks(saved["x"], saved["victims"])).sum((1, 3))
            torch.mul(along - self._mean * total, self._scale, out=out[0])
        out[1].copy_(total)

    def push(self, saved: Saved, tangents: Directions, directions: Directions) -> Maybe:
        moved = tangents[0]
        x, victims = saved["x"], saved["victims"]
        gamma, beta = directions if self.names else (None, None)
        if not self._train:
            found = None if moved is None else moved * _channels(self._gain, moved)
            if gamma is not None and beta is not None:
                gain = gamma * self._scale
                blocks, offset = _blocks(x, victims), beta - gain * self._mean
                along = torch.addcmul(offset[:, None, :, None], blocks, gain[:, None, :, None])
                found = add(found, along.reshape(x.shape))
            return found
        saved["tangent"] = None
        found = None
        if moved is not None:
            saved["tangent"] = self._project(saved, _blocks(moved, victims), "rate") * saved["scale"]
            found = saved["tangent"] * self._gamma[:, None]
        if gamma is not None:
            found = add(found, saved["normal"] * gamma[:, None, :, None])
        if beta is not None:
            spread = beta[:, None, :, None]
            found = spread.expand_as(saved["normal"]) if found is None else found + spread
        return None if found is None else found.reshape(x.shape)

    def pull(self, saved: Saved, shift: Maybe, delta: Maybe, directions: Directions) -> Directions:
        victims, gamma = saved["victims"], directions[0] if self.names else None
        if not self._train:
            found = None if shift is None else shift * _channels(self._gain, shift)
            if gamma is not None and delta is not None:
                gain = (gamma * self._scale)[:, None, :, None]
                found = add(found, (_blocks(delta, victims) * gain).reshape(delta.shape))
            return [found]
        shape = saved["x"].shape
        scale, normal = saved["scale"], saved["normal"]
        gain = self._gamma[:, None] * scale
        found = None
        if shift is not None:
            found = self._project(saved, _blocks(shift, victims)) * gain
        if delta is not None:
            blocks, tangent = _blocks(delta, victims), saved["tangent"]
            factor = torch.zeros_like(scale)
            if gamma is not None:
                factor = factor + gamma[:, None, :, None] * scale
            if tangent is not None:
                factor = factor - gain * saved["rate"] * scale
                along = _mean(blocks * normal), _mean(blocks * tangent)
                found = add(found, (tangent * along[0] + normal * along[1]) * -gain)
            found = add(found, saved["projected"] * factor)
        return [None if found is None else found.reshape(shape)]

    def _project(self, saved: Saved, blocks: Tensor, keep: str | None = None) -> Tensor:
        """P v; the mean of n v is kept under the name `keep`."""
        normal = saved["normal"]
        along = _mean(blocks * normal)
        if keep is not None:
            saved[keep] = along
        return blocks - _mean(blocks) - normal * along


def _mean(blocks: Tensor) -> Tensor:
    """Over a victim's samples and positions."""
    return blocks.mean((1, 3), keepdim=True)


def _blocks(x: Tensor, victims: int) -> Tensor:
    """(V * B, C, ...) -> (V, B, C, positions)."""
    return x.reshape(victims, -1, x.shape[1], math.prod(x.shape[2:]))


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1) or whatever broadcasts over (N, C, ...)."""
    return vector.reshape(-1, *[1] * (like.dim() - 2))
