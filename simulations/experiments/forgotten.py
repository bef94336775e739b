"""What forgetting leaks: clients ask for deletions, and the auditor measures what is seen of the forgotten."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversaries import Attack
from adversaries.needs import Facts
from adversaries.refusals import applicable, threat_model
from adversaries.seats import MaliciousClient, MaliciousServer
from adversaries.unlearning import difference
from fedattack.audit import AuditResult, audit_forgotten
from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable
from fedattack.groundtruth import GroundTruth
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Observation, UnlearningRequest, Update, called
from fedattack.rng import numpy_rng
from fedattack.task import task_of, trained_parameters
from fedattack.training import sample_logits, sample_losses
from fedattack.unlearning import (
    Deletion,
    Forgotten,
    History,
    Weights,
    as_positions,
)
from fedattack.unlearning.gates import judge_after
from fedattack.unlearning.mechanism import Excluded, Link
from simulations.client_app import Workplace, round_batches, used_positions
from simulations.engine.federation import DeletionRequests, FederationResult, RoundRecord, run_federation
from simulations.engine.local_grid import LocalGrid
from simulations.engine.open_grid import open_grid
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.reconstruction import Answers
from simulations.experiments.trainer import FederationTrainer
from simulations.experiments.unlearning import Training, UnlearningExperiment

HONEST = "honest"
"""Under this name go deletions that an honest client asks for, where nobody else does."""


@dataclass(frozen=True)
class Look:
    """One view of a deletion: an observation of the forgotten, the truth about it, from which seat, and in words."""

    view: str  # "", "models", "releases"
    observation: Observation
    truth: GroundTruth
    seat: str
    told: tuple[str, ...]
    link: Link = "softmax"  # of the loss


class Watching(FederationTrainer):
    """A trainer that keeps what is seen of the first round in which some clients answer after a deletion."""

    def __init__(
        self, config: Config, world: World, grid: LocalGrid, place: Workplace, clients: Collection[int]
    ) -> None:
        super().__init__(config, world, grid, place)
        self.watched = frozenset(clients)
        self.answers: dict[int, Observation] = {}
        self.resumed: tuple[int, Weights, Weights] | None = None  # round, weights before it, and after
        self.sent: tuple[int, Weights] | None = (
            None  # round and weights of the first question without a training
        )

    def train(
        self,
        excluded: Excluded,
        weights: Weights,
        first_round: int,
        history: History | None = None,
        **kept: Any,
    ) -> Weights:
        """See :class:`FederationTrainer`."""

        def moved(round: int, after: Weights) -> None:
            if self.resumed is None:
                self.resumed = round, weights, after

        kept |= {"on_observation": self._note, "observe": lambda _, client: self._lacks(client)}
        return super().train(excluded, weights, first_round, history, on_weights=moved, **kept)

    def _seen(self, excluded: Excluded, weights: Weights, round: int, *asked: Any) -> list[Observation]:
        self.sent = self.sent or (round, weights)
        seen = super()._seen(excluded, weights, round, *asked)
        for observation in seen:
            self._note(observation)
        return seen

    def _lacks(self, client: int) -> bool:
        return client not in self.answers and (client in self.watched or client == EVERYONE)

    def _note(self, observation: Observation) -> None:
        if self._lacks(observation.client):
            self.answers[observation.client] = observation

    def as_before(self, observation: Observation, history: History) -> Observation:
        """What the server saw of the same round before the deletion: from the same weights, with the same draws."""
        round, seen = observation.round, list[Observation]()
        if round - 1 not in history.checkpoints:
            raise NotApplicable(
                f"the global model before round {round} was not kept, which {called(observation.client)} answered; "
                "lower unlearning.checkpoint_every"
            )
        federation = self.config.federation.model_copy(update={"evaluate": False, "rounds": round})
        run_federation(
            self.config.model_copy(update={"federation": federation}),
            self.world,
            initial=history.checkpoint(round - 1),
            first_round=round,
            grid=self.grid,
            on_observation=seen.append,
            observe=lambda _, client: client == observation.client,
        )
        if not seen:
            raise NotApplicable(
                f"client {observation.client} had sent no update in round {round} to compare with"
            )
        return seen[0]


class ForgottenExperiment(Experiment):
    """Has the mechanism forget once more, with draws anew, and attacks what is seen of the forgotten.

    The deletions are those of the run's unlearning attacks, `deleting` their experiment; where there are none, an
    honest client asks to forget ``attack.requests`` of its samples, drawn at random.
    """

    def __init__(
        self, plan: Plan, attacks: Mapping[str, Attack], deleting: UnlearningExperiment | None
    ) -> None:
        super().__init__(plan, {})
        self.inverting = {name: attack for name, attack in attacks.items() if attack.inverts}
        hostile = any(isinstance(attack, MaliciousClient) for attack in attacks.values())
        self.malicious = plan.config.attack.malicious_clients if hostile else ()
        self.altering = [
            name
            for name, attack in attacks.items()
            if isinstance(attack, MaliciousClient)
            and (type(attack).reply, type(attack).poison) != (MaliciousClient.reply, MaliciousClient.poison)
        ]
        self.own = deleting is None
        self.deleting = deleting or UnlearningExperiment(plan, {})
        config = plan.config
        again = config.unlearning.model_copy(update={"draws": "anew"})
        self.config = config.model_copy(update={"unlearning": again})
        self.work: list[Answers] = []
        self.found: dict[str, dict[str, Any]] = {}

    @classmethod
    def beside(
        cls, experiments: Sequence[Experiment], plan: Plan, attacks: Mapping[str, Attack]
    ) -> ForgottenExperiment:
        """One that looks at the deletions of the experiment on unlearning, where that is among the others."""
        asking = (one for one in experiments if isinstance(one, UnlearningExperiment))
        return cls(plan, attacks, next(asking, None))

    @staticmethod
    def notes(config: Config, world: World) -> list[str]:
        """What to know before anything starts: why differences are only about the forgotten's gradient.

        ConfigError or NotApplicable where nothing can be forgotten.
        """
        if task_of(world.scenario).kind != "classify":
            raise ConfigError(
                f"setting 'unlearning.forgotten' = True: task {config.training.task!r} trains no classifier, whose "
                "updates and losses are read; use --task classify"
            )
        UnlearningExperiment.check(config, world)
        sentences = difference.departures(world.scenario, max(map(len, world.partitions)))
        return [f"what forgetting leaks is seen only roughly: {sentence}" for sentence in sentences]

    def wants(self, round: int, client: int) -> bool:
        return self.own and self.deleting.wants(round, client)

    def observe(self, observation: Observation) -> None:
        if self.own and self.deleting.wants(observation.round, observation.client):
            self.deleting.observe(observation)

    def global_model(self, round: int, weights: Weights) -> None:
        if self.own:
            self.deleting.global_model(round, weights)

    def weights_again(self, round: int) -> bool:
        """No: see :class:`UnlearningExperiment`."""
        return False

    def after_round(self, record: RoundRecord) -> None:
        if self.own:
            self.deleting.after_round(record)

    def close(self) -> None:
        for work in self.work:
            work.close()

    def answers(self) -> dict[str, dict[str, Any]]:
        return self.found

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Attack what is seen of each attack's deletions, or of an honest client's."""
        place, scored = Workplace.of(self.config, self.plan.world), dict[str, AuditResult]()
        asked = self.deleting.asked or self._asked(place)
        for source in asked:
            suffix = "forgotten" if len(asked) == 1 else f"forgotten-{source}"
            try:
                scored |= self._audit(source, suffix, place, asked)
            except Exception as error:  # costs the others nothing
                self.failed[suffix] = error
        return scored

    def _asked(self, place: Workplace) -> DeletionRequests:
        """What an honest client asks for, of the model as it is released."""
        client, requests = self._honest(), DeletionRequests()
        size = len(place.partitions[client])
        count = min(self.plan.config.attack.requests, size)
        drawn = numpy_rng(self.plan.config.seed, "honest deletion").choice(size, count, replace=False)
        requests[HONEST] = [(client, UnlearningRequest(client, tuple(sorted(drawn.tolist()))))]
        if self.own:
            self.deleting.release(self.deleting.history.weights)
        return requests

    def _honest(self) -> int:
        """The first client that has samples and carries out no attack, or the first that has samples."""
        some = [client for client, ids in enumerate(self.plan.world.partitions) if len(ids)]
        return min(some, key=lambda client: (client in self.malicious, client))

    def _audit(
        self, source: str, suffix: str, place: Workplace, asked: DeletionRequests
    ) -> dict[str, AuditResult]:
        started, plan, mechanism = time.perf_counter(), self.plan, self.deleting.mechanism
        named = plan.config.unlearning.mechanism
        plan.shown(suffix, 0.0, f"{named} forgets")
        history = self.deleting.history
        with (
            open_grid(self.config, plan.world) as grid,
            tempfile.TemporaryDirectory(dir=history.folder) as scratch,
        ):
            now = history.fork(Path(scratch) / "now", history.weights, history.excluded)
            server = FederationTrainer(self.config, plan.world, grid, place)
            training = Training(self.config, place, server, history, history.weights, asked, Path(scratch))
            deletions, desk = self.deleting.granted(training, source, asked, now)
            clients = [deletion.client for deletion in deletions]
            if not deletions:
                names = ", ".join(plan.config.gates.names)
                raise NotApplicable(
                    f"gates refuse all that {source} asks for ({names}), so nothing is forgotten"
                )
            located = [as_positions(one, place.registered(one.client)) for one in deletions]
            if history.ignorant(clients) is None:
                raise NotApplicable(
                    f"{' and '.join(map(called, clients))} took part in no round, so there is nothing to forget"
                )
            trainer = Watching(self.config, plan.world, grid, place, clients)
            answer = mechanism.forget(deletions, now, trainer)
            verdicts, deletions = judge_after(self.deleting.gates, deletions, answer.weights, desk), located
            if stopped := [one.gate for one in verdicts if not one.accepted]:
                raise NotApplicable(
                    f"gate {stopped[0]!r} refuses what came of the request: nothing is forgotten"
                )
            looks, lacking = self._looks(place, trainer, history, deletions, answer.weights)
        try:
            looks.append(self._releases(place, history.weights, answer, deletions))
        except NotApplicable as refused:
            lacking.append(f"no two releases to compare: {refused}")
        scored = self._pictures(suffix, looks)
        count = sum(len(deletion.positions) for deletion in deletions)
        plural = "s" if count != 1 else ""
        asking = f"{source} asks to forget {count} sample{plural} that it chose"
        asking += ", whose losses may differ for that alone"
        if source == HONEST:
            asking = f"no attack asks: honest {called(clients[0])} asks to forget {count} of its samples, at random"
        told = [
            f"{asking}; {named} forgets, and clients draw anew",
            *lacking,
        ]
        if not scored and self.inverting and looks:
            told.append("no attack on images applies to what was seen of the forgotten (log.txt)")
        name = f"losses:{suffix}"
        spent = time.perf_counter() - started
        scored[name] = self._membership(name, place, deletions, history.weights, answer.weights, told, spent)
        plan.shown(suffix, 1.0, "done")
        return scored

    # ------------------------------------------------------------------ what is seen

    def _looks(
        self,
        place: Workplace,
        trainer: Watching,
        history: History,
        deletions: Sequence[Deletion],
        released: Weights,
    ) -> tuple[list[Look], list[str]]:
        """Every view of the deletions, and for each that there is not, why."""
        looks, lacking = list[Look](), list[str]()
        hidden = hides_clients(self.config.defense)
        for deletion in [_joined(deletions)] if hidden else deletions:
            try:
                looks.append(self._updates(place, trainer, history, deletion, deletions))
            except NotApplicable as refused:
                lacking.append(f"no two updates to compare: {refused}")
        try:
            if len(place.partitions) == 1:
                raise NotApplicable("there is no other client")
            if trainer.resumed is not None:
                looks.append(self._taken_again(place, trainer, history, deletions))
            else:
                looks.append(self._left_out(place, trainer, history, deletions, released))
        except NotApplicable as refused:
            lacking.append(f"no two global models to compare: {refused}")
        return looks, lacking

    def _updates(
        self,
        place: Workplace,
        trainer: Watching,
        history: History,
        deletion: Deletion,
        deletions: Sequence[Deletion],
    ) -> Look:
        """From the server's seat: a client's update (the sum, under secure aggregation) before and after."""
        client = deletion.client
        sizes = [len(ids) for ids in place.partitions]
        count, size = len(deletion.positions), sum(sizes) if client == EVERYONE else sizes[client]
        after = trainer.answers.get(client)
        if after is None and not deletion.drops_out:
            mechanism = self.config.unlearning.mechanism
            raise NotApplicable(f"{called(client)} was asked for no update while {mechanism} forgot")
        first = after or _placeholder(client, history.ignorant([client]), self.plan.world)
        before = trainer.as_before(first, history)
        if client == EVERYONE:
            size = before.num_examples
        moved = after is not None and not difference.same_weights(before.weights, after.weights)
        observation = difference.of_updates(before, after, size, count)
        departs = difference.departures(before.scenario, size, moved=moved)
        if self.altering and client in self.malicious:
            changes = f"{called(client)} changes what it sends ({', '.join(self.altering)})"
            departs.append(f"{changes}: its updates may be no mean of its samples' gradients")
        what = "all that it sent" if after is None else f"({size:,} g - {size - count:,} g') / {count}"
        exactly = "only roughly" if departs else "exactly"
        told = (
            f"{what}, of {called(client)}'s updates of round {before.round} before and after: {exactly} the gradient "
            f"of the {count} forgotten sample{'s' if count != 1 else ''}",
            *departs,
        )
        return Look("", observation, _truth(place, observation, deletions), "curious server", told)

    def _taken_again(
        self, place: Workplace, trainer: Watching, history: History, deletions: Sequence[Deletion]
    ) -> Look:
        """From another client's seat: the global models after the first round that was taken again."""
        assert trainer.resumed is not None
        round, start, after = trainer.resumed
        observation = self._of_models(round, start, history, after, deletions)
        told = (
            f"another client, who is sent the global model after round {round} before and after the deletion, finds "
            f"{observation.num_examples} forgotten by the rank of what they differ by",
        )
        return Look("models", observation, _truth(place, observation, deletions), "another client", told)

    def _left_out(
        self,
        place: Workplace,
        trainer: Watching,
        history: History,
        deletions: Sequence[Deletion],
        released: Weights,
    ) -> Look:
        """From another client's seat, where the mechanism takes a client's kept update out instead: all of that."""
        clients = {deletion.client for deletion in deletions}
        start, mechanism = history.ignorant(clients), self.config.unlearning.mechanism
        assert start is not None
        after = released if history.rounds == start + 1 else None
        if trainer.sent is not None:
            after = trainer.sent[1] if trainer.sent[0] == start + 2 else None
        if after is None or start not in history.checkpoints:
            raise NotApplicable(
                f"{mechanism} takes no round of the federation again, and none of its updates out"
            )
        if len(clients) > 1:
            raise NotApplicable(f"{mechanism} takes updates of several clients out at once")
        observation = self._of_models(start + 1, history.checkpoint(start), history, after, deletions)
        (client,) = clients
        size = len(place.partitions[client])
        used = used_positions(round_batches(self.plan.config, size, start + 1, client))
        told = (
            f"{mechanism} takes all out that {called(client)} sent in round {start + 1}: another client, who is sent "
            f"the global model with it and without, reads its gradient, of {observation.num_examples} sample"
            f"{'s' if observation.num_examples != 1 else ''}, to be forgotten or not",
        )
        truth = _truth(place, observation, [Deletion(client, frozenset(used.tolist()))])
        return Look("models", observation, truth, "another client", told)

    def _of_models(
        self,
        round: int,
        start: Weights,
        history: History,
        after: Weights,
        deletions: Sequence[Deletion],
    ) -> Observation:
        if round not in history.checkpoints:
            raise NotApplicable(
                f"the global model after round {round} was not kept; lower unlearning.checkpoint_every"
            )
        clients = {deletion.client for deletion in deletions}
        client = min(clients) if len(clients) == 1 else EVERYONE
        seat = replace(_placeholder(client, round - 1, self.plan.world), weights=start)
        return difference.of_models(seat, history.checkpoint(round), after)

    def _releases(
        self, place: Workplace, before: Weights, answer: Forgotten, deletions: Sequence[Deletion]
    ) -> Look:
        """From the seat of whoever has both released models: of a linear model trained to convergence."""
        scenario, mechanism = place.scenario, self.config.unlearning.mechanism
        goal = self.deleting.mechanism.minimises(scenario)
        if goal is None:
            raise NotApplicable(f"what {mechanism} releases is at the minimum of nothing that is known")
        count = sum(len(deletion.positions) for deletion in deletions)
        samples, clients = sum(map(len, place.partitions)), {deletion.client for deletion in deletions}
        client = min(clients) if len(clients) == 1 else EVERYONE
        seat = replace(_placeholder(client, 0, self.plan.world), weights=before)
        observation = difference.of_releases(
            seat, answer.weights, samples, count, decay=goal.decay, link=goal.link
        )
        granted = 0 if seat.auxiliary is None else len(seat.auxiliary)
        told: tuple[str, ...] = (
            f"whoever has the models released before and after, and knows that {count} of {samples:,} samples were "
            f"forgotten, reads their gradient to first order, with the curvature of {granted:,} public images",
        )
        if answer.certificate is not None:
            told += (
                "the certificate is about the model after alone, and says nothing of who has the one before",
            )
        truth = _truth(place, observation, deletions)
        return Look("releases", observation, truth, "anybody with both models", told, goal.link)

    # ------------------------------------------------------------------ what is made of it

    def _pictures(self, suffix: str, looks: Sequence[Look]) -> dict[str, AuditResult]:
        """Attack and view -> the forgotten images as they were rebuilt."""
        scored: dict[str, AuditResult] = {}
        for view in dict.fromkeys(look.view for look in looks):
            chosen = [look for look in looks if look.view == view]
            first, tail = chosen[0].observation, f":{suffix}{f'-{view}' if view else ''}"
            public = first.auxiliary
            facts = Facts(
                rounds=(first.round,),
                auxiliary=0 if public is None else len(public),
                labelled=None if public is None else public.labels is not None,
            )
            usable: dict[str, Attack] = {}
            for name, attack in self.inverting.items():
                if isinstance(attack, MaliciousServer):
                    self._say(
                        f"{name}{tail} is left out: it sends weights of its own, and is no curious {chosen[0].seat}"
                    )
                    continue
                for look in chosen:
                    try:
                        applicable({name: attack}, look.observation.scenario, facts)
                    except NotApplicable as refused:
                        self._say(f"{name}{tail} is left out: {refused}")
                        break
                else:
                    usable[f"{name}{tail}"] = attack
            if not usable:
                continue
            link = chosen[0].link
            wrapped = {label: difference.OnDifference(attack, link) for label, attack in usable.items()}  # type: ignore[arg-type]
            work = Answers(self.plan.config, self.plan.folder, wrapped, self.plan.shown)
            self.work.append(work)
            for look in chosen:  # of one scenario each: they differ in how many were forgotten
                work.submit([look.observation])
            work.collect()
            self.found |= work.answers()
            told = [sentence for look in chosen for sentence in look.told]
            for label, attack in usable.items():
                result = work.audit(label, [look.truth for look in chosen])
                needs = attack.needs_now(first.scenario)
                threat = threat_model(attack, needs, bool(public)) | {"seat": chosen[0].seat, "letters": []}
                result.summary["told"] = told
                scored[label] = replace(result, threat=threat)
        return scored

    def _membership(
        self,
        name: str,
        place: Workplace,
        deletions: Sequence[Deletion],
        before: Weights,
        after: Weights,
        told: Sequence[str],
        seconds: float,
    ) -> AuditResult:
        """Losses of the forgotten, of what their clients keep, and of samples that nobody trained on."""
        world, model = self.plan.world, build_model(place.scenario.model).eval()

        def losses(images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
            if not len(labels):
                return np.empty(0), np.empty(0)
            one, two = (sample_losses(model, weights, images, labels).numpy() for weights in (before, after))
            return one, two

        gone = [place.samples(d.client, np.asarray(sorted(d.positions), np.int64)) for d in deletions]
        left = [
            place.samples(
                d.client, np.setdiff1d(np.arange(len(place.partitions[d.client])), sorted(d.positions))
            )
            for d in deletions
        ]
        unseen = world.dataset.tensors(world.pools.nonmembers)
        if not len(unseen[1]):
            raise NotApplicable(
                "setting 'data.nonmembers': 0 held-out samples, beside which the forgotten are ranked"
            )
        right = float((sample_logits(model, before, unseen[0]).argmax(1) == unseen[1]).float().mean())
        return audit_forgotten(
            name,
            losses(*_together(gone)),
            losses(*_together(left)),
            losses(*unseen),
            mechanism=self.config.unlearning.mechanism,
            accuracy=right,
            chance_accuracy=self.plan.commonest_share,
            told=told,
            seconds=seconds,
        )

    def _say(self, text: str) -> None:
        self.plan.shown.say(text, self.plan.folder)


def _joined(deletions: Sequence[Deletion]) -> Deletion:
    """Deletions as an observer of sums sees them: so many samples, of anybody."""
    count = sum(len(deletion.positions) for deletion in deletions)
    return Deletion(EVERYONE, frozenset(range(count)))


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _truth(place: Workplace, observation: Observation, deletions: Sequence[Deletion]) -> GroundTruth:
    """The forgotten samples of the observed client, or of all."""
    own = [d for d in deletions if observation.client in (EVERYONE, d.client)]
    images, labels = _together(
        [place.samples(d.client, np.asarray(sorted(d.positions), np.int64)) for d in own]
    )
    ids = tuple(int(place.partitions[d.client][position]) for d in own for position in sorted(d.positions))
    return GroundTruth(observation.round, observation.client, images, labels, ids)


def _placeholder(client: int, round: int | None, world: World) -> Observation:
    """What is known of a client that sent nothing: the round after `round`, the scenario, the public images."""
    trained = trained_parameters(build_model(world.scenario.model))
    shapes = tuple(tuple(parameter.shape) for parameter in trained.values())
    nothing = Update(tuple(trained), shapes, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    return Observation((round or 0) + 1, client, world.scenario, {}, nothing, 0, auxiliary=world.auxiliary)
