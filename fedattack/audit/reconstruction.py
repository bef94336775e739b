"""Reconstruction: the auditor scores what attacks answered, beside what they could have guessed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from fedattack.audit import reconstruction_verdict as rule
from fedattack.audit.family import (
    SEVERITY,
    AuditResult,
    Cells,
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
from fedattack.audit.image_scores import (
    AUXILIARY_FLOOR,
    GREY_FLOOR,
    VERDICT_METRICS,
    ImageScores,
    Victim,
    column,
    describe_metric,
    described_metrics,
    figure,
    score_images,
    scored_by,
)
from fedattack.errors import DataError
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import (
    INFLATION_DB,
    METRICS,
    ImageMetric,
    Interval,
    constant_hits,
    paired_difference,
)
from fedattack.metrics.identification import evidence, sign_test
from fedattack.observation import Observation, Reconstruction
from fedattack.reporting import formats
from fedattack.reporting.formats import seat
from fedattack.storage.plain import number

ANSWERED = (
    Metric("label_right"),
    Metric("label_confidence"),
    Metric("loss", worst="max"),
    Metric("certificate", worst="max"),
    Metric("out_of_range_share", worst="max"),
)
"""What an answer has beside its images."""


def audit_reconstruction(
    attack_name: str,
    observations: Sequence[Observation],
    reconstructions: Sequence[Reconstruction | None],
    truths: Sequence[GroundTruth],
    seconds: Sequence[float] | float,
    *,
    reasons: Mapping[str, str] | None = None,
    seed: int = 0,
    metrics: Mapping[str, ImageMetric] | None = None,
    public: Tensor | None = None,
    photographs: Mapping[str, Tensor] | None = None,
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
    metrics
        Scored by, beside those that the verdict rests on.
    public
        Images of nobody's, (N, C, H, W), among which a private one is looked for as well.
    photographs
        Key of an observation of one image -> the other photographs of the same person, (M, C, H, W), in random order.

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
    times = _times(seconds, len(observations))
    victims = []
    for observation, answer, spent in zip(observations, reconstructions, times, strict=True):
        truth, update, granted = by_key[observation.key], observation.update, observation.auxiliary
        fields = {
            "k": update.kept,
            "k_measuring": _measuring(observation),
            "k_per_pixel": update.kept / truth.images.numel(),
            "rate": update.kept / update.numel,
            "kept_per_layer": json.dumps(update.kept_per_layer()),
            "wire_bytes": observation.wire_bytes,
            "seconds": spent,
        }
        images, why = None if granted is None else granted.images, (reasons or {}).get(observation.key, "")
        another = (photographs or {}).get(observation.key)
        victims.append(Victim(observation.key, truth, answer, why, images, fields, another))
    public_labels = getattr(observations[0].auxiliary, "labels", None)
    labels = [] if public_labels is None else public_labels.tolist()

    def seen(records: list[dict[str, Any]]) -> dict[str, Any]:
        return _seen(observations, records)

    return _audit(attack_name, victims, metrics, public, seed, labels, seen)


def audit_images(
    name: str,
    victims: Sequence[Victim],
    *,
    seed: int = 0,
    metrics: Mapping[str, ImageMetric] | None = None,
    public: Tensor | None = None,
) -> AuditResult:
    """The same of answers of which nothing is known but their images; see :func:`audit_reconstruction`.

    DataError if there is nothing to score.
    """
    if not victims:
        raise DataError(f"{name!r}: no image to score")
    return _audit(name, victims, metrics, public, seed, [], lambda _: {})


def _audit(
    name: str,
    victims: Sequence[Victim],
    metrics: Mapping[str, ImageMetric] | None,
    public: Tensor | None,
    seed: int,
    public_labels: Sequence[int],
    seen: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> AuditResult:
    common = {"attack": name, "family": "reconstruction"}
    scores = score_images(victims, scored_by(metrics), common, public=public)
    summary = _Summary(victims, scores, public_labels, seed).figures(seen)
    histories = {
        f"round {victim.truth.round}, {seat(victim.truth.client)}": list(victim.answer.history)
        for victim in victims
        if victim.answer is not None and victim.answer.history and not _failed(scores, victim)
    }
    told = (name, "reconstruction", scores.records, summary, summary["verdict"], summary["level"])
    return AuditResult(*told, scores.images, {"histories": histories})


def _failed(scores: ImageScores, victim: Victim) -> bool:
    return any(victim.key == one["key"] for one in scores.failed)


def _measuring(observation: Observation) -> int:
    """Sent entries that depend on the image: not zero, and no bias of the last layer."""
    layers = list(observation.update.layers())
    if len(layers[-1][1]) == 1:
        layers.pop()
    return sum(int(values.count_nonzero()) for _, _, _, values in layers)


class _Summary:
    """What the records of an audit come to."""

    def __init__(
        self, victims: Sequence[Victim], scores: ImageScores, public_labels: Sequence[int], seed: int
    ) -> None:
        self.victims, self.scores, self.public_labels, self.seed = victims, scores, public_labels, seed

    def figures(self, seen: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
        """The summary of all records; `seen` tells what the attacker saw."""
        records, failed = self.scores.records, self.scores.failed
        scored = [row for row in records if row["status"] == "scored"]
        told = described_metrics(self.scores, scored, self.seed)

        def of(key: str, worst: Any = "min") -> dict[str, Any]:
            return describe(column(scored, key), self.seed, [row["victim"] for row in scored], worst)

        told["metrics"] |= {metric.key: of(metric.key, metric.worst) for metric in ANSWERED}
        methods = {victim.answer.method for victim in self.victims if victim.answer is not None}
        times = {row["victim"]: row.get("seconds", 0.0) for row in records}
        paper = {name: of(f"{name}_paper_scale") for name in VERDICT_METRICS}
        summary: dict[str, Any] = {
            "family": "reconstruction",
            "count": len(self.victims),
            "images": len(records),
            "missing": len(records) - len(scored),
            "failed": failed,
            **told,
            "scored_by": self.scores.metrics,
            "paper_scale": {**paper, "inflation_db": INFLATION_DB},
            "batch": sorted(set(Counter(row["victim"] for row in records).values())),
            "matched_by": sorted({row["matched_by"] for row in scored}),
            "methods": sorted(methods - {""}),
            "seconds": float(sum(times.values())),
            **seen(records),
        }
        if not scored:
            why = f" ({failed[0]['key']}: {failed[0]['reason']})" if failed else ""
            text = f"the attack failed: none of {len(records)} images was reconstructed{why}"
            return summary | {"level": "failed", "verdict": text}
        summary |= self.judge(records)[1]
        level, verdict = summary["level"], f"{RECONSTRUCTION.words(summary['level'])}: {summary['verdict']}"
        rounds = sorted({row["round"] for row in scored})
        if len(rounds) > 1:
            # Each round's interval is as much wider as there are rounds that could stand out by luck (Bonferroni).
            parts = {r: [row for row in records if row["round"] == r] for r in rounds}
            each = {r: self.judge(part, len(rounds)) for r, part in parts.items()}
            gains = [gain.mean for gain, _ in each.values()]
            of_round = {r: figures for r, (_, figures) in each.items()}
            if max(gains) - min(gains) > rule.MARGIN or len({f["level"] for f in of_round.values()}) > 1:
                level, verdict = _by_round(of_round)
                summary["rounds"] = {str(r): figures for r, figures in of_round.items()}
                for part in (
                    summary["above_best_floor"],
                    summary["above_control"],
                    *summary["metrics"].values(),
                ):
                    if part is not None:
                        part |= {"low": None, "high": None}
        return summary | {"level": level, "verdict": verdict}

    def judge(self, records: list[dict[str, Any]], looks: int = 1) -> tuple[Interval, dict[str, Any]]:
        """The gain over the best floor and the verdict on some of the records, of which there are `looks` sets."""
        scored = [row for row in records if row["status"] == "scored"]
        victims = [row["victim"] for row in scored]
        confidence = 1 - 0.05 / looks
        names = {key.split(".")[1] for row in scored for key in row if key.startswith("floor.")}
        # A floor of an attack's own may be missing for some victims: then it is no floor of the whole.
        capped = {
            name: np.minimum(values, rule.COUNTED_DB)
            for name in sorted(names)
            if not np.isnan(values := column(scored, f"floor.{name}.psnr")).any()
        }
        ours = np.minimum(column(scored, "psnr"), rule.COUNTED_DB)
        best = max(capped, key=lambda name: float(capped[name].mean()))
        over_floor = paired_difference(ours, capped[best], self.seed, victims, confidence)
        over_control, control = None, np.asarray(column(scored, "control_psnr"))
        if not np.isnan(control).any():
            over_control = paired_difference(ours, control, self.seed, victims, confidence)
        shown = None
        if not np.isnan(against := np.asarray(column(scored, "shown.psnr"))).any():
            rows = zip(against, column(scored, "shown.ssim"), column(scored, "shown.floor"), strict=True)
            shown = (_mean(against), sum(rule.image_recovered(p, s, f, None) for p, s, f in rows))
        guesses = np.max(list(capped.values()), axis=0)
        failed = [row for row in records if "notes" not in row]
        lost = {row["victim"]: row["status"].removeprefix("failed: ") for row in failed}
        found = rule.Findings(
            images=len(records),
            recovered=sum(
                rule.image_recovered(row["psnr"], row["ssim"], float(guess), row["control_psnr"])
                for row, guess in zip(scored, guesses, strict=True)
            ),
            psnr=_mean(column(scored, "psnr")),
            ssim=_mean(column(scored, "ssim")),
            floor_name=best,
            floor_psnr=_mean(capped[best]),
            over_floor=over_floor,
            over_control=over_control,
            labels=_labels(self.public_labels, records, looks),
            failed=[{"key": self.victims[victim].key, "reason": why} for victim, why in lost.items()],
            shown=shown,
            identified=self.identified(records, looks),
            methods=_methods(scored),
        )
        level, text = rule.reconstruction(found)
        told, named = found.labels, found.identified
        return over_floor, {
            "recovered": found.recovered,
            "psnr": found.psnr,
            "best_floor": best,
            "above_best_floor": interval_fields(over_floor),
            "above_control": None if over_control is None else interval_fields(over_control),
            "labels": {
                "right": told.right,
                "of": told.of,
                "floor": told.floor,
                "beyond_guessing": told.beyond,
            },
            "identified": None if named is None else named.record(),
            "person": self.person(records, looks),
            "level": level,
            "verdict": text,
        }

    def identified(self, records: Sequence[Mapping[str, Any]], looks: int) -> rule.Identified | None:
        """How many of the records' victims are identified, beside chance and the floors; None: it is not known."""
        chosen = [
            v
            for v in dict.fromkeys(row["victim"] for row in records)
            if self.scores.identified[v] is not None
        ]
        found = [one for v in chosen if (one := self.scores.identified[v]) is not None]
        told = evidence(found, 1 - 0.05 / looks)
        if told is None:
            return None
        floors = [self.scores.floors_identified[v] for v in chosen]
        names = [name for name in floors[0] if all(name in one for one in floors)]
        tests = {name: sign_test(found, [one[name] for one in floors]) for name in names}
        firsts = {name: sum(one[name].first for one in floors) for name in names}
        best = max(firsts, key=lambda name: firsts[name], default="")
        return rule.Identified(
            told,
            best,
            firsts.get(best, 0),
            max(tests.values(), default=0.0),
            looks,
            len(records) == len(chosen),
        )

    def person(self, records: Sequence[Mapping[str, Any]], looks: int) -> dict[str, Any] | None:
        """How often another photograph of the same person ranks first, beside chance; None where there is none."""
        found = [self.scores.persons[v] for v in dict.fromkeys(row["victim"] for row in records)]
        told = evidence([one for one in found if one is not None], 1 - 0.05 / looks)
        return None if told is None else rule.Identified(told).record()


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


