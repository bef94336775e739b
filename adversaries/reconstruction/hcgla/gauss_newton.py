"""Damped Gauss-Newton on the entries that were sent: the best honest reconstruction we know from one update.

Gradient matching by a first-order optimiser stops far from what a sparse update really gives away. This solver
treats the update as what it is, a few thousand noiseless measurements of a few thousand pixels:

1. *Decouple through the head.* The head's gradient is r h^T and its bias' gradient is r = softmax(z) - e_y, so a
   kept entry of the label's row gives one feature exactly, h_j = gW[y, j] / gb[y]; an entry that was not sent is
   known to be small, h_j < tau / |gb[y]|. After the sigmoid is inverted, features are smooth functions of the image,
   and the convolutions' gradients depend on the head only through v = W^T r, which those features fix.
2. *Gauss-Newton.* Residuals are the known features before the sigmoid, (u_j(x) - logit h_j) / su, the kept
   entries of the convolutions' gradients, (g_i(x) - g_i) / (s tau), and the log-probabilities of the kept bias
   entries; a Gaussian prior on images joins as |z|^2 with x = mean + A z. Each step solves the damped normal
   equations by a dense Cholesky factorisation and is halved until the objective falls.
3. *Anneal.* s starts large, where the prior smooths the problem, and falls while the *certificate*, the objective
   per measured number, says that the measurements can be explained to the precision claimed (about 1 or less).
   Where it cannot (quantised values, several local steps, residuals of earlier rounds), annealing ends and the last
   reconstruction that was explained is returned.

For a batch all images are solved for jointly: rows of distinct labels still separate, the convolutions' gradients
are the mean over the batch, and each image is spanned by the largest modes of the prior.

References
----------
Yang et al., "Using Highly Compressed Gradients in Federated Learning for Data Reconstruction Attacks", IEEE TIFS
2023 (the setting). Geiping et al., "Inverting Gradients", NeurIPS 2020 (inputs of a linear layer from its
gradient). Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021 (layer-wise linear
constraints). The joint Gauss-Newton solve and its certificate are this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.reconstruction import closed_form
from adversaries.reconstruction.closed_form import Chain, ForwardPass
from adversaries.reconstruction.priors import GaussianPrior
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Observation, Scenario, Update

OVERDETERMINED = (0.3, 0.03, 0.003, 0.001)
UNDERDETERMINED = (1.0, 0.3, 0.1, 0.03, 0.01)
BATCH = (1.0, 0.3, 0.1, 0.03, 0.01)
PAIR = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
MAX_BATCH = 16


@dataclass(frozen=True)
class GaussNewtonSettings:
    """Settings of the solver.

    Attributes
    ----------
    schedule : tuple of float or None
        Falling values of s; None: chosen by the number of measurements per unknown and the batch size.
    modes : int or None
        Prior modes per image; None: all for one image, fewer for batches (:func:`default_modes`).
    max_objective : float
        Certificate above which annealing ends: objective per measured number.
    steps : int
        Gauss-Newton steps per value of s at most; a further one is taken only while the certificate is above
        `max_objective`.
    last_steps : int
        Steps at the last value of s at most, ended early once one gains less than a percent.
    halvings : int
        Times a step is halved before it is given up.
    feature_noise : float
        Standard deviation of a known feature before the sigmoid, as a share of s.
    weight_floor : float
        Smallest scale of a convolution-gradient entry's error at s = 1, as a share of the kept entries' root
        mean square: at high rates tau falls far below the error of truncating the prior to its modes.
    head_entries : int
        For batches: off-label entries of the head used, largest first.
    chunk : int
        Directions differentiated at once.
    """

    schedule: tuple[float, ...] | None = None
    modes: int | None = None
    max_objective: float = 1.5
    steps: int = 3
    last_steps: int = 2
    halvings: int = 5
    feature_noise: float = 0.03
    weight_floor: float = 0.1
    head_entries: int = 3000
    chunk: int = 256


@dataclass(frozen=True)
class GaussNewtonResult:
    """What the solver answers.

    Attributes
    ----------
    images : Tensor
        float32 (B, C, H, W), clamped to [0, 1], on the CPU, in the order of the labels.
    objective_per_number : float
        The certificate at the answer.
    explained : bool
        Whether the certificate stayed below its limit; False: not even the loosest noise model explains the
        update, and the answer is not to be trusted.
    steps : int
        Gauss-Newton steps taken.
    history : list of float
        Certificate after each step.
    details : dict
        JSON-able: schedule, modes, measurements of each kind, unknowns, the prior's source.
    """

    images: Tensor
    objective_per_number: float
    explained: bool
    steps: int
    history: list[float] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)


def applies(
    scenario: Scenario,
    update: Update | None = None,
    *,
    round: int = 1,
    num_examples: int | None = None,
    labels: Tensor | None = None,
) -> None:
    """Refuse what the solver's model of an update does not cover.

    Parameters
    ----------
    scenario : Scenario
    update : Update, optional
        None: check what is known before the run starts.
    round : int
        1-based round; with error feedback only the first is the compressed gradient of one batch.
    num_examples : int, optional
        Declared batch size; None: the scenario's.
    labels : Tensor, optional
        int64 (B,): the inferred labels.

    Raises
    ------
    NotApplicable
        In one sentence.
    """
    closed_form.describe(scenario.model)
    if scenario.model.activation != "sigmoid":
        raise NotApplicable(
            f"Gauss-Newton inverts the sigmoid of the features, and model.activation is "
            f"{scenario.model.activation!r}; use method 'matching' or activation 'sigmoid'"
        )
    training, compression = scenario.training, scenario.compression
    if training.protocol != "fedsgd" or (update is not None and update.kind != "gradient"):
        raise NotApplicable(
            f"Gauss-Newton reads the gradient of one batch, and training.protocol = {training.protocol!r} sends the "
            "outcome of local steps; use protocol 'fedsgd'"
        )
    if compression.name not in ("none", "topk", "dgc"):
        raise NotApplicable(
            f"Gauss-Newton needs exact values of the largest entries, and compression.name = {compression.name!r} "
            "sends others; use topk or none"
        )
    if compression.name == "dgc" and compression.clip_norm is not None:
        raise NotApplicable(
            f"Gauss-Newton needs the gradient's scale, and compression.clip_norm = {compression.clip_norm:g} hides it"
        )
    if round > 1 and compression.name != "none" and (compression.error_feedback or compression.name == "dgc"):
        raise NotApplicable(
            f"in round {round} the residuals of earlier rounds are part of the update (compression.error_feedback, "
            "dgc), which Gauss-Newton does not model; attack round 1"
        )
    count = num_examples if num_examples is not None else training.batch_size
    if count > MAX_BATCH:
        raise NotApplicable(
            f"Gauss-Newton solves for at most {MAX_BATCH} images at once, and the batch has {count}"
        )
    if labels is not None and len(labels.unique()) < len(labels):
        raise NotApplicable(
            f"labels {sorted(labels.tolist())} repeat within the batch, so that rows of the head mix several images"
        )


def default_modes(size: int, batch: int) -> int:
    """Modes per image: all while the unknowns number at most 4,096, else D / (1 + B / 4)."""
    if batch == 1 or size * batch <= 4096:
        return size
    return min(size, max(4096 // batch, round(size / (1 + batch / 4))))


@dataclass(frozen=True)
class Measurements:
    """An update, read as measurements of a batch with known distinct labels.

    Gradient values of the head are multiplied by B, so that they are sums over the batch.

    Attributes
    ----------
    labels : Tensor
        int64 (B,).
    conv_positions : Tensor
        int64 (m,): kept entries in the concatenation of the chain's kernels and biases.
    conv_values, conv_scales : Tensor
        float64 (m,): their values, and the scale of their errors at s = 1.
    row_values : Tensor
        float64 (B, F): gradient of each label's row of the head.
    row_known : Tensor
        bool (B, F): which of them were sent.
    bias_rows, bias_values : Tensor
        int64 and float64 (e,): kept entries of the head's bias gradient.
    head_rows, head_cols, head_values : Tensor
        int64, int64 and float64: kept off-label entries of the head's weight gradient, largest first.
    bias_threshold, weight_threshold : float
        No unsent entry of the head's bias and weight gradient is larger; 0 where all were sent.
    precision : float
        Relative rounding error of the values as they were sent.
    """

    labels: Tensor
    conv_positions: Tensor
    conv_values: Tensor
    conv_scales: Tensor
    row_values: Tensor
    row_known: Tensor
    bias_rows: Tensor
    bias_values: Tensor
    head_rows: Tensor
    head_cols: Tensor
    head_values: Tensor
    bias_threshold: float
    weight_threshold: float
    precision: float

    def to(self, device: torch.device) -> Measurements:
        """The same measurements with their tensors on `device`."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Measurements(**moved)


