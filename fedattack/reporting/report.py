"""Everything a finished run writes: records, summary, images, figures and the report that opens from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fedattack.audit.canaries import CanaryAudit
from fedattack.audit.family import AuditResult, by_family, headline
from fedattack.files import write_bytes
from fedattack.observation import Reconstruction, observation_name
from fedattack.registry import Registry
from fedattack.reporting import figures, findings, views
from fedattack.reporting.pages import render
from fedattack.reporting.provenance import changed_settings, provenance, told
from fedattack.storage.observations import safe_name
from fedattack.storage.records import write_records, write_summary
from fedattack.storage.run_folder import RunFolder

CHECKSUM = "data checksum"
"""Entry of a federation's figures: SHA-256 of what its clients trained on."""

_IMAGES = 256
"""Single images written per attack."""

_ROUNDS = 100
_ROWS = 200
_COLUMNS = (
    "accuracy",
    "loss",
    "train_loss",
    "answered",
    "dropped",
    "failed",
    "rejected",
    "wire_bytes",
    "seconds",
)


@dataclass(frozen=True)
class _Picture:
    data: str
    alt: str
    caption: str


def write_results(
    folder: RunFolder,
    results: Sequence[AuditResult],
    federation: Mapping[str, Any] | None = None,
    *,
    command: str = "",
    label_counts: Mapping[int, Mapping[int, int]] | None = None,
    notes: Sequence[str] = (),
    left_out: Mapping[str, str] | None = None,
    about: str = "",
    heading: str = "",
    generated: Mapping[int, Tensor] | None = None,
    canaries: CanaryAudit | None = None,
) -> Path:
    """Write records, summary, images, figures and ``report.html`` into a run's folder; the report's path.

    Parameters
    ----------
    federation
        "rounds": list of {"round", "loss", "accuracy", "train_loss", "answered", "failed", "rejected", "dropped",
        "wire_bytes", "seconds"} (missing or None where unknown), "rejections": list of {"round", "client",
        "reason"}, "called": what to call "loss" and "train_loss"; every other entry with a plain value is shown as a
        fact.
    label_counts
        Client -> label -> samples.
    notes
        Warnings shown below the verdicts.
    left_out
        Attack -> why it does not apply.
    about
        What was asked about, in words, where it is no federation that the run itself trained.
    heading
        The page's question; empty: how much leaks.
    generated
        Round -> images of the generator that was trained, (n, C, S, S) in [0, 1].
    canaries
        What canaries measured of the noise; their scores go into ``canaries.csv``.

    Raises
    ------
    RunFailed
        If the disk is full.
    """
    federation = dict(federation or {})
    write_records(folder, results)
    run = provenance(folder.begun, folder.sessions)
    write_summary(folder, results, federation, left_out, run)
    for result in results:
        _write_images(folder, result)
    used = [family for family, _ in by_family(results)]
    about_data = [("Data checksum", str(federation.pop(CHECKSUM)))] if CHECKSUM in federation else []
    page = render(
        "report",
        title=f"fedattack report: {', '.join(result.attack for result in results) or 'no attack'}",
        heading=heading or f"How much {'do these images' if about else 'does this federation'} leak?",
        subtitle=about or views.subtitle(folder.config),
        top=headline(results, federation),
        attacks=[views.attack_view(result) for result in results],
        families=views.family_views(results),
        notes=notes,
        pictures=_attack_pictures(folder, results),
        seen=views.seen_views(results),
        canaries=_canaries(folder, canaries) if canaries else None,
        federation=(
            _federation(folder, federation, label_counts, generated) if federation or label_counts else None
        ),
        command=command or f"fedattack --config {folder.path / 'config.toml'}",
        run=[("Seed", str(folder.config.seed)), *told(run), *about_data],
        changed=changed_settings(folder.config),
        config=folder.config.to_toml(),
        tables=[table for result in results if (table := views.records_table(result))],
        floors=", ".join(dict.fromkeys(text for family in used for text in family.floors.values())),
        glossary=[entry for family in used for entry in family.terms()],
    )
    path = folder.path / "report.html"
    write_bytes(path, page.encode())
    return path


