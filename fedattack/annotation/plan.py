"""What one annotator is asked, in which order: pairs, silent repeats, checks, and practice before them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedattack.annotation.pairs import Picture, RatedPair, png
from fedattack.annotation.practice import class_cases, match_cases, recognise_cases
from fedattack.annotation.table import CANNOT_TELL, PER_PAIR, pair_name
from fedattack.errors import ConfigError
from fedattack.rng import numpy_rng

_SHARE = 0.1
"""Of repeats, and of checks, among the pairs."""

_FEWEST = 5
"""Pairs below which nobody is asked anything twice."""

_APART = 5
"""Questions at least between a pair and its repeat."""

MOST_CLASSES = 10

Protocol = Literal["match", "recognise"]
Kind = Literal["pair", "repeat", "identical", "wrong"]
_Placed = tuple[float, Kind, RatedPair]


@dataclass(frozen=True)
class Option:
    """An answer: its key, what stands on its button, the table's `choice`, and its label.

    `label` None: it depends on the pair's class (a class was chosen), or there is none ("cannot tell").
    """

    key: str
    text: str
    choice: str
    label: Literal[0, 1] | None = None


CANNOT = Option("?", "Cannot tell", CANNOT_TELL)
_YES_NO = {
    "match": (Option("y", "Yes, the same", "same", 1), Option("n", "No", "different", 0), CANNOT),
    "recognise": (
        Option("y", "Yes", "recognisable", 1),
        Option("n", "No", "not recognisable", 0),
        CANNOT,
    ),
}
_QUESTIONS = {
    "match": "Do both pictures show the same image?",
    "recognise": "Can you recognise what the picture shows?",
    "class": "What does the picture show?",
}
_HINTS = {
    "match": "Yes, if you can tell that the right one was made from the left one, even where it is blurred, noisy, "
    "moved, mirrored, or of other brightness.",
    "recognise": "Yes, if you can tell what it is, even where it is blurred, noisy, moved, mirrored, or of other "
    "brightness.",
    "class": "Choose what it shows, even where it is blurred, noisy, moved, or of other brightness; None, if nothing "
    "can be recognised.",
}


@dataclass(frozen=True)
class Question:
    """One screen: the pictures from left to right, and the row that its answer becomes.

    `told` holds the columns of the table that do not depend on the answer; `token` names the screen to the page and
    says nothing about it.
    """

    token: str
    kind: Kind
    pictures: tuple[Picture, ...]
    told: dict[str, str]

    @property
    def name(self) -> tuple[str, str]:
        """What finds its rating in a table, of its annotator: the pair, and whether it is a check."""
        return self.told["pair_id"], self.told["is_attention_check"]


@dataclass(frozen=True)
class Exercise:
    """A practice screen: pictures as PNG, their size, the places of the right answers among the options, and why."""

    token: str
    pictures: tuple[bytes, ...]
    size: tuple[int, int]
    right: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Plan:
    """All that one annotator is asked. The same pairs, protocol, annotator and seed make the same plan.

    `digest` names the pairs and the protocol.
    """

    protocol: Protocol
    annotator: str
    digest: str
    question: str
    hint: str
    options: tuple[Option, ...]
    exercises: tuple[Exercise, ...]
    questions: tuple[Question, ...]


def judged(told: Mapping[str, str], option: Option, shown_px: int | str, timestamp: str) -> dict[str, str]:
    """The table's row for an answer to a question that `told` describes."""
    label = option.label
    if label is None and option.choice != CANNOT_TELL:
        label = 1 if option.choice == told["class_label"] else 0
    return dict(told) | {
        "label": "" if label is None else str(label),
        "choice": option.choice,
        "shown_px": str(shown_px),
        "timestamp": timestamp,
    }


def make_plan(
    pairs: Sequence[RatedPair], protocol: Protocol, annotator: str, seed: int, by_class: bool = False
) -> Plan:
    """Plan an annotator's questions, in a blinded order of their own.

    A tenth of the pairs are asked again, at least five questions later; as many checks are strewn in, whose answer is
    certain: an original beside itself or beside the reconstruction of another; under `recognise`, an original in the
    place of a reconstruction, after those of it. Below five pairs there are neither. A pair that is there twice is
    asked for once. `by_class`: under `recognise`, the class is asked for instead of yes or no.

    Raises ConfigError where classes are asked for that are unknown, or have no keys.
    """
    if by_class and protocol != "recognise":
        raise ConfigError(f"--ask class goes with --protocol recognise; got {protocol!r}")
    options = _by_class(pairs) if by_class else _YES_NO[protocol]
    pairs = list({pair_name(_told(pair)): pair for pair in pairs}.values())
    digest = _digest(pairs, protocol, by_class)
    rng = numpy_rng(seed, "annotation", zlib.crc32(annotator.encode()), int(digest[:8], 16))
    order = [pairs[place] for place in rng.permutation(len(pairs))]
    repeats = _repeats(order, rng)
    placed: list[_Placed] = [(at, "pair", pair) for at, pair in enumerate(order)]
    placed += repeats
    placed += _match_checks(order, rng) if protocol == "match" else _alone_checks(order, repeats, rng)
    placed.sort(key=lambda one: one[0])
    secret = f"{digest}|{annotator}|{seed}"
    every = [
        _question(f"{secret}|{place}", kind, pair, protocol, annotator)
        for place, (_, kind, pair) in enumerate(placed)
    ]
    questions = {question.name: question for question in every}.values()  # a check may be drawn twice
    task = "class" if by_class else protocol
    exercises = _exercises(order, task, options, rng, secret)
    return Plan(
        protocol, annotator, digest, _QUESTIONS[task], _HINTS[task], options, exercises, tuple(questions)
    )


