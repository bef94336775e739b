"""Reconstruction: the auditor scores what attacks answered, beside what they could have guessed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedattack.audit import reconstruction_verdict as rule
from fedattack.audit.family import (
    SEVERITY,
    AuditResult,
    Column,
    Drawing,
    Family,
    Figures,
    Leakage,
    Level,
    Metric,
    Row,
    describe,
    interval_fields,
    score_rows,
)
from fedattack.errors import DataError
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import (
    INFLATION_DB,
    Interval,
    constant_hits,
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
from fedattack.reporting import formats
from fedattack.reporting.formats import seat
from fedattack.storage.plain import number

GREY_FLOOR = "flat grey"
AUXILIARY_FLOOR = "auxiliary mean"

ORIGINAL, REBUILT = "original", "reconstruction"
SHOWN = "shown to the model"
"""Panels of an audit: the private images, the answers, and what a defence made of the private images."""

_CONTROLS = 32
"""Other victims that each reconstruction is scored against, at most."""

METRICS = (
    Metric("psnr", "PSNR", "dB"),
    Metric("ssim", "SSIM", digits=3),
    Metric("mse", worst="max"),
    Metric("label_right"),
    Metric("label_confidence"),
    Metric("loss", worst="max"),
    Metric("certificate", worst="max"),
    Metric("out_of_range_share", worst="max"),
)


def audit_reconstruction(
    attack_name: str,
    observations: Sequence[Observation],
    reconstructions: Sequence[Reconstruction | None],
    truths: Sequence[GroundTruth],
    seconds: Sequence[float] | float,
    *,
    reasons: Mapping[str, str] | None = None,
    seed: int = 0,
) -> AuditResult:
    """Score reconstructions against the private images, every floor and another victim's images; a record per image.

    Floors are what the same attacker answers without the update: flat grey, the mean of the auxiliary images it was
    granted, and whatever the attack itself calls its prior. The control scores each reconstruction against the
    other victims' private images. Where a defence transforms the images, reconstructions are scored against what
    the model was shown, too ("shown"). Floors and controls are matched to the batch as freely as possible, so that
    matching cannot favour the attack.

    Parameters
    ----------
    reconstructions
        In the order of the observations. None, and images or floors of the wrong size or not finite, are victims
        that failed: rows with the status "failed: reason", left out of every mean.
    seconds
        Per observation, or in all.
    reasons
        Key of an observation -> why it has no answer.

    Raises
    ------
    DataError
        If there is nothing to score, the lengths differ, or an observation has no truth.
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
    panels: list[dict[str, Tensor]] = []
    failed: list[dict[str, str]] = []
    answers: list[Reconstruction | None] = []
    histories: dict[str, list[float]] = {}
    for victim, (observation, answer, truth) in enumerate(
        zip(observations, reconstructions, batches, strict=True)
    ):
        why = _fault(answer, truth.images, (reasons or {}).get(observation.key))
        if why or answer is None:
            failed.append({"key": observation.key, "reason": why})
            answer = None
        rows, shown = _score_victim(attack_name, observation, answer, truth, f"failed: {why}")
        control = None if answer is None else _control(answer, victim, batches)
        for row in rows:
            row |= {"victim": victim, "control_psnr": control, "seconds": times[victim]}
        records += rows
        panels.append(shown)
        answers.append(answer)
        if answer is not None and answer.history:
            histories[f"round {observation.round}, {seat(observation.client)}"] = list(answer.history)
    names = dict.fromkeys(name for shown in panels for name in shown)
    nothing = [torch.full_like(truth.images, math.nan) for truth in batches]
    images = {
        name: torch.cat([shown.get(name, none) for shown, none in zip(panels, nothing, strict=True)])
        for name in names
    }
    summary = _summarise(observations, answers, records, failed, seed)
    level, verdict, curves = summary["level"], summary["verdict"], {"histories": histories}
    return AuditResult(attack_name, "reconstruction", records, summary, verdict, level, images, curves)