def _labels(public: Sequence[int], records: list[dict[str, Any]], looks: int = 1) -> rule.Labels:
    """Labels right beside the best answer that ignores the update, told apart over the clients.

    That answer is the best fixed multiset for labels that are all equally common, as common as in the public data,
    or as among the other clients. Beyond it lies what beats it in a one-sided paired t test over the clients and by
    more than a guess's luck, which a t test of a few clients in full agreement cannot know.
    """
    asked = [row for row in records if row.get("label_right") is not None]
    if not asked:
        return rule.Labels()
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


def _undefined(name: str, told: Figures, s: Figures) -> str:
    """How many of the scored images a metric has no value for, or an infinite one."""
    of, found = s["images"] - s["missing"], s["metrics"][name]
    lost, same = of - found["count"], found.get("identical", 0)
    text = f"{told['title']}: no value for {lost} of {of} images" if lost else ""
    return text or (
        f"{told['title']}: {same} of {of} identical, left out of the mean" if 0 < same < of else ""
    )


def _any(figures: Figures) -> bool:
    return any(described["count"] for described in figures.values())


def _score_rows(result: AuditResult) -> list[Row]:
    s = result.summary
    rows = score_rows(result)
    if _any(s["shown"]):
        rows.insert(1, ("the same, against what the model was shown", False, s["shown"]))
    if _any(s["control"]):
        rows.append(("control: scored against other victims", False, s["control"]))
    return rows


