"""Which positions max-pooling took, and the images that go with them, in turns.

A layer behind ReLU and 2x2 max-pooling is given the largest output of each window of a convolution, and which of the
four that was is not sent. But the convolution's own gradient is, for each output channel, the sum over all windows of
all samples of a known factor times the patch of inputs at the position that was taken: ``g = sum_w c_w p_w[k_w]``. It
tells positions as a receiver tells the symbols of many senders on one channel: with patches of the images found so
far, each window's four hypotheses are weighed against what all other windows may still be, as one Gaussian; the prior
of a hypothesis is how well its output fits the layer's input, which is known. Then images are solved for with
positions as likely as that, by least squares on the layer's inputs and on the convolution's gradient, which given the
positions are linear in what the convolution is given; and so on. Both are of this project. Each image's own equations
are factored (:mod:`adversaries.inversion.matching.blocks`), so that conjugate gradients need only what ties images
together; how far a step trusts them follows what the last one left, since the kinks below bound how far they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from adversaries.inversion.evidence.whitening import Whitening
from adversaries.inversion.matching.below import Below, PooledConvolution, Weights
from adversaries.inversion.matching.blocks import Blocks, worthwhile
from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients

MOST_ENTRIES = 2048
"""Weights of an output channel up to which its gradient's covariance is worth factoring."""

_DETECTIONS = 3
_STEPS = 3
_ANEW = 4
"""Turns after which images' own matrices are factored again."""

_INNER = 150
_INNER_FACTORED = 60
"""Iterations of conjugate gradients in a step, without and with images' own matrices factored."""

_TRUSTED = 0.5
_FALL, _GROW = 0.5, 1.5
"""Noise of an image's outputs in a step, in units of what is left of them, and its ratios from step to step."""

_SPREAD = 1.0
"""Deviation of an output from the layer's input, in units of what is left of these."""

_UNEXPLAINED = 2.0
"""Noise of a channel's gradient beside what positions leave open, in units of its estimate."""

_SLOWEST = 0.8
_FASTEST = 0.5
_COOLING = 0.1
"""Least ratios from turn to turn: of outputs' deviations, and of a channel's noise."""

_SURE = 0.9995
_DAMPED = 0.7
_STALLED = 0.995
_STALLED_TURNS = 6
"""After so many turns in a row that leave more than that share of the least, there is no further."""


@dataclass
class _Chances:
    """Of windows' positions (B, O, h, w, 4), and the variance of a channel's gradient that they leave open (O,)."""

    shares: Tensor
    open: Tensor


