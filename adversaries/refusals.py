"""The one check of what attacks need against what is known before a federation trains.

Its table of sentences also writes ``fedattack list attacks``, ``show``, README's table and the threat model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from adversaries.base import Attack
from adversaries.inversion.evidence import defences, one_gradient
from adversaries.inversion.evidence.first_layer import first_layer, is_complete
from adversaries.inversion.evidence.head import head_name
from adversaries.inversion.evidence.labels.label_strategies import check_strategy
from adversaries.inversion.evidence.layers.hidden_layer import hidden_layers
from adversaries.inversion.evidence.layers.patches import patch_embedding
from adversaries.inversion.gradients import closed_form
from adversaries.needs import Facts, Needs
from fedattack.config import ModelConfig
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.task import task_of

NOT_KNOWN = Facts()

A = TypeVar("A", bound=Attack)


@lru_cache(maxsize=16)
def _model(model: ModelConfig) -> tuple[str, bool, type[nn.Module]]:
    """Head ("", "linear", "biased"), whether BatchNorm is in it, and class of a model."""
    with torch.random.fork_rng(devices=[]):
        module = build_model(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    normalised = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    found = _said(head_name, tuple(shapes), tuple(shapes.values()))
    name = "" if found else head_name(tuple(shapes), tuple(shapes.values()))
    # Of a frozen head nothing is sent.
    read = bool(name) and module.get_parameter(f"{name}.weight").requires_grad
    if not read or shapes[f"{name}.weight"][0] != model.classes:
        return "", normalised, type(module)
    return "biased" if f"{name}.bias" in shapes else "linear", normalised, type(module)


def normalises(model: ModelConfig) -> bool:
    """Whether BatchNorm is in a model."""
    return _model(model)[1]


def _said(check: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """What a function that refuses by an error says."""
    try:
        check(*arguments, **options)
    except NotApplicable as refusal:
        return str(refusal)
    return ""


def _no_start(n: Needs, model: ModelConfig) -> object:
    """What a model does not begin with, or that its first layer has no bias."""
    refused = _said(first_layer, model)
    if refused and n.patches:
        return _said(patch_embedding, model)
    return refused or not first_layer(model).biased


def _one_step(s: Scenario) -> Scenario:
    return dataclasses.replace(
        s, training=s.training.model_copy(update={"local_steps": 1, "local_epochs": None})
    )


@dataclass(frozen=True)
class Row:
    """One need: what a person reads of it, and what refuses a scenario that does not meet it.

    Attributes
    ----------
    field : str
        Of :class:`Needs`.
    words : str
        A template over n, the needs; "": said by another row.
    broken : callable
        (needs n, scenario s, facts f) -> whether it is known not to be met, or at once the sentence that says so.
    sentence : str
        What stands in the way and what would help; a template over n, s, f, and t, c, m: the scenario's
        training, compression, model.
    value : object
        Of the field, where the row is for one alone.
    plain : bool
        Whether it goes without saying in a short list.
    """

    field: str
    words: str
    broken: Callable[[Needs, Scenario, Facts], object]
    sentence: str = ""
    value: object = None
    plain: bool = False

    def declared(self, n: Needs) -> bool:
        """Whether the needs have it."""
        value = getattr(n, self.field)
        return bool(value) and self.value in (None, value)

    def refusal(self, n: Needs, s: Scenario, f: Facts) -> str:
        """The sentence, or "" where the need is met or not known not to be."""
        broken = self.broken(n, s, f)
        if isinstance(broken, str):
            return broken
        return self.sentence.format(n=n, s=s, f=f, t=s.training, c=s.compression, m=s.model) if broken else ""


_NO_HEAD = (
    "model.name = {m.name!r} does not end in a linear layer, in whose gradient this attack reads; use a model with a "
    "linear head"
)
_READ = "and quotients or differences of entries are read; use compression.name 'none'"

# fmt: off
TABLE: tuple[Row, ...] = (
    Row("trains", "a classifier", lambda n, s, f: task_of(s).kind != "classify",
        "training.task = {t.task!r} trains no classifier, whose classes this attack reads; use --task classify, or "
        "an attack on generators (fedattack list attacks)", value="classify", plain=True),
    Row("trains", "a generator", lambda n, s, f: task_of(s).kind != "generate",
        "training.task = {t.task!r} trains no generator; use --task wgan-gp", value="generate"),
    Row("critic", "critics that are sent", lambda n, s, f: s.model.nets == "generator",
        "gan.share = 'generator': critics stay at home, and this attack reads them; use gan.share 'both'"),
    Row("block", "{n.block.words} (model {n.block.models})",
        lambda n, s, f: not issubclass(_model(s.model)[2], n.block.kind if n.block else nn.Module),
        "model.name = {m.name!r} lacks {n.block.words}; use --model {n.block.models}"),
    Row("update", "one gradient", lambda n, s, f: _said(one_gradient.check_one_gradient, s, signs=n.signs),
        value="gradient"),
    Row("update", "one update",
        lambda n, s, f: _said(one_gradient.check_one_gradient, _one_step(s), signs=n.signs), value="steps"),
    Row("entries", "every entry", lambda n, s, f: not is_complete(s),
        "compression.name = {c.name!r} at rate {c.rate:g} leaves entries out, and every one is needed; use "
        "compression.name 'none'", value="all"),
    Row("entries", "whole rows",
        lambda n, s, f: s.compression.name in ("randomk", "dgc") and s.compression.rate < 1,
        "compression.name = {c.name!r} at rate {c.rate:g} leaves holes in every row; use 'none', 'topk' or "
        "'qsgd'", value="rows"),
    Row("values", "no signs", lambda n, s, f: s.compression.name == "sign",
        f"compression.name = 'sign': entries are sent as signs, {_READ}", plain=True),
    Row("values", "unrounded", lambda n, s, f: s.compression.name in ("qsgd", "topk-qsgd"),
        f"compression.name = {{c.name!r}}: entries are sent rounded, {_READ}", value="exact", plain=True),
    Row("unclipped", "no clipping", lambda n, s, f: defences.clips(s),
        "defence 'clip-noise' scales the gradient by a factor that is not sent, and this attack needs its "
        "length; use hcgla or ig, or leave defense.clip-noise.clip_norm empty (no clipping)", plain=True),
    Row("undecayed", "no weight decay in weight deltas",
        lambda n, s, f: (s.training.protocol == "fedavg" and s.training.weight_decay > 0
                         and (n.undecayed == "delta" or s.training.local_steps > 1)),
        "training.weight_decay = {t.weight_decay} over {t.local_steps} local step(s) moves weights by what is "
        "no gradient; use weight_decay 0", plain=True),
    Row("sums", "a single update or a dense sum", lambda n, s, f: _said(one_gradient.check_sum, s),
        value="dense", plain=True),
    Row("sums", "single updates", lambda n, s, f: hides_clients(s.defense),
        "defence 'secure-aggregation' shows the server one large batch of all clients and no update of one "
        "alone; leave it out of 'defense.names', or use an attack that reads sums, such as {n.summed}",
        value="single", plain=True),
    Row("fresh", "no error feedback, or round 1", lambda n, s, f: one_gradient.accumulates(s) and f.last > 1,
        "setting 'attack.rounds' = {f.last} with error feedback or DGC: from round 2 on an update holds "
        "residuals of other batches, and this attack reads one; use --attack-rounds 1, or hcgla",
        plain=True),
    Row("labels", "labels read off a linear head", lambda n, s, f: not _model(s.model)[0],
        _NO_HEAD, plain=True),
    Row("labels", "",
        lambda n, s, f: _said(check_strategy, n.labels, s,
                              0 if s.training.local_steps > 1 else s.training.batch_size,
                              False if f.auxiliary == 0 else f.labelled)),
    Row("distinct", "distinct labels", lambda n, s, f: s.training.batch_size > (s.model.classes or 0),
        "training.batch_size = {t.batch_size} > {m.classes} classes: labels must repeat, and images with equal "
        "labels are not told apart; lower --batch-size"),
    Row("images", "{n.together}", lambda n, s, f: s.training.batch_size > n.images,
        "training.batch_size = {t.batch_size}: this attack tells {n.together} of an update apart; use "
        "--batch-size {n.images}, or an attack on batches"),
    Row("batch", "an agreed batch size", lambda n, s, f: s.training.batch_size < 1,
        "training.batch_size = 0: clients' batches differ, and the attack is trained for one size; give it",
        value="agreed"),
    Row("batch", "the same batch in every round", lambda n, s, f: s.training.batch_size > 0,
        "training.batch_size = {t.batch_size}: clients draw another batch in every round, and rounds on one "
        "batch are compared; use --batch-size 0", value="same"),
    Row("first_layer", "{n.begins}", lambda n, s, f: _no_start(n, s.model),
        "model.name = {m.name!r} has no bias in its first layer, whose gradient fixes the scale of what its "
        "rows hold; use --model mlp"),
    Row("hidden", "a linear layer with bias before ReLU", lambda n, s, f: _said(hidden_layers, s.model)),
    Row("head", "a linear head", lambda n, s, f: not _model(s.model)[0], _NO_HEAD),
    Row("head", "with a bias", lambda n, s, f: _model(s.model)[0] == "linear",
        "model.name = {m.name!r}: its head has no bias, whose gradient counts images; use another model",
        value="biased"),
    Row("activations", "activation {n.behind}", lambda n, s, f: s.model.activation not in n.activations,
        "model.activation = {m.activation!r}, and this attack works behind {n.behind}; use --activation "
        "{n.activations[0]}"),
    Row("batch_norm", "BatchNorm", lambda n, s, f: not _model(s.model)[1],
        "model.name = {m.name!r} has no BatchNorm, whose statistics are matched; use a ResNet, or --attack ig",
        value="needed"),
    Row("batch_norm", "no BatchNorm", lambda n, s, f: _model(s.model)[1],
        "model.name = {m.name!r} normalises by batch statistics, in which all samples meet; use a model without"
        " BatchNorm", value="refused"),
    Row("chain", "a chain of convolutions", lambda n, s, f: _said(closed_form.describe, s.model)),
    Row("width", "width {n.width}", lambda n, s, f: s.model.width is not None and s.model.width < n.width,
        "model.width = {m.width} < {n.width}: too few neurons to tell the images of a batch apart; raise "
        "--width or lower --batch-size"),
    Row("auxiliary", "{n.public}",
        lambda n, s, f: f.auxiliary is not None and f.auxiliary < n.auxiliary,
        "setting 'data.auxiliary_size': {f.auxiliary} auxiliary images, and this attack needs at least "
        "{n.auxiliary}"),
    Row("labelled", "", lambda n, s, f: f.labelled is False,
        "setting 'data.auxiliary': these images have no labels, which this attack needs"),
    Row("helped", "public images help", lambda n, s, f: False),
    Row("clients", "updates of {n.clients} clients in one round",
        lambda n, s, f: f.drawn is not None and f.drawn < n.clients,
        "{n.clients} clients must answer in one round, and {f.drawn} of {f.clients} are drawn; raise "
        "'federation.clients' or 'federation.participation'"),
    Row("held_out", "held-out samples", lambda n, s, f: f.held_out == 0,
        "setting 'data.nonmembers': 0 held-out samples, and this attack needs some; accepted: 1 or more",
        plain=True),
    Row("others", "the global models that its client is sent", lambda n, s, f: f.honest == 0,
        "setting 'attack.malicious_clients': all clients are malicious, and this attack asks about the others"),
    Row("references", "{n.trained}",
        lambda n, s, f: f.references is not None and f.references < n.references,
        "setting 'attack.references' = {f.references}: this attack needs at least {n.trained}; use --references "
        "{n.references}"),
    Row("about", "asked about anybody", lambda n, s, f: False, value="anybody", plain=True),
    Row("people", "asked about people", lambda n, s, f: f.people is False,
        "setting 'attack.unit' = 'sample': this attack asks about people, by samples that nobody trained on; use "
        "attack.unit 'group' with data.withheld and data.nonmember_unit 'group'"),
    Row("foreign", "samples taken as they are sent", lambda n, s, f: f.foreign is False,
        "setting 'unlearning.mechanism': this one forgets what its client registered, and this attack sends samples "
        "that nobody did; use one that forgets samples as they are sent (scrub)"),
    Row("certificate", "a certificate that can be used up", lambda n, s, f: f.certificate is False,
        "setting 'unlearning.mechanism': this one promises nothing that removals could use up; use one that "
        "certifies (certified)"),
    Row("calibrates", "clients that work while the server forgets", lambda n, s, f: f.calibrates is False,
        "setting 'unlearning.mechanism': this one asks no client to work, and this attack changes what clients "
        "answer; use retrain, federaser or another that reaches clients"),
    Row("members", "known members", lambda n, s, f: f.members == 0, "no known members are granted"),
)
# fmt: on
"""Every need, in the order in which needs are read and asked."""


def refusals(needs: Needs, scenario: Scenario, facts: Facts = NOT_KNOWN) -> list[str]:
    """What of `needs` is known not to be met, a sentence each; empty: nothing stands in the way."""
    said = (row.refusal(needs, scenario, facts) for row in TABLE if row.declared(needs))
    return [sentence for sentence in said if sentence]


def attack_refusals(attack: Attack, scenario: Scenario, facts: Facts = NOT_KNOWN) -> list[str]:
    """What stands in an attack's way: its needs, and where they are met what trying tells (:meth:`Attack.probe`).

    ConfigError or DataError if the attack's own settings cannot work: a file that it names is missing, ...
    """
    found = refusals(attack.needs_now(scenario), scenario, facts)
    tried = "" if found else _said(attack.probe, scenario, facts)
    return [tried] if tried else found


def applicable(
    attacks: Mapping[str, A],
    scenario: Scenario,
    facts: Facts = NOT_KNOWN,
    also: Callable[[str, A], object] | None = None,
    *,
    empty: bool = False,
) -> tuple[dict[str, A], dict[str, str]]:
    """Attacks that apply, and for each other one the sentence that says why it is left out.

    `also` refuses by NotApplicable what somebody else cannot do with an attack, (name, attack). NotApplicable
    if there are attacks and none applies, unless that may be (`empty`); else errors as :func:`attack_refusals`.
    """
    left_out = {}
    for name, attack in attacks.items():
        refused = attack_refusals(attack, scenario, facts) or [_said(also, name, attack) if also else ""]
        if refused[0]:
            left_out[name] = refused[0]
    if left_out and len(left_out) == len(attacks) and not empty:
        raise NotApplicable("\n".join(f"attack {name!r}: {sentence}" for name, sentence in left_out.items()))
    return {name: attack for name, attack in attacks.items() if name not in left_out}, left_out


def words(needs: Needs, *, plain: bool = False) -> list[str]:
    """What is needed, in a few words each; with `plain` also what goes without saying."""
    said = [row.words.format(n=needs) for row in TABLE if row.declared(needs) and (plain or not row.plain)]
    bare = bool(needs.sums) and not (needs.update or needs.clients)
    return ["one update"] * bare + [one for one in said if one]


_SEEN = {
    "weights": "sees its own samples and every global model that it is sent",
    "queries": "sees its own samples and the global model's answers to counted queries, and not the model",
    "none": "sees its own samples and nothing of the global model",
}
"""What an attack in a client's seat knows, by its access."""


