"""A family of attacks as data, and what the audits of all families have in common.

Tables, figures, report, records and sweeps read a :class:`Family` and know none by name: a new one is one file,
and one line in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fedattack.errors import ConfigError
from fedattack.metrics import Interval, bootstrap_mean, units_needed, wilson
from fedattack.registry import Registry
from fedattack.reporting import formats

End = Literal["min", "max"]
Level = Literal["leak", "partial", "none", "undecided", "failed"]

SEVERITY: tuple[Level, ...] = ("leak", "partial", "undecided", "none", "failed")
"""Levels, the worst for whoever defends first."""

_SHARED_WORDS: dict[Level, str] = {"undecided": "undecided", "failed": "the attack failed"}

Figures = Mapping[str, Any]
"""A described metric ("mean", "worst", "best", "low", "high"), or a summary."""
Column = tuple[str, Callable[[Figures], str]]
"""Heading of a column, and its cell from a summary or a record."""
Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Columns and rows of a table."""
Columns = Callable[[Sequence[Figures]], Sequence[Column]]
"""The columns that some summaries or records need."""


@dataclass(frozen=True)
class Metric:
    """One figure of a family, shown as ``scale * value`` with `digits` decimals.

    `key` stands in the summary's "metrics" and in each floor, there as `floor` where that is given. No `title`: no
    column in the report. `worst` is the attacker's: "min" where more means more leakage. `note` adds words from the
    described metric.
    """

    key: str
    title: str = ""
    unit: str = ""
    scale: float = 1.0
    digits: int = 1
    worst: End = "min"
    floor: str = ""
    note: Callable[[Figures], str] = lambda _: ""

    @property
    def heading(self) -> str:
        """Title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def shown(self, value: Any) -> str:
        """A value as a person reads it."""
        return formats.decimal(None if value is None else value * self.scale, self.digits)

    def of(self, figures: Figures) -> Figures | None:
        """The described metric among those of the attack or of a floor."""
        found: Figures | None = figures.get(self.key) or figures.get(self.floor)
        return found

    def two_lines(self, figures: Figures) -> str:
        """Mean above interval, for narrow columns."""
        described = self.of(figures) or {"mean": None}
        return f"{self.shown(described['mean'])}\n{formats.span(described, self.digits, self.scale)}"

    def cells(self, figures: Figures, ends: bool) -> list[str]:
        """Mean, interval, and where `ends` worst and best, of the attack or of a floor."""
        described = self.of(figures)
        if not described:
            return [""] * (4 if ends else 2)
        interval = formats.interval(described, self.digits, self.scale)
        note = self.note(described)
        cells = [f"{self.shown(described['mean'])}{f' ({note})' if note else ''}", interval]
        return cells + [self.shown(described.get(end)) for end in ("worst", "best")] if ends else cells


@dataclass(frozen=True)
class Leakage:
    """The one figure that says how much leaked, as a sweep compares it.

    `column` and `title` are those of the sweep's table and of its figure, `label` is the figure's name with the
    unit, and `read` turns a summary into it. `nothing` is its value where nothing leaks, `span` what the colours
    span at least, so that noise does not look like a result; both in the unit of the label, `scale` times the
    summary's.
    """

    column: str
    label: str
    read: Callable[[Figures], Figures | None]
    nothing: float
    span: float
    title: str
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Drawing:
    """A figure of the report. `target`: ``"package.module:function"``, a result (`each`) or all -> figure or None."""

    name: str
    target: str
    alt: str
    caption: str
    each: bool = True


Row = tuple[str, bool, Figures]
"""Of a table of scores: name, whether it is the attack's own, described metrics by key."""


