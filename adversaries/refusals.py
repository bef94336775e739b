"""The one check of what attacks need against what is known before a federation trains, from one table of sentences.

The same table writes the words of ``fedattack list attacks`` and ``fedattack show``, README's table and the threat
model of the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from adversaries.base import Attack
from adversaries.inversion.evidence import defences, one_gradient
from adversaries.inversion.evidence.first_layer import first_layer, is_complete
from adversaries.inversion.evidence.head import head_name
from adversaries.inversion.evidence.label_strategies import check_strategy
from adversaries.inversion.gradients import closed_form
from adversaries.needs import Facts, Needs
from fedattack.config import ModelConfig
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario

NOT_KNOWN = Facts()

A = TypeVar("A", bound=Attack)

Sentence = str | Literal[False] | None
"""What stands in the way and what would help; nothing where the need is met, or not known not to be."""


@dataclass(frozen=True)
class _Model:
    """What a need may ask of a model."""

    head: Literal["", "linear", "biased"]
    batch_norm: bool
    kind: type[nn.Module]


@lru_cache(maxsize=16)
def _model(model: ModelConfig) -> _Model:
    with torch.random.fork_rng(devices=[]):
        module = build_model(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    head: Literal["", "linear", "biased"] = ""
    try:
        name = head_name(tuple(shapes), tuple(shapes.values()))
        if shapes[f"{name}.weight"][0] == model.classes:
            head = "biased" if f"{name}.bias" in shapes else "linear"
    except NotApplicable:
        pass
    normalised = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    return _Model(head, normalised, type(module))


def _said(check: Callable[..., object], *arguments: Any, **options: Any) -> Sentence:
    """What a function that refuses by an error says."""
    try:
        check(*arguments, **options)
    except NotApplicable as refusal:
        return str(refusal)
    return None


def _update(n: Needs, s: Scenario) -> Sentence:
    if n.update == "steps":
        s = dataclasses.replace(s, training=s.training.model_copy(update={"local_steps": 1}))
    return _said(one_gradient.check_one_gradient, s, signs=n.signs)


def _entries(n: Needs, s: Scenario) -> Sentence:
    name, rate = s.compression.name, s.compression.rate
    if n.entries == "all":
        return not is_complete(s) and (
            f"compression.name = {name!r} at rate {rate:g} leaves entries out, and every one is needed; use "
            "compression.name 'none'"
        )
    return (name in ("randomk", "dgc") and rate < 1) and (
        f"compression.name = {name!r} at rate {rate:g} leaves holes in every row; use 'none', 'topk' or 'qsgd'"
    )


def _values(n: Needs, s: Scenario) -> Sentence:
    bad = ("sign",) if n.values == "rounded" else ("sign", "qsgd", "topk-qsgd")
    return s.compression.name in bad and (
        f"compression.name = {s.compression.name!r}: entries are sent "
        f"{'as signs' if s.compression.name == 'sign' else 'rounded'}, and quotients or differences of them are "
        f"read; use compression.name 'none'{' or qsgd' if n.values == 'rounded' else ''}"
    )


def _undecayed(n: Needs, s: Scenario) -> Sentence:
    t = s.training
    decayed = t.protocol == "fedavg" and t.weight_decay and (n.undecayed == "delta" or t.local_steps > 1)
    return bool(decayed) and (
        f"training.weight_decay = {t.weight_decay} over {t.local_steps} local step(s) moves weights by what is no "
        "gradient; use weight_decay 0" + (" or local_steps 1" if n.undecayed == "steps" else "")
    )


def _sums(n: Needs, s: Scenario) -> Sentence:
    if n.sums == "dense":
        return _said(one_gradient.check_sum, s)
    return hides_clients(s.defense) and (
        "defence 'secure-aggregation' shows the server one large batch of all clients and no update of one alone; "
        "leave it out of 'defense.names', or use an attack that reads sums, such as ig"
    )


def _fresh(n: Needs, s: Scenario, f: Facts) -> Sentence:
    late = [number for number in f.rounds if number > 1]
    return (one_gradient.accumulates(s) and bool(late)) and (
        f"setting 'attack.rounds' = {', '.join(map(str, f.rounds))} with error feedback or DGC: from round 2 on an "
        "update holds residuals of other batches, and this attack reads one; use --attack-rounds 1, or hcgla"
    )


def _labels(n: Needs, s: Scenario) -> Sentence:
    several = s.training.local_steps > 1
    return (_model(s.model).head == "" and _NO_HEAD.format(s.model.name)) or _said(
        check_strategy, n.labels, s, 0 if several else s.training.batch_size
    )


_NO_HEAD = (
    "model.name = {!r} does not end in a linear layer, in whose gradient this attack reads; use a model with a "
    "linear head"
)


def _distinct(n: Needs, s: Scenario) -> Sentence:
    batch, classes = s.training.batch_size, s.model.classes or 0
    return batch > classes and (
        f"training.batch_size = {batch} > {classes} classes: labels must repeat, and images with equal labels are "
        "not told apart; use --batch-size " + str(classes)
    )


def _images(n: Needs, s: Scenario) -> Sentence:
    batch = s.training.batch_size
    return batch > n.images and (
        f"training.batch_size = {batch}: this attack tells at most {n.images} image(s) of one update apart; use "
        f"--batch-size {n.images}" + (", or --attack spear" if n.first_layer else "")
    )


def _batch(n: Needs, s: Scenario) -> Sentence:
    batch = s.training.batch_size
    if n.batch == "agreed":
        return batch < 1 and (
            "training.batch_size = 0: clients' batches differ, and the attack is trained for one size; give it"
        )
    return bool(batch) and (
        f"training.batch_size = {batch}: clients draw another batch in every round, and rounds on one batch are "
        "compared; use --batch-size 0"
    )


def _first_layer(n: Needs, s: Scenario) -> Sentence:
    if refused := _said(first_layer, s.model):
        return refused
    return not first_layer(s.model).biased and (
        f"model.name = {s.model.name!r} has no bias in its first layer, whose gradient fixes the scale of what its "
        "rows hold; use --model mlp"
    )


def _head(n: Needs, s: Scenario) -> Sentence:
    found = _model(s.model).head
    return (found == "" and _NO_HEAD.format(s.model.name)) or (
        n.head == "biased"
        and found == "linear"
        and (
            f"model.name = {s.model.name!r}: its head has no bias, whose gradient counts images; use another model"
        )
    )


def _batch_norm(n: Needs, s: Scenario) -> Sentence:
    has = _model(s.model).batch_norm
    if n.batch_norm == "needed":
        return not has and (
            f"model.name = {s.model.name!r} has no BatchNorm, whose statistics are matched; use a ResNet, or "
            "--attack ig"
        )
    return has and (
        f"model.name = {s.model.name!r} normalises by batch statistics, in which all samples meet; use a model "
        "without BatchNorm"
    )


def _block(n: Needs, s: Scenario) -> Sentence:
    assert n.block is not None
    return not issubclass(_model(s.model).kind, n.block.kind) and (
        f"model.name = {s.model.name!r} lacks {n.block.words}; use --model {n.block.models}"
    )


def _width(n: Needs, s: Scenario) -> Sentence:
    width = s.model.width
    return (
        width is not None
        and width < n.width
        and (
            f"model.width = {width} < {n.width}: too few neurons to tell the images of a batch apart; raise --width "
            "or lower --batch-size"
        )
    )


def _granted(what: str, setting: str, least: int, granted: int | None) -> Sentence:
    return (
        granted is not None
        and granted < least
        and (f"setting {setting!r}: {granted} {what}, and this attack needs at least {least}; grant more")
    )


def _clients(n: Needs, s: Scenario, f: Facts) -> Sentence:
    return (
        f.drawn is not None
        and f.drawn < n.clients
        and (
            f"{n.clients} clients must answer in one round, and {f.drawn} of {f.clients} are drawn; raise "
            "'federation.clients' or 'federation.participation'"
        )
    )


@dataclass(frozen=True)
class Row:
    """One kind of need.

    Attributes
    ----------
    words : callable
        Needs -> what a person reads.
    refusal : callable
        (Needs, Scenario, Facts) -> Sentence; asked only where the need is declared.
    plain : bool
        Whether it goes without saying in a short list.
    """

    words: Callable[[Needs], str]
    refusal: Callable[[Needs, Scenario, Facts], Sentence]
    plain: bool = False


def _row(words: str | Callable[[Needs], str], refusal: Any, plain: bool = False) -> Row:
    said = (lambda n: words) if isinstance(words, str) else words
    facts = refusal.__code__.co_argcount == 3
    return Row(said, refusal if facts else lambda n, s, f: refusal(n, s), plain)


TABLE: dict[str, Row] = {
    "block": _row(lambda n: f"{n.block.words} (model {n.block.models})" if n.block else "", _block),
    "update": _row(
        lambda n: "one gradient" if n.update == "gradient" else "one update",
        _update,
    ),
    "entries": _row(lambda n: "every entry" if n.entries == "all" else "whole rows", _entries),
    "values": _row(lambda n: "unrounded" if n.values == "exact" else "no signs", _values, plain=True),
    "unclipped": _row(
        "no clipping",
        lambda n, s: (
            defences.clips(s)
            and (
                "defence 'clip-noise' scales the gradient by a factor that is not sent, and this attack needs its "
                "length; use hcgla or ig, or leave defense.clip-noise.clip_norm empty (no clipping)"
            )
        ),
        plain=True,
    ),
    "undecayed": _row("no weight decay in weight deltas", _undecayed, plain=True),
    "sums": _row(
        lambda n: "single updates" if n.sums == "single" else "a single update or a dense sum",
        _sums,
        plain=True,
    ),
    "fresh": _row("no error feedback, or round 1", _fresh, plain=True),
    "labels": _row("labels read off a linear head", _labels, plain=True),
    "distinct": _row("distinct labels", _distinct),
    "images": _row(lambda n: "one image" if n.images == 1 else f"at most {n.images} images", _images),
    "batch": _row(
        lambda n: "an agreed batch size" if n.batch == "agreed" else "the same batch in every round", _batch
    ),
    "first_layer": _row("a linear first layer with bias", _first_layer),
    "head": _row(lambda n: "a linear head" + (" with bias" if n.head == "biased" else ""), _head),
    "activations": _row(
        lambda n: f"activation {' or '.join(n.activations)}",
        lambda n, s: (
            s.model.activation not in n.activations
            and (
                f"model.activation = {s.model.activation!r}: this attack works behind {', '.join(n.activations)}; "
                f"use --activation {n.activations[0]}"
            )
        ),
    ),
    "batch_norm": _row(lambda n: ("" if n.batch_norm == "needed" else "no ") + "BatchNorm", _batch_norm),
    "chain": _row("a chain of convolutions", lambda n, s: _said(closed_form.describe, s.model)),
    "width": _row(lambda n: f"width {n.width}", _width),
    "auxiliary": _row(
        "public images to train on",
        lambda n, s, f: _granted("auxiliary images", "data.auxiliary_size", n.auxiliary, f.auxiliary),
    ),
    "labelled": _row(
        "labels of public images",
        lambda n, s, f: (
            f.labelled is False
            and "the auxiliary images have no labels, which this attack needs; see setting 'data.auxiliary'"
        ),
    ),
    "helped": _row("public images help", lambda n, s: None),
    "clients": _row(lambda n: f"updates of {n.clients} clients in one round", _clients),
    "held_out": _row(
        "held-out samples",
        lambda n, s, f: _granted("held-out samples", "data.nonmembers", 1, f.held_out),
        plain=True,
    ),
    "references": _row(
        "reference models", lambda n, s, f: _granted("reference models", "attack.references", 1, f.references)
    ),
    "members": _row(
        "known members", lambda n, s, f: _granted("known members", "attack.members", 1, f.members)
    ),
}
"""Field of :class:`Needs` -> its words and its refusal, in the order in which they are read and asked."""


def refusals(needs: Needs, scenario: Scenario, facts: Facts = NOT_KNOWN) -> list[str]:
    """What of `needs` is known not to be met, a sentence each; empty: nothing stands in the way."""
    asked = ((row, getattr(needs, field)) for field, row in TABLE.items())
    said = (row.refusal(needs, scenario, facts) for row, value in asked if value)
    return [sentence for sentence in said if sentence]


def attack_refusals(attack: Attack, scenario: Scenario, facts: Facts = NOT_KNOWN) -> list[str]:
    """What stands in an attack's way: its needs, and where they are met what trying tells (:meth:`Attack.probe`).

    Raises
    ------
    ConfigError, DataError
        If the attack's own settings cannot work: a file that it names is missing, ...
    """
    found = refusals(attack.needs_now(scenario), scenario, facts)
    return found or [sentence for sentence in [_said(attack.probe, scenario, facts)] if sentence]


def applicable(
    attacks: Mapping[str, A], scenario: Scenario, facts: Facts = NOT_KNOWN
) -> tuple[dict[str, A], dict[str, str]]:
    """Attacks that apply, and for each other one the sentence that says why it is left out.

    Raises
    ------
    NotApplicable
        If there are attacks and none applies.
    ConfigError, DataError
        As :func:`attack_refusals`.
    """
    left_out = {
        name: refused[0]
        for name, attack in attacks.items()
        if (refused := attack_refusals(attack, scenario, facts))
    }
    if left_out and len(left_out) == len(attacks):
        raise NotApplicable("\n".join(f"attack {name!r}: {sentence}" for name, sentence in left_out.items()))
    return {name: attack for name, attack in attacks.items() if name not in left_out}, left_out


def words(needs: Needs, *, plain: bool = False) -> list[str]:
    """What is needed, in a few words each; with `plain` also what goes without saying."""
    rows = ((row, getattr(needs, field)) for field, row in TABLE.items())
    said = [row.words(needs) for row, value in rows if value and (plain or not row.plain)]
    return said if needs.update or needs.clients or not needs.sums else ["one update", *said]


def seat_of(attack: Attack | type[Attack]) -> str:
    """ "curious server", "malicious server" or "client"."""
    if attack.seat == "client":
        return "client"
    return "malicious server" if getattr(attack, "arms", False) else "curious server"


def threat_model(attack: Attack | type[Attack], needs: Needs | None = None) -> dict[str, Any]:
    """Who attacks, what it needs and what it is taken to know, JSON-able.

    Parameters
    ----------
    attack : Attack or its class
    needs : Needs, optional
        As :meth:`Attack.needs_now` says in one scenario; None: as declared.

    Returns
    -------
    dict
        "seat": str; "needs", "assumptions": lists of str; "letters": list of str. Letters are the threat models of
        Carletti, Foggia, Mazzocca, Parrella, Vento, "SoK: Gradient Inversion Attacks in Federated Learning", USENIX
        Security 2025: A, model updates; B, and basic knowledge; C, and training details; D, and surrogate data; E,
        and the clients' data distribution (here: BatchNorm statistics of their data); F, C and active manipulation;
        G, and surrogate data; H, and the choice of clients. Every attack here is told the training details, so that
        none is below C. Two letters: without and with the public images that help it. None for other questions than
        images.
    """
    needs = attack.needs if needs is None else needs
    seat = seat_of(attack)
    bare, granted = ("F", "G") if seat == "malicious server" else ("C", "D")
    if needs.batch_norm == "needed":
        bare = granted = "E"
    letters = [granted] if needs.auxiliary else [bare, granted] if needs.helped else [bare]
    assumptions = ["knows the model, the agreed training, the compression and the defences"]
    if seat == "malicious server":
        assumptions.append("changes the weights that it sends in the attacked rounds")
    if needs.auxiliary or needs.helped:
        assumptions.append("holds public images like the clients'" + (" (helps)" if needs.helped else ""))
    declared = words(needs, plain=True)
    return {
        "seat": seat,
        "needs": words(needs),
        "letters": list(dict.fromkeys(letters)) if attack.inverts else [],
        "assumptions": assumptions + [one for one in declared if one not in words(needs)],
    }


_CONTRADICTIONS: tuple[tuple[str, Callable[[Needs], bool]], ...] = (
    ("chain and first_layer: it cannot begin with both", lambda n: n.chain and n.first_layer),
    ("chain and batch_norm: it has none", lambda n: n.chain and n.batch_norm == "needed"),
    ("auxiliary and helped: public images are needed or only help", lambda n: n.auxiliary > 0 and n.helped),
    (
        "labelled without auxiliary: there are no images",
        lambda n: n.labelled and not (n.auxiliary or n.helped),
    ),
    ("values and signs: signs do, or they do not", lambda n: bool(n.values) and n.signs),
    ("clients and sums: a sum is of no single client", lambda n: n.clients > 1 and n.sums == "dense"),
    ("batch and images: all of a client's samples", lambda n: n.batch == "same" and n.images > 0),
)


def check_class(name: str, cls: type[Attack], shared: Iterable[str], families: Iterable[str]) -> None:
    """Refuse an attack class that breaks the contract.

    Parameters
    ----------
    name : str
        Of the attack in the run.
    cls : type
    shared : iterable of str
        Settings of a run that stand beside the attacks' own (``attack.victims``, ...).
    families : iterable of str
        Questions that an auditor can score.

    Raises
    ------
    ConfigError
    """
    known, own = sorted(families), {field.name for field in dataclasses.fields(cls)}
    if (family := getattr(cls, "family", None)) not in known:
        raise ConfigError(
            f"attack {name!r} is of family {family!r}, which nobody scores; an attack's `family` is one of "
            f"{', '.join(known)}"
        )
    if shadowed := sorted(own & set(shared)):
        raise ConfigError(
            f"attack {name!r} has a field {shadowed[0]!r}, but 'attack.{shadowed[0]}' is a setting of every run; an "
            "attack's fields are settings of its own: give it another name"
        )
    if not isinstance(cls.needs, Needs):
        raise ConfigError(
            f"attack {name!r} declares needs = {cls.needs!r}; an attack's `needs` is an adversaries.needs.Needs"
        )
    for what, broken in _CONTRADICTIONS:
        if broken(cls.needs):
            raise ConfigError(f"attack {name!r} declares needs that contradict each other, {what}")
