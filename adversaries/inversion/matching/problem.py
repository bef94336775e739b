"""What the optimiser minimises: objective plus regularisers as a function of its variables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adversaries.inversion.evidence.one_gradient import FIRST_POINT
from adversaries.inversion.gradients import (
    CompiledSlope,
    DirectGradients,
    GradientModel,
    Prediction,
    Statistics,
    SurrogateGradients,
)
from adversaries.inversion.gradients.compiled import LONG
from adversaries.inversion.gradients.layers import add
from adversaries.inversion.matching.objectives import OBJECTIVES, Layout, scale
from adversaries.inversion.matching.pixels import Bounded, Chart, ImageChart, Pixels, Priced, Standardised
from adversaries.inversion.matching.regularisers import PIXEL_TERMS, SPECIAL, batch_norm, group
from adversaries.inversion.matching.settings import Matching
from fedattack.errors import ConfigError

POINT_STEP = 1e-3
"""What Adam moves a surrogate's point by in one iteration (Zhu et al. 2023)."""

POINT_SCALE = 0.1
"""Of a point beside pixels, for an optimiser that knows no steps of its own (L-BFGS)."""

Penalty = Callable[[Tensor, "Tensor | None", slice], Tensor]
"""A term of an attack's own: (images (V', B, C, H, W), shares (V', B, classes) or None, which rows) -> (V',).

Rows are restart-major: row r V + v is victim v from start r. Shares are the soft labels under labels "joint".
"""


