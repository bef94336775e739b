"""Finished runs beside each other: which settings differ, what each found, and by how much, of the same victims."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedattack.audit.family import Metric, get_family, interval_fields
from fedattack.audit.paired import Paired, Side
from fedattack.config import Config
from fedattack.errors import ConfigError
from fedattack.registry import Registry
from fedattack.reporting import formats
from fedattack.reporting.finished import Finished, named_apart
from fedattack.reporting.pages import render
from fedattack.reporting.provenance import provenance, shown
from fedattack.reporting.provenance import told as told_of
from fedattack.reporting.report import CHECKSUM
from fedattack.storage.plain import flat, number, plain


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; `document` is its content in JSON's own types.

    "runs": for each "name", "folder", "headline" (with "level" and "text"; None: not attacked), "accuracy" of the
    last model in [0, 1] (None: unknown), "seconds", "ended".
    "settings": "setting" and "values", of those that differ.
    "figures": "family", "attack" (of each run), "metric", "heading" and, for each run, "values": None or "mean",
    "low", "high", "worst".
    "verdicts": "family", "attack", "values" with "level" and "verdict".
    "differences": "family", "seat" (the attack of "verdicts"), "attack", "metric", "heading", "first", "then"
    (names of runs), "mean", "low", "high" (None: fewer than three units), "units" and "reading".
    "unpaired": why two runs have none, in sentences. "text": the headline.
    """

    document: dict[str, Any]


def compare(folders: Sequence[Path | str]) -> Comparison:
    """Set finished runs beside each other; the first is what the others are compared with.

    Differences are told where two runs drew the same victims (the same data settings and seed, or one checksum of
    the clients' data), as intervals of the paired difference.

    Raises
    ------
    ConfigError
        If there are fewer than two different runs, one is not finished, or they have no question in common.
    DataError
        If a file of theirs is malformed.
    """
    if len(folders) < 2:
        raise ConfigError(f"compare needs two runs or more; {len(folders)} given")
    runs = [Finished.read(folder) for folder in folders]
    places = [run.path.resolve() for run in runs]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ConfigError(f"RUN {str(twice)!r}: is given twice; give different runs")
    names = named_apart([run.path for run in runs])
    seats = _seats(runs, names)
    differences, unpaired = _differences(runs, names, seats)
    document = {
        "runs": [_run(run, name) for run, name in zip(runs, names, strict=True)],
        "settings": _settings(runs),
        "verdicts": [_verdicts(runs, seat) for seat in seats],
        "figures": [row for seat in seats for row in _figures(runs, seat)],
        "differences": differences,
        "unpaired": unpaired,
    }
    return Comparison(plain(document | {"text": _text(document, names)}))


@dataclass(frozen=True)
class _Seat:
    """Attacks that are compared: of a family, each run's name for it (None: that run has none)."""

    family: str
    attacks: tuple[str | None, ...]

    @property
    def name(self) -> str:
        return " / ".join(dict.fromkeys(name for name in self.attacks if name is not None))


def _seats(runs: Sequence[Finished], names: Sequence[str]) -> list[_Seat]:
    """Attacks of one name in two runs or more; a family's only attacks, whatever they are called."""
    found: list[_Seat] = []
    asked = [{name: one["family"] for name, one in run.summary["attacks"].items()} for run in runs]
    for index, name in enumerate(names):
        if not asked[index]:
            raise ConfigError(f"RUN {name!r}: was not attacked; there is nothing to compare")
    families = list(dict.fromkeys(family for one in asked for family in one.values()))
    shared = [family for family in families if sum(family in one.values() for one in asked) > 1]
    if not shared:
        told = "; ".join(
            f"{name} asked {', '.join(dict.fromkeys(one.values()))}"
            for name, one in zip(names, asked, strict=True)
        )
        raise ConfigError(f"the runs have no question in common: {told}")
    for family in shared:
        of = [[name for name, kind in one.items() if kind == family] for one in asked]
        if all(len(held) <= 1 for held in of):
            found.append(_Seat(family, tuple(held[0] if held else None for held in of)))
            continue
        for name in dict.fromkeys(name for held in of for name in held):
            found.append(_Seat(family, tuple(name if name in held else None for held in of)))
    return found