def write_answers(folder: RunFolder, answers: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the reconstructions among unscored answers (attack -> key -> answer) as PNG, batches side by side."""
    for attack, by_key in answers.items():
        for key, answer in by_key.items():
            if not isinstance(answer, Reconstruction):
                continue
            row = torch.cat(list(answer.images.clamp(0, 1)), dim=2)
            write_bytes(folder.images / safe_name(attack) / f"{safe_name(key)}.png", image_png(row))


def _attack_pictures(folder: RunFolder, results: Sequence[AuditResult]) -> list[_Picture]:
    """The figures that the families ask for: of each attack, or of all of a family together."""
    functions: Registry[Any] = Registry("figure", {})
    shown = []
    for family, chosen in by_family(results):
        for drawing in family.drawings:
            draw = functions.get(drawing.target)
            if not drawing.each:
                if (figure := draw(chosen)) is not None:
                    alt = findings.of_drawing(drawing, chosen)
                    shown.append(_figure(folder, drawing.name, figure, alt, drawing.caption))
                continue
            for result in chosen:
                if (figure := draw(result)) is not None:
                    file, alt = (
                        f"{safe_name(result.attack)}-{drawing.name}",
                        findings.of_drawing(drawing, [result]),
                    )
                    shown.append(_figure(folder, file, figure, alt, drawing.caption))
    return shown


def _figure(folder: RunFolder, name: str, figure: Any, alt: str, caption: str) -> _Picture:
    data = figures.png(figure)
    write_bytes(folder.figures / f"{name}.png", data)
    return _Picture(base64.b64encode(data).decode(), alt, caption)


def _write_images(folder: RunFolder, result: AuditResult) -> None:
    """Single images at their own size, 8 bit; all of them, unrounded, are in ``parts`` and ``truth``."""
    place = folder.images / safe_name(result.attack)
    for name, images in result.images.items():
        for record, image in zip(result.records[:_IMAGES], images, strict=False):
            if torch.isnan(image).any():
                continue
            stem = f"{observation_name(record['round'], record['client'])}-{record['image']}"
            write_bytes(place / f"{stem}-{name.replace(' ', '-').replace('/', '-')}.png", image_png(image))


def image_png(image: Tensor) -> bytes:
    """8-bit PNG of an image (C, H, W) in [0, 1]."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]).save(buffer, format="PNG")
    return buffer.getvalue()


def _canaries(folder: RunFolder, found: CanaryAudit) -> dict[str, Any]:
    rows = zip(found.of_present.astype(int), found.inclusions_of, found.scores, strict=True)
    lines = [
        "present,inclusions,score",
        *(f"{there},{times:.9g},{score:.9g}" for there, times, score in rows),
    ]
    write_bytes(folder.path / "canaries.csv", ("\n".join(lines) + "\n").encode())
    told = "Scores of canaries that were there, and of those that were not: the further apart, the less is hidden."
    alt = f"Histogram of the canaries' scores: {found.text}"
    picture = _figure(folder, "canaries", figures.canary_scores(found), alt, told)
    return {
        "text": found.text,
        "broken": found.broken,
        "rows": found.rows,
        "remarks": found.remarks,
        "picture": picture,
    }


def _federation(
    folder: RunFolder,
    federation: Mapping[str, Any],
    label_counts: Mapping[int, Mapping[int, int]] | None,
    generated: Mapping[int, Tensor] | None,
) -> dict[str, Any]:
    rounds = [dict.fromkeys(_COLUMNS) | dict(row) for row in federation.get("rounds", [])]
    called = {"loss": "test loss", "train_loss": "training loss"} | federation.get("called", {})
    facts = [
        (name.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
        for name, value in federation.items()
        if isinstance(value, str | int | float)
    ]
    pictures = []
    if generated:
        alt = f"{len(generated[max(generated)])} images of the generator of round {max(generated)}"
        alt += ", below images of earlier rounds" if len(generated) > 1 else ""
        told = "Images of the last generator, and of earlier ones from the same latents: none was chosen."
        pictures.append(_figure(folder, "samples", figures.sample_sheet(generated), alt, told))
        for number, images in generated.items():
            path = folder.images / "generator" / f"round-{number:05d}.png"
            write_bytes(path, image_png(figures.sheet(images)))
    if sum(row["accuracy"] is not None or row["loss"] is not None for row in rounds) > 1:
        told = (
            "The global model on held-out samples: an attacked federation that learns nothing proves little."
        )
        drawn = figures.accuracy_over_rounds(rounds, called)
        pictures.append(_figure(folder, "accuracy", drawn, findings.of_rounds(rounds, called), told))
    if label_counts and sum(map(len, label_counts.values())) > 1:
        alt, told = findings.of_labels(label_counts), "How the samples are dealt out."
        pictures.append(_figure(folder, "labels", figures.label_histogram(label_counts), alt, told))
    more = f"The first {_ROUNDS} of {len(rounds)} rounds; all are in summary.json."
    left_out = more if len(rounds) > _ROUNDS else ""
    rejections = list(federation.get("rejections", []))[:_ROWS]
    told_of = {"called": called, "classifies": any(row["accuracy"] is not None for row in rounds)}
    shown = {**told_of, "facts": facts, "rounds": rounds[:_ROUNDS], "left_out": left_out}
    return shown | {"rejections": rejections, "pictures": pictures}
