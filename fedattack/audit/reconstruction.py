"""The auditor: the only reader of the truth. Scores what attacks answered, beside what they could have guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedattack.audit import reconstruction_verdict
from fedattack.audit.family import SHOWN, AuditResult, describe, interval_fields
from fedattack.errors import DataError, RunFailed
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import (
    INFLATION_DB,
    labels_right,
    match,
    mse,
    out_of_range_share,
    paired_difference,
    paper_scale,
    psnr,
    ssim,
    ssim_window,
)
from fedattack.observation import Observation, Reconstruction
from fedattack.reporting.formats import seat

GREY_FLOOR = "flat grey"
AUXILIARY_FLOOR = "auxiliary mean"

_CONTROLS = 32
"""Other victims that each reconstruction is scored against, at most."""


def audit_reconstruction(
    attack_name: str,
    observations: Sequence[Observation],
    reconstructions: Sequence[Reconstruction | None],
    truths: Sequence[GroundTruth],
    seconds: Sequence[float] | float,
    *,
    seed: int = 0,
) -> AuditResult:
    """Score reconstructions against the private images, every floor and another victim's images.

    Floors are what the same attacker answers without the update: flat grey, the mean of the auxiliary images it was
    granted, and whatever the attack itself calls its prior. The shuffled control scores each reconstruction against
    the other victims' private images. Where a defence transforms the images, reconstructions are scored against what
    the model was shown, too ("shown"). Floors and controls are matched to the batch as freely as possible, so that
    matching cannot favour the attack.

    Parameters
    ----------
    attack_name : str
        Its name in this run.
    observations : sequence of Observation
        What the attack saw.
    reconstructions : sequence of Reconstruction or None
        Its answers, in the same order; None, or images that are not finite, count as failed and are left out of the
        means (the summary says how many).
    truths : sequence of GroundTruth
        In any order; found by their key.
    seconds : sequence of float, or float
        Time per observation, or in all.
    seed : int
        Seeds the bootstrap.

    Returns
    -------
    AuditResult
        One record per private image.

    Raises
    ------
    DataError
        If there is nothing to score, the lengths differ, or an observation has no truth.
    RunFailed
        If an attack answered images of the wrong size.
    """
    if not observations or len(observations) != len(reconstructions):
        raise DataError(
            f"attack {attack_name!r}: {len(reconstructions)} reconstructions for {len(observations)} observations; "
            "one of each is needed"
        )
    by_key = {truth.key: truth for truth in truths}
    absent = [observation.key for observation in observations if observation.key not in by_key]
    if absent:
        raise DataError(f"attack {attack_name!r}: no truth for {', '.join(absent[:3])}")
    batches = [by_key[observation.key] for observation in observations]
    times = _times(seconds, len(observations))

    records: list[dict[str, Any]] = []
    shown: dict[str, list[Tensor]] = {}
    histories: dict[str, list[float]] = {}
    for victim, (observation, answer, truth) in enumerate(
        zip(observations, reconstructions, batches, strict=True)
    ):
        scored, panels = _score_victim(attack_name, observation, answer, truth)
        control = _control(answer, victim, batches) if _usable(answer) else None
        for row in scored:
            row |= {"victim": victim, "control_psnr": control, "seconds": times[victim]}
            records.append(row)
        for name, panel in panels.items():
            shown.setdefault(name, []).append(panel)
        if answer is not None and answer.history:
            histories[f"round {observation.round}, {seat(observation.client)}"] = list(answer.history)
    images = {name: torch.cat(parts) for name, parts in shown.items() if sum(map(len, parts)) == len(records)}
    summary, level, verdict = _summarise(observations, reconstructions, records, seed)
    return AuditResult(
        attack_name, "reconstruction", records, summary, verdict, level, images, {"histories": histories}
    )


def _score_victim(
    attack: str, observation: Observation, answer: Reconstruction | None, truth: GroundTruth
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows and panels of one private batch."""
    private = truth.images
    size = private.shape[1:]
    if answer is not None and answer.images.shape[1:] != size:
        raise RunFailed(
            f"attack {attack!r} answered images of shape {tuple(answer.images.shape)} for {observation.key}, whose "
            f"private batch is {tuple(private.shape)}"
        )
    update = observation.update
    common = {
        "attack": attack,
        "family": "reconstruction",
        "round": observation.round,
        "client": observation.client,
        "k": update.kept,
        "k_per_pixel": update.kept / private.numel(),
        "rate": update.kept / update.numel,
        "kept_per_layer": json.dumps(update.kept_per_layer()),
        "wire_bytes": observation.wire_bytes,
    }
    if answer is not None:
        common |= {
            "label_confidence": answer.label_confidence,
            "loss": answer.loss,
            "certificate": answer.certificate,
            "method": answer.method,
        }
    panels = {"original": private, "reconstruction": torch.full_like(private, math.nan)}
    if truth.shown is not None:
        panels[SHOWN] = truth.shown
    rows = [
        common | {"image": index, "sample": sample, "label": label, "status": "no reconstruction"}
        for index, (sample, label) in enumerate(zip(truth.sample_ids, truth.labels.tolist(), strict=True))
    ]
    for name, images in _floors(observation, answer, private).items():
        panels[name] = _align(images, private)
        for field, values in _scores(panels[name], private).items():
            for row, value in zip(rows, values, strict=True):
                row[f"floor.{name}.{field}"] = value
    if not _usable(answer):
        return rows, panels
    assert answer is not None
    pairing = match(answer.images, private, answer.labels, truth.labels)
    named = labels_right(answer.labels, truth.labels)
    chosen = [index for index, place in enumerate(pairing.order) if place >= 0]
    found_images = answer.images[[pairing.order[index] for index in chosen]].to(private.dtype).cpu()
    panels["reconstruction"][chosen] = found_images.clamp(0, 1)
    scores = _scores(found_images, private[chosen])
    inflated, wide_ssim = paper_scale(found_images, private[chosen])
    outside = out_of_range_share(found_images)
    if truth.shown is not None:
        for field, values in _scores(
            _align(answer.images.to(private).clamp(0, 1), truth.shown), truth.shown
        ).items():
            for row, value in zip(rows, values, strict=True):
                row[f"shown.{field}"] = value
    for row, right in zip(rows, named, strict=True):
        row["label_right"] = right
    for position, index in enumerate(chosen):
        rows[index] |= {field: values[position] for field, values in scores.items()}
        rows[index] |= {
            "status": "scored",
            "matched_by": pairing.matched_by,
            "out_of_range_share": float(outside[position]),
            "psnr_paper_scale": float(inflated[position]),
            "ssim_paper_scale": float(wide_ssim[position]),
        }
    return rows, panels


