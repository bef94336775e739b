"""From summaries to the words and rows that the report shows."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedattack.audit.family import HEADLINES, AuditResult
from fedattack.config import Config
from fedattack.metrics import INFLATION_DB
from fedattack.reporting import formats
from fedattack.storage.plain import fedattack_version

_QUESTIONS = {
    "reconstruction": "Can private images be rebuilt from what clients send?",
    "membership": "Can it be told which samples a client trained on?",
    "unlearning": "Can a client harm the model by what it asks to be forgotten?",
}
_ROWS = 200
_LIBRARIES = ("torch", "flwr", "ray", "numpy", "scipy", "scikit-learn")


def subtitle(config: Config) -> str:
    c = config
    kept = "uncompressed" if c.compression.name == "none" else f"{c.compression.name}"
    if c.compression.name in ("topk", "randomk", "dgc"):
        kept += f" keeping {formats.rate(c.compression.rate)}"
    if c.defense.names:
        kept += f", {', '.join(c.defense.names)}"
    rounds = f"{c.federation.rounds} round{'s' if c.federation.rounds != 1 else ''}"
    return (
        f"{c.federation.clients} clients, {rounds} of {c.federation.strategy} ({c.training.protocol}, batch "
        f"{c.training.batch_size or 'of everything'}), {c.data.name}, {c.model.name}, {kept}, seed {c.seed}"
    )


def attack_view(result: AuditResult) -> dict[str, Any]:
    headline, _, explanation = result.verdict.partition(": ")
    shown: dict[str, Any] = {
        "name": result.attack,
        "family": result.family,
        "level": result.level,
        "question": _QUESTIONS[result.family],
        "headline": headline if headline in HEADLINES[result.family].values() else result.verdict,
        "explanation": explanation,
        "s": result.summary,
        "remarks": _remarks(result),
    }
    if result.family == "reconstruction":
        s = result.summary
        rows = [
            {
                "name": "reconstruction",
                "main": True,
                "psnr": s["metrics"]["psnr"],
                "ssim": s["metrics"]["ssim"],
            }
        ]
        if s["shown"]["psnr"]["count"]:
            rows.append({"name": "the same, against what the model was shown", "main": False, **s["shown"]})
        order = sorted(s["floors"], key=lambda name: -(s["floors"][name]["psnr"]["mean"] or 0.0))
        rows += [{"name": f"floor: {name}", "main": False, **s["floors"][name]} for name in order]
        if s["control"]["psnr"]["count"]:
            control = {
                "name": "control: scored against other victims",
                "main": False,
                "psnr": s["control"]["psnr"],
            }
            rows.append({**control, "ssim": None})
        shown["rows"] = rows
    return shown


def seen_views(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """One entry per distinct view; attacks that saw the same share it."""
    views: list[dict[str, Any]] = []
    for result in results:
        if result.family != "reconstruction":
            continue
        s = result.summary
        scenario = s["scenario"]
        model, training, compression = scenario["model"], scenario["training"], scenario["compression"]
        granted = s["auxiliary"]
        images = "none"
        if granted:
            labels = "with labels" if granted["labelled"] else "without labels"
            images = (
                f"{granted['count']:,} public images {labels}; source: {granted['source'] or 'not stated'}"
            )
        kind = (
            "gradient of the mean loss over one batch"
            if s["update_kind"] == "gradient"
            else "weight difference"
        )
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


def images_table(result: AuditResult) -> dict[str, Any] | None:
    if result.family != "reconstruction":
        return None
    s = result.summary
    floors = list(s["floors"])
    columns = [
        "round",
        "client",
        "image",
        "sample",
        "PSNR",
        "SSIM",
        *floors,
        "control",
        "label",
        "objective",
        "time",
    ]
    rows = []
    for row in result.records[:_ROWS]:
        right = row.get("label_right")
        rows.append(
            [
                row["round"],
                formats.seat(row["client"]).removeprefix("client "),
                row["image"],
                row["sample"],
                formats.decimal(row.get("psnr")),
                formats.decimal(row.get("ssim"), 3),
                *(formats.decimal(row.get(f"floor.{name}.psnr")) for name in floors),
                formats.decimal(row.get("control_psnr")),
                formats.NONE if right is None else "right" if right else "wrong",
                formats.compact(row.get("loss")),
                formats.seconds(row["seconds"]),
            ]
        )
    more = f", the first {_ROWS} of {len(result.records)} images" if len(result.records) > _ROWS else ""
    return {
        "title": f"{result.attack}: every private image{more} (PSNR in dB)",
        "columns": columns,
        "rows": rows,
    }


def versions(config: Config) -> list[tuple[str, str]]:
    found = [("Seed", str(config.seed)), ("fedattack", fedattack_version())]
    for name in _LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return [
        *found,
        ("Python", platform.python_version()),
        ("System", f"{platform.system()} {platform.machine()}"),
    ]


def _remarks(result: AuditResult) -> str:
    s = result.summary
    parts = []
    if result.family == "reconstruction":
        if s.get("above_best_floor"):
            over = s["above_best_floor"]
            text = f"Above the best floor ({s['best_floor']}): {formats.decimal(over['mean'])} dB"
            parts.append(
                text + (f", 95 % interval {formats.interval(over)}" if over["low"] is not None else "")
            )
        if s.get("above_control"):
            parts.append(f"above the control: {formats.decimal(s['above_control']['mean'])} dB")
        if s.get("labels"):
            labels, sure = s["labels"], s["metrics"]["label_confidence"]["mean"]
            parts.append(
                f"labels right: {labels['right']} of {labels['of']} (own confidence {formats.compact(sure)})"
            )
        if s["methods"]:
            parts.append(f"method: {', '.join(s['methods'])}")
        if s["metrics"]["certificate"]["mean"] is not None:
            parts.append(f"objective per kept number: {formats.compact(s['metrics']['certificate']['mean'])}")
        if s["matched_by"] and s["matched_by"] != ["single"]:
            parts.append(f"images of a batch were matched by {' / '.join(s['matched_by'])}")
        if s["missing"]:
            parts.append(f"{s['missing']} images without a usable reconstruction are left out of the means")
        each = s["seconds"] / s["count"]
        parts.append(f"time: {formats.seconds(s['seconds'])} in all, {formats.seconds(each)} a victim")
        scale = s["paper_scale"]
        if scale["psnr"]["mean"] is not None:
            parts.append(
                f"in the units of the code released with HCGLA (PSNR {INFLATION_DB:.2f} dB higher, SSIM with data "
                f"range 2) the means would read {formats.decimal(scale['psnr']['mean'])} dB and "
                f"{formats.decimal(scale['ssim']['mean'], 3)}"
            )
    elif result.family == "membership":
        asked = f"{s['members']} members and {s['nonmembers']} non-members"
        parts.append(
            f"{result.attack}: {asked}, {s['targets']} target client{'s' if s['targets'] != 1 else ''}"
        )
        if s["statistic"]:
            parts.append(f"statistic: {s['statistic']}")
        tail = s["metrics"]["tpr_at_1_percent_fpr"]
        parts.append(f"chance of finding so many at 1 % false positives: {formats.p_value(tail['p_value'])}")
        if s["nonmembers"] < 1000:
            parts.append("with so few non-members, 0.1 % means no false positive at all")
        parts.append(f"time: {formats.seconds(s['seconds'])}")
    else:
        parts.append(f"{result.attack}: {s['seeds']} seed{'s' if s['seeds'] != 1 else ''}")
        if s["metrics"]["damage"]["low"] is not None:
            parts.append(f"the damage's interval covers {s['metrics']['damage']['interval_over']}")
        parts.append(f"time: {formats.seconds(s['seconds'])}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "." if not text.startswith(result.attack) else text + "."


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
        text = (
            f"{name}, {formats.rate(settings['rate'])} of all entries, chosen per {settings['scope']} scope"
        )
        text = text.replace("per global scope", "over all layers").replace("per layer scope", "in each layer")
    elif name == "topk-qsgd":
        text = f"{settings['rate']:.2%} top-k with {settings['levels']} levels per sign"
    elif name == "qsgd":
        text = f"qsgd with {settings['levels']} levels per sign"
    else:
        text = str(name)
    return text + (", with error feedback" if settings["error_feedback"] else "")
