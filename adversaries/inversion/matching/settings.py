"""How gradients are matched: every choice the engine leaves to an attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from adversaries.inversion.gradients import BatchNormMode, Compile, Layers
from adversaries.inversion.matching.objectives import OBJECTIVES, LayerWeights
from adversaries.inversion.matching.pixels import Parametrisation
from adversaries.inversion.matching.regularisers import PIXEL_TERMS, SPECIAL
from adversaries.inversion.solvers.minimiser import LineSearch
from fedattack.errors import ConfigError, unknown_name

Optimiser = Literal["lbfgs", "adam", "sgd", "signed-lbfgs", "signed-adam", "signed-sgd"]

_CHOICES = {
    "layer_weights": LayerWeights,
    "optimiser": Optimiser,
    "line_search": LineSearch,
    "compile": Compile,
    "parametrisation": Parametrisation,
}


@dataclass(frozen=True)
class Matching:
    """How to match; unknown names, values out of range and combinations that mean nothing are a ConfigError.

    Attributes
    ----------
    layer_weights : {"equal", "falling"}
        How much each tensor counts; see :func:`~adversaries.inversion.matching.objectives.layer_weights`.
    l1_share : float
        Weight of the absolute differences under objective "l2-l1".
    regularisers : dict of str to float
        Weights of :data:`~adversaries.inversion.matching.regularisers.PIXEL_TERMS`, "batch-norm" and "group".
    units : {"relative", "absolute"}
        "relative": weights are in units of the objective at a prediction of zeros (the sent entries' squared norm
        under the squared ones, 1 under cosines), so that a weight means the same whatever the model and the
        compression. "absolute": as written in most papers.
    layers : {"all", "last"}
        Which tensors are matched.
    batch_norm : {"train", "eval"}, optional
        Whether the client's BatchNorm used its batch's statistics or the running ones; None: as declared.
    parametrisation : {"pixels", "standardised", "box", "spectrum"}
        What the optimiser turns; see :mod:`adversaries.inversion.matching.pixels`.
    labels : {"given", "joint"}
        "joint": soft labels are optimised beside the images (DLG).
    optimiser : {"lbfgs", "adam", "sgd", "signed-lbfgs", "signed-adam", "signed-sgd"}
        "signed": it is shown the sign of the gradient alone.
    line_search : {"none", "armijo"}
        For L-BFGS; "none" steps as ``torch.optim.LBFGS`` does.
    decay : bool
        Whether the learning rate falls to a tenth after 3/8, 5/8 and 7/8 of the iterations (not L-BFGS).
    clamp : bool
        Whether pixels are clamped to [0, 1] after each step (parametrisation "pixels" or "standardised").
    noise : float
        Deviation of the normal noise added to each step, in units of the learning rate (Yin et al. 2021).
    iterations : int
        Evaluations of objective and gradient after the first; 0 answers the start.
    memory, block : int
        See :class:`adversaries.inversion.solvers.lbfgs.Lbfgs`.
    stop, patience : float, int
        See :class:`adversaries.inversion.solvers.minimiser.Rules`.
    compile : {"auto", "always", "never"}
        Whether the network's passes are compiled (``torch.compile``); "auto": in runs of
        :data:`~adversaries.inversion.gradients.compiled.LONG` iterations and more. Where it cannot be done the
        passes run as they are, and the log says why.
    transform_every : int
        Apply `transform` to the images after each this many iterations and start the optimiser afresh; 0: never.
    """

    objective: str = "masked-l2"
    regularisers: dict[str, float] = field(default_factory=dict)
    layers: Layers = "all"
    parametrisation: Parametrisation = "pixels"
    optimiser: Optimiser = "lbfgs"
    line_search: LineSearch = "armijo"
    learning_rate: float = 1.0
    iterations: int = 400
    memory: int = 20
    block: int = 0
    stop: float = 0.0
    transform_every: int = 0
    layer_weights: LayerWeights = "equal"
    l1_share: float = 0.1
    units: Literal["relative", "absolute"] = "relative"
    batch_norm: BatchNormMode | None = None
    labels: Literal["given", "joint"] = "given"
    momentum: float = 0.0
    decay: bool = True
    clamp: bool = False
    noise: float = 0.0
    patience: int = 0
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        if not OBJECTIVES.get(self.objective).weighted and self.layer_weights != "equal":
            raise ConfigError(
                f"objective {self.objective!r} is over all layers at once, and layer_weights is "
                f"{self.layer_weights!r}; use another objective, as 'masked-l2' or 'layer-cosine'"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in get_args(known):
                raise unknown_name(name, getattr(self, name), get_args(known))
        for name in self.regularisers:
            if name not in SPECIAL:
                PIXEL_TERMS.get(name)
        for name in ("iterations", "l1_share", "noise", "patience", "momentum", "transform_every"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"setting {name!r} = {getattr(self, name)}: must not be negative")
        lbfgs, sgd = (self.optimiser.endswith(kind) for kind in ("lbfgs", "sgd"))
        for name, wrong, reason in (
            ("learning_rate", not self.learning_rate > 0, "must be positive"),
            ("memory", self.memory < 1, "must be at least 1"),
            ("momentum", self.momentum >= 1, "must be below 1"),
            ("momentum", self.momentum and not sgd, f"is for optimiser 'sgd', not {self.optimiser!r}"),
            ("noise", self.noise and lbfgs, "L-BFGS cannot bear noise; use optimiser 'adam' or 'sgd'"),
        ):
            if wrong:
                raise ConfigError(f"setting {name!r} = {getattr(self, name)}: {reason}")
        if self.clamp and self.parametrisation not in ("pixels", "standardised"):
            raise ConfigError(
                f"setting 'clamp' needs parametrisation 'pixels' or 'standardised', not {self.parametrisation!r}"
            )
