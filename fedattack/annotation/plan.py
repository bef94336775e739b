"""What one annotator is asked, in which order: pairs, silent repeats, checks, and practice before them."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from fedattack.annotation.pairs import Picture, RatedPair
from fedattack.annotation.table import CANNOT_TELL, PER_PAIR, pair_name
from fedattack.errors import ConfigError
from fedattack.rng import numpy_rng

PRACTICE = 5
_SHARE = 0.1
"""Of repeats, and of checks, among the pairs."""

_FEWEST = 5
"""Pairs below which nobody is asked anything twice."""

_APART = 5
"""Questions at least between a pair and its repeat."""

MOST_CLASSES = 10

Protocol = Literal["match", "recognise"]
Kind = Literal["pair", "repeat", "identical", "wrong"]


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
    certain: an original beside itself or, under `match`, beside the reconstruction of another. Below five pairs there
    are neither. A pair that is there twice is asked for once. `by_class`: under `recognise`, the class is asked for
    instead of yes or no.

    Raises ConfigError where classes are asked for that are unknown, or have no keys.
    """
    if by_class and protocol != "recognise":
        raise ConfigError(f"--ask class goes with --protocol recognise; got {protocol!r}")
    options = _by_class(pairs) if by_class else _YES_NO[protocol]
    pairs = list({pair_name(_told(pair)): pair for pair in pairs}.values())
    digest = _digest(pairs, protocol, by_class)
    rng = numpy_rng(seed, "annotation", zlib.crc32(annotator.encode()), int(digest[:8], 16))
    order = [pairs[place] for place in rng.permutation(len(pairs))]
    placed: list[tuple[float, Kind, RatedPair]] = [(at, "pair", pair) for at, pair in enumerate(order)]
    placed += _repeats(order, rng) + _checks(order, protocol, rng)
    placed.sort(key=lambda one: one[0])
    secret = f"{digest}|{annotator}|{seed}"
    every = [
        _question(f"{secret}|{place}", kind, pair, protocol, annotator)
        for place, (_, kind, pair) in enumerate(placed)
    ]
    questions = {question.name: question for question in every}.values()  # a check may be drawn twice
    task = "class" if by_class else protocol
    exercises = _exercises(order, protocol, options, rng, secret)
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


def _repeats(order: Sequence[RatedPair], rng: np.random.Generator) -> list[tuple[float, Kind, RatedPair]]:
    early = max(0, len(order) - _APART)
    chosen = rng.permutation(early)[: _some(len(order))]
    return [(rng.uniform(place + _APART, len(order)), "repeat", order[place]) for place in sorted(chosen)]


def _checks(
    order: Sequence[RatedPair], protocol: Protocol, rng: np.random.Generator
) -> list[tuple[float, Kind, RatedPair]]:
    """An original beside itself and, where two pictures are compared, beside another's reconstruction, in turn."""
    found: list[tuple[float, Kind, RatedPair]] = []
    originals = {pair.original.sha256: pair for pair in order}
    for number in range(_some(len(order))):
        pair = order[int(rng.integers(len(order)))]
        other = _stranger(pair, order, rng) if protocol == "match" and number % 2 else None
        at = rng.uniform(1, len(order))
        if other is not None:
            found.append((at, "wrong", RatedPair(pair.original, other.reconstruction, other.told)))
            continue
        same = originals.pop(pair.original.sha256, None)  # each original once
        if same is not None:
            told = {name: same.told.get(name, "") for name in ("dataset", "class_label")}
            found.append((at, "identical", RatedPair(same.original, same.original, told)))
    return found


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
    protocol: Protocol,
    options: Sequence[Option],
    rng: np.random.Generator,
    secret: str,
) -> tuple[Exercise, ...]:
    """Five screens with a certain answer, of the originals and their distortions."""
    first = order[int(rng.integers(len(order)))]
    other = _stranger(first, order, rng) or first
    one, two = first.original.pixels(), other.original.pixels()
    noise = Image.fromarray(rng.integers(0, 256, np.asarray(one).shape, dtype=np.uint8))
    mine, theirs = first.told.get("class_label", ""), other.told.get("class_label", "")
    if protocol == "match":
        cases = [
            (one, True, mine, "The right picture is the left one, unchanged."),
            (noise, False, mine, "The right picture is noise: nothing of the left one can be seen in it."),
            (_blurred(one), True, mine, "The right picture is the left one, blurred; it can still be told."),
            (two, False, mine, "The right picture shows another image, however clearly."),
            (
                _moved(one),
                True,
                mine,
                "The right picture is the left one, moved and paler; that does not matter.",
            ),
        ]
        if other is first:
            cases[3] = (
                _shuffled(one, rng),
                False,
                mine,
                "The pixels are shuffled: nothing can be told any more.",
            )
    else:
        cases = [
            (one, True, mine, "It is an original, unchanged."),
            (noise, False, mine, "It is noise: nothing can be recognised."),
            (_blurred(two), True, theirs, "It is an original, blurred; it can still be told."),
            (
                _shuffled(one, rng),
                False,
                mine,
                "The pixels are shuffled: nothing can be recognised any more.",
            ),
            (_moved(two), True, theirs, "It is an original, moved and paler; that does not matter."),
        ]
    found = []
    for place, (picture, yes, name, why) in enumerate(cases[:PRACTICE]):
        shown = (one, picture) if protocol == "match" else (picture,)
        right = tuple(at for at, option in enumerate(options) if _is_right(option, yes, name))
        token = opaque(f"{secret}|practice {place}")
        found.append(Exercise(token, tuple(png(image) for image in shown), one.size, right, why))
    return tuple(found)


def _is_right(option: Option, yes: bool, name: str) -> bool:
    if option.choice == CANNOT_TELL:
        return False
    return option.choice == name if yes and option.label is None else option.label == int(yes)


def png(image: Image.Image) -> bytes:
    """A picture as PNG, without any text of its file."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(0.6, min(image.size) / 40)))


def _moved(image: Image.Image) -> Image.Image:
    """An eighth to the right, with half the contrast."""
    pixels = np.asarray(image).astype(np.float64)
    pixels = np.roll(pixels, max(1, image.width // 8), axis=1)
    return Image.fromarray((pixels.mean() + 0.5 * (pixels - pixels.mean())).round().astype(np.uint8))


def _shuffled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image)
    flat = pixels.reshape(image.width * image.height, -1)
    return Image.fromarray(rng.permutation(flat).reshape(pixels.shape))
