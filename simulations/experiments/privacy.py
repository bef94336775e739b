"""What a run's noise guaranteed: the defences' accounts over the rounds in which clients really answered."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedattack.audit.membership import Guarantee
from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import Privacy, build_defenses
from fedattack.models import build_model
from fedattack.reporting import formats
from simulations.engine.federation import RoundRecord


def privacy_accounts(
    config: Config, world: World, rounds: Sequence[RoundRecord]
) -> dict[str, dict[int, Privacy]]:
    """Defence -> client -> what it guarantees to the client; defences that mean to guarantee nothing are left out.

    A reply counts as released whether or not the server made use of it.
    """
    sent = Counter(client for record in rounds for client in record.clients)
    sent.update(client for record in rounds for client, _ in record.rejected)
    statistics = any(buffer.is_floating_point() for buffer in build_model(world.scenario.model).buffers())
    accounts: dict[str, dict[int, Privacy]] = {}
    for name, defense in build_defenses(config.defense).items():
        for client, times in sorted(sent.items()):
            samples = len(world.partitions[client])
            account = defense.privacy(config.training, samples, times, statistics)
            if account is not None:
                accounts.setdefault(name, {})[client] = account
    return accounts


def privacy_record(accounts: Mapping[str, Mapping[int, Privacy]]) -> dict[str, dict[str, Any]]:
    """Defence -> the worst client's account, JSON-able, with "client" and, in words, "text"."""
    record: dict[str, dict[str, Any]] = {}
    for name, clients in accounts.items():
        client = _worst(clients)
        worst = clients[client]
        record[name] = {**dataclasses.asdict(worst), "client": client, "text": privacy_text(worst)}
    return record


def _worst(clients: Mapping[int, Privacy]) -> int:
    """The client that is guaranteed least."""
    return max(clients, key=lambda one: (clients[one].epsilon, clients[one].sampled_epsilon or 0.0))


def weakest_guarantee(config: Config, world: World, rounds: Sequence[RoundRecord]) -> Guarantee | None:
    """What the run's best defence guarantees to the client that has least of it; None where none does."""
    found = []
    for clients in privacy_accounts(config, world, rounds).values():
        client = _worst(clients)
        account = clients[client]
        found.append(Guarantee(account.epsilon, account.delta, account.unit, client))
    best = min(found, key=lambda one: one.epsilon, default=None)
    return best if best is not None and math.isfinite(best.epsilon) else None


def privacy_text(account: Privacy) -> str:
    """One line for a person."""
    if account.note:
        return f"no guarantee: {account.note}"
    whom = "all that a client sends" if account.unit == "client" else "one sample"
    text = (
        f"epsilon {formats.decimal(account.epsilon, 2)} at delta {formats.compact(account.delta)} for {whom}, "
        f"{formats.count(account.releases)} release{'s' if account.releases != 1 else ''}"
    )
    if account.sampled_epsilon is not None:
        text += f" ({formats.decimal(account.sampled_epsilon, 2)} if batches were Poisson samples)"
    return text