@dataclass(frozen=True)
class Family:
    """What is asked, how it is measured, and how it is told.

    Parameters
    ----------
    metrics
        The leading one first.
    measured
        From a summary: the metrics that it holds, where they are not always the same; `metrics` those of any.
    floors
        Floors every audit of the family has -> what they are.
    headlines
        Level -> the words of a verdict; "undecided" and "failed" have words already.
    columns
        Of the terminal's table, or what makes them from the summaries; None: made from the metrics.
    beyond
        From the results of its attacks: a second table of the terminal, its columns and rows; None: none.
    rows, remarks, details
        For the report, from a result: rows of scores, sentences below them, columns of a table of its records.
    beside
        From a result: sentences below its verdict, on the terminal too.
    together
        From the results of all its attacks in a run: figures with a sentence, "text"; None: nothing to tell.
    sweep
        Further columns of a sweep's table, from a summary.
    sweep_columns
        From a row of a sweep's table: heading and cell of those that its page shows.
    paired
        ``"package.module:function"``, from an attack's :class:`~fedattack.audit.paired.Side` in each of two runs with
        the same data and a seed: differences of figures of the same units; empty: none are told.
    types
        Column of the records -> pandas type; others are floats, or texts.
    glossary
        How to read its figures: "term: text" in each paragraph.
    subject
        What is judged.
    """

    name: str
    question: str
    title: str
    metrics: tuple[Metric, ...]
    floors: Mapping[str, str]
    headlines: Mapping[Level, str]
    leakage: Leakage
    columns: tuple[Column, ...] | Columns | None = None
    measured: Callable[[Figures], Sequence[Metric]] | None = None
    beyond: Callable[[Sequence[AuditResult]], Cells | None] = lambda _: None
    rows: Callable[[AuditResult], list[Row]] = lambda result: score_rows(result)
    remarks: Callable[[AuditResult], Sequence[str]] = lambda _: ()
    beside: Callable[[AuditResult], Sequence[str]] = lambda _: ()
    together: Callable[[Sequence[AuditResult]], Figures | None] = lambda _: None
    details: Callable[[AuditResult], Sequence[Column]] = lambda _: ()
    sweep: Callable[[Figures], dict[str, Any]] = lambda _: {}
    sweep_columns: Callable[[Figures], Mapping[str, str]] = lambda _: {}
    paired: str = ""
    drawings: tuple[Drawing, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    glossary: str = ""
    subject: str = "attack"

    def words(self, level: Level) -> str:
        """How a verdict of this level begins."""
        return self.headlines.get(level) or _SHARED_WORDS[level]

    def titled(self, summaries: Sequence[Figures]) -> list[Metric]:
        """The metrics of some summaries that tables show."""
        found = [one for s in summaries for one in (self.measured(s) if self.measured else self.metrics)]
        return list({metric.key: metric for metric in [*found, *self.metrics] if metric.title}.values())

    def terms(self) -> list[tuple[str, str]]:
        """The glossary, entry by entry."""
        entries = [" ".join(entry.split()).partition(": ") for entry in self.glossary.strip().split("\n\n")]
        return [(term, text) for term, _, text in entries if text]

    def table_columns(self, summaries: Sequence[Figures]) -> Sequence[Column]:
        """The terminal's columns after the attack's name."""
        if self.columns is not None:
            return self.columns(summaries) if callable(self.columns) else self.columns
        lead = self.metrics[0]
        made: list[Column] = []
        for metric in self.titled(summaries):
            made.append((metric.heading, lambda s, m=metric: m.two_lines(s["metrics"])))  # type: ignore[misc]
        made.append(("best\nfloor", lambda s: lead.cells(s["floors"][s["best_floor"]], False)[0]))
        return (*made, ("time", lambda s: formats.seconds(s["seconds"])))


def score_rows(result: AuditResult) -> list[Row]:
    """The attack's figures, then its floors, the highest first."""
    lead, floors = get_family(result.family).metrics[0], result.summary["floors"]
    order = sorted(floors, key=lambda name: -((lead.of(floors[name]) or {}).get("mean") or 0.0))
    rows = [(f"floor: {name}", False, floors[name]) for name in order]
    return [(result.attack, True, result.summary["metrics"]), *rows]


FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "reconstruction": "fedattack.audit.reconstruction:RECONSTRUCTION",
        "membership": "fedattack.audit.membership:MEMBERSHIP",
        "unlearning": "fedattack.audit.unlearning:UNLEARNING",
        "forgetting": "fedattack.audit.forgetting:FORGETTING",
        "forgotten": "fedattack.audit.forgotten:FORGOTTEN",
    },
    "fedattack.families",
)
"""What can be asked of a federation, by name."""


