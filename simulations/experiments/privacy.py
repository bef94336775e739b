"""What a run's noise guaranteed over the rounds in which clients really answered, and what canaries measure."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.audit.canaries import CanaryAudit, CanaryScores, Contribution, audit_canaries
from fedattack.audit.membership import Guarantee
from fedattack.canaries import Canaries, release_weights
from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import ClientDefenses, Privacy, build_defenses
from fedattack.defenses.accounting import UNIT_WORDS
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.errors import ConfigError
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Observation
from fedattack.reporting import formats
from fedattack.rng import torch_rng
from fedattack.task import LocalRound, trained_parameters
from fedattack.training import LossTask, load_weights, training_mode
from simulations.client_app import Workplace, round_batches, used_positions
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
    told = [
        f"epsilon {formats.decimal(account.epsilon, 2)} at delta {formats.compact(account.delta)} for "
        f"{UNIT_WORDS[account.unit]}, {formats.count(account.releases)} "
        f"release{'s' if account.releases != 1 else ''}",
        f"{formats.decimal(account.replacement_epsilon, 2)} where it is replaced by another (replacement)",
    ]
    if account.sampled_epsilon is not None:
        told.append(
            f"{formats.decimal(account.sampled_epsilon, 2)} if batches were Poisson samples (zero-out)"
        )
    return "; ".join(told)


class CanaryWatch:
    """Looks at what the server is sent, as it comes, for the canaries that the run planted; there may be none."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._place = Workplace.of(config, world)
        self.canaries: Canaries | None = self._place.canaries
        if self.canaries is not None:
            _ = self._stepped  # refused before anything starts
        self._found = CanaryScores(len(self.canaries) if self.canaries else 0)
        self._sums: list[Observation] = []

    def observe(self, observation: Observation) -> None:
        """Take account of an update; of a sum when :meth:`after_round` says whose it is."""
        if observation.client == EVERYONE:
            self._sums.append(observation)
        else:
            self._add(observation, {observation.client: 1.0})

    def after_round(self, record: RoundRecord) -> None:
        """Take account of the sum over those that answered."""
        for observation in self._sums:
            examples = {
                client: len(used_positions(self._batches(record.round, client))) for client in record.clients
            }
            total = sum(examples.values())
            self._add(observation, {client: count / total for client, count in examples.items()})
        self._sums.clear()

    def audit(self, rounds: Sequence[RoundRecord]) -> CanaryAudit | None:
        """What the canaries show, beside what is accounted to the least guarded client among theirs."""
        if self.canaries is None:
            return None
        accounts: Mapping[int, Privacy] = {}
        for name, found in privacy_accounts(self._config, self._world, rounds).items():
            if isinstance(build_defenses(self._config.defense)[name], ClipNoise):
                accounts = found
        theirs = {client: accounts[client] for client in accounts if len(self.canaries.of(client))}
        if not theirs:
            return None
        worst = _worst(theirs)
        through = ""
        if self._config.compression.name not in ("none", "randomk"):
            through = f"compressor {self._config.compression.name!r}"
        elif not isinstance(self._place.task, LossTask):
            through = f"the optimiser of task {self._config.training.task!r}"
        share = self._config.canaries.guesses
        return audit_canaries(self.canaries, self._found, theirs[worst], worst, share, through)

    def _release_weights(self, sizes: list[int]) -> NDArray[np.float64]:
        """As :func:`release_weights`; of a task with an optimiser of its own, each step as much, by its batch."""
        if isinstance(self._place.task, LossTask):
            return release_weights(self._config.training, sizes)
        return -self._config.training.learning_rate / np.asarray(sizes, np.float64)

    def _batches(self, round: int, client: int) -> list[NDArray[np.int64]]:
        return round_batches(self._config, len(self._world.partitions[client]), round, client)

    def _add(self, observation: Observation, shares: Mapping[int, float]) -> None:
        """Say with which weight each canary, and the noise, of those who sent are in an observation."""
        canaries = self.canaries
        assert canaries is not None
        variance, numbers, weights = 0.0, [], []
        for client, share in shares.items():
            own = canaries.of(client)
            if canaries.kind == "client":
                of_each, variance = np.full(len(own), share), variance + share**2
            else:
                batches = self._batches(observation.round, client)
                steps = share * self._release_weights([len(batch) for batch in batches])
                variance += float(np.square(steps).sum())
                total = np.zeros(len(self._world.partitions[client]))
                for batch, weight in zip(batches, steps, strict=True):
                    total[batch] += weight
                of_each = total[canaries.position[own]]
            numbers.append(own[of_each != 0])
            weights.append(of_each[of_each != 0])
        if not sum(map(len, numbers)):
            return
        known = None
        if self._config.canaries.others_known and isinstance(self._place.task, LossTask):
            known = np.zeros(observation.update.numel, np.float32)
            for client, share in shares.items():
                known += np.float32(share) * self._others(observation, client)
        self._found.add(
            observation.update,
            np.concatenate(numbers),
            np.concatenate(weights),
            canaries.bound**2 * variance,
            self._contribution(observation),
            known,
        )

    def _others(self, observation: Observation, client: int) -> NDArray[np.float32]:
        """What a client would have sent without noise and canaries, flat; zeros where it has nothing else."""
        canaries, place, round = self.canaries, self._place, observation.round
        assert canaries is not None
        batches = self._batches(round, client)
        used = used_positions(batches)
        if not len(np.setdiff1d(used, canaries.replaced(client, len(place.partitions[client])))):
            return np.zeros(observation.update.numel, np.float32)
        silent, draws = canaries.silent, torch_rng(self._config.seed, "training", round, client)
        images, labels = place.samples(client, used)
        exact = [replace(one, noise=0.0) if isinstance(one, ClipNoise) else one for one in place.defenses]
        plain = place.task.step(place.scenario, draws)
        defended = ClientDefenses(exact, self._config.seed, round, client, plain, silent.step)
        place_of = np.zeros(len(place.partitions[client]), np.int64)
        place_of[used] = np.arange(len(used))
        given = LocalRound(
            observation.weights,
            defended.images(images),
            silent.coded(client, used, labels),
            [place_of[batch] for batch in batches],
            place.scenario,
            defended.gradient,
            draws,
        )
        result = place.task.train(place.model, given)
        update = defended.update(silent.update(client, result.update))
        return torch.cat([part.reshape(-1) for part in update.values()]).float().cpu().numpy()

    def _contribution(self, observation: Observation) -> Contribution:
        """What each canary adds to the update, at the weights that were sent where that depends on them."""
        canaries, numel = self.canaries, observation.update.numel
        assert canaries is not None
        if canaries.kind == "mislabelled":
            return self._gradients(observation)

        def add(canary: int) -> NDArray[np.float32]:
            if self._stepped is None:
                return canaries.contribution(canary, numel)
            whole = np.zeros(numel, np.float32)
            whole[self._stepped] = canaries.contribution(canary, len(self._stepped))
            return whole

        return add

    @cached_property
    def _stepped(self) -> NDArray[np.int64] | None:
        """Positions, in an update, of what a local step moves by its gradient; None: all."""
        model = build_model(self._world.scenario.model)
        sent, moved = trained_parameters(model), self._place.task.stepped(model)
        if not moved:
            raise ConfigError(
                f"setting 'canaries.count' = {self._config.canaries.count}: of what task "
                f"{self._config.training.task!r} trains on private samples nothing is sent ('gan.share' = "
                f"{self._config.gan.share!r}), so that canaries measure nothing; accepted: 'both'"
            )
        if moved.keys() == sent.keys() or self.canaries is None or self.canaries.kind == "client":
            return None
        ends = np.cumsum([0, *(parameter.numel() for parameter in sent.values())])
        ranges = [np.arange(ends[i], ends[i + 1]) for i, name in enumerate(sent) if name in moved]
        return np.concatenate(ranges)

    def _gradients(self, observation: Observation) -> Contribution:
        """The clipped gradients of mislabelled samples, as their clients show them to the model that was sent."""
        canaries, place, seen = (
            self.canaries,
            self._place,
            dict[int, tuple[NDArray[np.int64], Tensor, Tensor]](),
        )
        assert canaries is not None
        load_weights(place.model, observation.weights)
        training_mode(place.model, place.scenario.training.batch_norm)
        step = place.task.step(place.scenario, torch.Generator())

        def add(canary: int) -> NDArray[np.float32]:
            client = int(canaries.client[canary])
            if client not in seen:
                used = used_positions(self._batches(observation.round, client))
                images, labels = place.samples(client, used)
                defended = ClientDefenses(place.defenses, self._config.seed, observation.round, client)
                seen[client] = used, defended.images(images), labels
            used, images, labels = seen[client]
            at = int(np.flatnonzero(used == canaries.position[canary])[0])
            wrong = labels.new_tensor([canaries.wrong_label(canary, int(labels[at]))])
            _, gradient = step(place.model, images[at : at + 1].to(place.device), wrong.to(place.device))
            clipped = canaries.promise.clipped(gradient)
            return torch.cat([part.reshape(-1) for part in clipped]).float().cpu().numpy()

        return add
