"""The least-squares problem that one update poses, and its Jacobian.

Unknowns are z (B, modes) with images = mean + A z and z ~ N(0, I) a priori. Residuals are those of the label
rows' features before the sigmoid, and the *joint* ones: kept entries of the convolutions' gradients, of the
head's bias, and, for batches, of the head's other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.inversion.gradients import closed_form
from adversaries.inversion.gradients.closed_form import Chain, ForwardPass
from adversaries.reconstruction.hcgla.measurements import Measurements

FOLLOWED_MASS = 1 - 1e-5
FOLLOWED_CLASSES = 512
"""The softmax is differentiated over the likeliest classes only: enough for this mass, and at most so many."""


@dataclass(frozen=True)
class Anchor:
    """What the label rows say about the features (B, F), given the current class probabilities.

    `logits`: before the sigmoid where `known`, with `rounding`, the error left by the number format; `caps`:
    upper bounds of the others, inf where there is none.
    """

    known: Tensor
    logits: Tensor
    caps: Tensor
    rounding: Tensor


@dataclass(frozen=True)
class State:
    """The problem at one z, float64 (B, modes).

    Attributes
    ----------
    forward, delta : ForwardPass, list of Tensor
        Of all images, see :mod:`adversaries.inversion.gradients.closed_form`.
    held, moving, active : Tensor
        (B, F): features before the sigmoid as the head is taken to have seen them (known ones from the update,
        others from the images, capped); which of these follow the images; which features have a residual.
    softmax, probabilities : Tensor
        (B, classes): of the held features, and the same corrected by what was sent.
    vector : Tensor
        (B, F): v = W^T r.
    feature_residual, feature_noise, joint_residual, joint_noise : Tensor
        (B, F) twice, (number of joint measurements,) twice.
    """

    z: Tensor
    forward: ForwardPass
    delta: list[Tensor]
    held: Tensor
    moving: Tensor
    active: Tensor
    softmax: Tensor
    probabilities: Tensor
    vector: Tensor
    feature_residual: Tensor
    feature_noise: Tensor
    joint_residual: Tensor
    joint_noise: Tensor

    @property
    def objective(self) -> float:
        """Sum of squared, scaled residuals and the prior's |z|^2."""
        features = (self.feature_residual / self.feature_noise).square().sum()
        joint = (self.joint_residual / self.joint_noise).square().sum()
        return float(features + joint + self.z.square().sum())