def _run(run: Finished, name: str) -> dict[str, Any]:
    judged = [
        row["accuracy"]
        for row in run.summary["federation"].get("rounds", [])
        if row.get("accuracy") is not None
    ]
    told = run.summary.get("run") or {}
    top = run.summary.get("headline")
    return {
        "name": name,
        "folder": str(run.path.resolve()),
        "headline": top and {"level": top["level"], "text": top["text"]},
        "accuracy": judged[-1] if judged else None,
        "seconds": told.get("seconds"),
        "ended": told.get("ended"),
    }


def _settings(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """Settings that differ, of those that can change a result, and versions that do."""
    outer = ("engine.", "output.", "preset")
    usual = flat(Config().model_dump(mode="json"))
    held = [flat(run.summary["config"]) for run in runs]
    found = []
    for name in dict.fromkeys(name for one in held for name in one):
        values = [one.get(name, usual.get(name)) for one in held]
        if not name.startswith(outer) and any(value != values[0] for value in values):
            found.append({"setting": name, "values": [shown(value) for value in values]})
    versions = [
        (run.summary.get("run") or {}).get("versions") or {"fedattack": run.summary.get("version")}
        for run in runs
    ]
    for name in dict.fromkeys(name for one in versions for name in one):
        numbers = [one.get(name) for one in versions]
        if any(number != numbers[0] for number in numbers):
            found.append({"setting": f"version of {name}", "values": [shown(number) for number in numbers]})
    return found


def _verdicts(runs: Sequence[Finished], seat: _Seat) -> dict[str, Any]:
    held = [
        None if name is None else run.summary["attacks"][name]
        for run, name in zip(runs, seat.attacks, strict=True)
    ]
    values = [None if one is None else {"level": one["level"], "verdict": one["verdict"]} for one in held]
    return {"family": seat.family, "attack": seat.name, "values": values}


def _metrics(runs: Sequence[Finished], seat: _Seat) -> list[Metric]:
    """The metrics that tables show of this family's attacks, as they were read from JSON."""
    held = [
        run.summary["attacks"][name] for run, name in zip(runs, seat.attacks, strict=True) if name is not None
    ]
    return get_family(seat.family).titled(held)


def _figures(runs: Sequence[Finished], seat: _Seat) -> list[dict[str, Any]]:
    """Each metric's mean with its interval, a run beside another; then the best floor's lead."""
    rows = []
    for metric in _metrics(runs, seat):
        values = []
        for run, name in zip(runs, seat.attacks, strict=True):
            described = metric.of(run.summary["attacks"][name]["metrics"]) if name is not None else None
            values.append(None if not described else _scaled(described, metric))
        if any(value is not None for value in values):
            told = {
                "family": seat.family,
                "attack": seat.name,
                "metric": metric.key,
                "heading": metric.heading,
            }
            rows.append(told | {"digits": metric.digits, "values": values})
    return rows


def _scaled(described: Any, metric: Metric) -> dict[str, float | None]:
    """Mean, ends and worst in the unit of the heading."""
    ends = {end: described.get(end) for end in ("mean", "low", "high", "worst")}
    return {end: None if value is None else float(value) * metric.scale for end, value in ends.items()}


def _differences(
    runs: Sequence[Finished], names: Sequence[str], seats: Sequence[_Seat]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Of each later run less the first, metric by metric, and why there is none."""
    functions: Registry[Any] = Registry("paired difference", {})
    found: list[dict[str, Any]] = []
    unpaired: list[str] = []
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        if why := _other_victims(first, run):
            unpaired.append(f"{name} and {names[0]}: no paired differences: {why}")
            continue
        before = len(found)
        place = names.index(name)
        for seat in seats:
            family, one, other = get_family(seat.family), seat.attacks[0], seat.attacks[place]
            if not family.paired or one is None or other is None:
                continue
            sides = [Side(r.attack(a), r.summary["attacks"][a]) for r, a in ((first, one), (run, other))]
            seed = int(first.summary["config"]["seed"])
            for told in functions.get(family.paired)(*sides, seed):
                metric = next(
                    (
                        m
                        for m in _metrics([first, run], _Seat(seat.family, (one, other)))
                        if m.key == told.metric
                    ),
                    None,
                )
                if metric is not None:
                    attack = " / ".join(dict.fromkeys((one, other)))
                    found.append(_difference(seat, attack, metric, told, names[0], name))
        if len(found) == before:
            unpaired.append(f"{name} and {names[0]}: no paired differences: no unit was scored in both")
    return found, unpaired


def _other_victims(first: Finished, second: Finished) -> str:
    """Why two runs drew other victims; empty where they drew the same."""
    sums = [run.summary["federation"].get(CHECKSUM) for run in (first, second)]
    if sums[0] is not None and sums[0] == sums[1]:
        return ""
    configs = [run.summary["config"] for run in (first, second)]
    for name in ("data", "seed"):
        if configs[0].get(name) != configs[1].get(name):
            return f"other {'data settings' if name == 'data' else 'seeds'}, so other victims"
    return ""


def _difference(
    seat: _Seat, attack: str, metric: Metric, told: Paired, first: str, then: str
) -> dict[str, Any]:
    ends = {
        end: None if value is None else value * metric.scale
        for end, value in interval_fields(told.difference).items()
    }
    return {
        "family": seat.family,
        "seat": seat.name,
        "attack": attack,
        "metric": metric.key,
        "heading": metric.heading,
        "digits": metric.digits,
        "first": first,
        "then": then,
        **ends,
        "units": told.units,
        "reading": _reading(metric, ends["low"], ends["high"]),
    }


def _reading(metric: Metric, low: float | None, high: float | None) -> str:
    """``less found``, ``more found`` by the attack, or that it cannot be told."""
    if low is None or high is None:
        return "too few to tell"
    if low <= 0 <= high:
        return "not told apart"
    return "more found" if (low > 0) == (metric.worst == "min") else "less found"


def _text(document: dict[str, Any], names: Sequence[str]) -> str:
    """The headline: by each attack's leading metric, in which run it finds less, or that nobody can tell."""
    told, seen = [], set[tuple[str, str]]()
    levels = {(row["attack"], name): one and one["level"]
              for row in document["verdicts"] for name, one in zip(names, row["values"], strict=True)}  # fmt: skip
    for one in document["differences"]:
        key = (one["seat"], one["then"])
        if key in seen:
            continue
        seen.add(key)
        digits, then, first = one["digits"], one["then"], one["first"]
        figure = f"{one['heading']} {formats.signed(one['mean'], digits)} {formats.interval(one, digits)}"
        words = {
            "more found": f"finds more in {then} than in {first}",
            "less found": f"finds less in {then} than in {first}",
        }.get(one["reading"], f"does not tell {then} from {first}")
        failed = [name for name in (first, then) if levels.get((one["seat"], name)) == "failed"]
        doubt = (
            f"; below its floor in {' and '.join(failed)}, which says nothing about the model"
            if failed
            else ""
        )
        told.append(f"{one['attack']} {words} ({figure}, {one['units']} pairs{doubt})")
    if told:
        return "; ".join(told[:4])
    found = {run["headline"]["level"] for run in document["runs"] if run["headline"]}
    return (
        f"{'the same verdict' if len(found) == 1 else 'other verdicts'}, of other victims: {', '.join(names)}"
    )


def comparison_page(found: Comparison, command: str, begun: datetime.datetime) -> str:
    """The page of a comparison, which stands alone as a report does."""
    c = found.document
    names = [run["name"] for run in c["runs"]]
    return render(
        "compare",
        c=c,
        names=names,
        settings=[[row["setting"], *row["values"]] for row in c["settings"]],
        differences=difference_rows(found),
        figures=figure_rows(found),
        verdicts=[
            [row["attack"], *(formats.NONE if one is None else one["verdict"] for one in row["values"])]
            for row in c["verdicts"]
        ],
        command=command,
        run=told_of(provenance(begun)),
    )


def difference_rows(found: Comparison) -> list[list[str]]:
    """Attack, figure, run, run, difference, interval, pairs, reading."""
    return [
        [
            row["attack"],
            row["heading"],
            row["then"],
            row["first"],
            formats.signed(row["mean"], row["digits"]),
            formats.interval(row, row["digits"]),
            str(row["units"]),
            row["reading"],
        ]
        for row in found.document["differences"]
    ]


def figure_rows(found: Comparison) -> list[list[str]]:
    """Attack, figure, then each run's mean with its interval."""
    rows = []
    for row in found.document["figures"]:
        cells = []
        for value in row["values"]:
            if value is None:
                cells.append(formats.NONE)
                continue
            ends = {end: None if value[end] is None else number(value[end]) for end in ("low", "high")}
            mean = formats.decimal(number(value["mean"]), row["digits"])
            cells.append(f"{mean} {formats.interval(ends, row['digits'])}")
        rows.append([row["attack"], row["heading"], *cells])
    return rows
