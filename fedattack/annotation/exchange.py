"""Ratings from elsewhere: one HTML file that asks without a server, the answers it returns, released folders."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedattack.annotation.page import page
from fedattack.annotation.pairs import Picture, png
from fedattack.annotation.plan import Option, Plan, Question, judged
from fedattack.annotation.rating_file import RatingFile
from fedattack.annotation.server import timestamp
from fedattack.annotation.table import PER_PAIR, pair_name, row_fault
from fedattack.errors import ConfigError, DataError
from fedattack.files import write_bytes
from fedattack.storage.plain import read_json, write_json

_LARGEST_ANSWERS = 64 * 2**20
RELEASED = "released-majority"
"""The annotator of an imported released folder, which holds what several people decided."""


def export_page(plans: Sequence[Plan], file: Path, table: Path) -> Path:
    """Write the plans, one an annotator, as one HTML file with its pictures, and the key to its answers.

    The file names neither attack nor arm: what its questions mean stays in the key,
    ``<table>.exports/<name>.json``, whose path is returned. Exporting the same again writes the same.
    """
    name = _export_name(plans)
    places: dict[bytes, int] = {}
    pictures: list[dict[str, Any]] = []

    def place(picture: Picture | bytes, size: tuple[int, int]) -> int:
        data = picture if isinstance(picture, bytes) else png(picture.pixels())
        if data not in places:
            places[data] = len(pictures)
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            pictures.append({"src": source, "width": size[0], "height": size[1]})
        return places[data]

    asked = {}
    for plan in plans:
        practice = [
            {
                "token": one.token,
                "pictures": [place(picture, one.size) for picture in one.pictures],
                "right": list(one.right),
                "why": one.why,
            }
            for one in plan.exercises
        ]
        questions = [
            {"token": one.token, "pictures": [place(picture, picture.size) for picture in one.pictures]}
            for one in plan.questions
        ]
        asked[plan.annotator] = {"practice": practice, "questions": questions}
    first = plans[0]
    options = [{"key": option.key, "text": option.text} for option in first.options]
    shown: dict[str, Any] = {"question": first.question, "hint": first.hint, "options": options}
    document = {"export": name, "raters": list(asked), "plans": asked, "pictures": pictures} | shown
    key = key_file(table, name)
    told = {plan.annotator: {one.token: _portable(one) for one in plan.questions} for plan in plans}
    answers = [{"choice": option.choice, "label": option.label} for option in first.options]
    write_json(key, {"format": 1, "protocol": first.protocol, "options": answers, "questions": told})
    write_bytes(file, page(document).encode())
    return key


def key_file(table: Path, name: str) -> Path:
    """Where the key of an export stands."""
    return table.with_name(f"{table.stem}.exports") / f"{name}.json"


def _export_name(plans: Sequence[Plan]) -> str:
    tokens = [question.token for plan in plans for question in plan.questions]
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()[:16]


def _portable(question: Question) -> dict[str, str]:
    paths = {
        name: str(Path(question.told[name]).absolute()) for name in ("original_path", "reconstruction_path")
    }
    return question.told | paths


def import_answers(file: Path, table: Path) -> tuple[int, int, str]:
    """Merge a file that the exported page returned into `table`; how many ratings are new, how many it holds, whose.

    Merged again, it adds nothing; of a longer file of the same rater, what is new.

    Raises
    ------
    ConfigError, DataError
        Where the file is malformed, was exported beside another table, or does not go with this one; nothing is then
        merged.
    RunFailed
        Where the table cannot be written; nothing is then merged either.
    """
    answers, name, annotator = read_answers(file)
    key = key_file(table, name)
    if not key.is_file():
        raise ConfigError(
            f"{file} answers the export {name}, whose key {key} is missing: give the --table that was named when it "
            "was exported"
        )
    document = read_json(key)
    try:
        questions = document["questions"].get(annotator)
        options = [Option("", "", one["choice"], one["label"]) for one in document["options"]]
        protocol = document["protocol"]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{key} is no key of an export") from None
    if questions is None:
        raise DataError(
            f"{file}: annotator {annotator!r} was not asked; the export asks {', '.join(document['questions'])}"
        )
    rows: dict[str, dict[str, str]] = {}
    for place, answer in enumerate(answers, 1):
        token, choice = answer.get("token"), answer.get("choice")
        if not isinstance(token, str) or token not in questions:
            raise DataError(
                f"{file}, answer {place}: token = {token!r:.60} is none of the export's questions"
            )
        if not isinstance(choice, int) or isinstance(choice, bool) or not 0 <= choice < len(options):
            raise DataError(
                f"{file}, answer {place}: choice = {choice!r:.60}; accepted: 0 to {len(options) - 1}"
            )
        when = str(answer.get("timestamp", ""))
        rows[token] = judged(questions[token], options[choice], str(answer.get("shown_px", "")), when)
        if (fault := row_fault(rows[token])) is not None:
            raise DataError(f"{file}, answer {place}: {fault}")
    target = RatingFile(table, protocol)
    return target.append(*rows.values(), replace=True), len(rows), annotator


def read_answers(file: Path) -> tuple[list[dict[str, Any]], str, str]:
    """Answers, the export's name and the annotator of a returned file (DataError)."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None
    if size > _LARGEST_ANSWERS:
        raise DataError(f"{file} has {size:,} bytes; a file of answers has at most {_LARGEST_ANSWERS:,}")
    document = read_json(file)
    wanted = {"format": int, "export": str, "annotator": str, "answers": list}
    if (
        not isinstance(document, dict)
        or any(not isinstance(document.get(name), kind) for name, kind in wanted.items())
        or document["format"] != 1
        or not document["export"].isalnum()
        or not all(isinstance(answer, dict) for answer in document["answers"])
    ):
        raise DataError(
            f"{file} is no file of answers of an exported page: {json.dumps(sorted(wanted))} are expected"
        )
    return document["answers"], document["export"], document["annotator"]