def _floors(observation: Observation, answer: Reconstruction | None, private: Tensor) -> dict[str, Tensor]:
    floors = {GREY_FLOOR: torch.full_like(private, 0.5)}
    if observation.auxiliary is not None and len(observation.auxiliary):
        mean = observation.auxiliary.images.double().mean(dim=0, keepdim=True).to(private)
        floors[AUXILIARY_FLOOR] = mean.expand_as(private).clone()
    for name, images in (answer.floors if answer is not None else {}).items():
        if images.shape[1:] != private.shape[1:] or not torch.isfinite(images).all() or not len(images):
            raise RunFailed(
                f"floor {name!r} of {observation.key} is no finite batch of {tuple(private.shape[1:])} images"
            )
        floors[name] = images.to(private)
    return floors


def _align(images: Tensor, private: Tensor) -> Tensor:
    """`images` in the order of `private`; where there are too few, the nearest one once more."""
    order = list(match(images, private).order)
    for index, place in enumerate(order):
        if place < 0:
            order[index] = int((images - private[index]).square().mean(dim=(1, 2, 3)).argmin())
    return images[order]


def _scores(images: Tensor, private: Tensor) -> dict[str, list[float]]:
    window = ssim_window(*private.shape[-2:])
    return {
        "mse": mse(images, private).tolist(),
        "psnr": psnr(images, private).tolist(),
        "ssim": ssim(images, private, window=window).tolist(),
    }


