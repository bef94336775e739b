"""The reconstruction attacks of a run: submitted, kept as they come, scored."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversaries import ReconstructionAttack
from fedattack.audit import AuditResult, audit_reconstruction
from fedattack.audit.image_scores import check_metrics
from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable, RunFailed
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import build_metrics
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Observation, Reconstruction, Scenario, Update, UpdateKind
from fedattack.reporting import formats
from fedattack.rng import adversary_seed, numpy_rng
from fedattack.storage import RunFolder, StoredAnswer, load_truths, save_observation, save_truth
from fedattack.task import trained_parameters
from simulations.engine.federation import FederationResult, RoundRecord
from simulations.experiments.base import Experiment, Plan, SavedWork
from simulations.experiments.executor import Executor, make_executor
from simulations.experiments.private import PrivateBatches
from simulations.experiments.victims import Attacked, Victims, by_scenario, groups
from simulations.progress import Stages

_GALLERY = 256


def held_out_images(world: World) -> Tensor | None:
    """Held-out samples, a few, among which private images are looked for beside those of others."""
    chosen = world.pools.nonmembers[:_GALLERY]
    return world.dataset.tensors(chosen)[0] if len(chosen) else None


def other_photographs(world: World, truths: Sequence[GroundTruth], seed: int) -> dict[str, Tensor]:
    """Key of each single private image -> the other photographs of its person, in random order, if any."""
    groups, found = world.dataset.groups, dict[str, Tensor]()
    for truth in truths if groups is not None else ():
        assert groups is not None
        if len(truth.sample_ids) == 1:
            own = truth.sample_ids[0]
            others = np.setdiff1d(np.flatnonzero(groups == groups[own]), [own])
            drawn = numpy_rng(seed, "another photograph", truth.round, truth.client).permutation(others)
            images = world.dataset.tensors(drawn)[0] if len(drawn) else truth.images
            if different := [image for image in images if not torch.equal(image, truth.images[0])]:
                found[truth.key] = torch.stack(different)
    return found


class Answers:
    """Submits observations to the attacks, saves every answer when it comes, and knows what is finished."""

    def __init__(
        self, config: Config, folder: RunFolder, attacks: Mapping[str, ReconstructionAttack], shown: Stages
    ) -> None:
        self._config = config
        self._folder = folder
        self._attacks = dict(attacks)
        self._shown = shown
        self._seed = adversary_seed(config.seed, "attack")
        self._metrics = build_metrics(config.metric)
        self._executor: Executor | None = None
        self._observations: dict[str, Observation] = {}
        self._held: dict[str, list[Observation]] = defaultdict(list)  # of attacks that need their history
        self._done: dict[str, dict[str, StoredAnswer]] = {name: {} for name in self._attacks}
        self._failed: dict[str, dict[str, str]] = {name: {} for name in self._attacks}

    def need_history(self, scenario: Scenario) -> bool:
        """Whether an attack must be given what was seen of its victims before the attacked rounds."""
        return any(attack.needs_history(scenario) for attack in self._attacks.values())

    def submit(self, observations: Sequence[Observation], asked: bool = True) -> None:
        """Attack one round's observations, but for those whose answers are on disk.

        Without `asked` they are only the history of later ones.
        """
        if asked:
            self._observations |= {o.key: o for o in observations}
        for name, attack in self._attacks.items():
            if observations and attack.needs_history(observations[0].scenario):
                self._held[name] += observations
            elif asked:
                for group in groups(observations, self._config.attack.victims_per_task):
                    self._start(name, group)

    def refuse(self, observation: Observation, reason: str) -> None:
        """Count a victim of whom nothing usable arrived; no attack is asked."""
        self._observations[observation.key] = observation
        for failed in self._failed.values():
            failed[observation.key] = reason
        self._shown.say(f"{observation.key} cannot be attacked: {reason}", self._folder)

    def _start(self, name: str, group: list[Observation]) -> None:
        keys = [o.key for o in group if o.key in self._observations]
        known = {key: self._folder.load_reconstruction(name, key) for key in keys}
        self._done[name] |= {key: answer for key, answer in known.items() if answer}
        missing = [key for key, answer in known.items() if not answer]
        if not missing:
            return
        if self._executor is None:
            self._executor = make_executor(self._config.engine, self._progress, self._keep)
        folder, pause = self._folder.checkpoints(name, group[0].key), self._config.attack.state_seconds
        job = Victims(name, self._attacks[name], group, folder, pause, self._seed)
        # Who failed before was attacked alone at last, and is so again; else what is computed together stays so.
        alone = job.parts() if all(self._folder.has_failed(name, key) for key in missing) else []
        for part in [p for p in alone if any(o.key in missing for o in p.observations)] or [job]:
            self._executor.submit(part)

    def collect(self) -> None:
        """Wait for all that was submitted; attacks that need their history begin here, when it is complete."""
        together = self._config.attack.victims_per_task
        for name, held in self._held.items():
            scenarios = {o.client: o.scenario for o in held}
            clients = sorted(scenarios)
            for alike in by_scenario(clients, [scenarios[client] for client in clients]):
                for start in range(0, len(alike), together):
                    self._start(name, [o for o in held if o.client in alike[start : start + together]])
        self._held.clear()
        if self._executor is not None:
            self._executor.finish()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.close()

    def _keep(self, job: Victims, found: list[Attacked]) -> None:
        """Store what became of a group, at once."""
        name = job.name
        for one in found:
            key = one.key
            if key not in self._observations:  # the history of another answer
                continue
            if isinstance(one.answer, str):
                self._failed[name][key] = one.answer
                self._folder.save_failure(name, key, one.answer)
                self._shown.say(f"{name}: {key} failed: {one.answer}", self._folder)
            else:
                self._folder.save_reconstruction(name, key, one.answer, one.seconds, one.memory)
                self._done[name][key] = StoredAnswer(one.answer, one.seconds, one.memory)
                held = f", {formats.size(one.memory)} of memory at the peak" if one.memory else ""
                self._folder.log(f"{name}: {key} done in {one.seconds:.1f} s by {one.answer.method}{held}")
        shutil.rmtree(job.checkpoints, ignore_errors=True)
        finished = len(self._done[name]) + len(self._failed[name])
        self._progress(name, 0.0, f"{finished} of {len(self._observations)} victims")

    def _progress(self, name: str, share: float, text: str) -> None:
        finished = len(self._done[name]) + len(self._failed[name])
        total = max(1, len(self._observations))
        group = min(self._config.attack.victims_per_task, total - finished)
        self._shown(name, (finished + share * group) / total, text)

    def audit(
        self,
        name: str,
        truths: Sequence[GroundTruth],
        public: Tensor | None = None,
        photographs: Mapping[str, Tensor] | None = None,
    ) -> AuditResult:
        """Score one attack's answers; see :func:`fedattack.audit.audit_reconstruction`."""
        observations = list(self._observations.values())
        given = [self._done[name].get(o.key) for o in observations]
        images, seconds = [g and g.answer for g in given], [g.seconds if g else 0.0 for g in given]
        more: dict[str, Any] = {"seed": self._config.seed, "reasons": self._failed[name]}
        more |= {"metrics": self._metrics, "public": public, "photographs": photographs}
        found = audit_reconstruction(name, observations, images, truths, seconds, **more)
        held = max((g.memory for g in given if g), default=0)
        return replace(found, summary=found.summary | {"peak_memory": held}) if held else found

    def answers(self) -> dict[str, dict[str, Reconstruction]]:
        """Attack -> observation key -> answer."""
        return {
            name: {key: stored.answer for key, stored in done.items()} for name, done in self._done.items()
        }