def import_released(folder: Path, table: Path, protocol: str = "recognise") -> tuple[int, int, int]:
    """Rate pairs as a folder of the released SemSim data does; how many are new, how many it holds, what is left out.

    Its sub-folders ``<id>/`` hold an original, ``*_ori.png``, and its recognisable reconstructions, ``-<id>/`` the
    unrecognisable ones; ``others/`` are negatives without an original, which are left out. (SonyResearch/SemSim,
    ``human_anno_id/train_with_ori``.)

    Raises DataError where an original is missing or there are several, or a picture is unreadable.
    """
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r}: no such folder; accepted: one with sub-folders <id>/ and -<id>/")
    places = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    ids = [name for name in places if name.isdecimal()]
    if not ids:
        raise DataError(f"{str(folder)!r} has no sub-folder <id>/ with an original *_ori.png")
    orphans = [
        name for name in places if name.startswith("-") and name[1:].isdecimal() and name[1:] not in ids
    ]
    if orphans:
        raise DataError(
            f"{str(places[orphans[0]])!r} has no {orphans[0][1:]}/ beside it, where its original would be"
        )
    now, rows, left_out = timestamp(), [], len(_pictures(places["others"])) if "others" in places else 0
    for name in sorted(ids, key=int):
        inside = _pictures(places[name])
        originals = [path for path in inside if path.stem.endswith("_ori")]
        if len(originals) != 1:
            raise DataError(
                f"{str(places[name])!r} holds {len(originals)} originals *_ori.png; one is expected"
            )
        original = Picture.read(originals[0])
        negative = places.get(f"-{name}")
        judged = [(path, 1) for path in inside if path != originals[0]]
        judged += [
            (path, 0) for path in (_pictures(negative) if negative else []) if not path.stem.endswith("_ori")
        ]
        rows += [_released_row(original, Picture.read(path), label, protocol, now) for path, label in judged]
    return RatingFile(table, protocol).append(*rows), len(rows), left_out


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def _released_row(
    original: Picture, reconstruction: Picture, label: int, protocol: str, now: str
) -> dict[str, str]:
    told = dict.fromkeys(PER_PAIR, "")
    for kind, picture in (("original", original), ("reconstruction", reconstruction)):
        told |= {f"{kind}_path": str(picture.path), f"{kind}_sha256": picture.sha256}
    return told | {
        "schema_version": "1", "pair_id": pair_name(told), "protocol": protocol, "label": str(label),
        "choice": ("not recognisable", "recognisable")[label], "confidence": "", "annotator_id": RELEASED,
        "annotator_type": "human", "proxy_name": "", "shown_px": "", "timestamp": now, "is_attention_check": "0",
    }  # fmt: skip