def _usable(answer: Reconstruction | None) -> bool:
    return answer is not None and len(answer.images) > 0 and bool(torch.isfinite(answer.images).all())


def _control(answer: Reconstruction | None, victim: int, batches: Sequence[GroundTruth]) -> float | None:
    """Mean PSNR of one answer against the other victims' private images; None where there is no other image."""
    assert answer is not None
    own = batches[victim].images
    values = []
    for step in range(1, min(len(batches), _CONTROLS + 1)):
        other = batches[(victim + step) % len(batches)].images
        if other.shape == own.shape and torch.equal(other, own):
            continue
        order = match(answer.images, other).order
        pairs = [(place, index) for index, place in enumerate(order) if place >= 0]
        scored = psnr(answer.images[[a for a, _ in pairs]].cpu(), other[[b for _, b in pairs]])
        values.append(float(scored.clamp(max=reconstruction_verdict.COUNTED_DB).mean()))
    return float(np.mean(values)) if values else None


def _summarise(
    observations: Sequence[Observation],
    answers: Sequence[Reconstruction | None],
    records: list[dict[str, Any]],
    seed: int,
) -> tuple[dict[str, Any], Any, str]:
    scored = [row for row in records if row["status"] == "scored"]
    missing = len(records) - len(scored)
    victims = [row["victim"] for row in scored]
    times = {row["victim"]: row["seconds"] for row in records}
    floors = sorted({key.split(".")[1] for row in records for key in row if key.startswith("floor.")})

    def column(key: str) -> list[float]:
        return [math.nan if row.get(key) is None else float(row[key]) for row in scored]

    summary: dict[str, Any] = {
        "family": "reconstruction",
        "count": len(observations),
        "images": len(records),
        "missing": missing,
        "metrics": {
            "psnr": describe(column("psnr"), seed, victims),
            "ssim": describe(column("ssim"), seed, victims),
            "mse": describe(column("mse"), seed, victims, worst="max"),
            "label_right": describe(column("label_right"), seed, victims),
            "label_confidence": describe(column("label_confidence"), seed, victims),
            "loss": describe(column("loss"), seed, victims, worst="max"),
            "certificate": describe(column("certificate"), seed, victims, worst="max"),
            "out_of_range_share": describe(column("out_of_range_share"), seed, victims, worst="max"),
        },
        "floors": {
            name: {
                "psnr": describe(column(f"floor.{name}.psnr"), seed, victims),
                "ssim": describe(column(f"floor.{name}.ssim"), seed, victims),
            }
            for name in floors
        },
        "control": {"psnr": describe(column("control_psnr"), seed, victims)},
        "paper_scale": {
            "psnr": describe(column("psnr_paper_scale"), seed, victims),
            "ssim": describe(column("ssim_paper_scale"), seed, victims),
            "inflation_db": INFLATION_DB,
        },
        "shown": {
            "psnr": describe(column("shown.psnr"), seed, victims),
            "ssim": describe(column("shown.ssim"), seed, victims),
        },
        "ssim_window": ssim_window(*observations[0].scenario.image_shape[1:]),
        "matched_by": sorted({row["matched_by"] for row in scored}),
        "methods": sorted({answer.method for answer in answers if answer is not None and answer.method}),
        "seconds": float(sum(times.values())),
        **_seen(observations, records),
    }
    if not scored:
        level, verdict = "failed", f"the attack failed: none of {len(records)} images was reconstructed"
        return summary | {"level": level, "verdict": verdict}, level, verdict

    # A floor of an attack's own may be missing for some victims: then it is no floor of the whole.
    whole = [name for name in floors if not np.isnan(column(f"floor.{name}.psnr")).any()]
    ours = np.minimum(column("psnr"), reconstruction_verdict.COUNTED_DB)
    capped = {
        name: np.minimum(column(f"floor.{name}.psnr"), reconstruction_verdict.COUNTED_DB) for name in whole
    }
    best = max(whole, key=lambda name: float(capped[name].mean()))
    over_floor = paired_difference(ours, capped[best], seed, victims)
    control = np.asarray(column("control_psnr"))
    over_control = None if np.isnan(control).any() else paired_difference(ours, control, seed, victims)
    best_floor_each = np.max([capped[name] for name in whole], axis=0)
    recovered = sum(
        reconstruction_verdict.image_recovered(row["psnr"], row["ssim"], float(floor), row["control_psnr"])
        for row, floor in zip(scored, best_floor_each, strict=True)
    )
    labels = _label_evidence(observations, records)
    level, verdict = reconstruction_verdict.reconstruction(
        len(records),
        recovered,
        _mean(summary["metrics"]["psnr"]),
        _mean(summary["metrics"]["ssim"]),
        best,
        float(capped[best].mean()),
        over_floor,
        over_control,
        labels,
        missing,
    )
    summary |= {
        "recovered": recovered,
        "best_floor": best,
        "above_best_floor": interval_fields(over_floor),
        "above_control": None if over_control is None else interval_fields(over_control),
        "labels": {"right": labels[0], "of": labels[1], "beyond_guessing": labels[2]},
        "level": level,
        "verdict": verdict,
    }
    return summary, level, verdict