def _scored_by(s: Figures) -> Mapping[str, Figures]:
    """The metrics of a summary; older ones have those of a verdict."""
    found: Mapping[str, Figures] | None = s.get("scored_by")
    return found or {name: describe_metric(METRICS.get(name)) for name in VERDICT_METRICS}


def _measured(s: Figures) -> list[Metric]:
    """The metrics that images were scored by, and what an answer has besides."""
    return [*(figure(name, told) for name, told in _scored_by(s).items()), *ANSWERED]


def _remarks(result: AuditResult) -> list[str]:
    s, parts = result.summary, []
    metrics, scale, each = s["metrics"], s["paper_scale"], s["seconds"] / s["count"]
    parts += [_undefined(name, told, s) for name, told in _scored_by(s).items() if _undefined(name, told, s)]
    if over := s.get("above_control"):
        parts.append(f"above the control: {formats.decimal(over['mean'])} dB")
    if (sure := metrics["label_confidence"]["mean"]) is not None:
        parts.append(f"own confidence in the labels {formats.compact(sure)}")
    if person := s.get("person"):
        what = "another photograph of the same person ranks first"
        chance = f"by chance {formats.decimal(person['chance'])}, {formats.p_value(person['p_value'])}"
        parts.append(f"{what} for {person['first']} of {person['of']} ({chance})")
    if s["methods"]:
        parts.append(f"method: {', '.join(s['methods'])}")
    if (certificate := metrics["certificate"]["mean"]) is not None:
        parts.append(f"objective per kept number: {formats.compact(certificate)}")
    if s["matched_by"] and s["matched_by"] != ["single"]:
        parts.append(f"images of a batch were matched by {' / '.join(s['matched_by'])}")
    parts.append(f"time: {formats.seconds(s['seconds'])} in all, {formats.seconds(each)} a victim")
    if held := s.get("peak_memory"):
        parts.append(f"memory: {formats.size(held)} at the peak of the process that attacked")
    if scale["psnr"]["mean"] is not None:
        shown = f"{formats.decimal(scale['psnr']['mean'])} dB and {formats.decimal(scale['ssim']['mean'], 3)}"
        units = f"PSNR {INFLATION_DB:.2f} dB higher, SSIM with data range 2"
        parts.append(f"in the units of the code released with HCGLA ({units}) the means would read {shown}")
    return parts


