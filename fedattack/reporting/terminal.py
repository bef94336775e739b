"""What a run found, as one table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedattack.audit.family import AuditResult, Family
from fedattack.reporting import formats

STYLES = {
    "leak": "bold red",
    "partial": "bold yellow",
    "none": "bold green",
    "undecided": "bold",
    "failed": "bold",
}
WIDTH = 100


def print_summary(console: Console, results: Sequence[AuditResult]) -> None:
    """Print a table per family of attacks, each score beside its floor, and every verdict in words below.

    Parameters
    ----------
    console : rich.console.Console
    results : sequence of AuditResult
        In the order they are to appear.
    """
    makers = {"reconstruction": _reconstructions, "membership": _memberships, "unlearning": _unlearnings}
    families: list[Family] = ["reconstruction", "membership", "unlearning"]
    for family in families:
        chosen = [result for result in results if result.family == family]
        if chosen:
            console.print(makers[family](chosen, min(WIDTH, console.width)))
    for result in results:
        style = STYLES[result.level]
        headline, separator, rest = result.verdict.partition(":")
        words = Text.from_markup(
            f"[bold]{escape(result.attack)}[/]  [{style}]{escape(headline)}[/]{separator}"
        )
        words.append(rest)
        console.print(words, width=min(WIDTH, console.width))


def _table(title: str, width: int, columns: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        width=width,
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for index, column in enumerate(columns):
        # Headings are broken by hand, so that the columns are as narrow as their figures and nothing folds at 80.
        table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    return table


def _reconstructions(results: Sequence[AuditResult], width: int) -> Table:
    table = _table(
        "Reconstruction of private images (mean with 95 % interval)",
        width,
        [
            "attack",
            "images",
            "PSNR, dB",
            "worst",
            "SSIM",
            "best\nfloor",
            "k",
            "k per\npixel",
            "labels",
            "time",
        ],
    )
    for result in results:
        s = result.summary
        psnr, labels = s["metrics"]["psnr"], s.get("labels")
        best = s.get("best_floor")
        floor = formats.decimal(s["floors"][best]["psnr"]["mean"]) if best else formats.NONE
        table.add_row(
            escape(result.attack),
            formats.count(s["images"]),
            f"{formats.decimal(psnr['mean'])}\n{formats.span(psnr)}",
            formats.decimal(psnr["worst"]),
            formats.decimal(s["metrics"]["ssim"]["mean"], 3),
            floor,
            formats.count(s["k"]),
            formats.compact(s["k_per_pixel"]),
            f"{labels['right']}/{labels['of']}" if labels else formats.NONE,
            formats.seconds(s["seconds"]),
        )
    return table


def _memberships(results: Sequence[AuditResult], width: int) -> Table:
    table = _table(
        "Membership inference (with 95 % intervals)",
        width,
        [
            "attack",
            "asked\nabout",
            "AUC",
            "chance\nAUC",
            "TPR at\n1 % FPR",
            "chance",
            "TPR at\n0.1 % FPR",
            "time",
        ],
    )
    for result in results:
        s = result.summary
        metrics, chance = s["metrics"], s["floors"]["chance"]
        area, tail, far = metrics["auc"], metrics["tpr_at_1_percent_fpr"], metrics["tpr_at_0.1_percent_fpr"]
        table.add_row(
            escape(result.attack),
            formats.count(s["count"]),
            f"{formats.decimal(area['mean'], 3)}\n{formats.span(area, 3)}",
            f"0.500\n{formats.span(chance['auc'], 3)}",
            f"{formats.percent(tail['mean'])}\n({tail['true_positives']} of {tail['members']})",
            formats.percent(chance["tpr_at_1_percent_fpr"]["mean"]),
            f"{formats.percent(far['mean'])}\n({far['true_positives']} of {far['members']})",
            formats.seconds(s["seconds"]),
        )
    return table


def _unlearnings(results: Sequence[AuditResult], width: int) -> Table:
    table = _table(
        "Unlearning requests (with 95 % interval)",
        width,
        [
            "attack",
            "re-\nquests",
            "mecha-\nnism",
            "before",
            "after",
            "random\ndeletion",
            "damage,\npoints",
            "time",
        ],
    )
    for result in results:
        s = result.summary
        metrics = s["metrics"]
        damage = metrics["damage"]
        table.add_row(
            escape(result.attack),
            formats.count(s["count"]),
            escape(s["mechanism"]),
            formats.percent(metrics["accuracy_before"]["mean"]),
            formats.percent(metrics["accuracy_after"]["mean"]),
            formats.percent(s["floors"]["random deletion"]["accuracy"]["mean"]),
            f"{formats.decimal(damage['mean'] * 100)}\n{formats.span(damage, 1, 100)}",
            formats.seconds(s["seconds"]),
        )
    return table