def _mean(described: dict[str, Any]) -> float:
    return float(described["mean"])


def _label_evidence(
    observations: Sequence[Observation], records: list[dict[str, Any]]
) -> tuple[int, int, bool]:
    """Labels right, labels asked for, and whether naming the commonest label every time would not explain it."""
    asked = [row for row in records if "label_right" in row]
    right = sum(bool(row["label_right"]) for row in asked)
    if not asked:
        return 0, 0, False
    truly = [row["label"] for row in asked]
    # A head may be far wider than the label space: labels count from 0, so the largest one bounds it from below.
    shares = [1.0 / max(2, *(label + 1 for label in truly))]
    if len(truly) > 1:
        commonest = int(np.unique(truly, return_counts=True)[1].max())
        shares.append(
            (commonest - 1) / (len(truly) - 1)
        )  # of the other victims, as a guesser would know them
    auxiliary = observations[0].auxiliary
    if auxiliary is not None and auxiliary.labels is not None and len(auxiliary):
        shares.append(float(auxiliary.labels.unique(return_counts=True)[1].max()) / len(auxiliary))
    by_luck = stats.binomtest(right, len(asked), max(shares), alternative="greater").pvalue
    return right, len(asked), bool(by_luck < reconstruction_verdict.LABEL_P_VALUE)


def _seen(observations: Sequence[Observation], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the attacker saw, for the report."""
    first = observations[0]
    kept = [observation.update.kept_per_layer() for observation in observations]
    sizes = dict(zip(first.update.names, first.update.sizes, strict=True))
    granted = first.auxiliary
    return {
        "k": float(np.mean([observation.update.kept for observation in observations])),
        "k_per_pixel": float(np.mean([row["k_per_pixel"] for row in records])),
        "rate": float(np.mean([row["rate"] for row in records])),
        "parameters": first.update.numel,
        "kept_per_layer": {
            name: {"kept": float(np.mean([layers.get(name, 0) for layers in kept])), "of": size}
            for name, size in sizes.items()
        },
        "wire_bytes": float(np.mean([observation.wire_bytes for observation in observations])),
        "pixels": math.prod(first.scenario.image_shape),
        "batch": sorted({sum(r["victim"] == v for r in records) for v in {r["victim"] for r in records}}),
        "update_kind": first.update.kind,
        "statistics_sent": bool(first.buffers),
        "scenario": first.scenario.record(),
        "auxiliary": None
        if granted is None
        else {"count": len(granted), "source": granted.source, "labelled": granted.labels is not None},
    }


def _times(seconds: Sequence[float] | float, count: int) -> list[float]:
    if isinstance(seconds, int | float):
        return [seconds / count] * count
    if len(seconds) != count:
        raise DataError(f"{len(seconds)} times for {count} observations")
    return [float(value) for value in seconds]


__all__ = ["AUXILIARY_FLOOR", "GREY_FLOOR", "audit_reconstruction"]