def _details(result: AuditResult) -> list[Column]:
    metrics = [figure(name, told) for name, told in _scored_by(result.summary).items() if not told["pooled"]]
    lead = metrics[0]

    def cell(metric: Metric, prefix: str = "") -> Any:
        return lambda row: metric.shown(row.get(f"{prefix}{metric.key}"))

    right = {None: formats.NONE, True: "right", False: "wrong"}
    return [
        ("round", lambda row: str(row["round"])),
        ("client", lambda row: seat(row["client"]).removeprefix("client ")),
        ("image", lambda row: str(row["image"])),
        ("sample", lambda row: str(row["sample"])),
        *((metric.heading, cell(metric)) for metric in metrics),
        *((name, cell(lead, f"floor.{name}.")) for name in result.summary["floors"]),
        ("control", cell(lead, "control_")),
        ("own image's rank", _rank),
        ("label", lambda row: right[row.get("label_right")]),
        ("objective", lambda row: formats.compact(row.get("loss"))),
        ("time", lambda row: formats.seconds(row.get("seconds"))),
        ("status", lambda row: row["status"]),
        ("method", lambda row: row.get("method") or formats.NONE),
    ]


def _rank(row: Figures) -> str:
    return f"{row['own_rank']} of {row['gallery']}" if row.get("own_rank") else formats.NONE


