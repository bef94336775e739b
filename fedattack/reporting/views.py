"""From summaries to the words and rows that the report shows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fedattack.audit.family import AuditResult, by_family, get_family, told_together
from fedattack.config import Config
from fedattack.reporting import formats

_ROWS = 200
_INTERVAL = "95 % interval"
_MEASURING = "not zero, and no bias of the last layer"


def subtitle(config: Config) -> str:
    c = config
    kept = "uncompressed" if c.compression.name == "none" else f"{c.compression.name}"
    if c.compression.name in ("topk", "randomk", "dgc"):
        kept += f" keeping {formats.rate(c.compression.rate)}"
    if c.defense.names:
        kept += f", {', '.join(c.defense.names)}"
    rounds = f"{c.federation.rounds} round{'s' if c.federation.rounds != 1 else ''}"
    if c.federation.pretrain:
        rounds += f" after {c.federation.pretrain} of honest training"
    clients = f"{c.federation.clients} client{'s' if c.federation.clients != 1 else ''}"
    return (
        f"{clients}, {rounds} of {c.federation.strategy} ({c.training.protocol}, batch "
        f"{c.training.batch_size or 'of everything'}), {c.data.name}, {c.model.name}, {kept}, seed {c.seed}"
    )


def attack_view(result: AuditResult) -> dict[str, Any]:
    words, _, explanation = result.verdict.partition(": ")
    family = get_family(result.family)
    told = {"headline": words, "explanation": explanation, "badge": _badge(result.threat)}
    told |= {"name": result.attack, "level": result.level, "question": family.question}
    return {**told, "beside": list(family.beside(result))}


def _badge(threat: Mapping[str, Any]) -> str:
    """The threat model in a line: seat, letters, what it needs."""
    parts = [str(threat["seat"])] if threat.get("seat") else []
    parts += [" ".join(threat["letters"])] if threat.get("letters") else []
    return "; ".join([*parts, *(str(need) for need in threat.get("needs", ()))])


def family_views(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """A table of scores per family, attacks and floors below one another, and what is told of each and of all.

    Columns that have nothing to show are left out.
    """
    views, together = [], told_together(results)
    for family, chosen in by_family(results):
        found = [row for result in chosen for row in family.rows(result)]
        metrics = family.titled([result.summary for result in chosen])
        titled = [metric for metric in metrics if any(metric.of(figures) for _, _, figures in found)]
        columns: list[str] = []
        for metric in titled:
            columns += [metric.heading, _INTERVAL]
            columns += ["worst", "best"] if metric is titled[0] else []
        cells = [
            [cell for m in titled for cell in m.cells(figures, ends=m is titled[0])]
            for _, _, figures in found
        ]
        told = [
            n != _INTERVAL or any(row[i].strip(formats.NONE) for row in cells) for i, n in enumerate(columns)
        ]
        rows = [
            {"name": title, "main": main, "cells": list(itertools.compress(row, told))}
            for (title, main, _), row in zip(found, cells, strict=True)
        ]
        columns = list(itertools.compress(columns, told))
        remarks = [_sentence(result.attack, family.remarks(result)) for result in chosen]
        view = {
            "title": family.title,
            "subject": family.subject,
            "columns": columns,
            "rows": rows,
            "remarks": remarks,
        }
        views.append(view | {"together": together.get(family.name, {}).get("text", "")})
    return views


def _sentence(attack: str, parts: Sequence[str]) -> str:
    return f"{attack}: {'; '.join(part.removeprefix(f'{attack}: ') for part in parts)}." if parts else ""


def seen_views(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """One entry per distinct view; attacks that saw the same share it."""
    views: list[dict[str, Any]] = []
    for result in results:
        s = result.summary
        if "scenario" not in s or "kept_per_layer" not in s:
            continue
        scenario = s["scenario"]
        model, training, compression = scenario["model"], scenario["training"], scenario["compression"]
        granted = s["auxiliary"]
        images = "none"
        if granted:
            labels = "with labels" if granted["labelled"] else "without labels"
            source = granted["source"] or "not stated"
            images = f"{granted['count']:,} public images {labels}; source: {source}"
        step, measuring = s["update_kind"] == "gradient", formats.count(s["k_measuring"])
        kind = "gradient of the mean loss over one batch" if step else "weight difference"
        batch = " or ".join(str(b) for b in s["batch"])
        local = f", {training['local_steps']} local steps of learning rate {training['learning_rate']}"
        facts = [
            ("Model", f"{model['name']}, {model['classes']:,} classes, {model['activation']}, weights known"),
            ("Update", f"{kind}{local if training['protocol'] == 'fedavg' else ''}"),
            ("Batch", f"{batch} image{'s' if batch != '1' else ''}, {s['pixels']:,} pixel values each"),
            ("Defences", _defenses(scenario["defense"])),
            ("Compression", _compression(compression)),
            (
                "Sent (k)",
                f"{formats.count(s['k'])} of {s['parameters']:,} numbers, {formats.rate(s['rate'])}",
            ),
            ("k per pixel", f"{formats.compact(s['k_per_pixel'])} numbers sent for each private pixel value"),
            ("of the image", f"{measuring} of those numbers measure the image: {_MEASURING}"),
            ("On the wire", f"{formats.size(s['wire_bytes'])} per update"),
            ("Auxiliary data", images),
        ]
        if s["statistics_sent"]:
            facts.append(("BatchNorm", "running statistics were sent beside the update"))
        layers = [
            {"name": name, **sizes, "share": sizes["kept"] / sizes["of"] if sizes["of"] else 0.0}
            for name, sizes in s["kept_per_layer"].items()
        ]
        view = {"names": result.attack, "facts": facts, "layers": layers}
        for other in views:
            if other["facts"] == facts and other["layers"] == layers:
                other["names"] += f", {result.attack}"
                break
        else:
            views.append(view)
    return views


def records_table(result: AuditResult) -> dict[str, Any] | None:
    """Every record of an attack whose family shows them."""
    columns = get_family(result.family).details(result)
    if not columns:
        return None
    more = f", the first {_ROWS} of {len(result.records)}" if len(result.records) > _ROWS else ""
    return {
        "title": f"{result.attack}: every record{more}",
        "columns": [name for name, _ in columns],
        "rows": [[cell(row) for _, cell in columns] for row in result.records[:_ROWS]],
    }


def _defenses(settings: Mapping[str, Any]) -> str:
    names = []
    for name in settings["names"]:
        chosen = settings["shared_options"] | settings["options"].get(name, {})
        told = ", ".join(f"{option} {value}" for option, value in chosen.items())
        names.append(f"{name} ({told})" if told else name)
    return "; ".join(names) or "none"


def _compression(settings: Mapping[str, Any]) -> str:
    name = settings["name"]
    if name in ("topk", "randomk", "dgc"):
        where = {"global": "over all layers", "layer": "in each layer"}[settings["scope"]]
        text = f"{name}, {formats.rate(settings['rate'])} of all entries, chosen {where}"
    elif name == "topk-qsgd":
        text = f"{settings['rate']:.2%} top-k with {settings['levels']} levels per sign"
    elif name == "qsgd":
        text = f"qsgd with {settings['levels']} levels per sign"
    else:
        text = str(name)
    return text + (", with error feedback" if settings["error_feedback"] else "")
