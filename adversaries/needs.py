"""What an attack needs, as data: declared by the attack, checked by :mod:`adversaries.refusals`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Block:
    """A part of the model that an attack is made for: its class, what it is, and names of `models` with it."""

    kind: type[nn.Module]
    words: str
    models: str


@dataclass(frozen=True)
class Needs:
    """What an attack needs of the federation; what is left out (0, "", False, None) it does without."""

    update: Literal["", "gradient", "steps"] = ""
    """(A known multiple of) entries of one gradient; or of the sum of several local steps' gradients."""
    signs: bool = False
    """With `update`: the gradient's signs will do."""
    entries: Literal["", "rows", "all"] = ""
    """Every entry was sent; or such that missing ones are known to be small."""
    values: Literal["", "rounded", "exact"] = ""
    """Entries do not come as signs; nor rounded."""
    unclipped: bool = False
    """No defence has scaled the gradient by a factor that is not sent."""
    undecayed: Literal["", "steps", "delta"] = ""
    """No weight decay over several local steps; nor in any weight delta."""
    sums: Literal["", "dense", "single", "any"] = ""
    """Sums over clients (secure aggregation) are read where dense; or single updates alone; or either."""
    fresh: bool = False
    """Updates hold no residuals of earlier rounds: under error feedback only round 1 is attacked."""
    labels: str = ""
    """The strategy that reads labels from a linear head (``label_strategies.STRATEGIES``)."""
    distinct: bool = False
    """No two images of a batch have the same label."""
    images: int = 0
    """Most images in a batch."""
    batch: Literal["", "agreed", "same"] = ""
    """Batches have one agreed size; or each client's is the same in every round (all of its samples)."""
    first_layer: bool = False
    """The model begins with a linear layer with bias on the pixels."""
    patches: bool = False
    """With `first_layer`: an embedding of patches with learned positions will do."""
    hidden: bool = False
    """Somewhere in the model a ReLU follows a linear layer with bias."""
    head: Literal["", "linear", "biased"] = ""
    """The model ends in a linear layer; with a bias."""
    activations: tuple[str, ...] = ()
    batch_norm: Literal["", "needed", "refused"] = ""
    chain: bool = False
    """The model is a chain of convolutions with a linear head."""
    block: Block | None = None
    width: int = 0
    """Least `model.width`."""
    auxiliary: int = 0
    """Least number of public images granted."""
    labelled: bool = False
    """Public images have labels."""
    helped: bool = False
    """Public images help, and are not needed."""
    clients: int = 0
    """Clients that answer in one round."""
    held_out: bool = False
    """Samples that no client trains on, for the questions that are asked."""
    others: bool = False
    """Clients that are not malicious, about whose data it asks."""
    references: int = 0
    """Least number of reference models, trained by the adversary."""
    about: Literal["client", "anybody"] = "client"
    """Of membership: whether one client trained on a sample, or anybody did."""
    members: bool = False
    """Samples that are known to be members."""
    trains: Literal["classify", "generate"] = "classify"
    """What the federation trains."""
    critic: bool = False
    """Of a generator's federation: critics are sent."""
    people: bool = False
    """Of membership: people are asked about, by samples that nobody trained on."""
    foreign: bool = False
    """Of unlearning: the mechanism forgets samples that nobody registered."""
    certificate: bool = False
    """Of unlearning: the mechanism says what it promises, and when it must train anew."""
    calibrates: bool = False
    """Of unlearning: the mechanism has clients work while it forgets."""

    @property
    def summed(self) -> str:
        """Attacks on the same training that read sums."""
        return "critic" if self.trains == "generate" else "ig or unmix"

    @property
    def begins(self) -> str:
        """What the model begins with, in words."""
        return "a linear first layer with bias" + (
            ", or patches with learned positions" if self.patches else ""
        )

    @property
    def behind(self) -> str:
        """The activations in words."""
        return " or ".join(self.activations)

    @property
    def trained(self) -> str:
        """How many reference models, in words."""
        return "one reference model" if self.references == 1 else f"{self.references} reference models"

    @property
    def public(self) -> str:
        """The public images in words."""
        return "labelled public images" if self.labelled else "public images to train on"

    @property
    def together(self) -> str:
        """How many images of one batch, in words."""
        return "one image" if self.images == 1 else f"at most {self.images} images"


@dataclass(frozen=True)
class Facts:
    """What is known of a federation before it trains, beside its scenario; None: not known, and not checked.

    Attributes
    ----------
    rounds, samples : tuple of int
        Rounds to be attacked; samples of each client that is to be attacked.
    clients, drawn, honest : int
        In the federation; drawn each round; not malicious.
    held_out, auxiliary, labelled
        Samples that no client trains on; public images granted; whether these have labels.
    references, members : int
        Reference models, and known members, granted.
    people : bool
        Whether people are asked about.
    foreign : bool
        Whether the mechanism takes samples as they are sent, whoever's they are.
    certificate : bool
        Whether the mechanism promises something.
    calibrates : bool
        Whether the mechanism has clients work.
    """

    rounds: tuple[int, ...] = ()
    clients: int | None = None
    drawn: int | None = None
    samples: tuple[int, ...] = ()
    held_out: int | None = None
    auxiliary: int | None = None
    labelled: bool | None = None
    honest: int | None = None
    references: int | None = None
    members: int | None = None
    people: bool | None = None
    foreign: bool | None = None
    certificate: bool | None = None
    calibrates: bool | None = None

    @property
    def last(self) -> int:
        """The last round to be attacked; 1 where none is known."""
        return max(self.rounds, default=1)