def value_precision(values: Tensor) -> float:
    """Relative rounding error of the number format that `values` (float32) fit into."""
    if torch.equal(values, values.half().float()):
        return 2.0**-11
    if torch.equal(values, values.bfloat16().float()):
        return 2.0**-9
    return 2.0**-22


def read_update(
    chain: Chain, observation: Observation, labels: Tensor, settings: GaussNewtonSettings
) -> Measurements:
    """Sort the kept entries of an update by what they measure; see :class:`Measurements`."""
    update, batch = observation.update, len(labels)
    dense = update.indices is None
    per_layer = observation.scenario.compression.scope == "layer"
    tensors = {name: (positions, values.double()) for name, _, positions, values in update.layers()}

    def threshold(name: str) -> float:
        values = tensors[name][1] if per_layer else update.values
        return 0.0 if dense or not values.numel() else float(values.abs().min())

    positions, values, thresholds, start = [], [], [], 0
    for name in chain.names:
        at, kept = tensors[name]
        positions.append(at + start)
        values.append(kept)
        thresholds.append(torch.full_like(kept, threshold(name)))
        start += math.prod(update.shapes[update.names.index(name)])
    conv_values = torch.cat(values)
    level = float(conv_values.square().mean().sqrt()) if conv_values.numel() else 0.0

    at, kept = tensors["head.weight"]
    kept = batch * kept
    rows, cols = at // chain.feature_count, at % chain.feature_count
    bias_rows, bias_values = tensors["head.bias"]
    row_values, row_known = _label_rows(chain, labels, rows, cols, kept, bias_rows, batch * bias_values)
    off_label = (~torch.isin(rows, labels)).nonzero()[:, 0]
    largest = off_label[kept[off_label].abs().argsort(descending=True, stable=True)[: settings.head_entries]]
    return Measurements(
        labels=labels,
        conv_positions=torch.cat(positions),
        conv_values=conv_values,
        conv_scales=torch.cat(thresholds).clamp(min=settings.weight_floor * level),
        row_values=row_values,
        row_known=row_known,
        bias_rows=bias_rows,
        bias_values=batch * bias_values,
        head_rows=rows[largest],
        head_cols=cols[largest],
        head_values=kept[largest],
        bias_threshold=batch * threshold("head.bias"),
        weight_threshold=batch * threshold("head.weight"),
        precision=value_precision(update.values),
    )


