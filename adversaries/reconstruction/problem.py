"""What the optimiser minimises: objective plus regularisers as a function of its variables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adversaries.reconstruction.gradients import GradientModel, Statistics
from adversaries.reconstruction.objectives import OBJECTIVES, Layout, scale
from adversaries.reconstruction.parametrise import Bounded, Chart, ImageChart, Pixels, Priced
from adversaries.reconstruction.regularisers import PIXEL_TERMS, batch_norm, group
from adversaries.reconstruction.settings import Matching
from fedattack.errors import ConfigError

Penalty = Callable[[Tensor, "Tensor | None", slice], Tensor]
"""A term of an attack's own: (images (V', B, C, H, W), shares (V', B, classes) or None, which rows) -> (V',).

Rows are restart-major: row r V + v is victim v from start r. Shares are the soft labels under labels "joint".
"""


class Problem:
    """Objective and gradient of all rows as a function of the optimiser's variables (rows, N).

    A row is one victim from one start; the rows of one start lie together. Its variables are those of the chart, and
    under joint labels after them the label logits.

    Parameters
    ----------
    gradients : GradientModel
        Of all rows.
    chart : Chart
    settings : Matching
    restarts : int
        Starts of each victim.
    label_shape : tuple of int, optional
        (B, classes) of the label logits, where labels are optimised too.
    targets : tuple of (Tensor, Tensor)
        Of :func:`~adversaries.reconstruction.regularisers.batch_norm_targets`, for all rows.
    penalty : Penalty, optional
        Added to the objective.
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
        objective = OBJECTIVES[settings.objective]
        self._whole = objective.whole
        layout = Layout(gradients.sent, settings.layer_weights, settings.l1_share)
        self._distance = objective.build(layout)
        weights = {name: weight for name, weight in settings.regularisers.items() if weight}
        self._pixel_terms = [(PIXEL_TERMS[name], w) for name, w in weights.items() if name in PIXEL_TERMS]
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
        self._restarts, self._label_shape, self._penalty = restarts, label_shape, penalty
        self._label_count = 0 if label_shape is None else label_shape[0] * label_shape[1]

    def variables(self, start: Tensor, logits: Tensor | None = None) -> Tensor:
        """Variables (rows, N) of images (rows, B, C, H, W) or the chart's variables, and label logits.

        Parameters
        ----------
        start : Tensor
            Images, where the chart can be inverted; or its variables (rows, N').
        logits : Tensor, optional
            (rows, B, classes).
        """
        if start.ndim > 2:
            if not isinstance(self._chart, ImageChart):
                raise ConfigError("this parametrisation cannot start from images; give its variables")
            start = self._chart.variables(start)
        return start if logits is None else torch.cat([start, logits.flatten(1)], 1)

    def width(self, variables: Tensor) -> int:
        """How many of the variables (rows, N) are the chart's (N')."""
        return variables.shape[1] - self._label_count

    def images(self, variables: Tensor) -> Tensor:
        """Images (rows, B, C, H, W)."""
        return self._chart.images(variables[:, : self.width(variables)])

    def projection(self, clamp: bool) -> Callable[[Tensor], Tensor] | None:
        """What puts variables (rows, N) back after each step: the chart's own rule, or the pixels' limits."""
        if clamp:
            assert isinstance(self._chart, Pixels)
            low, high = self._chart.limits
            project: Callable[[Tensor], Tensor] = partial(torch.clamp, min=low, max=high)
        elif isinstance(self._chart, Bounded):
            project = self._chart.project
        else:
            return None
        if not self._label_count:
            return project

        def images_only(variables: Tensor) -> Tensor:
            width = self.width(variables)
            return torch.cat([project(variables[:, :width]), variables[:, width:]], 1)

        return images_only

    def logits(self, variables: Tensor) -> Tensor | None:
        """Label logits (rows, B, classes); None where labels are given."""
        if self._label_shape is None:
            return None
        return variables[:, -self._label_count :].unflatten(1, self._label_shape)

    def evaluate(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (rows,) and their gradients (rows, N)."""
        rows = len(variables)
        centres = self._centres(variables) if self._group else None
        if self._gradients.joint or rows == 1:
            return self._part(variables, slice(0, rows), centres)
        parts = [self._part(variables[row : row + 1], slice(row, row + 1), centres) for row in range(rows)]
        losses, slopes = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(slopes)

    def _centres(self, variables: Tensor) -> Tensor:
        """Each row's victim's mean image over its restarts, (rows, B, C, H, W)."""
        with torch.no_grad():
            images = self.images(variables).unflatten(0, (self._restarts, -1))
            return images.mean(0, keepdim=True).expand_as(images).flatten(0, 1)

    def _part(self, variables: Tensor, rows: slice, centres: Tensor | None) -> tuple[Tensor, Tensor]:
        variables = variables.detach().requires_grad_()
        images = self.images(variables)
        logits = self.logits(variables)
        shares = None if logits is None else logits.softmax(2)
        prediction = self._gradients.predict(
            images, rows, whole=self._whole, shares=shares, statistics=self._statistics > 0
        )
        losses = self._distance(prediction, rows)
        unit = self._unit[rows]
        for term, weight in self._pixel_terms:
            losses = losses + weight * unit * term(images)
        if self._statistics:
            aims = tuple((mean[rows], variance[rows]) for mean, variance in self._targets)
            losses = losses + self._statistics * unit * batch_norm(prediction.statistics, aims)
        if centres is not None:
            losses = losses + self._group * unit * group(images, centres[rows])
        if isinstance(self._chart, Priced):
            losses = losses + unit * self._chart.cost(variables[:, : self.width(variables)])
        if self._penalty is not None:
            losses = losses + unit * self._penalty(images, shares, rows)
        (slope,) = torch.autograd.grad(losses.sum(), variables)
        return losses.detach(), slope