class Problem:
    """One update's least-squares problem.

    Parameters
    ----------
    mean, factor : Tensor
        float64 (D,) and (D, most modes): images = mean + factor z, with as many columns as z has numbers.
    feature_noise, least_feature_noise : float
        Standard deviation of a known feature before the sigmoid: a share of s, and a lower limit.
    chunk : int
        Directions differentiated at once.
    reread : callable, optional
        Images (B, C, H, W) -> measurements, where these depend on the images; `measured` are those at the mean.
    """

    def __init__(
        self,
        chain: Chain,
        weights: dict[str, Tensor],
        measured: Measurements,
        mean: Tensor,
        factor: Tensor,
        feature_noise: float,
        least_feature_noise: float,
        chunk: int,
        device: torch.device,
        reread: Callable[[Tensor], Measurements] | None = None,
    ) -> None:
        self.chain, self.measured = chain, measured.to(device)
        self._reread = reread
        self.mean, self.factor = mean.to(device), factor.to(device)
        self.factor32 = factor.to(device, torch.float32)
        self.weights = {name: tensor.to(device, torch.float64) for name, tensor in weights.items()}
        self.weights32 = {name: tensor.to(device, torch.float32) for name, tensor in weights.items()}
        self.feature_noise, self.least_feature_noise = feature_noise, least_feature_noise
        self.chunk, self.device = chunk, device
        self.batch = len(measured.labels)
        # Where they were not rounded, features and probabilities are taken from the update as they were sent.
        self.exact = not measured.row_noise
        # Nearly linear in the features for one image, but noise in a small probability has no logarithm.
        self.log_biases = self.batch == 1 and not measured.bias_noise

    @property
    def rereads(self) -> bool:
        """Whether the measurements depend on the images."""
        return self._reread is not None

    def read(self, z: Tensor) -> None:
        """Take the measurements for what they are if z is right."""
        if self._reread is not None:
            self.measured = self._reread(self.images(z)).to(self.device)

    def anchor(self, state: State | None = None) -> Anchor:
        """Features from the label rows, less what the other images of a batch leak into them by `state`."""
        m = self.measured
        own = torch.zeros(self.batch, 1, dtype=torch.float64, device=self.device)
        other_rows, other_biases = torch.zeros_like(m.row_values), torch.zeros_like(own)
        if state is not None:
            p = state.softmax[:, m.labels]
            own = p.diagonal()[:, None]
            others = p.T * (1 - torch.eye(self.batch, dtype=p.dtype, device=self.device))
            other_rows, other_biases = others @ torch.sigmoid(state.held), others.sum(1, keepdim=True)
        residual = own - 1
        for sample, label in enumerate(m.labels):
            sent = m.bias_values[m.bias_rows == label]
            if sent.numel():
                residual[sample] = sent[0] - other_biases[sample]
        noise = (m.row_noise + m.bias_noise) / residual.abs()
        edge = (0.5 * noise).clamp(1e-7, 0.4)
        h = ((m.row_values - other_rows) / residual).clamp(edge, 1 - edge)
        bound = (m.row_bound / residual.abs()).expand_as(h)
        caps = torch.where(bound < 1, torch.logit(bound.clamp(1e-7, 1 - 1e-7)), math.inf)
        # d logit(h) = dh / (h (1 - h)), and h, a quotient of two rounded numbers, is off by about 1.5 roundings.
        rounding = (1.5 * m.precision + noise / h) / (1 - h)
        return Anchor(m.row_known, torch.logit(h), caps, rounding)

    def widen(self, share: float) -> float:
        """Make the prior's deviations that many times as large; returns `share`, by which z shrinks."""
        self.factor, self.factor32 = self.factor * share, self.factor32 * share
        return share

    def left_out(self, modes: int) -> float:
        """Variance a priori, averaged over the pixels, that so few modes cannot express."""
        return float(self.factor[:, modes:].square().sum()) / len(self.factor)

    def images(self, z: Tensor) -> Tensor:
        """(B, C, H, W) of z (B, modes)."""
        return (self.mean + z @ self.factor[:, : z.shape[1]].T).unflatten(1, self.chain.image_shape)

    def evaluate(self, z: Tensor, s: float, anchor: Anchor) -> State:
        """All residuals at z, and their standard deviations at s."""
        m, chain = self.measured, self.chain
        forward = closed_form.run_forward(chain, self.weights, self.images(z))
        top = forward.outputs[-1].flatten(1)
        held = torch.minimum(top, torch.where(anchor.known, math.inf, anchor.caps))
        if self.exact:
            held = torch.where(anchor.known, anchor.logits, held)
        features = torch.sigmoid(held)
        logits = features @ self.weights["head.weight"].T + self.weights["head.bias"]
        log_softmax = logits.log_softmax(1)
        probabilities = self._with_sent_biases(log_softmax.exp())
        residual = probabilities.clone()
        residual[torch.arange(self.batch), m.labels] -= 1
        vector = closed_form.feature_gradient(self.weights, residual)
        last = (vector * chain.activation.slope(held)).reshape(forward.outputs[-1].shape)
        delta = closed_form.deltas(chain, self.weights, forward, last)

        least = max(self.feature_noise * s, self.least_feature_noise)
        over = (top - anchor.caps).clamp(min=0)
        feature_noise = torch.where(anchor.known, (least**2 + anchor.rounding**2).sqrt(), least)

        gradients = closed_form.kernel_gradients(chain, forward, delta)
        predicted = torch.cat([gradients[name].mean(0).flatten() for name in chain.names])[m.conv_positions]
        conv_noise = ((s * m.conv_scales) ** 2 + m.conv_rounding**2).sqrt()
        bias_residual, bias_noise = self._bias_residual(log_softmax, s, least)
        entries = closed_form.head_entries(residual, features, m.head_rows, m.head_cols).sum(0)
        entry_noise = torch.full_like(entries, math.hypot(s * m.head_scale, m.row_noise))
        return State(
            z=z,
            forward=forward,
            delta=delta,
            held=held,
            moving=(~anchor.known & (top < anchor.caps)) | (anchor.known & (not self.exact)),
            active=anchor.known | (over > 0),
            softmax=log_softmax.exp(),
            probabilities=probabilities,
            vector=vector,
            feature_residual=torch.where(anchor.known, top - anchor.logits, over),
            feature_noise=feature_noise,
            joint_residual=torch.cat([predicted - m.conv_values, bias_residual, entries - m.head_values]),
            joint_noise=torch.cat([conv_noise, bias_noise, entry_noise]),
        )

    def _with_sent_biases(self, softmax: Tensor) -> Tensor:
        """For one image the bias gradient is the softmax itself: take what was sent, scale and cap the rest."""
        m = self.measured
        if not self.exact or self.batch > 1 or not len(m.bias_values):
            return softmax
        sent = m.bias_values + (m.bias_rows == m.labels[0])
        rest = softmax.clone()
        rest[0, m.bias_rows] = 0
        rest *= (1 - sent.sum()).clamp(min=0) / rest.sum().clamp(min=1e-30)
        rest = torch.minimum(rest, m.bias_bound)
        rest[0, m.bias_rows] = sent.clamp(min=0)
        return rest

    def _bias_residual(self, log_softmax: Tensor, s: float, least: float) -> tuple[Tensor, Tensor]:
        """Kept entries of the head's bias, as log-probabilities where they are known well."""
        m = self.measured
        own = (m.bias_rows[:, None] == m.labels).to(log_softmax.dtype).sum(1)
        if not self.log_biases:
            predicted = log_softmax.exp()[:, m.bias_rows].sum(0) - own
            noise = math.hypot(s * m.bias_scale, m.bias_noise)
            return predicted - m.bias_values, torch.full_like(predicted, noise)
        # The label's entry is p - 1: a small p is lost in rounding.
        sent = (m.bias_values + own).clamp(min=1e-6)
        residual = log_softmax[0, m.bias_rows] - sent.log()
        blurred = (s * m.bias_scale / sent).clamp(min=least)
        return torch.where(sent > 1e-4, residual, 0.0), blurred

    def jacobian(self, state: State) -> tuple[list[Tensor], Tensor]:
        """Derivatives of the residuals by z, divided by their noise; transposed, float32.

        Per image the active features', (modes, active); and the joint measurements', (B * modes, measurements).
        """
        modes = state.z.shape[1]
        joint = torch.empty(self.batch * modes, len(state.joint_residual), device=self.device)
        scale = (1 / state.joint_noise).float()
        per_image = []
        for sample in range(self.batch):
            features = torch.empty(modes, int(state.active[sample].sum()), device=self.device)
            differentiate = _OneImage(self, state, sample)
            for start in range(0, modes, self.chunk):
                rows = slice(start, min(start + self.chunk, modes))
                moved, features[rows] = differentiate(self.factor32[:, rows].T)
                joint[sample * modes :][rows] = moved * scale
            per_image.append(features)
        return per_image, joint


