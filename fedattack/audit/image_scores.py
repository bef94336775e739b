"""Every answer scored by every metric: beside its floors, another victim's images, and what the model was shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedattack.audit.family import Metric, describe
from fedattack.audit.reconstruction_verdict import COUNTED_DB
from fedattack.config import MetricConfig
from fedattack.errors import DataError
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import (
    ImageMetric,
    Pairs,
    build_metrics,
    labels_right,
    match,
    out_of_range_share,
    score,
)
from fedattack.metrics.identification import Identification, apart, gallery_size, identify
from fedattack.metrics.structural import paper_scale
from fedattack.observation import Reconstruction

GREY_FLOOR = "flat grey"
AUXILIARY_FLOOR = "auxiliary mean"

ORIGINAL, REBUILT = "original", "reconstruction"
SHOWN = "shown to the model"
"""Panels of an audit: the private images, the answers, and what a defence made of the private images."""

VERDICT_METRICS = ("psnr", "ssim")
"""Scored always: a verdict rests on them (:mod:`fedattack.audit.reconstruction_verdict`)."""

_CONTROLS = 32
"""Other victims that each reconstruction is scored against, at most."""
_COSTLY_CONTROLS = 4
"""The same, by metrics that are networks."""


@dataclass(frozen=True)
class Victim:
    """One private batch, and what was answered about it.

    `answer` None: the `reason` says why there is none; one without labels was not asked for them. `granted`: public
    images that the attacker had, (N, C, H, W), whose mean is a floor. `fields`: further columns of its records.
    `photographs`: of a single private image, the others of the same person, (M, C, H, W), where there are some: the
    first is ranked, and none of them counts as another's.
    """

    key: str
    truth: GroundTruth
    answer: Reconstruction | None
    reason: str = ""
    granted: Tensor | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    photographs: Tensor | None = None


@dataclass(frozen=True)
class ImageScores:
    """Records (a row an image), panels for figures, and what is one value of all images.

    Columns of a metric ``m``: ``m``, ``floor.<floor>.m``, ``shown.m`` and ``control_m`` (mean over other victims'
    images). `pooled`: metric -> "" (the attack's own), floor or "shown" -> value. `identified`: of each victim, in
    order; None where it cannot be told; `floors_identified`: floor -> the same;
    `persons`: of another photograph of the same person. `metrics` are what was scored by,
    and what is told of each in a summary.
    """

    records: list[dict[str, Any]]
    images: dict[str, Tensor]
    failed: list[dict[str, str]]
    pooled: dict[str, dict[str, float]]
    identified: list[Identification | None]
    floors_identified: list[dict[str, Identification]]
    persons: list[Identification | None]
    metrics: dict[str, dict[str, Any]]


def scored_by(chosen: Mapping[str, ImageMetric] | None = None) -> dict[str, ImageMetric]:
    """The metrics of an audit: those that were chosen, and those that the verdict rests on, which come first."""
    resting = build_metrics(MetricConfig(names=VERDICT_METRICS))
    return resting | dict(chosen or {})


def figure(name: str, told: Mapping[str, Any]) -> Metric:
    """A metric of the registry as tables show it; `told` as :func:`describe_metric` has it."""
    worst = "min" if told["higher"] else "max"
    return Metric(name, told["title"], told["unit"], digits=told["digits"], worst=worst)  # type: ignore[arg-type]


def describe_metric(metric: ImageMetric | type[ImageMetric]) -> dict[str, Any]:
    """ "title", "unit", "digits", "higher" (more means more leaked), "pooled", and "record" where there is one."""
    heading = metric.title if isinstance(metric, type) else metric.heading
    found = {name: getattr(metric, name) for name in ("unit", "digits", "higher", "pooled")}
    record = {} if isinstance(metric, type) else metric.record()
    return {"title": heading, **found, **({"record": record} if record else {})}


def score_images(
    victims: Sequence[Victim],
    metrics: Mapping[str, ImageMetric],
    common: Mapping[str, Any],
    *,
    public: Tensor | None = None,
) -> ImageScores:
    """Score every victim's answer; `common` are fields of all records, `public` further images for the gallery.

    An answer of the wrong size or not finite is a victim that failed: its rows have the status "failed: reason".
    """
    each = {name: metric for name, metric in metrics.items() if not metric.pooled}
    work = _Work(victims, each, dict(common), public)
    records: list[dict[str, Any]] = []
    panels: list[dict[str, Tensor]] = []
    for number in range(len(victims)):
        rows, shown = work.victim(number)
        records += rows
        panels.append(shown)
    names = dict.fromkeys(name for shown in panels for name in shown)
    nothing = [torch.full_like(victim.truth.images, math.nan) for victim in victims]
    images = {
        name: torch.cat([shown.get(name, none) for shown, none in zip(panels, nothing, strict=True)])
        for name in names
    }
    pooled = _pooled({n: m for n, m in metrics.items() if m.pooled}, images)
    told = {name: describe_metric(metric) for name, metric in metrics.items()}
    return ImageScores(
        records, images, work.failed, pooled, work.identified, work.floors_identified, work.persons, told
    )


def described_metrics(
    scores: ImageScores, rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the records come to: "metrics", "floors" (floor -> ...), "control" and "shown", by metric.

    `rows` are the scored records.
    """
    victims = [row["victim"] for row in rows]
    floors = sorted({key.split(".")[1] for row in scores.records for key in row if key.startswith("floor.")})

    def of(prefix: str, where: str) -> dict[str, Any]:
        found = {}
        for name, told in scores.metrics.items():
            if told["pooled"]:
                value = scores.pooled[name].get(where)
                one = [] if value is None else [value]
                found[name] = describe(one, seed) | {"count": len(rows) if one else 0}
            else:
                found[name] = describe(
                    column(rows, f"{prefix}{name}"), seed, victims, figure(name, told).worst
                )
        return found

    return {
        "metrics": of("", ""),
        "floors": {name: of(f"floor.{name}.", name) for name in floors},
        "control": of("control_", "control"),
        "shown": of("shown.", "shown"),
    }


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of a column, NaN where a row has none."""
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def fault(answer: Reconstruction | None, private: Tensor, reason: str | None) -> str:
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


class _Work:
    """Scores one victim after the other."""

    def __init__(
        self,
        victims: Sequence[Victim],
        metrics: Mapping[str, ImageMetric],
        common: dict[str, Any],
        public: Tensor | None,
    ) -> None:
        self.victims, self.metrics, self.common, self.public = victims, metrics, common, public
        self.failed: list[dict[str, str]] = []
        self.identified: list[Identification | None] = []
        self.floors_identified: list[dict[str, Identification]] = []
        self.persons: list[Identification | None] = []
        costly = {name: m for name, m in metrics.items() if "weights" in m.needs}
        cheap = {name: m for name, m in metrics.items() if name not in costly and "gallery" not in m.needs}
        self._controls = [
            (cheap, min(len(victims), _CONTROLS + 1)),
            (costly, min(len(victims), _COSTLY_CONTROLS + 1)),
        ]

    def victim(self, number: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Rows and panels of one private batch."""
        victim = self.victims[number]
        truth, private = victim.truth, victim.truth.images
        why = fault(victim.answer, private, victim.reason)
        answer = None if why else victim.answer
        if answer is None:
            self.failed.append({"key": victim.key, "reason": why})
        fields = self.common | {
            "round": truth.round,
            "client": truth.client,
            **victim.fields,
            "victim": number,
        }
        panels = {ORIGINAL: private, REBUILT: torch.full_like(private, math.nan)}
        if truth.shown is not None:
            panels[SHOWN] = truth.shown
        rows = [
            fields | {"image": index, "sample": sample, "label": label, "status": f"failed: {why}"}
            for index, (sample, label) in enumerate(zip(truth.sample_ids, truth.labels.tolist(), strict=True))
        ]

        def add(prefix: str, found: Mapping[str, Sequence[float]], places: Sequence[int]) -> None:
            for name, values in found.items():
                for place, value in zip(places, values, strict=True):
                    rows[place][f"{prefix}{name}"] = value

        everyone = range(len(rows))
        gallery = self._gallery(number)
        floors = _floors(victim, answer)
        batches = (
            [] if gallery is None else [b for b in gallery.split(len(private)) if len(b) == len(private)]
        )
        for name, images in floors.items():
            panels[name] = _align(images, private)
            add(f"floor.{name}.", self._scores(panels[name], private, truth, gallery), everyone)
        if answer is None:
            self.identified.append(None)
            self.persons.append(None)
            self.floors_identified.append({})
            return rows, panels
        own = answer.images.to(private).cpu()
        pairing = match(own, private, answer.labels, truth.labels)
        asked = bool(answer.labels.numel())
        named = labels_right(answer.labels, truth.labels) if asked else [None] * len(private)
        chosen = [index for index, place in enumerate(pairing.order) if place >= 0]
        found_images = own[[pairing.order[index] for index in chosen]]
        panels[REBUILT][chosen] = found_images.clamp(0, 1)
        known = identify({REBUILT: own.clamp(0, 1), **floors}, private, batches)
        self.identified.append(known.pop(REBUILT, None))
        self.floors_identified.append(known)
        another: dict[str, Identification] = {}
        if victim.photographs is not None and batches:
            others = apart(batches, victim.photographs, len(batches))
            strangers = [] if others is None else others.split(1)
            another = identify({"": own.clamp(0, 1)}, victim.photographs[:1], strangers)
        self.persons.append(another.get(""))
        told_right = tuple(bool(named[index]) for index in chosen) if asked else None
        add("", self._scores(found_images, private[chosen], truth, gallery, chosen, told_right), chosen)
        outside, (inflated, wide) = (
            out_of_range_share(found_images),
            paper_scale(panels[REBUILT][chosen], private[chosen]),
        )
        scale = {"psnr_paper_scale": inflated.tolist(), "ssim_paper_scale": wide.tolist()}
        add("", scale | {"out_of_range_share": outside.tolist()}, chosen)
        if truth.shown is not None:
            aligned = _align(own.clamp(0, 1), truth.shown)
            of_all = tuple(map(bool, named)) if asked else None
            add("shown.", self._scores(aligned, truth.shown, truth, None, named=of_all), everyone)
            guesses = [
                score({"psnr": self.metrics["psnr"]}, Pairs(_align(images, truth.shown), truth.shown))["psnr"]
                for images in floors.values()
            ]
            add("shown.", {"floor": np.max(guesses, axis=0).tolist()}, everyone)
        said = {name: getattr(answer, name) for name in ("label_confidence", "loss", "certificate", "method")}
        said |= {f"control_{name}": value for name, value in self._control(own, number).items()}
        mine = self.identified[-1]
        said |= {
            "own_rank": None if mine is None else mine.rank,
            "gallery": None if mine is None else mine.of,
        }
        for row, right in zip(rows, named, strict=True):
            row |= {"label_right": right, **said, "notes": _why(answer)}
        for index in chosen:
            rows[index] |= {"status": "scored", "matched_by": pairing.matched_by}
        for row in rows:
            if row["status"] != "scored":
                row["status"] = f"failed: {len(answer.images)} images for a batch of {len(private)}"
        return rows, panels

    def _scores(
        self,
        images: Tensor,
        private: Tensor,
        truth: GroundTruth,
        gallery: Tensor | None,
        chosen: Sequence[int] | None = None,
        named: tuple[bool, ...] | None = None,
    ) -> dict[str, list[float]]:
        labels = truth.labels if chosen is None else truth.labels[list(chosen)]
        pairs = Pairs(images.clamp(0, 1), private, labels, named, gallery)
        return score(self.metrics, pairs)

    def _gallery(self, number: int) -> Tensor | None:
        """Other victims' private images, then public ones; none equal to one of the own."""
        victim = self.victims[number]
        own = victim.truth.images
        count = len(self.victims)
        others = [self.victims[(number + step) % count].truth.images for step in range(1, count)]
        others += [images for images in (victim.granted, self.public) if images is not None]
        alike = [images for images in others if images.shape[1:] == own.shape[1:]]
        return apart(alike, own, gallery_size(len(own)))

    def _control(self, own: Tensor, number: int) -> dict[str, float | None]:
        """Mean of each metric of one answer against the other victims' images; None where there is no other image."""
        private, found = self.victims[number].truth.images, dict[str, float | None]()
        for metrics, several in self._controls:
            values: dict[str, list[float]] = {name: [] for name in metrics}
            for step in range(1, several if metrics else 0):
                other = self.victims[(number + step) % len(self.victims)].truth
                images = other.images
                if images.shape[1:] != private.shape[1:]:
                    continue
                if images.shape == private.shape and torch.equal(images, private):
                    continue
                order = match(own, images).order
                matched = [index for index, place in enumerate(order) if place >= 0]
                answered = own[[order[index] for index in matched]].clamp(0, 1)
                pairs = Pairs(answered, images[matched], other.labels[matched])
                for name, scores in score(metrics, pairs).items():
                    known = np.minimum(np.asarray(scores), COUNTED_DB)
                    values[name] += (
                        [float(known[~np.isnan(known)].mean())] if not np.isnan(known).all() else []
                    )
            found |= {name: float(np.mean(one)) if one else None for name, one in values.items()}
        return found


def _pooled(metrics: Mapping[str, ImageMetric], images: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Metrics of all images together: the answers', each floor's, and what was shown."""
    found: dict[str, dict[str, float]] = {name: {} for name in metrics}
    for panel, made in images.items():
        if panel in (ORIGINAL, SHOWN) or not metrics:
            continue
        known = ~torch.isnan(made).flatten(1).any(1)
        against = [("" if panel == REBUILT else panel, images[ORIGINAL])]
        against += [("shown", images[SHOWN])] if panel == REBUILT and SHOWN in images else []
        for where, truth in against:
            if not known.any():
                continue
            for name, values in score(metrics, Pairs(made[known].clamp(0, 1), truth[known])).items():
                found[name][where] = values[0]
    return found


def _why(answer: Reconstruction) -> str:
    """What an attack says about how it came to its answer."""
    told: list[str] = []
    for key in ("why", "reason", "notes"):
        said = answer.details.get(key) or []
        told += [said] if isinstance(said, str) else map(str, said)
    return "; ".join(told)


def _floors(victim: Victim, answer: Reconstruction | None) -> dict[str, Tensor]:
    private = victim.truth.images
    floors = {GREY_FLOOR: torch.full_like(private, 0.5)}
    if victim.granted is not None and len(victim.granted):
        mean = victim.granted.double().mean(dim=0, keepdim=True).to(private)
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


def check_metrics(metrics: Mapping[str, ImageMetric], size: tuple[int, int, int]) -> None:
    """Refuse, before any work, metrics that cannot score images of that (C, H, W): ConfigError or DataError."""
    for name, metric in metrics.items():
        try:
            metric.check(size)
        except DataError as error:
            raise DataError(f"setting 'metric.names' = {name!r}: {error}") from None
