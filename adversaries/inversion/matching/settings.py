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
    """How to match; unknown names, values out of range and combinations that mean nothing are a ConfigError."""

    objective: str = "masked-l2"
    regularisers: dict[str, float] = field(
        default_factory=dict
    )  # weights; :data:`PIXEL_TERMS` and :data:`SPECIAL`
    layers: Layers = "all"  # which tensors are matched
    parametrisation: Parametrisation = "pixels"
    optimiser: Optimiser = "lbfgs"  # "signed": it is shown the sign of the gradient alone
    line_search: LineSearch = "armijo"  # for L-BFGS; "none" steps as ``torch.optim.LBFGS`` does
    learning_rate: float = 1.0
    iterations: int = 400  # evaluations of objective and gradient after the first; 0 answers the start
    memory: int = 20  # see :class:`~adversaries.inversion.solvers.lbfgs.Lbfgs`, as for `block`
    block: int = 0
    stop: float = 0.0  # a victim below this loss has finished
    transform_every: int = 0  # `transform` the images after this many iterations, then start afresh; 0: never
    layer_weights: LayerWeights = "equal"
    l1_share: float = 0.1  # weight of the absolute differences under objective "l2-l1"
    # "relative": weights are in units of the objective at a prediction of zeros (the sent entries' squared norm under
    # the squared ones, 1 under cosines) and mean the same whatever model and compression; "absolute": as in papers.
    units: Literal["relative", "absolute"] = "relative"
    batch_norm: BatchNormMode | None = None  # of the client; None: as declared
    labels: Literal["given", "joint"] = "given"  # "joint": soft labels are optimised beside the images (DLG)
    momentum: float = 0.0  # of SGD
    decay: bool = (
        True  # of the learning rate, to a tenth after 3/8, 5/8 and 7/8 of the iterations (not L-BFGS)
    )
    clamp: bool = False  # pixels to [0, 1] after each step, under "pixels" or "standardised"
    noise: float = (
        0.0  # deviation of that added to each step, in units of the learning rate (Yin et al. 2021)
    )
    patience: int = 0  # see :class:`~adversaries.inversion.solvers.minimiser.Rules`
    compile: Compile = "auto"  # the network's passes; "auto": in runs of :data:`LONG` iterations and more

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