def threat_model(
    attack: Attack | type[Attack], needs: Needs | None = None, public: bool | None = None
) -> dict[str, Any]:
    """Who attacks, what it needs and what it is taken to know, JSON-able.

    `needs` are as :meth:`Attack.needs_now` says in one scenario, `public` says whether public images are
    granted; None: as declared, not known yet. Returns "seat": str; "needs", "assumptions", "letters": lists
    of str. Letters are the threat models of Carletti, Foggia, Mazzocca, Parrella, Vento, "SoK: Gradient
    Inversion Attacks in Federated Learning", USENIX Security 2025: A, model updates; B, and basic knowledge;
    C, and training details; D, and surrogate data; E, and the clients' data distribution (here: BatchNorm
    statistics of their data); F, C and active manipulation; G, and surrogate data; H, and the choice of
    clients. Every attack here is told the training details, so that none is below C. Two letters: without and
    with the public images that help it. None for other questions than images.
    """
    needs = attack.needs if needs is None else needs
    seat = attack.seat
    bare, granted = ("F", "G") if seat == "malicious server" else ("C", "D")
    if needs.batch_norm == "needed":
        bare = granted = "E"
    helped = [bare, granted] if public is None else [granted if public else bare]
    letters = [granted] if needs.auxiliary else helped if needs.helped else [bare]
    assumptions = ["knows the model, the agreed training, the compression and the defences"]
    if seat == "malicious client":
        assumptions = [_SEEN[getattr(attack, "access", "weights")]]
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
    """ConfigError for an attack class that breaks the contract.

    `shared` are settings of a run that stand beside the attacks' own (``attack.victims``, ...), `families`
    the questions that an auditor can score.
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
