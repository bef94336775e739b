"""The page of answers that nobody scored: pictures, certificates, labels, and no verdict."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedattack.files import write_bytes
from fedattack.observation import MembershipScores, Reconstruction, called
from fedattack.reporting import formats
from fedattack.reporting.pages import render
from fedattack.reporting.provenance import provenance, told
from fedattack.reporting.report import image_png
from fedattack.storage.run_folder import RunFolder

MOST = 200
"""Answers of an attack that are shown."""

_HIGHEST = 10


def write_answers_page(
    folder: RunFolder,
    answers: Mapping[str, Mapping[Any, Any]],
    threats: Mapping[str, Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write ``report.html`` of unscored answers (attack -> key -> answer) into a run's folder; its path.

    `threats` is attack -> threat model ("seat", "needs"), `notes` what else a person should know. RunFailed if the
    disk is full.
    """
    page = render(
        "answers",
        attacks=[_attack(name, by_key, threats.get(name, {})) for name, by_key in answers.items()],
        notes=list(notes),
        command=command,
        run=told(provenance(folder.begun, folder.sessions)),
    )
    path = folder.path / "report.html"
    write_bytes(path, page.encode())
    return path


def answer_rows(answers: Mapping[str, Mapping[Any, Any]]) -> list[tuple[str, str, str, str]]:
    """(attack, observation, certificate, labels) of each reconstruction among the answers, in words."""
    return [
        (name, str(key), formats.compact(answer.certificate), _labels(answer))
        for name, by_key in answers.items()
        for key, answer in by_key.items()
        if isinstance(answer, Reconstruction)
    ]


def _attack(name: str, by_key: Mapping[Any, Any], threat: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(list(by_key.items())[:MOST])
    return {
        "name": name,
        "seat": threat.get("seat", ""),
        "needs": ", ".join(threat.get("needs", ())),
        "images": [_images(key, one) for key, one in shown.items() if isinstance(one, Reconstruction)],
        "scores": [_scores(key, one) for key, one in shown.items() if isinstance(one, MembershipScores)],
        "more": len(by_key) - len(shown),
    }


def _images(key: Any, answer: Reconstruction) -> dict[str, Any]:
    row = torch.cat(list(answer.images.clamp(0, 1)), dim=2)
    return {
        "key": str(key),
        "method": answer.method,
        "count": len(answer.images),
        "picture": base64.b64encode(image_png(row)).decode(),
        "certificate": formats.compact(answer.certificate),
        "loss": formats.compact(answer.loss),
        "labels": _labels(answer),
    }


def _labels(answer: Reconstruction) -> str:
    return f"{', '.join(map(str, answer.labels.tolist()))} ({formats.percent(answer.label_confidence, 0)})"


def _scores(key: Any, answer: MembershipScores) -> dict[str, Any]:
    best = answer.scores.argsort(descending=True)[:_HIGHEST].tolist()
    told = ", ".join(f"{index} ({formats.compact(float(answer.scores[index]))})" for index in best)
    subject = called(key) if isinstance(key, int) else str(key)
    return {"key": subject, "statistic": answer.statistic, "count": len(answer.scores), "highest": told}
