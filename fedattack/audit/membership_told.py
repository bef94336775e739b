"""What the audit of membership tells in words, and in a table's cells."""

from __future__ import annotations

from collections.abc import Callable

from fedattack.audit.family import AuditResult, Figures
from fedattack.audit.membership_people import exposed_people
from fedattack.defenses.accounting import UNIT_WORDS
from fedattack.observation import EVERYONE
from fedattack.reporting import formats


def tail_note(point: Figures) -> str:
    """How many were found, or by chance would be at most."""
    if "members" in point:
        return f"{point['true_positives']} of {point['members']}"
    return f"up to {formats.decimal(point['high'] * 100)}" if "high" in point else ""


def share_note(found: Figures) -> str:
    """How many of how many."""
    return f"{found['right']} of {found['of']}" if "of" in found else ""


def remarks(result: AuditResult) -> list[str]:
    """What stands below the table."""
    s = result.summary
    targets = f"{s['targets']} target client{'s' if s['targets'] != 1 else ''}"
    if result.records[0]["client"] == EVERYONE:
        targets = "asked about members of anybody"
    parts = [f"{result.attack}: {s['members']} members and {s['nonmembers']} non-members, {targets}"]
    named = s["statistic"].lower() not in ("", result.attack.replace("-", ""))
    parts += [f"statistic: {s['statistic']}"] * named
    parts += [f"reference models: {s['references']}"] if s["references"] is not None else []
    tail = s["metrics"]["tpr_at_1_percent_fpr"]
    parts.append(f"chance of finding so many at 1 % false positives: {formats.p_value(tail['p_value'])}")
    return [*parts, f"time: {formats.seconds(s['seconds'])}"]


def beside(result: AuditResult) -> list[str]:
    """What stands below the verdict: spread, floors, whose sample, what noise allows, warnings."""
    s, told = result.summary, list[str]()
    metrics, floors = s["metrics"], s["floors"]
    area = metrics["auc"]
    if s["targets"] > 1:
        ends = f"{area['worst']:.3f} to {area['best']:.3f}, mean {area['clients_mean']:.3f}"
        told.append(f"client by client: AUC {ends}, sd {area['clients_sd']:.3f} ({s['targets']} clients)")
    if "auc_others" in metrics:
        both = (metrics["auc_held_out"], metrics["auc_others"])
        held, others = (f"{one['mean']:.3f} {formats.interval(one, 3)}" for one in both)
        told.append(f"against held-out samples: AUC {held}; against other clients' members: {others}")
    if found := metrics.get("right_client"):
        share = f"{formats.percent(found['mean'])} {formats.interval(found, 1, 100.0)}"
        chance = formats.percent(found["chance"])
        told.append(
            f"right client first: {found['right']} of {found['of']} members, {share}, chance {chance}"
        )
    if people := s["people"]:
        shares = [exposed_people(people[side]) for side in ("members", "non-members")]
        told.append(
            "person by person, at 10 % false positives: more samples are called members than chance explains for "
            f"{shares[0]} people trained on, and for {shares[1]} others (by chance: 1 in 40)"
        )
    named = [
        f"{name} {floors[name]['auc']['mean']:.3f} {formats.interval(floors[name]['auc'], 3)}"
        for name in floors
        if name != "chance"
    ]
    told += [f"floors without a model: {'; '.join(named)}"] if named else []
    if allowed := s["allowed"]:
        whom = UNIT_WORDS[allowed["unit"]]
        most, tail = allowed["tpr_at_1_percent_fpr"], metrics["tpr_at_1_percent_fpr"]["mean"]
        bound = f"at most {formats.percent(most)} of the members at 1 % false positives"
        bound += f", and an AUC of {allowed['auc']:.3f}"
        told.append(
            f"what the accounted epsilon allows ({formats.compact(allowed['epsilon'])} at delta "
            f"{formats.compact(allowed['delta'])} for {whom}, client {allowed['client']}): "
            f"{bound if most < 0.9995 else 'everything'}; found "
            f"{formats.percent(tail)}, and {area['mean']:.3f}"
        )
    return [*told, *(f"warning: {one}" for one in s["warnings"])]


def tail_cell(key: str) -> Callable[[Figures], str]:
    """Of a summary, a true-positive rate above its counts."""

    def cell(s: Figures) -> str:
        point = s["metrics"][key]
        return f"{formats.percent(point['mean'])}\n({tail_note(point)})"

    return cell


def pixels_cell(s: Figures) -> str:
    """Of a summary, what pixels alone tell."""
    found = s["floors"].get("pixels alone", {}).get("auc")
    return f"{found['mean']:.3f}\n{formats.span(found, 3)}" if found else formats.NONE