def get_family(name: str) -> Family:
    """The family of that name; raises ConfigError where there is none."""
    found = FAMILIES.get(name)
    if not isinstance(found, Family):
        raise ConfigError(f"family {name!r} is a {type(found).__name__}: fedattack.audit.Family is accepted")
    return found


@dataclass(frozen=True)
class AuditResult:
    """One attack, scored: one flat record per private image, candidate or seed, and what they come to.

    `summary` is as :func:`fedattack.storage.records.summary_document` has it; `verdict` the words of its level, a
    colon, the reasons. `images` are panels for figures, float32 (N, C, H, W) in the order of `records`, NaN where
    there is none. `threat` has "seat" (str), "needs", "letters", "assumptions" (lists of str), where the run says
    so.
    """

    attack: str
    family: str
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    verdict: str
    level: Level
    images: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    threat: dict[str, Any] = field(default_factory=dict)


def by_family(results: Sequence[AuditResult]) -> list[tuple[Family, list[AuditResult]]]:
    """The families that were asked, in the order of the results, and the results of each."""
    names = dict.fromkeys(result.family for result in results)
    return [(get_family(name), [result for result in results if result.family == name]) for name in names]


def told_together(results: Sequence[AuditResult]) -> dict[str, Figures]:
    """Family -> what is told of all its attacks in a run together, where there is such."""
    found = {family.name: family.together(chosen) for family, chosen in by_family(results)}
    return {name: figures for name, figures in found.items() if figures is not None}


def gain_level(gain: Interval, margin: float) -> Level:
    """What an interval of the gain over the best floor says, as equivalence within a margin (Schuirmann 1987).

    "partial": it lies above 0. "failed": below 0, or its mean a margin or more below. "none": its upper end is
    below the margin. "undecided": anything else, an unknown interval included.
    """
    if gain.mean <= -margin or gain.high < 0:
        return "failed"
    if gain.low > 0:
        return "partial"
    return "none" if gain.high < margin else "undecided"


def further_units(gain: Interval, margin: float) -> int:
    """How many more units would tell "partial" or "none", if mean and spread stay as they were observed."""
    return max(1, units_needed(gain.spread, max(gain.mean, margin - gain.mean)) - gain.count)


def at_chance(accuracy: float | None, chance: float | None, samples: int | None) -> str:
    """Words where a model's accuracy cannot be told from the share of the commonest class; else empty.

    Both in [0, 1], None where unknown. Wilson's interval over the samples decides, where there are any.
    """
    if accuracy is None or chance is None:
        return ""
    low = wilson(round(accuracy * samples), samples).low if samples else accuracy
    if low > chance:
        return ""
    shown, most = formats.percent(accuracy), formats.percent(chance)
    return f"the model is at chance (accuracy {shown}, commonest class {most}), and says nothing either way"


def describe(
    values: Sequence[float], seed: int, groups: Sequence[int] | None = None, worst: End = "min"
) -> dict[str, float | int | None]:
    """Mean, worst (for the attacker), best, count and bootstrap interval of a metric, None where unknown.

    NaN (nothing to score) is left out, infinity (identical images) is left out of the mean and counted as
    "identical", unless every value is infinite. `groups` are the victims of the values.
    """
    array = np.asarray(values, dtype=np.float64)
    place = np.arange(len(array)) if groups is None else np.asarray(groups)
    place, array = place[~np.isnan(array)], array[~np.isnan(array)]
    if not len(array):
        return {"mean": None, "worst": None, "best": None, "low": None, "high": None, "count": 0}
    finite = np.isfinite(array)
    ends = extremes(array.tolist(), worst)
    described: dict[str, float | int | None] = {"mean": float(array[0]), **ends, "low": None, "high": None}
    described["count"] = len(array)
    if finite.any():
        described |= interval_fields(bootstrap_mean(array[finite], seed, place[finite]))
    if not finite.all():
        described["identical"] = int((~finite).sum())
    return described