def _label_rows(
    chain: Chain,
    labels: Tensor,
    rows: Tensor,
    cols: Tensor,
    kept: Tensor,
    bias_rows: Tensor,
    bias_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """The head's rows of the labels, dense, and which entries are known.

    For a single image every row is a multiple of the same features, so an entry missing from the label's row is
    filled in from the row with the largest bias gradient that has it.
    """
    values = torch.zeros(len(labels), chain.feature_count, dtype=torch.float64)
    known = torch.zeros_like(values, dtype=torch.bool)
    for sample, label in enumerate(labels.tolist()):
        mine = rows == label
        values[sample, cols[mine]] = kept[mine]
        known[sample, cols[mine]] = True
    own_bias = bias_values[bias_rows == labels[0]]
    if len(labels) == 1 and own_bias.numel():
        for position in bias_values.abs().argsort(descending=True, stable=True).tolist():
            there = (rows == bias_rows[position]) & ~known[0, cols]
            values[0, cols[there]] = kept[there] / bias_values[position] * own_bias
            known[0, cols[there]] = True
    return values, known


@dataclass(frozen=True)
class Anchor:
    """What the label rows say about the features, given the current class probabilities.

    Attributes
    ----------
    known : Tensor
        bool (B, F).
    logits : Tensor
        float64 (B, F): features before the sigmoid where `known`.
    caps : Tensor
        float64 (B, F): upper bounds before the sigmoid where not `known`; inf where there is none.
    precision : Tensor
        float64 (B, F): error of `logits` left by the number format.
    """

    known: Tensor
    logits: Tensor
    caps: Tensor
    precision: Tensor


@dataclass(frozen=True)
class State:
    """Everything the solver knows at one z: predictions, and what the Jacobian needs."""

    z: Tensor
    forward: ForwardPass
    delta: list[Tensor]
    held: Tensor
    moving: Tensor
    active: Tensor
    slope_vector: Tensor
    probabilities: Tensor
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
    """One update's least-squares problem in z (B, modes), images = mean + A z."""

    def __init__(
        self,
        chain: Chain,
        weights: dict[str, Tensor],
        measured: Measurements,
        prior: GaussianPrior,
        settings: GaussNewtonSettings,
        device: torch.device,
    ) -> None:
        self.chain, self.measured, self.settings, self.device = chain, measured.to(device), settings, device
        self.batch = len(measured.labels)
        modes = settings.modes or default_modes(prior.size, self.batch)
        self.weights = {name: weights[name].to(device, torch.float64) for name in weights}
        self.weights32 = {name: weights[name].to(device, torch.float32) for name in weights}
        self.mean, self.factor = prior.mean.to(device), prior.factor(modes).to(device)
        self.factor32 = self.factor.float()
        self.modes = self.factor.shape[1]
        m = self.measured
        self.joint_classes = m.bias_rows
        self.use_head_entries = self.batch > 1 and len(m.head_values) > 0
        head_count = len(m.head_values) if self.use_head_entries else 0
        self.count = len(m.conv_values) + int(m.row_known.sum()) + len(m.bias_values) + head_count

    # --- reading the rows -------------------------------------------------------------------------------------

    def anchor(self, state: State | None) -> Anchor:
        """Features from the label rows; for a batch, less what the other images leak into them."""
        m = self.measured
        own = torch.zeros(self.batch, 1, dtype=torch.float64, device=self.device)
        shared_rows = torch.zeros_like(m.row_values)
        shared_bias = torch.zeros_like(own)
        if state is not None:
            p = state.probabilities[:, m.labels]
            features = torch.sigmoid(state.held)
            others = p.T * (1 - torch.eye(self.batch, dtype=p.dtype, device=p.device))
            shared_rows, shared_bias = others @ features, others.sum(1, keepdim=True)
            own = p.diagonal()[:, None]
        residual = own - 1
        for sample, label in enumerate(m.labels):
            sent = m.bias_values[m.bias_rows == label]
            if sent.numel():
                residual[sample] = sent[0] - shared_bias[sample]
        h = ((m.row_values - shared_rows) / residual).clamp(1e-7, 1 - 1e-7)
        caps = torch.full_like(h, math.inf)
        if m.weight_threshold > 0:
            bound = m.weight_threshold / residual.abs()
            caps = torch.where(bound < 1, torch.logit(bound.clamp(max=1 - 1e-7)), math.inf).expand_as(h)
        return Anchor(m.row_known, torch.logit(h), caps, 1.5 * m.precision / (1 - h))

    # --- evaluating -------------------------------------------------------------------------------------------

    def images(self, z: Tensor) -> Tensor:
        """(B, C, H, W) of z (B, modes)."""
        return (self.mean + z @ self.factor.T).unflatten(1, self.chain.image_shape)

    def evaluate(self, z: Tensor, s: float, anchor: Anchor) -> State:
        """All residuals at z, scaled for s."""
        m, chain, settings = self.measured, self.chain, self.settings
        forward = closed_form.run_forward(chain, self.weights, self.images(z))
        top = forward.outputs[-1].flatten(1)
        held = torch.where(anchor.known, anchor.logits, torch.minimum(top, anchor.caps))
        moving = ~anchor.known & (top < anchor.caps)
        features = torch.sigmoid(held)
        logits = features @ self.weights["head.weight"].T + self.weights["head.bias"]
        log_p = logits.log_softmax(1)
        p = self._with_sent_biases(log_p.exp())
        residual = p.clone()
        residual[torch.arange(self.batch), m.labels] -= 1
        v = residual @ self.weights["head.weight"]
        shape = forward.outputs[-1].shape
        last = (v * chain.activation.slope(held)).reshape(shape)
        delta = closed_form.deltas(chain, self.weights, forward, last)

        su = max(settings.feature_noise * s, 0.001 if self.batch == 1 else 0.003)
        over = (top - anchor.caps).clamp(min=0)
        feature_residual = torch.where(anchor.known, top - anchor.logits, over)
        feature_noise = torch.where(anchor.known, (su**2 + anchor.precision**2).sqrt(), su)

        gradients = closed_form.kernel_gradients(chain, forward, delta)
        predicted = torch.cat([gradients[name].mean(0).flatten() for name in chain.names])[m.conv_positions]
        level = m.conv_values.square().mean().sqrt() if len(m.conv_values) else 0.0
        rounding = m.precision * (m.conv_values.abs() + level)
        parts = [predicted - m.conv_values]
        noise = [((s * m.conv_scales) ** 2 + rounding**2).sqrt()]
        bias_residual, bias_noise = self._bias_residual(log_p, s, su)
        parts.append(bias_residual)
        noise.append(bias_noise)
        if self.use_head_entries:
            entries = closed_form.head_entries(residual, features, m.head_rows, m.head_cols).sum(0)
            parts.append(entries - m.head_values)
            noise.append(torch.full_like(entries, s * self._head_scale(m.head_values, m.weight_threshold)))
        return State(
            z,
            forward,
            delta,
            held,
            moving,
            anchor.known | (over > 0),
            v,
            p,
            feature_residual,
            feature_noise,
            torch.cat(parts),
            torch.cat(noise),
        )

    def _head_scale(self, values: Tensor, threshold: float) -> float:
        return max(threshold, self.settings.weight_floor * float(values.square().mean().sqrt()))

    def _with_sent_biases(self, p: Tensor) -> Tensor:
        """For one image the bias gradient is the softmax itself: take what was sent, scale and cap the rest."""
        m = self.measured
        if self.batch > 1 or not len(m.bias_values):
            return p
        sent = m.bias_values + (m.bias_rows == m.labels[0])
        rest = p.clone()
        rest[0, m.bias_rows] = 0
        rest = rest * ((1 - sent.sum()).clamp(min=0) / rest.sum().clamp(min=1e-30))
        if m.bias_threshold > 0:
            rest = rest.clamp(max=m.bias_threshold)
        rest[0, m.bias_rows] = sent.clamp(min=0)
        return rest

    def _bias_residual(self, log_p: Tensor, s: float, su: float) -> tuple[Tensor, Tensor]:
        """Kept bias entries: as log-probabilities, nearly linear in the features, where there is one image."""
        m = self.measured
        if not len(m.bias_values):
            return log_p.new_zeros(0), log_p.new_zeros(0)
        own = (m.bias_rows[:, None] == m.labels).to(log_p.dtype).sum(1)
        scale = self._head_scale(m.bias_values, m.bias_threshold)
        if self.batch > 1:
            predicted = log_p.exp()[:, m.bias_rows].sum(0) - own
            return predicted - m.bias_values, torch.full_like(predicted, s * scale)
        sent = (m.bias_values + own).clamp(min=1e-12)
        usable = sent > 1e-4
        residual = torch.where(usable, log_p[0, m.bias_rows] - sent.log(), 0.0)
        return residual, (s * scale / sent).clamp(min=su)

    # --- differentiating --------------------------------------------------------------------------------------

    def jacobian(self, state: State) -> tuple[list[Tensor], Tensor]:
        """Scaled Jacobian, transposed, float32.

        Returns
        -------
        list of Tensor
            Per image (modes, active features): the feature residuals'.
        Tensor
            (B * modes, joint measurements): the others'.
        """
        m, chain = self.measured, self.chain
        joint = torch.empty(self.batch * self.modes, len(state.joint_residual), device=self.device)
        scale = (1 / state.joint_noise).float()
        per_image = []
        for sample in range(self.batch):
            one = ForwardPass(
                [t[sample : sample + 1].float() for t in state.forward.inputs],
                [t[sample : sample + 1].float() for t in state.forward.outputs],
            )
            delta = [t[sample : sample + 1].float() for t in state.delta]
            active = state.active[sample].nonzero()[:, 0]
            feature_scale = (1 / state.feature_noise[sample, active]).float()
            head = _HeadTangent(self, state, sample)
            blocks = []
            for start in range(0, self.modes, self.settings.chunk):
                stop = min(start + self.settings.chunk, self.modes)
                tangents = self.factor32[:, start:stop].T.unflatten(1, chain.image_shape)
                outputs = closed_form.forward_tangents(chain, self.weights32, one, tangents)
                top = outputs[-1].flatten(1)
                blocks.append(top[:, active] * feature_scale)
                last, entries = head(top)
                gradients = closed_form.conv_gradient_tangents(
                    chain,
                    self.weights32,
                    one,
                    delta,
                    tangents,
                    outputs,
                    None if last is None else last.reshape(outputs[-1].shape),
                )
                flat = torch.cat([gradients[name].flatten(1) for name in chain.names], 1)[:, m.conv_positions]
                columns = torch.cat([flat / self.batch, entries], 1)
                joint[sample * self.modes + start : sample * self.modes + stop] = columns * scale
            per_image.append(torch.cat(blocks))
        return per_image, joint


class _HeadTangent:
    """Tangents of delta_L and of the head's kept entries at one image, from tangents of u_L.

    Only features that are neither known nor at their cap move, and only classes that hold some probability (or
    whose entries were kept) are followed.
    """

    def __init__(self, problem: Problem, state: State, sample: int) -> None:
        m, f32 = problem.measured, torch.float32
        self.problem = problem
        held = state.held[sample]
        self.moving = state.moving[sample].to(f32)
        self.still = not bool(state.moving[sample].any())
        activation = problem.chain.activation
        self.slope, self.bend = activation.slope(held).to(f32), activation.bend(held).to(f32)
        self.vector = state.slope_vector[sample].to(f32)
        p = state.probabilities[sample]
        order = p.argsort(descending=True)
        needed = int((p[order].cumsum(0) < 1 - 1e-5).sum()) + 1
        followed = [order[: min(needed, 512)], m.bias_rows]
        if problem.use_head_entries:
            followed.append(m.head_rows)
        self.classes = torch.cat(followed).unique()
        self.p = p[self.classes].to(f32)
        self.weight = problem.weights32["head.weight"][self.classes]
        # For one image the probabilities that were sent are constants.
        self.free = torch.ones_like(self.p)
        if problem.batch == 1:
            self.free[torch.isin(self.classes, m.bias_rows)] = 0
        self.bias_at = torch.searchsorted(self.classes, m.bias_rows)
        if problem.use_head_entries:
            self.head_at = torch.searchsorted(self.classes, m.head_rows)
            self.head_features = torch.sigmoid(held)[m.head_cols].to(f32)
            residual = p[self.classes].clone()
            residual[self.classes == m.labels[sample]] -= 1
            self.head_residual = residual[self.head_at].to(f32)

    def __call__(self, top: Tensor) -> tuple[Tensor | None, Tensor]:
        """Tangents of u_L (R, F) -> of delta_L (R, F) or None where it rests, and of the head's entries."""
        m, problem = self.problem.measured, self.problem
        count = len(m.bias_rows) + (len(m.head_values) if problem.use_head_entries else 0)
        if self.still:
            return None, top.new_zeros(len(top), count)
        shift = top * self.moving
        features = shift * self.slope
        logits = features @ self.weight.T
        relative = logits - (logits @ self.p)[:, None]
        moved = relative * self.p
        last = (moved * self.free) @ self.weight * self.slope + self.vector * self.bend * shift
        if problem.batch == 1:
            return last, relative[:, self.bias_at]
        entries = [moved[:, self.bias_at]]
        if problem.use_head_entries:
            entries.append(
                moved[:, self.head_at] * self.head_features + features[:, m.head_cols] * self.head_residual
            )
        return last, torch.cat(entries, 1)


def _gram(rows: Tensor, into: Tensor) -> None:
    """Add rows rows^T to the lower triangle of `into`, in its precision, block by block."""
    size = max(256, -(-len(rows) // 8))
    for columns in rows.split(2048, 1):
        part = columns.to(into.dtype)
        for start in range(0, len(rows), size):
            block = part[start : start + size]
            into[start:, start : start + size].addmm_(part[start:], block.T)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """(system + I)^-1 right for a positive semi-definite system given by its lower triangle; overwrites it."""
    system.diagonal().add_(1)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(right.to(system.dtype)[:, None], factor)[:, 0].double()


def gauss_newton_step(state: State, per_image: list[Tensor], joint: Tensor, double: bool) -> Tensor:
    """Solve (J^T J + I) dz = -(J^T residual + z) on the smaller of unknowns and measurements.

    Parameters
    ----------
    state : State
    per_image, joint : list of Tensor, Tensor
        From :meth:`Problem.jacobian`.
    double : bool
        Accumulate and factorise in float64; else float32.

    Returns
    -------
    Tensor
        float64, the shape of z.
    """
    batch, modes = state.z.shape
    dtype = torch.float64 if double else torch.float32
    scaled = state.feature_residual / state.feature_noise
    residuals = [scaled[b, state.active[b]] for b in range(batch)]
    joint_residual = state.joint_residual / state.joint_noise
    unknowns, rows = batch * modes, joint.shape[1] + sum(block.shape[1] for block in per_image)
    if unknowns <= rows:
        system = torch.zeros(unknowns, unknowns, dtype=dtype, device=joint.device)
        _gram(joint, system)
        right = state.z.flatten() + joint.double() @ joint_residual
        for b, block in enumerate(per_image):
            own = slice(b * modes, (b + 1) * modes)
            _gram(block, system[own, own])
            right[own] += block.double() @ residuals[b]
        return -_solve(system, right).reshape(batch, modes)
    transposed = torch.zeros(rows, unknowns, device=joint.device)
    transposed[: joint.shape[1]] = joint.T
    start = joint.shape[1]
    for b, block in enumerate(per_image):
        transposed[start : start + block.shape[1], b * modes : (b + 1) * modes] = block.T
        start += block.shape[1]
    system = torch.zeros(rows, rows, dtype=dtype, device=joint.device)
    _gram(transposed, system)
    flat = state.z.flatten()
    target = transposed.double() @ flat - torch.cat([joint_residual, *residuals])
    return (transposed.double().T @ _solve(system, target) - flat).reshape(batch, modes)


def default_schedule(measurements: int, unknowns: int, batch: int) -> tuple[float, ...]:
    """Falling values of s: fast where measurements outnumber unknowns, gentle elsewhere and for batches."""
    if batch == 1:
        return OVERDETERMINED if measurements >= unknowns else UNDERDETERMINED
    return PAIR if batch == 2 else BATCH


def solve(
    observation: Observation,
    labels: Tensor,
    prior: GaussianPrior,
    settings: GaussNewtonSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> GaussNewtonResult:
    """Reconstruct a batch from one observation.

    Parameters
    ----------
    observation : Observation
        Read: global weights, update, scenario.
    labels : Tensor
        int64 (B,): the inferred labels, distinct.
    prior : GaussianPrior
        Its factor is computed once and kept: share one prior between victims.
    settings : GaussNewtonSettings, optional
    device : torch.device or str
    progress : Progress

    Returns
    -------
    GaussNewtonResult

    Raises
    ------
    NotApplicable
        See :func:`applies`.
    ConfigError
        If the schedule does not fall, or `modes` is out of range.
    """
    settings = settings or GaussNewtonSettings()
    device = torch.device(device)
    labels = labels.cpu()
    applies(
        observation.scenario,
        observation.update,
        round=observation.round,
        num_examples=len(labels),
        labels=labels,
    )
    _check(settings, prior)
    chain = closed_form.describe(observation.scenario.model)
    measured = read_update(chain, observation, labels, settings)
    problem = Problem(chain, observation.weights, measured, prior, settings, device)
    unknowns = problem.batch * problem.modes
    schedule = settings.schedule or default_schedule(problem.count, unknowns, problem.batch)

    z = torch.zeros(problem.batch, problem.modes, dtype=torch.float64, device=device)
    anchor = problem.anchor(None)
    anchor = problem.anchor(problem.evaluate(z, schedule[0], anchor))
    answer, certificate, explained = z, math.inf, False
    history: list[float] = []
    reached: list[float] = []
    for level, s in enumerate(schedule):
        progress(level / len(schedule), f"s = {s:g}")
        last = level == len(schedule) - 1
        state = problem.evaluate(z, s, anchor)
        for _ in range(settings.last_steps if last else settings.steps):
            before = state.objective
            state = _descend(problem, state, s, anchor)
            history.append(state.objective / problem.count)
            anchor = problem.anchor(state)
            slow = state.objective > (0.99 if last else 0.9) * before
            if slow or (not last and history[-1] <= settings.max_objective):
                break
            state = problem.evaluate(state.z, s, anchor)
        good = history[-1] <= settings.max_objective
        if good or level == 0:
            answer, certificate, explained = state.z, history[-1], good
            reached.append(s)
        if not good:
            break
        z = state.z
    progress(1.0, "done")
    details: dict[str, object] = {
        "schedule": list(schedule),
        "reached": reached,
        "modes": problem.modes,
        "unknowns": unknowns,
        "measurements": problem.count,
        "conv_entries": len(measured.conv_values),
        "features_known": int(measured.row_known.sum()),
        "prior": prior.source,
    }
    images = problem.images(answer).clamp(0, 1).float().cpu()
    return GaussNewtonResult(images, certificate, explained, len(history), history, details)


def _check(settings: GaussNewtonSettings, prior: GaussianPrior) -> None:
    schedule = settings.schedule
    if schedule is not None and (
        not schedule
        or min(schedule) <= 0
        or any(a <= b for a, b in zip(schedule, schedule[1:], strict=False))
    ):
        raise ConfigError(
            f"setting 'schedule' = {schedule!r}: give positive values that fall, like 1, 0.3, 0.1"
        )
    if settings.modes is not None and not 1 <= settings.modes <= prior.size:
        raise ConfigError(
            f"setting 'modes' = {settings.modes}: give 1 to {prior.size}, the numbers in one image"
        )


def _descend(problem: Problem, state: State, s: float, anchor: Anchor) -> State:
    """One Gauss-Newton step, halved until the objective falls; the old state where it never does."""
    per_image, joint = problem.jacobian(state)
    step = gauss_newton_step(state, per_image, joint, double=s < 0.3)
    share = 1.0
    for _ in range(problem.settings.halvings + 1):
        candidate = problem.evaluate(state.z + share * step, s, anchor)
        if candidate.objective < state.objective:
            return candidate
        share /= 2
    return state