class _OneImage:
    """Tangents of all residuals by one image: the state and the softmax, prepared once for all chunks."""

    def __init__(self, problem: Problem, state: State, sample: int) -> None:
        m = problem.measured
        self.problem, self.chain, self.measured = problem, problem.chain, m
        self.forward = ForwardPass(
            [t[sample : sample + 1].float() for t in state.forward.inputs],
            [t[sample : sample + 1].float() for t in state.forward.outputs],
        )
        self.delta = [t[sample : sample + 1].float() for t in state.delta]
        self.active = state.active[sample].nonzero()[:, 0]
        self.feature_scale = (1 / state.feature_noise[sample, self.active]).float()
        self.moving = state.moving[sample].float()
        self.still = not bool(state.moving[sample].any())
        held, activation = state.held[sample], problem.chain.activation
        self.slope, self.bend = activation.slope(held).float(), activation.bend(held).float()
        self.vector = state.vector[sample].float()
        self._prepare_softmax(state, sample, held)

    def _prepare_softmax(self, state: State, sample: int, held: Tensor) -> None:
        problem, m = self.problem, self.measured
        softmax, corrected = state.softmax[sample], state.probabilities[sample]
        order = softmax.argsort(descending=True)
        needed = int((softmax[order].cumsum(0) < FOLLOWED_MASS).sum()) + 1
        followed = [order[: min(needed, FOLLOWED_CLASSES)], m.bias_rows, m.head_rows]
        classes = torch.cat(followed).unique()
        self.weight = problem.weights32["head.weight"][classes]
        self.softmax = softmax[classes].float()
        # For one image the probabilities that were sent, and those at their bound, are constants.
        unsent = torch.ones_like(corrected)
        unsent[m.bias_rows] = 0
        self.unsent = (softmax * unsent / (softmax * unsent).sum().clamp(min=1e-30))[classes].float()
        self.free = (corrected * unsent * (corrected < m.bias_bound))[classes].float()
        self.bias_at = torch.searchsorted(classes, m.bias_rows)
        self.head_at = torch.searchsorted(classes, m.head_rows)
        self.head_residual = corrected[m.head_rows].float()
        self.head_features = torch.sigmoid(held)[m.head_cols].float()

    def __call__(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Directions (R, D) -> tangents of the joint residuals (R, measurements), of the features (R, active)."""
        chain, m, weights = self.chain, self.measured, self.problem.weights32
        tangents = directions.unflatten(1, chain.image_shape)
        outputs = closed_form.forward_tangents(chain, weights, self.forward, tangents)
        top = outputs[-1].flatten(1)
        last, biases, entries = self._head(top)
        if not len(m.conv_positions):
            return torch.cat([biases, entries], 1), top[:, self.active] * self.feature_scale
        gradients = closed_form.conv_gradient_tangents(
            chain,
            weights,
            self.forward,
            self.delta,
            tangents,
            outputs,
            None if last is None else last.reshape(outputs[-1].shape),
        )
        flat = torch.cat([gradients[name].flatten(1) for name in chain.names], 1)[:, m.conv_positions]
        joint = torch.cat([flat / self.problem.batch, biases, entries], 1)
        return joint, top[:, self.active] * self.feature_scale

    def _head(self, top: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Tangents of u_L (R, F) -> of delta_L (R, F), None where it rests, of the kept biases and head entries."""
        m = self.measured
        if self.still:
            return None, top.new_zeros(len(top), len(m.bias_rows)), top.new_zeros(len(top), len(m.head_rows))
        shift = top * self.moving
        features = shift * self.slope
        logits = features @ self.weight.T
        relative = logits - (logits @ self.softmax)[:, None]
        if self.problem.batch == 1 and self.problem.exact:
            biases = relative[:, self.bias_at]
            moved = (logits - (logits @ self.unsent)[:, None]) * self.free
        else:
            moved = relative * self.softmax
            biases = (relative if self.problem.log_biases else moved)[:, self.bias_at]
        last = (moved @ self.weight) * self.slope + self.vector * self.bend * shift
        entries = moved[:, self.head_at] * self.head_features + features[:, m.head_cols] * self.head_residual
        return last, biases, entries