def _fault(answer: Reconstruction | None, private: Tensor, reason: str | None) -> str:
    """Why an answer cannot be scored; empty where it can."""
    if answer is None:
        return reason or "no answer"
    size = tuple(private.shape[1:])
    for name, images in (("", answer.images), *answer.floors.items()):
        what = f"its floor {name!r}" if name else "it"
        if tuple(images.shape[1:]) != size:
            shapes = f"{tuple(images.shape)}, and the private batch is {tuple(private.shape)}"
            return f"{what} answered images of shape {shapes}"
        if not len(images):
            return f"{what} answered no image"
        if not torch.isfinite(images).all():
            return f"{what} answered pixels that are not finite"
    return reason or ""


def _score_victim(
    attack: str, observation: Observation, answer: Reconstruction | None, truth: GroundTruth, status: str
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows and panels of one private batch."""
    private, update = truth.images, observation.update
    common = {
        "attack": attack,
        "family": "reconstruction",
        "round": observation.round,
        "client": observation.client,
        "k": update.kept,
        "k_measuring": _measuring(observation),
        "k_per_pixel": update.kept / private.numel(),
        "rate": update.kept / update.numel,
        "kept_per_layer": json.dumps(update.kept_per_layer()),
        "wire_bytes": observation.wire_bytes,
    }
    panels = {ORIGINAL: private, REBUILT: torch.full_like(private, math.nan)}
    if truth.shown is not None:
        panels[SHOWN] = truth.shown
    rows = [
        common | {"image": index, "sample": sample, "label": label, "status": status}
        for index, (sample, label) in enumerate(zip(truth.sample_ids, truth.labels.tolist(), strict=True))
    ]

    def add(prefix: str, scores: Mapping[str, Sequence[float]]) -> None:
        for field, values in scores.items():
            for row, value in zip(rows, values, strict=True):
                row[f"{prefix}{field}"] = value

    floors = _floors(observation, answer, private)
    for name, images in floors.items():
        panels[name] = _align(images, private)
        add(f"floor.{name}.", _scores(panels[name], private))
    if answer is None:
        return rows, panels
    pairing = match(answer.images, private, answer.labels, truth.labels)
    named = labels_right(answer.labels, truth.labels)
    chosen = [index for index, place in enumerate(pairing.order) if place >= 0]
    found_images = answer.images[[pairing.order[index] for index in chosen]].to(private.dtype).cpu()
    panels[REBUILT][chosen] = found_images.clamp(0, 1)
    scores = _scores(found_images, private[chosen])
    inflated, wide_ssim = paper_scale(found_images, private[chosen])
    outside = out_of_range_share(found_images)
    if truth.shown is not None:
        shown = truth.shown
        add("shown.", _scores(_align(answer.images.to(private).clamp(0, 1), shown), shown))
        guesses = [_scores(_align(images, shown), shown)["psnr"] for images in floors.values()]
        add("shown.", {"floor": np.max(guesses, axis=0).tolist()})
    said = {name: getattr(answer, name) for name in ("label_confidence", "loss", "certificate", "method")}
    for row, right in zip(rows, named, strict=True):
        row |= {"label_right": right, **said, "notes": _why(answer)}
    scores |= {"out_of_range_share": outside.tolist(), "psnr_paper_scale": inflated.tolist()}
    scores["ssim_paper_scale"] = wide_ssim.tolist()
    for position, index in enumerate(chosen):
        rows[index] |= {"status": "scored", "matched_by": pairing.matched_by}
        rows[index] |= {field: values[position] for field, values in scores.items()}
    for row in rows:
        if row["status"] != "scored":
            row["status"] = f"failed: {len(answer.images)} images for a batch of {len(private)}"
    return rows, panels


def _why(answer: Reconstruction) -> str:
    """What an attack says about how it came to its answer."""
    told: list[str] = []
    for key in ("why", "reason", "notes"):
        said = answer.details.get(key) or []
        told += [said] if isinstance(said, str) else map(str, said)
    return "; ".join(told)


def _measuring(observation: Observation) -> int:
    """Sent entries that depend on the image: not zero, and no bias of the last layer."""
    layers = list(observation.update.layers())
    if len(layers[-1][1]) == 1:
        layers.pop()
    return sum(int(values.count_nonzero()) for _, _, _, values in layers)


def _floors(observation: Observation, answer: Reconstruction | None, private: Tensor) -> dict[str, Tensor]:
    floors = {GREY_FLOOR: torch.full_like(private, 0.5)}
    if observation.auxiliary is not None and len(observation.auxiliary):
        mean = observation.auxiliary.images.double().mean(dim=0, keepdim=True).to(private)
        floors[AUXILIARY_FLOOR] = mean.expand_as(private).clone()
    for name, images in (answer.floors if answer is not None else {}).items():
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
    similar = ssim(images, private, window=ssim_window(*private.shape[-2:]))
    scores = {"mse": mse(images, private), "psnr": psnr(images, private), "ssim": similar}
    return {name: values.tolist() for name, values in scores.items()}


def _control(answer: Reconstruction, victim: int, batches: Sequence[GroundTruth]) -> float | None:
    """Mean PSNR of one answer against the other victims' private images; None where there is no other image."""
    own = batches[victim].images
    values = []
    for step in range(1, min(len(batches), _CONTROLS + 1)):
        other = batches[(victim + step) % len(batches)].images
        if other.shape == own.shape and torch.equal(other, own):
            continue
        order = match(answer.images, other).order
        matched = [index for index, place in enumerate(order) if place >= 0]
        scored = psnr(answer.images[[order[index] for index in matched]].cpu(), other[matched])
        values.append(float(scored.clamp(max=rule.COUNTED_DB).mean()))
    return float(np.mean(values)) if values else None


def _summarise(
    observations: Sequence[Observation],
    answers: Sequence[Reconstruction | None],
    records: list[dict[str, Any]],
    failed: list[dict[str, str]],
    seed: int,
) -> dict[str, Any]:
    scored = [row for row in records if row["status"] == "scored"]
    victims = [row["victim"] for row in scored]
    times = {row["victim"]: row["seconds"] for row in records}
    floors = sorted({key.split(".")[1] for row in records for key in row if key.startswith("floor.")})

    def described(key: str, worst: Any = "min") -> dict[str, Any]:
        return describe(_column(scored, key), seed, victims, worst)

    def images(prefix: str, suffix: str = "") -> dict[str, Any]:
        return {name: described(f"{prefix}{name}{suffix}") for name in ("psnr", "ssim")}

    summary: dict[str, Any] = {
        "family": "reconstruction",
        "count": len(observations),
        "images": len(records),
        "missing": len(records) - len(scored),
        "failed": failed,
        "metrics": {metric.key: described(metric.key, metric.worst) for metric in METRICS},
        "floors": {name: images(f"floor.{name}.") for name in floors},
        "control": {"psnr": described("control_psnr")},
        "paper_scale": {**images("", "_paper_scale"), "inflation_db": INFLATION_DB},
        "shown": images("shown."),
        "ssim_window": ssim_window(*observations[0].scenario.image_shape[1:]),
        "matched_by": sorted({row["matched_by"] for row in scored}),
        "methods": sorted({answer.method for answer in answers if answer is not None and answer.method}),
        "seconds": float(sum(times.values())),
        **_seen(observations, records),
    }
    if not scored:
        why = f" ({failed[0]['key']}: {failed[0]['reason']})" if failed else ""
        text = f"the attack failed: none of {len(records)} images was reconstructed{why}"
        return summary | {"level": "failed", "verdict": text}
    summary |= _judge(observations, records, seed)[1]
    level, verdict = summary["level"], f"{RECONSTRUCTION.words(summary['level'])}: {summary['verdict']}"
    rounds = sorted({row["round"] for row in scored})
    if len(rounds) > 1:
        # Each round's interval is as much wider as there are rounds that could stand out by luck (Bonferroni).
        parts = {r: [row for row in records if row["round"] == r] for r in rounds}
        each = {r: _judge(observations, part, seed, len(rounds)) for r, part in parts.items()}
        gains = [gain.mean for gain, _ in each.values()]
        told = {r: figures for r, (_, figures) in each.items()}
        if max(gains) - min(gains) > rule.MARGIN or len({f["level"] for f in told.values()}) > 1:
            level, verdict = _by_round(told)
            summary["rounds"] = {str(r): figures for r, figures in told.items()}
            for part in (summary["above_best_floor"], summary["above_control"], *summary["metrics"].values()):
                if part is not None:
                    part |= {"low": None, "high": None}
    return summary | {"level": level, "verdict": verdict}


def _by_round(told: Mapping[int, dict[str, Any]]) -> tuple[Level, str]:
    """The worst round for whoever defends in full, the others in short."""
    gains = {r: told[r]["above_best_floor"]["mean"] for r in told}
    order = sorted(told, key=lambda r: (SEVERITY.index(told[r]["level"]), -gains[r]))
    worst = told[order[0]]
    text = f"{RECONSTRUCTION.words(worst['level'])} in round {order[0]}: {worst['verdict']}"
    for r in order[1:]:
        gap = rule.signed_gap(gains[r])
        score = f"mean {rule.decibel(told[r]['psnr'])}, {gap} the floor"
        text += f"; in round {r} {RECONSTRUCTION.words(told[r]['level'])}: {score}"
    return worst["level"], text


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def _judge(
    observations: Sequence[Observation], records: list[dict[str, Any]], seed: int, looks: int = 1
) -> tuple[Interval, dict[str, Any]]:
    """The gain over the best floor and the verdict on some of the records, of which there are `looks` sets."""
    scored = [row for row in records if row["status"] == "scored"]
    victims = [row["victim"] for row in scored]
    confidence = 1 - 0.05 / looks
    names = {key.split(".")[1] for row in scored for key in row if key.startswith("floor.")}
    # A floor of an attack's own may be missing for some victims: then it is no floor of the whole.
    capped = {
        name: np.minimum(values, rule.COUNTED_DB)
        for name in sorted(names)
        if not np.isnan(values := _column(scored, f"floor.{name}.psnr")).any()
    }
    ours = np.minimum(_column(scored, "psnr"), rule.COUNTED_DB)
    best = max(capped, key=lambda name: float(capped[name].mean()))
    over_floor = paired_difference(ours, capped[best], seed, victims, confidence)
    over_control, control = None, np.asarray(_column(scored, "control_psnr"))
    if not np.isnan(control).any():
        over_control = paired_difference(ours, control, seed, victims, confidence)
    shown = None
    if not np.isnan(against := np.asarray(_column(scored, "shown.psnr"))).any():
        rows = zip(against, _column(scored, "shown.ssim"), _column(scored, "shown.floor"), strict=True)
        shown = (_mean(against), sum(rule.image_recovered(p, s, f, None) for p, s, f in rows))
    guesses = np.max(list(capped.values()), axis=0)
    failed = [row for row in records if "label_right" not in row]
    lost = {row["victim"]: row["status"].removeprefix("failed: ") for row in failed}
    found = rule.Findings(
        images=len(records),
        recovered=sum(
            rule.image_recovered(row["psnr"], row["ssim"], float(guess), row["control_psnr"])
            for row, guess in zip(scored, guesses, strict=True)
        ),
        psnr=_mean(_column(scored, "psnr")),
        ssim=_mean(_column(scored, "ssim")),
        floor_name=best,
        floor_psnr=_mean(capped[best]),
        over_floor=over_floor,
        over_control=over_control,
        labels=_labels(observations, records, looks),
        failed=[{"key": observations[victim].key, "reason": why} for victim, why in lost.items()],
        shown=shown,
        methods=_methods(scored),
    )
    level, text = rule.reconstruction(found)
    told = found.labels
    return over_floor, {
        "recovered": found.recovered,
        "psnr": found.psnr,
        "best_floor": best,
        "above_best_floor": interval_fields(over_floor),
        "above_control": None if over_control is None else interval_fields(over_control),
        "labels": {"right": told.right, "of": told.of, "floor": told.floor, "beyond_guessing": told.beyond},
        "level": level,
        "verdict": text,
    }


def _mean(values: Any) -> float:
    """Over the finite ones; infinite where all are."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.inf


def _methods(scored: Sequence[Mapping[str, Any]]) -> str:
    """Which methods answered, for how many victims, and why, where there is something to say."""
    of_victim = {row["victim"]: (row["method"], row["notes"]) for row in scored if row["method"]}
    counts = Counter(method for method, _ in of_victim.values())
    told = []
    for method, count in counts.items():
        why = next((note for other, note in of_victim.values() if other == method and note), "")
        if len(counts) > 1 or why:
            told.append(f"{method} ({count} of {len(of_victim)}{f': {why}' if why else ''})")
    return f"method {', '.join(told)}" if told else ""


def _labels(
    observations: Sequence[Observation], records: list[dict[str, Any]], looks: int = 1
) -> rule.Labels:
    """Labels right beside the best answer that ignores the update, told apart over the clients.

    That answer is the best fixed multiset for labels that are all equally common, as common as in the public data,
    or as among the other clients. Beyond it lies what beats it in a one-sided paired t test over the clients and by
    more than a guess's luck, which a t test of a few clients in full agreement cannot know.
    """
    asked = [row for row in records if "label_right" in row]
    if not asked:
        return rule.Labels()
    auxiliary = observations[0].auxiliary
    public = [] if auxiliary is None or auxiliary.labels is None else auxiliary.labels.tolist()
    # A head may be far wider than the label space: labels count from 0, so the largest one bounds it from below.
    classes = max(1, *public, *(row["label"] for row in asked)) + 1
    totals = np.bincount([row["label"] for row in asked], minlength=classes)
    guesses: dict[str, dict[int, float]] = {}
    right: dict[int, int] = {}
    for client in sorted({row["client"] for row in asked}):
        own = [row for row in asked if row["client"] == client]
        beliefs = {"equally common": np.ones(classes), "public": np.bincount(public, minlength=classes)}
        beliefs["of the other clients"] = totals - np.bincount([r["label"] for r in own], minlength=classes)
        batches = [[r["label"] for r in own if r["victim"] == v] for v in {r["victim"] for r in own}]
        right[client] = sum(bool(row["label_right"]) for row in own)
        for name, weights in beliefs.items():
            if weights.sum():
                shares = weights / weights.sum()
                guesses.setdefault(name, {})[client] = sum(constant_hits(shares, batch) for batch in batches)
    best = max(guesses.values(), key=lambda hits: sum(hits.values()))
    floor, hits = sum(best.values()), sum(right.values())
    beyond: bool | None = None
    if len(right) >= 3:
        gains = np.array([right[client] - best[client] for client in right])
        error = max(float(gains.std(ddof=1)), 1e-9) / math.sqrt(len(gains))
        paired = float(stats.t.sf(gains.mean() / error, len(gains) - 1))
        luck = float(stats.binom.sf(hits - 1, len(asked), min(1.0, floor / len(asked))))
        beyond = max(paired, luck) * looks < rule.LABEL_P_VALUE
    return rule.Labels(hits, len(asked), floor, beyond)


def _seen(observations: Sequence[Observation], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the attacker saw, for the report."""
    first = observations[0]
    kept = [observation.update.kept_per_layer() for observation in observations]
    sizes = dict(zip(first.update.names, first.update.sizes, strict=True))
    granted = first.auxiliary
    return {
        "k": float(np.mean([observation.update.kept for observation in observations])),
        "k_measuring": float(np.mean([_measuring(observation) for observation in observations])),
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


def _score_rows(result: AuditResult) -> list[Row]:
    s = result.summary
    rows = score_rows(result)
    if s["shown"]["psnr"]["count"]:
        rows.insert(1, ("the same, against what the model was shown", False, s["shown"]))
    if s["control"]["psnr"]["count"]:
        rows.append(("control: scored against other victims", False, s["control"]))
    return rows


def _remarks(result: AuditResult) -> list[str]:
    s, parts = result.summary, []
    metrics, scale, each = s["metrics"], s["paper_scale"], s["seconds"] / s["count"]
    if over := s.get("above_control"):
        parts.append(f"above the control: {formats.decimal(over['mean'])} dB")
    if (sure := metrics["label_confidence"]["mean"]) is not None:
        parts.append(f"own confidence in the labels {formats.compact(sure)}")
    if s["methods"]:
        parts.append(f"method: {', '.join(s['methods'])}")
    if (certificate := metrics["certificate"]["mean"]) is not None:
        parts.append(f"objective per kept number: {formats.compact(certificate)}")
    if s["matched_by"] and s["matched_by"] != ["single"]:
        parts.append(f"images of a batch were matched by {' / '.join(s['matched_by'])}")
    parts.append(f"time: {formats.seconds(s['seconds'])} in all, {formats.seconds(each)} a victim")
    if scale["psnr"]["mean"] is not None:
        shown = f"{formats.decimal(scale['psnr']['mean'])} dB and {formats.decimal(scale['ssim']['mean'], 3)}"
        units = f"PSNR {INFLATION_DB:.2f} dB higher, SSIM with data range 2"
        parts.append(f"in the units of the code released with HCGLA ({units}) the means would read {shown}")
    return parts


def _details(result: AuditResult) -> list[Column]:
    def psnr_of(key: str) -> Any:
        return lambda row: formats.decimal(row.get(key))

    right = {None: formats.NONE, True: "right", False: "wrong"}
    return [
        ("round", lambda row: str(row["round"])),
        ("client", lambda row: seat(row["client"]).removeprefix("client ")),
        ("image", lambda row: str(row["image"])),
        ("sample", lambda row: str(row["sample"])),
        ("PSNR, dB", psnr_of("psnr")),
        ("SSIM", lambda row: formats.decimal(row.get("ssim"), 3)),
        *((name, psnr_of(f"floor.{name}.psnr")) for name in result.summary["floors"]),
        ("control", psnr_of("control_psnr")),
        ("label", lambda row: right[row.get("label_right")]),
        ("objective", lambda row: formats.compact(row.get("loss"))),
        ("time", lambda row: formats.seconds(row["seconds"])),
        ("status", lambda row: row["status"]),
        ("method", lambda row: row.get("method") or formats.NONE),
    ]


def _best(s: Figures) -> Figures:
    """PSNR of the best floor."""
    return s["floors"][s["best_floor"]]["psnr"] if "best_floor" in s else {"mean": None}


def _label_cell(s: Figures) -> str:
    labels = s.get("labels")
    return f"{labels['right']}/{labels['of']}\n({labels['floor']:.1f})" if labels else formats.NONE


def _sweep(s: Figures) -> dict[str, Any]:
    row = {"images": s["images"], "k": number(s["k"])}
    if "best_floor" not in s:
        return row
    psnr, ssim, labels = s["metrics"]["psnr"], s["metrics"]["ssim"], s["labels"]
    row |= {"psnr": number(psnr["mean"]), "psnr_worst": number(psnr["worst"]), "ssim": number(ssim["mean"])}
    row |= {"floor": s["best_floor"], "floor_psnr": number(_best(s)["mean"]), "recovered": s["recovered"]}
    return row | {"labels_right": labels["right"], "labels_of": labels["of"]}


_INTEGERS = ("round", "client", "victim", "image", "sample", "label", "k", "k_measuring", "wire_bytes")
_TEXTS = ("method", "notes", "matched_by", "kept_per_layer")

RECONSTRUCTION: Family = Family(
    name="reconstruction",
    question="Can private images be rebuilt from what clients send?",
    title="Reconstruction of private images (mean with 95 % interval)",
    metrics=METRICS,
    floors={
        GREY_FLOOR: "a flat grey image",
        AUXILIARY_FLOOR: "the mean of the public images it was granted",
        "prior": "the attack's own prior",
    },
    headlines=rule.HEADLINES,
    leakage=Leakage(
        "gain",
        "PSNR above the best floor, dB",
        lambda s: s.get("above_best_floor"),
        nothing=0.0,
        span=6.0,
        title="How far reconstructions lie above what could be guessed",
    ),
    columns=(
        ("images", lambda s: formats.count(s["images"])),
        ("PSNR, dB", lambda s: METRICS[0].two_lines(s["metrics"])),
        ("worst", lambda s: formats.decimal(s["metrics"]["psnr"]["worst"])),
        ("SSIM", lambda s: formats.decimal(s["metrics"]["ssim"]["mean"], 3)),
        ("best\nfloor", lambda s: formats.decimal(_best(s)["mean"])),
        ("k\n(image)", lambda s: f"{formats.count(s['k'])}\n({formats.count(s['k_measuring'])})"),
        ("k per\npixel", lambda s: formats.compact(s["k_per_pixel"])),
        ("labels\n(floor)", _label_cell),
        ("time", lambda s: formats.seconds(s["seconds"])),
    ),
    rows=_score_rows,
    remarks=_remarks,
    beside=lambda result: result.summary.get("told", ()),
    details=_details,
    sweep=_sweep,
    drawings=(
        Drawing(
            "sheet",
            "fedattack.reporting.figures:reconstruction_sheet",
            "originals above, reconstructions and the best floor below",
            "Originals, what the attack made of the update, and what the same attacker would have answered without "
            "it. PSNR under each image; pixels enlarged, not smoothed.",
        ),
        Drawing(
            "psnr",
            "fedattack.reporting.figures:psnr_dots",
            "PSNR of each image beside its floors",
            "The grey line spans what the update added over the best guess for that image.",
        ),
        Drawing(
            "objective",
            "fedattack.reporting.figures:loss_history",
            "objective over iterations",
            "Restarts and stopping are decided by this objective alone, never by the private images.",
        ),
    ),
    types=dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(_TEXTS, "string") | {"label_right": "boolean"},
    glossary=f"""
PSNR, SSIM: Images in [0, 1], clamped, data range 1; SSIM with scikit-image's uniform 7 \u00d7 7 window. At 30 dB
a small image is hard to tell from the original; infinite means identical. Worst and best are the attacker's.

Recovered: An image at {rule.RECOVERED_PSNR:.0f} dB and SSIM {rule.RECOVERED_SSIM} or more, at least
{rule.RECOVERED_MARGIN:.0f} dB above every floor and the control. Half of the images: \u201cprivate images
recovered\u201d. One such image, a mean significantly above both the best floor and the control, or labels beyond
what can be guessed: \u201cpartial leakage\u201d.

No leakage: The upper end of the gain's interval lies below {rule.MARGIN:.0f} dB. Below its floor an attack
failed, which says nothing about the model.

Control: The same reconstruction scored against other victims' images. What scores as well there is a good prior,
not a leak.

k: Numbers that were really sent. A rate alone says nothing: 0.1 % of a model with a wide head is thousands of
numbers, of a small one a handful. Only those that are not zero and no bias of the last layer measure the image.
""",
)