class Positions:
    """The problem of one batch.

    Parameters
    ----------
    below, pooling, weights
        The network below the layer, its pooled convolution, and the weights that were sent.
    features, back : Tensor
        (B, n): the layer's inputs, and the derivative of the mean loss by them.
    target, kept : Tensor
        (O, K): the gradient of the convolution's weights, and which entries of it were sent.
    """

    def __init__(
        self,
        below: Below,
        pooling: PooledConvolution,
        weights: Weights,
        features: Tensor,
        back: Tensor,
        target: Tensor,
        kept: Tensor,
    ) -> None:
        self._below, self._pooling, self._weights = below, pooling, weights
        self._kernel = weights[f"{pooling.name}.weight"].detach()
        bias = weights.get(f"{pooling.name}.bias")
        self._bias = None if bias is None else bias.detach()
        channels, height, width = pooling.outputs
        self._size = (height, width)
        shape = (len(features), channels, height // 2, width // 2)
        self._wanted, self._on = features.view(shape), (features > 0).view(shape)
        self._back = back.view(shape) * self._on
        self._target, self._kept = target * kept, kept.to(target)
        self._counts = kept.sum(1).clamp(min=1)

    def settle(
        self,
        prior: Whitening,
        images: Tensor,
        left: Callable[[Tensor], tuple[Tensor, float]],
        turns: int,
        progress: Callable[[float], None],
    ) -> Tensor:
        """Images (B, C, H, W) from a first estimate, after the turn that leaves least of the inputs and the gradient.

        There are `turns` at most. `left` answers what is left of the layer's inputs (B,) and of the lower gradient
        at images; turns are compared by the product, which no scale enters.
        """

        def unexplained() -> float:
            inputs, lower = left(images)
            return float(inputs.mean()) * lower

        best, least = images, unexplained()
        blocks = None
        if worthwhile(images):
            blocks = Blocks(prior, self._given, self._kernel, self._pooling.settings, images)
        spread = misfit = level = images.new_zeros(len(images))
        noise, stalled = torch.zeros_like(self._target[:, 0]), 0
        for turn in range(turns):
            for step in range(_STEPS):
                given = self._given(images).detach()
                outputs = self._windows(self._convolved(given, self._bias))
                before, misfit = misfit, self._misfit(outputs)
                level = _trusted(level, misfit, before) if turn or step else misfit
                if not step:
                    wide = _SPREAD * misfit
                    spread = (_SLOWEST * spread).minimum(wide).maximum(_FASTEST * wide) if turn else wide
                    chances = self._detect(given, self._fitting(outputs, spread.clamp(min=1e-5)))
                noise = self._noise(given, chances).maximum(_COOLING * noise)
                anew = not step and turn % _ANEW == 0
                images = self._step(prior, images, chances.shares, noise, level.clamp(min=1e-6), blocks, anew)
            now = unexplained()
            stalled = stalled + 1 if now > _STALLED * least else 0
            if now < least:
                best, least = images, now
            progress((turn + 1) / turns)
            if stalled == _STALLED_TURNS:
                break
        return best

    def _given(self, images: Tensor) -> Tensor:
        return self._below.given_to(self._pooling.name, images, self._weights)

    def _convolved(self, given: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(given, self._kernel, bias, **self._pooling.settings)

    def _windows(self, outputs: Tensor) -> Tensor:
        """(B, O, H, W) -> (B, O, h, w, 4); what no window takes is left out."""
        high, wide = (2 * (size // 2) for size in self._size)
        cut = outputs[..., :high, :wide].unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        return cut.transpose(-3, -2).flatten(-2)

    def _unfolded(self, windows: Tensor) -> Tensor:
        """The adjoint of :meth:`_windows`."""
        whole = windows.unflatten(-1, (2, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        return F.pad(whole, (0, self._size[1] % 2, 0, self._size[0] % 2))

    def _misfit(self, outputs: Tensor) -> Tensor:
        """Root mean square (B,) of how far windows' largest outputs are from the layer's inputs that are not zero."""
        wrong = ((outputs.amax(-1) - self._wanted) * self._on).square().flatten(1).sum(1)
        return (wrong / self._on.flatten(1).sum(1).clamp(min=1)).sqrt()

    def _fitting(self, outputs: Tensor, spread: Tensor) -> Tensor:
        """Chances that each position was the largest, if its output is the layer's input and no other is above it."""
        far = (outputs - self._wanted[..., None]) / spread.view(-1, 1, 1, 1, 1)
        chances = torch.softmax(-far.square() / 2 - torch.special.log_ndtr(-far), -1)
        return chances * self._on[..., None]

    @torch.no_grad()
    def _detect(self, given: Tensor, fitting: Tensor) -> _Chances:
        """Chances of positions by outputs and the convolution's gradient, channel by channel."""
        settings = self._pooling.settings
        columns = F.unfold(
            given, self._kernel.shape[2:], settings["dilation"], settings["padding"], settings["stride"]
        )
        patches = self._windows(columns.unflatten(2, self._size)).permute(0, 2, 3, 4, 1)
        shares, left_open = fitting.clone(), torch.zeros_like(self._target[:, 0])
        for channel in range(len(self._target)):
            rows, high, wide = self._on[:, channel].nonzero().T
            if not len(rows):
                continue
            factors = self._back[rows, channel, high, wide][:, None, None]
            known = patches[rows, high, wide] * self._kept[channel] * factors  # (n, 4, K)
            prior = fitting[rows, channel, high, wide]
            found, left_open[channel] = _detected(
                known, prior, self._target[channel], int(self._counts[channel])
            )
            shares[rows, channel, high, wide] = found
        return _Chances(shares, left_open)

    def _noise(self, given: Tensor, chances: _Chances) -> Tensor:
        """Variance (O,) of each channel's gradient in a step: half of what is left of it, or what is open."""
        factors = self._unfolded(chances.shares * self._back[..., None])
        found = conv2d_weight(given, self._kernel.shape, factors, **self._pooling.settings).flatten(1)
        left = ((found - self._target) * self._kept).square().sum(1) / self._counts
        floor = (1e-10 * self._target.square().mean(1)).clamp(min=1e-30)
        return (left / 2).maximum(chances.open).maximum(floor)

    def _step(
        self,
        prior: Whitening,
        images: Tensor,
        shares: Tensor,
        noise: Tensor,
        misfit: Tensor,
        blocks: Blocks | None,
        anew: bool,
    ) -> Tensor:
        """One Gauss-Newton step on the layer's inputs, the convolution's gradient and the prior.

        `misfit` (B,) is the outputs' noise, `noise` the gradient's variance; `blocks` are factored `anew`, or are
        those of an earlier step.
        """
        images = images.detach().requires_grad_()
        given = self._given(images)
        zero = torch.zeros_like(given, requires_grad=True)
        (pulled,) = torch.autograd.grad(given, images, zero, create_graph=True)
        factors = self._unfolded(shares * self._back[..., None])
        with torch.no_grad():
            now = given.detach()
            outputs = self._windows(self._convolved(now, self._bias))
            above = outputs > self._wanted[..., None]
            # What was taken is as large as the layer's input, everything else at most: zero where nothing was taken.
            weights = torch.where(self._on[..., None], torch.where(above, 1.0, shares), above.to(shares))
            weights = weights / misfit.square().view(-1, 1, 1, 1, 1)
            wrong = self._unfolded(weights * (outputs - self._wanted[..., None]))
            weights = self._unfolded(weights)
            precision = self._kept / noise[:, None]

        def pull(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(given, images, cotangent, retain_graph=True)[0]

        def on_inputs(outputs: Tensor, gradient: Tensor) -> Tensor:
            kernel = gradient.view_as(self._kernel)
            return conv2d_input(now.shape, self._kernel, outputs, **self._pooling.settings) + conv2d_input(
                now.shape, kernel, factors, **self._pooling.settings
            )

        def gradient(inputs: Tensor) -> Tensor:
            return conv2d_weight(inputs, self._kernel.shape, factors, **self._pooling.settings).flatten(1)

        def system(v: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, zero, prior.turn(v), retain_graph=True)
            back = on_inputs(self._convolved(pushed) * weights, gradient(pushed) * precision)
            return prior.back(pull(back)) + v

        right = on_inputs(wrong, (gradient(now) - self._target) * precision)
        start = prior.whiten(images.detach())
        if blocks is not None and anew:
            blocks.factor(images.detach(), weights, factors, noise)
        most = _INNER if blocks is None else _INNER_FACTORED
        change, _ = conjugate_gradients(system, -prior.back(pull(right)) - start, most, 1e-4, blocks)
        return images.detach() + prior.turn(change)


def _trusted(level: Tensor, misfit: Tensor, before: Tensor) -> Tensor:
    """Outputs' noise (B,) of the next step: smaller where the last came nearer, larger where kinks led it astray."""
    nearer = (_TRUSTED * misfit).maximum(_FALL * level)
    return torch.where(misfit < before, nearer, (_GROW * level).minimum(misfit))


def _detected(known: Tensor, prior: Tensor, target: Tensor, count: int) -> tuple[Tensor, float]:
    """Chances (n, 4) of positions whose chosen patches (n, 4, K) sum to a gradient (K,), of `count` entries.

    Also the mean square of what the chances leave open of the gradient.
    """
    chances = prior
    for _ in range(_DETECTIONS):
        mean = (chances[..., None] * known).sum(1)
        left = target - mean.sum(0)
        doubtful = chances.amax(1) < _SURE
        if not bool(doubtful.any()):
            break
        off, roots = known[doubtful] - mean[doubtful][:, None], chances[doubtful].sqrt()
        spans = (off * roots[..., None]).flatten(0, 1)
        spans = spans[spans.square().sum(1) > 0]
        square = float(left.square().sum())
        noise = _UNEXPLAINED * max(
            (square - float(spans.square().sum())) / count, 0.05 * square / count, 1e-30
        )
        covariance = spans.T @ spans
        covariance.diagonal().add_(noise)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            break
        solved = torch.cholesky_solve(torch.cat([left[:, None], off.flatten(0, 1).T], 1), factor)
        along = off @ solved[:, 0]
        among = off @ solved[:, 1:].T.view(off.shape).transpose(1, 2)
        # The same without the window itself, by Woodbury's identity.
        inner = torch.eye(4, dtype=off.dtype, device=off.device) * (1 + 1e-6)
        inner = torch.linalg.inv(inner - roots[:, :, None] * among * roots[:, None, :])
        others = among * roots[:, None, :] @ inner * roots[:, None, :]
        along = along + (others @ along[..., None])[..., 0]
        among = among + others @ among
        score = along - among.diagonal(dim1=1, dim2=2) / 2
        told = torch.softmax(prior[doubtful].clamp(min=1e-12).log() + score, 1)
        chances = chances.clone()
        chances[doubtful] = (1 - _DAMPED) * chances[doubtful] + _DAMPED * told
    mean = (chances[..., None] * known).sum(1)
    return chances, float((chances[..., None] * (known - mean[:, None]).square()).sum()) / count