def _best(s: Figures, name: str) -> Figures:
    """A metric of the floor that is best by it; of the verdict's lead, of the floor that the verdict names."""
    floors = {floor: found[name] for floor, found in s["floors"].items() if found.get(name)}
    known = {floor: found for floor, found in floors.items() if found["mean"] is not None}
    if "best_floor" not in s or not known:
        return {"mean": None}
    if name == VERDICT_METRICS[0]:
        return floors.get(s["best_floor"], {"mean": None})
    pick = max if _scored_by(s)[name]["higher"] else min
    return known[pick(known, key=lambda floor: known[floor]["mean"])]


def _first_cell(s: Figures) -> str:
    told = s.get("identified")
    return f"{told['first']}/{told['of']}\n({formats.decimal(told['chance'])})" if told else formats.NONE


def _k_cell(s: Figures) -> str:
    return f"{formats.count(s['k'])}\n({formats.count(s['k_measuring'])})" if "k" in s else formats.NONE


def _columns(summaries: Sequence[Figures]) -> list[Column]:
    """Of the terminal's table: what a verdict rests on; the other metrics have a table of their own."""
    told = {name: figure(name, one) for s in summaries for name, one in _scored_by(s).items()}
    chosen = [told[name] for name in VERDICT_METRICS]
    lead = chosen[0]
    shown: list[Column] = [("images", lambda s: formats.count(s["images"]))]
    for metric in chosen:
        shown.append((metric.heading, _two_lines(metric, ends=metric is lead)))
        if metric is lead:
            shown.append(("worst", lambda s: lead.shown(s["metrics"][lead.key]["worst"])))
    return [
        *shown,
        ("best\nfloor", lambda s: lead.shown(_best(s, lead.key)["mean"])),
        ("own\nfirst", _first_cell),
        ("k\n(image)", _k_cell),
        ("labels\n(floor)", _label_cell),
        ("time", lambda s: formats.seconds(s["seconds"])),
    ]


def _beyond(results: Sequence[AuditResult]) -> Cells | None:
    """Every metric that no verdict rests on, beside the best floor and the control."""
    rows = []
    for result in results:
        s = result.summary
        for name, told in _scored_by(s).items():
            if name not in VERDICT_METRICS:
                metric = figure(name, told)
                mean, ends, worst, _ = metric.cells(s["metrics"], ends=True)
                control = metric.shown((s["control"].get(name) or {"mean": None})["mean"])
                floor = metric.shown(_best(s, name)["mean"])
                rows.append([result.attack, metric.heading, mean, ends, worst, floor, control])
    return (
        (("attack", "scored by", "mean", "95 % interval", "worst", "best floor", "control"), rows)
        if rows
        else None
    )


