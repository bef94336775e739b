"""What an attack needs, as data: declared by the attack, checked by :mod:`adversaries.refusals`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Block:
    """A part of the model that an attack is made for.

    Attributes
    ----------
    kind : type
        Class of the module that has it.
    words : str
        What it is.
    models : str
        Names of models with it.
    """

    kind: type[nn.Module]
    words: str
    models: str


@dataclass(frozen=True)
class Needs:
    """What an attack needs of the federation; what is left out (0, "", False, None) it does without.

    Attributes
    ----------
    update : {"gradient", "steps"}
        The update is (a known multiple of) entries of one gradient; or of the sum of several local steps' gradients.
    signs : bool
        With `update`: the gradient's signs will do.
    entries : {"rows", "all"}
        Which entries must have been sent: all, or such that the missing ones are known to be small.
    values : {"rounded", "exact"}
        How entries must come: not as signs; nor rounded.
    unclipped : bool
        No defence has scaled the gradient by a factor that is not sent.
    undecayed : {"steps", "delta"}
        No weight decay in several local steps; nor in any weight delta.
    sums : {"dense", "single"}
        Sums over clients (secure aggregation) are read where they are dense; or single updates alone are.
    fresh : bool
        Updates hold no residuals of earlier rounds: under error feedback only round 1 is attacked.
    labels : str
        Strategy that reads the labels from the update's linear head
        (:data:`adversaries.inversion.evidence.label_strategies.STRATEGIES`).
    distinct : bool
        No two images of a batch have the same label.
    images : int
        Most images in a batch.
    batch : {"agreed", "same"}
        Clients' batches have one agreed size; or each client's is the same in every round (all of its samples).
    first_layer : bool
        The model begins with a linear layer with bias on the pixels.
    head : {"linear", "biased"}
        The model ends in a linear layer; with a bias.
    activations : tuple of str
    batch_norm : {"needed", "refused"}
    chain : bool
        The model is a chain of convolutions with a linear head.
    block : Block
    width : int
        Least `model.width`.
    auxiliary : int
        Least number of public images granted.
    labelled : bool
        Public images come with labels.
    helped : bool
        Public images help, and are not needed.
    clients : int
        Clients that answer in one round.
    held_out : bool
        Samples that no client trains on, for the questions that are asked.
    references, members : bool
        Models trained on public data for comparison; samples that are known to be members.
    """

    update: Literal["", "gradient", "steps"] = ""
    signs: bool = False
    entries: Literal["", "rows", "all"] = ""
    values: Literal["", "rounded", "exact"] = ""
    unclipped: bool = False
    undecayed: Literal["", "steps", "delta"] = ""
    sums: Literal["", "dense", "single"] = ""
    fresh: bool = False
    labels: str = ""
    distinct: bool = False
    images: int = 0
    batch: Literal["", "agreed", "same"] = ""
    first_layer: bool = False
    head: Literal["", "linear", "biased"] = ""
    activations: tuple[str, ...] = ()
    batch_norm: Literal["", "needed", "refused"] = ""
    chain: bool = False
    block: Block | None = None
    width: int = 0
    auxiliary: int = 0
    labelled: bool = False
    helped: bool = False
    clients: int = 0
    held_out: bool = False
    references: bool = False
    members: bool = False

    @property
    def behind(self) -> str:
        """The activations in words."""
        return " or ".join(self.activations)

    @property
    def together(self) -> str:
        """How many images of one batch, in words."""
        return "one image" if self.images == 1 else f"at most {self.images} images"


@dataclass(frozen=True)
class Facts:
    """What is known of a federation before it trains, beside its scenario; None: not known, and not checked.

    Attributes
    ----------
    rounds : tuple of int
        Rounds to be attacked.
    clients, drawn : int
        In the federation, and drawn each round.
    samples : tuple of int
        Of each client that is to be attacked.
    held_out : int
        Samples that no client trains on.
    auxiliary : int
        Public images granted.
    labelled : bool
        Whether these have labels.
    references, members : int
        Reference models, and known members, granted.
    """

    rounds: tuple[int, ...] = ()
    clients: int | None = None
    drawn: int | None = None
    samples: tuple[int, ...] = ()
    held_out: int | None = None
    auxiliary: int | None = None
    labelled: bool | None = None
    references: int | None = None
    members: int | None = None

    @property
    def last(self) -> int:
        """The last round to be attacked; 1 where none is known."""
        return max(self.rounds, default=1)
