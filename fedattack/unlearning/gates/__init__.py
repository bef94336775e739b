"""What a server may ask of a deletion request before it forgets, and of the model after it, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedattack.config import GatesConfig
from fedattack.registry import Registry, build_plugins
from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.requests import Deletion, Verdict

GATES: Registry[type[Gate]] = Registry(
    "gate",
    {
        "ownership": "fedattack.unlearning.gates.ownership:Ownership",
        "digest": "fedattack.unlearning.gates.digest:Digest",
        "label": "fedattack.unlearning.gates.label:Label",
        "rate": "fedattack.unlearning.gates.rate:Rate",
        "loss": "fedattack.unlearning.gates.loss:Loss",
        "cap": "fedattack.unlearning.gates.cap:Cap",
        "guard": "fedattack.unlearning.gates.guard:Guard",
    },
    group="fedattack.gates",
    base="fedattack.unlearning.gates.base:Gate",
)


def build_gates(config: GatesConfig) -> dict[str, Gate]:
    """The gates that a run names, with their parameters, in their order."""
    return build_plugins(GATES, config.names, config.options, config.shared_options, "gates")


def judge_before(
    gates: Mapping[str, Gate], deletions: Sequence[Deletion], desk: Desk
) -> tuple[list[Deletion], list[Verdict]]:
    """The deletions that every gate lets through, and the verdict of each that looks at requests, on each."""
    granted: list[Deletion] = []
    verdicts: list[Verdict] = []
    asked = {name: gate for name, gate in gates.items() if type(gate).before is not Gate.before}
    for deletion in deletions:
        said = {name: gate.before(deletion, desk) for name, gate in asked.items()}
        verdicts += [desk.verdict(deletion, name, reason) for name, reason in said.items()]
        if not any(said.values()):
            granted.append(deletion)
            desk.granted[deletion.client] = desk.granted.get(deletion.client, 0) + deletion.samples
    return granted, verdicts


def judge_after(
    gates: Mapping[str, Gate], deletions: Sequence[Deletion], weights: Mapping[str, Tensor], desk: Desk
) -> list[Verdict]:
    """Verdicts of the gates that look at what forgetting `deletions` did: ``desk.weights`` became `weights`."""
    verdicts: list[Verdict] = []
    for name, gate in gates.items():
        if type(gate).after is not Gate.after:
            reason = gate.after(deletions, dict(weights), desk)
            verdicts += [desk.verdict(deletion, name, reason) for deletion in deletions]
    return verdicts


__all__ = ["GATES", "Desk", "Gate", "build_gates", "judge_after", "judge_before"]