def _two_lines(metric: Metric, ends: bool) -> Callable[[Figures], str]:
    if ends:
        return lambda s: metric.two_lines(s["metrics"])
    return lambda s: metric.shown((metric.of(s["metrics"]) or {"mean": None})["mean"])


def _label_cell(s: Figures) -> str:
    labels = s.get("labels")
    if not labels or not labels["of"]:
        return formats.NONE
    return f"{labels['right']}/{labels['of']}\n({labels['floor']:.1f})"


def _sweep(s: Figures) -> dict[str, Any]:
    row = {"images": s["images"], "k": number(s.get("k"))}
    if "best_floor" not in s:
        return row
    for name in _scored_by(s):
        row[name], row[f"{name}_worst"] = (number(s["metrics"][name][end]) for end in ("mean", "worst"))
        row[f"floor_{name}"] = number(_best(s, name)["mean"])
    row |= {"floor": s["best_floor"], "recovered": s["recovered"]}
    if told := s.get("identified"):
        row |= {"own_first": told["first"], "own_first_of": told["of"]}
    labels = s["labels"]
    row |= {f"{name}.title": json.dumps(told) for name, told in _scored_by(s).items()}
    return row | {"labels_right": labels["right"], "labels_of": labels["of"]}


def _sweep_columns(row: Figures) -> dict[str, str]:
    """Each metric's mean, and that of the best floor."""
    shown = {}
    for key in row:
        name = key.removesuffix(".title")
        if name != key and isinstance(row[key], str):
            metric = figure(name, json.loads(row[key]))
            shown[metric.heading] = metric.shown(row[name])
            shown[f"floor: {metric.heading}"] = metric.shown(row[f"floor_{name}"])
    return shown


_INTEGERS = (
    *("round", "client", "victim", "image", "sample", "label", "k", "k_measuring", "wire_bytes"),
    *("own_rank", "gallery"),
)
_TEXTS = ("method", "notes", "matched_by", "kept_per_layer")

RECONSTRUCTION: Family = Family(
    name="reconstruction",
    question="Can private images be rebuilt from what clients send?",
    title="Reconstruction of private images (mean with 95 % interval)",
    metrics=(*(figure(name, describe_metric(METRICS.get(name))) for name in VERDICT_METRICS), *ANSWERED),
    measured=_measured,
    beyond=_beyond,
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
    columns=_columns,
    rows=_score_rows,
    remarks=_remarks,
    beside=lambda result: result.summary.get("told", ()),
    details=_details,
    sweep=_sweep,
    sweep_columns=_sweep_columns,
    paired="fedattack.audit.paired:of_images",
    drawings=(
        Drawing(
            "sheet",
            "fedattack.reporting.figures:reconstruction_sheet",
            "originals above, reconstructions and the best floor below",
            "Originals, what the attack made of the update, and what the same attacker would have answered without "
            "it. The first score under each image; pixels enlarged, not smoothed.",
        ),
        Drawing(
            "scores",
            "fedattack.reporting.figures:score_dots",
            "scores of each image beside its floors",
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

Registered correlation: Of pixels, at the shift, and in the mirror image, where it is highest: shifted, mirrored and
re-lit images keep it. Unrelated images reach .6 to .9 so; it says something beside floor and control alone.

Own image first: How many victims' private images rank first by registered correlation among images of others,
private and public; ties count against. Chance is one in as many. Beyond chance (p < {rule.IDENTIFIED_P_VALUE}) and
every floor: at least \u201cpartial leakage\u201d; \u201cprivate images recovered\u201d where half of what a defence
showed the model is recovered as well. It is the image that is told, not the person.

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