def extremes(values: Sequence[float], worst: End = "min") -> dict[str, float]:
    """ "worst" and "best" of some values, for the attacker."""
    ends = (float(min(values)), float(max(values)))
    return dict(zip(("worst", "best"), ends if worst == "min" else ends[::-1], strict=True))


def interval_fields(interval: Interval) -> dict[str, float | None]:
    """An interval as plain fields: "mean", "low", "high" (None where unknown)."""
    ends = {"low": interval.low, "high": interval.high} if interval.known else {"low": None, "high": None}
    return {"mean": interval.mean, **ends}


def headline(results: Sequence[AuditResult], federation: Figures | None = None) -> dict[str, Any] | None:
    """The worst that was found by any attack, from which seat, and under which assumptions; None without results.

    "level", "attack", "seat" (empty where unknown), "assumptions" (list of str), "text", and what it is made of:
    "words", and "held", what was so when the attack was run. A guarantee that canaries
    show to be broken stands above every attack; "attack" is empty then.
    """
    if broken := ((federation or {}).get("canaries") or {}).get("headline"):
        found = {"level": "leak", "attack": "", "seat": "", "assumptions": [], "text": broken}
        return found | {"words": broken, "held": []}
    if not results:
        return None
    first = min(results, key=lambda result: SEVERITY.index(result.level))
    alike = [one for one in results if (one.level, one.family) == (first.level, first.family)]
    read = get_family(first.family).leakage.read
    worst = max(alike, key=lambda result: (read(result.summary) or {}).get("mean") or 0.0)
    seat, held = str(worst.threat.get("seat", "")), _assumptions(worst, federation or {})
    words = get_family(worst.family).words(worst.level)
    by = f"by {worst.attack}{f', seat: {seat}' if seat else ''}"
    if worst.level in ("leak", "partial"):
        text = f"worst found: {words}, {by}"
    elif worst.level == "failed":
        text = "every attack failed, which says nothing about the model"
    else:
        unsure = ", ".join(r.attack for r in results if r.level in ("undecided", "failed"))
        text = (
            f"undecided: {unsure} cannot tell"
            if worst.level == "undecided"
            else f"nothing found: {words}, {by}"
        )
        text += f"; {unsure} cannot tell" if unsure and worst.level == "none" else ""
    found = {"level": worst.level, "attack": worst.attack, "seat": seat, "words": text, "held": held}
    text += f" ({'; '.join(held)})" if held else ""
    return found | {"assumptions": [*held, *worst.threat.get("assumptions", ())], "text": text}


def _assumptions(result: AuditResult, federation: Figures) -> list[str]:
    """What held when the attack was run: model and its training, batch, steps, what was granted."""
    s, told = result.summary, []
    scenario = s.get("scenario")
    accuracies = {row["round"]: row.get("accuracy") for row in federation.get("rounds", [])}
    before = federation.get("pretraining")  # what round 1 sends
    if before:
        accuracies[0] = before["accuracy"]
    sent = sorted({row["round"] - 1 for row in result.records if "round" in row})
    name = scenario["model"]["name"] if scenario else "model"
    known = [accuracies[r] for r in sent or [max(accuracies, default=0)] if accuracies.get(r) is not None]
    states = ["its initial weights"] if sent[:1] == [0] and not before else []
    if known:
        ends = dict.fromkeys(map(formats.percent, (min(known), max(known))))
        states.append(f"{' to '.join(ends)} accuracy")
    told += [f"{name} at {' and '.join(states)}"] if states else []
    if before:
        told.append(f"{before['rounds']} honest rounds before round 1")
    if scenario:
        training = scenario["training"]
        batch = " or ".join(map(str, s["batch"]))
        steps = training["local_steps"] if training["protocol"] == "fedavg" else 1
        told.append(f"batch {batch}, {steps} local step{'s' if steps != 1 else ''}")
        if names := scenario["defense"]["names"]:
            told.append(f"defences: {', '.join(names)}")
        granted = s["auxiliary"]
        told.append(f"{granted['count']:,} public images granted" if granted else "no public images granted")
    return told