class Problem:
    """Objective and gradient of all rows as a function of the optimiser's variables (rows, N).

    A row is one victim from one start; the rows of one start lie together. Its variables are those of the
    chart, under joint labels after them the label logits, (B, classes) = `label_shape`, and last, where gradients are
    surrogates, what moves their point. `targets` are those of
    :func:`~adversaries.inversion.matching.regularisers.batch_norm_targets`, for all rows.
    """

    def __init__(
        self,
        gradients: GradientModel,
        chart: Chart,
        settings: Matching,
        *,
        restarts: int = 1,
        label_shape: tuple[int, int] | None = None,
        targets: Statistics = (),
        penalty: Penalty | None = None,
    ) -> None:
        self._gradients, self._chart = gradients, chart
        objective = OBJECTIVES.get(settings.objective)
        self._whole = objective.whole
        layout = Layout(gradients.sent, settings.layer_weights, settings.l1_share)
        self._distance = objective.build(layout)
        self._slope = None if objective.slope is None else objective.slope(layout)
        weights = {name: weight for name, weight in settings.regularisers.items() if weight}
        self._pixel_terms = [(PIXEL_TERMS.get(name), w) for name, w in weights.items() if name not in SPECIAL]
        self._group = weights.get("group", 0.0)
        self._statistics = weights.get("batch-norm", 0.0)
        self._targets = targets
        if self._group and restarts < 2:
            raise ConfigError("regulariser 'group' compares the restarts of a victim; use 2 or more restarts")
        if self._statistics and not targets:
            raise ConfigError("regulariser 'batch-norm' needs the statistics to aim at")
        absolute = settings.units == "absolute"
        ones = gradients.sent.values.new_ones(len(gradients.sent.values))
        self._unit = ones if absolute else scale(objective, self._distance, gradients.sent)
        self._plain_unit = bool((self._unit == 1).all())
        self._cost = chart.cost if isinstance(chart, Priced) else None
        self._finished = [False] * len(self._unit)
        self._restarts, self._label_shape, self._penalty = restarts, label_shape, penalty
        self._label_count = 0 if label_shape is None else label_shape[0] * label_shape[1]
        self._surrogate = gradients if isinstance(gradients, SurrogateGradients) else None
        self._point_count = 0 if self._surrogate is None else 1
        # One learning rate moves all variables, and a point takes a step of its own.
        lbfgs = settings.optimiser.endswith("lbfgs")
        self._point_scale = POINT_SCALE if lbfgs else POINT_STEP / settings.learning_rate
        # Where variables are pixels, scaled perhaps, nothing lies before the images.
        scaled = isinstance(chart, Pixels) and type(chart) in (Pixels, Standardised)
        self._pixels_only = scaled and label_shape is None and self._surrogate is None
        self._pixel_scale = chart.scale if isinstance(chart, Pixels) else 1.0
        # Where the entries' gradient is written out and nothing else depends on them, no graph is needed at all.
        alone = not self._statistics and self._cost is None and penalty is None and label_shape is None
        direct = gradients if alone and isinstance(gradients, DirectGradients) else None
        self._compiled: CompiledSlope | str = _compiled(settings, direct, self._slope is not None)
        self._direct = self._compiled if isinstance(self._compiled, CompiledSlope) else direct

    @property
    def compiled(self) -> str:
        """Whether the network's passes were compiled, or why not."""
        return self._compiled if isinstance(self._compiled, str) else self._compiled.outcome

    def variables(self, start: Tensor, logits: Tensor | None = None, points: Tensor | None = None) -> Tensor:
        """Variables (rows, N) of images or the chart's variables, label logits (rows, B, classes), points (rows,)."""
        if start.ndim > 2:
            if not isinstance(self._chart, ImageChart):
                raise ConfigError("this parametrisation cannot start from images; give its variables")
            start = self._chart.variables(start)
        parts = [start] if logits is None else [start, logits.flatten(1)]
        if self._surrogate is not None:
            shift = 0 if points is None else (points - FIRST_POINT)[:, None] / self._point_scale
            parts.append(start.new_zeros(len(start), 1) + shift)
        return torch.cat(parts, 1)

    def width(self, variables: Tensor) -> int:
        """How many of the variables (rows, N) are the chart's (N')."""
        return variables.shape[1] - self._label_count - self._point_count

    def images(self, variables: Tensor) -> Tensor:
        return self._chart.images(variables[:, : self.width(variables)])

    def projection(self, clamp: bool) -> Callable[[Tensor], Tensor] | None:
        """What puts variables (rows, N) back after each step: the chart's own rule, or the pixels' limits."""
        if clamp:
            assert isinstance(self._chart, Pixels)
            low, high = self._chart.limits
            project: Callable[[Tensor], Tensor] | None = partial(torch.clamp, min=low, max=high)
        elif isinstance(self._chart, Bounded):
            project = self._chart.project
        else:
            project = None
        if self._surrogate is None and (project is None or not self._label_count):
            return project
        span = 1 / self._point_scale

        def by_parts(variables: Tensor) -> Tensor:
            width = self.width(variables)
            drawn, logits, point = variables.split([width, self._label_count, self._point_count], 1)
            point = point.clamp(-FIRST_POINT * span, (1 - FIRST_POINT) * span)
            return torch.cat([drawn if project is None else project(drawn), logits, point], 1)

        return by_parts

    def logits(self, variables: Tensor) -> Tensor | None:
        """Label logits (rows, B, classes); None where labels are given."""
        if self._label_shape is None:
            return None
        width = self.width(variables)
        return variables[:, width : width + self._label_count].unflatten(1, self._label_shape)

    def points(self, variables: Tensor) -> Tensor | None:
        """Each row's point between the weights before and after, (rows,) in [0, 1]; None where there is none."""
        if self._surrogate is None:
            return None
        return FIRST_POINT + self._point_scale * variables[:, -1]

    def evaluate(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (rows,) and their gradients (rows, N)."""
        rows = len(variables)
        centres = self._centres(variables) if self._group else None
        if self._gradients.joint or rows == 1:
            return self._part(variables, slice(0, rows), centres)
        parts = [
            (variables.new_zeros(1), torch.zeros_like(variables[:1]))
            if self._finished[row]
            else self._part(variables[row : row + 1], slice(row, row + 1), centres)
            for row in range(rows)
        ]
        losses, slopes = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(slopes)

    def rest(self, finished: list[bool]) -> None:
        """Answer zeros for these rows from now on, where rows are evaluated one by one."""
        self._finished = finished

    def _centres(self, variables: Tensor) -> Tensor:
        """Each row's victim's mean image over its restarts, (rows, B, C, H, W)."""
        with torch.no_grad():
            images = self.images(variables).unflatten(0, (self._restarts, -1))
            return images.mean(0, keepdim=True).expand_as(images).flatten(0, 1)

    def _part(self, variables: Tensor, rows: slice, centres: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses and gradients of some rows.

        The graph is cut at the images: terms whose gradient there, or at the predicted entries, is written out are
        added without a graph, and where variables are pixels there is nothing before the cut.
        """
        variables = variables.detach()
        if not self._pixels_only:
            variables.requires_grad_()
        drawn = self.images(variables)
        if self._direct is not None and self._slope is not None:
            images, at_variables = drawn.detach(), None
            losses, at_images = self._direct.slope(images, rows, self._slope)
        else:
            images = drawn.detach().requires_grad_()
            losses, at_images, at_variables = self._through_graph(variables, images, rows)
        with torch.no_grad():
            if self._pixel_terms or centres is not None:
                value, pull = self._on_pixels(images, rows, centres)
                losses, at_images = losses + value, at_images + pull
        if self._pixels_only:
            flat = at_images.flatten(1)
            return losses, flat if self._pixel_scale == 1 else flat * self._pixel_scale
        (slope,) = torch.autograd.grad(drawn, variables, at_images)
        return losses, slope if at_variables is None else slope + at_variables

    def _through_graph(
        self, variables: Tensor, images: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses (rows,), their gradient at the images, and that at the variables that does not go through them."""
        logits = self.logits(variables)
        shares = None if logits is None else logits.softmax(2)
        points = self.points(variables)
        at = (
            self._gradients if self._surrogate is None or points is None else self._surrogate.at(points, rows)
        )
        prediction = at.predict(
            images, rows, whole=self._whole, shares=shares, statistics=self._statistics > 0
        )
        rest = self._differentiated(variables, images, shares, prediction, rows)
        roots: list[Tensor] = []
        pulls: list[Tensor | None] = []
        if rest is not None and rest.requires_grad:
            roots, pulls = [rest.sum()], [None]
        if self._slope is None:
            assert rest is not None
            losses = rest.detach()
        else:
            with torch.no_grad():
                losses, pull = self._slope(prediction.entries, rows)
            if rest is not None:
                losses = losses + rest.detach()
            roots, pulls = [prediction.entries, *roots], [pull, *pulls]
        if self._pixels_only:
            (at_images,) = torch.autograd.grad(roots, images, pulls)
            return losses, at_images, None
        at_images, at_variables = torch.autograd.grad(roots, (images, variables), pulls, allow_unused=True)
        return losses, at_images, at_variables

    def _differentiated(
        self, variables: Tensor, images: Tensor, shares: Tensor | None, prediction: Prediction, rows: slice
    ) -> Tensor | None:
        """The terms that are left to automatic differentiation, (rows,), or None where there are none."""
        unit = self._unit[rows]
        losses = self._distance(prediction, rows) if self._slope is None else None
        if self._statistics:
            aims = tuple((mean[rows], variance[rows]) for mean, variance in self._targets)
            losses = add(losses, self._statistics * unit * batch_norm(prediction.statistics, aims))
        if self._cost is not None:
            losses = add(losses, unit * self._cost(variables[:, : self.width(variables)]))
        if self._penalty is not None:
            losses = add(losses, unit * self._penalty(images, shares, rows))
        return losses

    def _on_pixels(self, images: Tensor, rows: slice, centres: Tensor | None) -> tuple[Tensor, Tensor]:
        """The terms of the images alone, (rows,), and their gradient."""
        terms = [term(images, weight) for term, weight in self._pixel_terms]
        if centres is not None:
            terms.append(group(images, centres[rows], self._group))
        value, slope = terms[0]
        for more_value, more_slope in terms[1:]:
            value, slope = value + more_value, slope + more_slope
        if self._plain_unit:
            return value, slope
        unit = self._unit[rows]
        return value * unit, slope * unit[:, None, None, None, None]


def _compiled(settings: Matching, direct: DirectGradients | None, written: bool) -> CompiledSlope | str:
    """The gradients to be compiled, or why they are not."""
    if settings.compile == "never" or (settings.compile == "auto" and settings.iterations < LONG):
        return "no"
    if direct is None or not written:
        return "not compiled: settings or network need automatic differentiation"
    if not direct.joint:
        return "not compiled: victims of this size are evaluated one by one"
    return CompiledSlope(direct)