class SavedVictims(SavedWork):
    """Reconstructs saved observations."""

    def __init__(self, *run: Any) -> None:
        super().__init__(*run)
        self._work = Answers(self.config, self.folder, self.attacks, self.shown)
        self._truths = None if self.truth is None else load_truths(self.truth)

    def submit(self, observations: Sequence[Observation]) -> None:
        """Attack them; where the truth is given, those that it tells of, by metrics that can score them."""
        if self.truth is not None and observations:
            check_metrics(build_metrics(self.config.metric), observations[0].scenario.image_shape)
        told = None if self._truths is None else {truth.key for truth in self._truths}
        chosen = [o for o in observations if told is None or o.key in told]
        if len(chosen) < len(observations):
            what = f"the truth tells of {len(chosen)} of {len(observations)} observations; the others are left out"
            self.shown.say(f"round {observations[0].round}: {what}", self.folder)
        self._work.submit(chosen)

    def collect(self) -> None:
        self._work.collect()

    def close(self) -> None:
        self._work.close()

    def audit(self) -> dict[str, AuditResult]:
        return {name: self._work.audit(name, self._truths or []) for name in self.attacks}

    def answers(self) -> dict[str, dict[str, Reconstruction]]:
        return self._work.answers()


class ReconstructionExperiment(Experiment):
    """Attacks the victims of the attacked rounds while the federation goes on, and scores the images."""

    from_saved = SavedVictims
    attacks: dict[str, ReconstructionAttack]

    @classmethod
    def check(cls, config: Config, world: World) -> None:
        """Refuse batches in which canaries stand in the place of images."""
        if config.canaries.count:
            raise NotApplicable(
                f"setting 'canaries.count' = {config.canaries.count}: canaries stand where images would, which "
                "nobody could rebuild; reconstruct in a run without them"
            )
        check_metrics(build_metrics(config.metric), world.scenario.image_shape)

    def __init__(self, plan: Plan, attacks: Mapping[str, ReconstructionAttack]) -> None:
        super().__init__(plan, attacks)
        self.work = Answers(plan.config, plan.folder, attacks, plan.shown)
        self.truths: list[GroundTruth] = []
        self._private = PrivateBatches(plan.config, plan.world)

    def wants(self, round: int, client: int) -> bool:
        """Whether this is a victim in an attacked round, or its history that an attack needs."""
        rounds = self.plan.config.attack.rounds
        history = round < max(rounds, default=0) and self.work.need_history(self.plan.world.scenario)
        return (round in rounds or history) and (client == EVERYONE or client < self.plan.config.victims)

    def after_round(self, record: RoundRecord) -> None:
        victims, self.this_round = self.this_round, []
        asked = record.round in self.plan.config.attack.rounds
        for observation in victims:
            truth = self._truth(observation, record.clients)
            if asked:
                self.truths.append(truth)
            if self.plan.config.output.save_observations:
                save_observation(self.plan.folder.observations, observation, self.plan.folder.identity)
                save_truth(self.plan.folder.truth, truth)
        self.work.submit(victims, asked)
        if asked and not hides_clients(self.plan.config.defense):
            for client, reason in (*record.rejected, *record.failed):
                if client < self.plan.config.victims and len(self.plan.world.partitions[client]):
                    self._refuse(record.round, client, reason)

    def _refuse(self, round: int, client: int, reason: str) -> None:
        """Note a victim whose reply the server could not use: an update of nothing, and the truth."""
        world = self.plan.world
        trained = trained_parameters(build_model(world.scenario.model))
        named = [(n, tuple(p.shape)) for n, p in trained.items()]
        names, shapes = zip(*named, strict=True)
        kind: UpdateKind = "gradient" if world.scenario.training.protocol == "fedsgd" else "delta"
        nothing = Update(names, shapes, torch.zeros(0, dtype=torch.int64), torch.zeros(0), kind)
        observation = Observation(round, client, world.scenario, {}, nothing, 0, auxiliary=world.auxiliary)
        self.truths.append(self._truth(observation, ()))
        last = next((line.strip() for line in reversed(reason.splitlines()) if line.strip()), reason)
        self.work.refuse(observation, f"its reply was not used: {last}")

    def _truth(self, observation: Observation, answered: Sequence[int]) -> GroundTruth:
        return self._private.truth(observation.round, observation.client, answered)

    def collect(self) -> None:
        self.work.collect()
        if not self.truths:
            raise RunFailed(
                f"no update of a victim was seen in rounds {list(self.plan.config.attack.rounds)}: all dropped out, "
                "were not drawn, or were rejected (log.txt); raise attack.victims or attack.rounds"
            )

    def close(self) -> None:
        self.work.close()

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        public = held_out_images(self.plan.world)
        photographs = other_photographs(self.plan.world, self.truths, self.plan.config.seed)
        return {name: self.work.audit(name, self.truths, public, photographs) for name in self.attacks}

    def answers(self) -> dict[str, dict[str, Reconstruction]]:
        return self.work.answers()
