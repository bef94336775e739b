"""`fedattack annotate` and `fedattack annotations`: people rate pairs, and what their ratings are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from fedattack.annotation import read_table, votes, write_votes
from fedattack.annotation.exchange import export_page, import_answers, import_released
from fedattack.annotation.pairs import read_pairs
from fedattack.annotation.plan import Plan, make_plan
from fedattack.annotation.quality import Annotator, Quality, quality
from fedattack.annotation.rating_file import RatingFile
from fedattack.annotation.server import RatingServer
from fedattack.errors import ConfigError, DataError
from fedattack.metrics.statistics import Interval
from fedattack.reporting import formats
from fedattack.storage.plain import plain
from simulations.progress import tell

Protocol = Literal["match", "recognise"]
PROTOCOLS = ("match", "recognise")


def make_plans(
    sources: Sequence[Path], annotator: str | None, protocol: str | None, seed: int, ask: str
) -> list[Plan]:
    """Plans of the annotators that `annotator` names, with commas; ConfigError or DataError."""
    if not sources:
        raise ConfigError(
            "SOURCE is missing: a run, a sweep, or a folder of originals and one of reconstructions"
        )
    names = list(dict.fromkeys(name.strip() for name in (annotator or "").split(",") if name.strip()))
    if not names:
        raise ConfigError("--annotator is missing: a pseudonym for who rates, as a1; several with commas")
    if odd := [name for name in names if not name.isprintable() or len(name) > 64 or "/" in name]:
        raise ConfigError(f"--annotator {odd[0]!r}: a pseudonym has at most 64 printable characters, no '/'")
    if len(names) > 9:
        raise ConfigError(f"--annotator names {len(names)} people; one page asks at most 9")
    if protocol not in PROTOCOLS:
        given = "is missing" if protocol is None else f"{protocol!r}"
        raise ConfigError(
            f"--protocol {given}; accepted: match (is it the same image as the original?), recognise (the "
            "reconstruction alone: can it be told what it shows?)"
        )
    if ask not in ("recognisable", "class"):
        raise ConfigError(f"--ask {ask!r}; accepted: recognisable, class")
    pairs = read_pairs(sources)
    chosen: Protocol = "match" if protocol == "match" else "recognise"
    return [make_plan(pairs, chosen, name, seed, by_class=ask == "class") for name in names]


def run_serve(plans: Sequence[Plan], table: Path, port: int, console: Console) -> None:
    """Serve the page until it is interrupted; each answer is in `table` before the next question shows."""
    file = RatingFile(table, plans[0].protocol)
    with RatingServer(plans, file, port) as server:
        for note in file.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        for session in server.sessions.values():
            tell(console, _asked(session.plan, len(session.answered())))
        tell(console, "answers go to", f"{table};", "stop with Ctrl-C and start again at any time")
        # Not through the console: a pipe must see it at once and whole.
        print(f"open {server.address}", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            rows = len(file.rows)
            tell(console, f"\nstopped; {rows:,} answers in {table}")


def _asked(plan: Plan, answered: int) -> str:
    kinds = [question.kind for question in plan.questions]
    checks, repeats = kinds.count("identical") + kinds.count("wrong"), kinds.count("repeat")
    done = f"; {answered} answered before" if answered else ""
    pairs = kinds.count("pair")
    return f"{plan.annotator}: {pairs} pairs, {repeats} asked again, {checks} checks, protocol {plan.protocol}{done}"


def run_export(plans: Sequence[Plan], table: Path, file: Path, console: Console) -> None:
    """Write the page for raters elsewhere."""
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--export {str(file)!r}: the page is an .html file")
    key = export_page(plans, file, table)
    for plan in plans:
        tell(console, _asked(plan, 0))
    size = formats.size(file.stat().st_size)
    tell(console, "page", file, f"({size}): send it to them")
    tell(console, f"key {key}: keep it; merge what they send back with")
    tell(console, f"  fedattack annotate --import FILE --table {table}")


def run_import(file: Path, table: Path, console: Console) -> None:
    """Merge what a rater elsewhere sent back."""
    added, held, annotator = import_answers(file, table)
    tell(
        console,
        f"{annotator}: {held:,} answers in {file}, {added:,} of them new in {table}",
    )


def run_import_released(folder: Path, table: Path, console: Console) -> None:
    """Rate pairs as a released folder does."""
    added, held, left_out = import_released(folder, table)
    negatives = f"; {left_out:,} pictures of others/ have no original and are left out" if left_out else ""
    tell(
        console,
        f"{held:,} ratings in {folder}, {added:,} of them new in {table}{negatives}",
    )


def run_votes(table: Path, out: Path, protocol: str | None, kind: str | None, console: Console) -> None:
    """Write the votes of each pair."""
    counted = votes(read_table(table, protocol), kind)
    write_votes(out, counted)
    console.print(f"{len(counted):,} pairs in {out}", markup=False, highlight=False, soft_wrap=True)


def run_report(table: Path, protocol: str | None, fast: float, as_json: bool, console: Console) -> None:
    """Print how the ratings of a table came about, and what they are worth."""
    frame = read_table(table, protocol)
    notes = frame.attrs["notes"]
    if frame.empty:
        raise DataError(f"{table} holds no ratings yet")
    found = quality(frame, fast=fast)
    if as_json:
        document = {
            "table": str(table),
            "notes": notes,
            "fast": fast,
            "kinds": [one.document() for one in found],
        }
        print(json.dumps(plain(document), indent=1))
        return
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for one in found:
        _print(one, fast, console)


def _print(found: Quality, fast: float, console: Console) -> None:
    who = "people" if found.kind == "human" else "proxies, not people"
    same, other = found.majority
    told = {"match": ("same", "different")}.get(found.protocol, ("recognisable", "not"))
    undecided = found.pairs - same - other - found.tied
    parts = [f"{same} {told[0]}", f"{other} {told[1]}"]
    parts += [f"{found.tied} tied"] * bool(found.tied) + [f"{undecided} that nobody could tell"] * bool(
        undecided
    )
    table = Table(
        title=f"Ratings by {who}, protocol {found.protocol}: {found.pairs} pairs ({', '.join(parts)})",
        title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for name in (
        "annotator",
        "rated",
        "cannot tell",
        "checks failed",
        "repeats changed",
        f"under {fast:g} s",
        "last",
    ):
        left = name in ("annotator", "last")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for one in found.annotators:
        table.add_row(*_cells(one, found.pairs))
    console.print(table)
    console.print(f"agreement: {_agreement(found)}", markup=False, highlight=False, soft_wrap=True)
    changed = sum(one.changed for one in found.annotators)
    if changed:
        tell(
            console,
            f"{changed} ratings were replaced by a later one of the same annotator and pair: the last counts",
        )
    console.print()


def _cells(one: Annotator, pairs: int) -> list[str]:
    def of(counts: tuple[int, int]) -> str:
        return f"{counts[0]} of {counts[1]}" if counts[1] else formats.NONE

    last = one.last[:16].replace("T", " ")
    fast = f"{one.fast} of {one.answers}" if one.kind == "human" else formats.NONE
    return [
        one.name,
        f"{one.rated} of {pairs}",
        str(one.undecided),
        of(one.checks),
        of(one.repeats),
        fast,
        last,
    ]


def _agreement(found: Quality) -> str:
    if found.alpha is None:
        return "unknown, for no pair has labels of two annotators"
    told = [_coefficient("Krippendorff's alpha", found.alpha) + " with two labels or more"]
    if found.kappa is not None:
        told.append(_coefficient("Fleiss' kappa", found.kappa) + " that everybody labelled")
    return "; ".join(told)


def _coefficient(name: str, value: Interval) -> str:
    if value.mean != value.mean:
        return f"{name} is undefined, for all labels are alike: {value.count} pairs"
    ends = {"low": value.low, "high": value.high} if value.known else {}
    return f"{name} {value.mean:.3f}, 95 % interval {formats.interval(ends, 3)}, {value.count} pairs"