def opaque(secret: str) -> str:
    """A name that tells nothing about what it names."""
    return hashlib.sha256(secret.encode()).hexdigest()[:24]


def _digest(pairs: Sequence[RatedPair], protocol: str, by_class: bool) -> str:
    """Names the pairs, whatever their order and place."""
    names = sorted(pair_name(_told(pair)) for pair in pairs)
    return hashlib.sha256("\n".join([protocol, str(by_class), *names]).encode()).hexdigest()[:16]


def _told(pair: RatedPair) -> dict[str, str]:
    told = dict.fromkeys(PER_PAIR, "") | pair.told
    for kind, picture in (("original", pair.original), ("reconstruction", pair.reconstruction)):
        told |= {f"{kind}_path": str(picture.path), f"{kind}_sha256": picture.sha256}
    return told


def _question(secret: str, kind: Kind, pair: RatedPair, protocol: Protocol, annotator: str) -> Question:
    told = _told(pair)
    told |= {
        "schema_version": "1",
        "pair_id": pair_name(told),
        "protocol": protocol,
        "confidence": "",
        "annotator_id": annotator,
        "annotator_type": "human",
        "proxy_name": "",
        "is_attention_check": "0" if kind == "pair" else "1",
    }
    pictures = (pair.original, pair.reconstruction) if protocol == "match" else (pair.reconstruction,)
    return Question(opaque(secret), kind, pictures, told)


def _some(count: int) -> int:
    return max(1, round(_SHARE * count)) if count >= _FEWEST else 0


def _repeats(order: Sequence[RatedPair], rng: np.random.Generator) -> list[_Placed]:
    early = max(0, len(order) - _APART)
    chosen = rng.permutation(early)[: _some(len(order))]
    return [(rng.uniform(place + _APART, len(order)), "repeat", order[place]) for place in sorted(chosen)]


def _match_checks(order: Sequence[RatedPair], rng: np.random.Generator) -> list[_Placed]:
    """An original beside itself and beside another's reconstruction, in turn."""
    found: list[_Placed] = []
    originals = {pair.original.sha256: pair for pair in order}
    for number in range(_some(len(order))):
        pair, at = order[int(rng.integers(len(order)))], rng.uniform(1, len(order))
        other = _stranger(pair, order, rng) if number % 2 else None
        if other is not None:
            found.append((at, "wrong", RatedPair(pair.original, other.reconstruction, other.told)))
        elif (same := originals.pop(pair.original.sha256, None)) is not None:  # each original once
            found.append((at, "identical", _itself(same)))
    return found


def _alone_checks(
    order: Sequence[RatedPair], repeats: Sequence[_Placed], rng: np.random.Generator
) -> list[_Placed]:
    """An original in a reconstruction's place, after its reconstructions: who has seen it recognises them."""
    last = {pair.original.sha256: (at, pair) for at, pair in enumerate(order)}
    for _, _, pair in repeats:
        last.pop(pair.original.sha256, None)
    seen = list(last.values())
    chosen = rng.permutation(len(seen))[: _some(len(order))]
    return [(rng.uniform(seen[one][0], len(order)), "identical", _itself(seen[one][1])) for one in chosen]


def _itself(pair: RatedPair) -> RatedPair:
    told = {name: pair.told.get(name, "") for name in ("dataset", "class_label")}
    return RatedPair(pair.original, pair.original, told)


def _stranger(pair: RatedPair, order: Sequence[RatedPair], rng: np.random.Generator) -> RatedPair | None:
    """Another original's pair, of another class where classes are known; None where there is none."""
    mine = pair.told.get("class_label", "")
    others = [
        one
        for one in order
        if one.original.sha256 != pair.original.sha256
        and one.original.size == pair.original.size
        and one.reconstruction.sha256 != pair.original.sha256
        and (not mine or one.told.get("class_label") != mine)
    ]
    return others[int(rng.integers(len(others)))] if others else None


def _by_class(pairs: Sequence[RatedPair]) -> tuple[Option, ...]:
    names = {pair.told.get("class_label", "") for pair in pairs}
    if "" in names or not 2 <= len(names) <= MOST_CLASSES:
        known = "some pairs have no class" if "" in names else f"the pairs have {len(names)} classes"
        raise ConfigError(
            f"--ask class: {known}; accepted: two to {MOST_CLASSES} known classes, for each has a key; "
            "or --ask recognisable"
        )
    ordered = sorted(names, key=lambda name: (len(name), name))
    own = all(name in "0123456789" for name in ordered)  # digits are their own keys
    keys = ordered if own else [*"1234567890"][: len(ordered)]
    classes = [Option(key, name, name) for key, name in zip(keys, ordered, strict=True)]
    return (*classes, Option("n", "None: not recognisable", "not recognisable", 0), CANNOT)


def _exercises(
    order: Sequence[RatedPair],
    task: str,
    options: Sequence[Option],
    rng: np.random.Generator,
    secret: str,
) -> tuple[Exercise, ...]:
    first = order[int(rng.integers(len(order)))]
    other = _stranger(first, order, rng)
    if task == "match":
        cases = match_cases(first, other, rng)
    elif task == "class":
        cases = class_cases(first, other or first, rng)
    else:
        cases = recognise_cases(first.original.pixels().mode == "RGB", rng)
    return tuple(
        Exercise(
            opaque(f"{secret}|practice {place}"),
            tuple(png(image) for image in case.pictures),
            case.pictures[0].size,
            tuple(at for at, option in enumerate(options) if _is_right(option, case.yes, case.name)),
            case.why,
        )
        for place, case in enumerate(cases)
    )


def _is_right(option: Option, yes: bool, name: str) -> bool:
    if option.choice == CANNOT_TELL:
        return False
    return option.choice == name if yes and option.label is None else option.label == int(yes)
