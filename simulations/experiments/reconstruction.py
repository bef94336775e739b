"""The reconstruction attacks of a run: submitted, kept as they come, scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries import ReconstructionAttack
from fedattack.audit import AuditResult, audit_reconstruction
from fedattack.config import Config
from fedattack.defenses import ClientDefenses, build_defenses
from fedattack.errors import RunFailed
from fedattack.groundtruth import GroundTruth
from fedattack.observation import EVERYONE, Observation, Reconstruction, Scenario
from fedattack.storage import RunFolder
from simulations.client_app import round_batches, used_positions
from simulations.engine.federation import FederationResult, RoundRecord
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import Attacked, Executor, groups, make_executor
from simulations.progress import Stages


class Answers:
    """Submits observations to the attacks, saves every answer when it comes, and knows what is finished."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        attacks: Mapping[str, ReconstructionAttack],
        shown: Stages,
    ) -> None:
        self._config = config
        self._folder = folder
        self._attacks = dict(attacks)
        self._shown = shown
        self._executor: Executor | None = None
        self._observations: dict[str, Observation] = {}
        self._held: dict[str, list[Observation]] = defaultdict(list)  # of attacks that need their history
        self._done: dict[str, dict[str, tuple[Reconstruction, float]]] = {name: {} for name in self._attacks}

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

    def _start(self, name: str, group: list[Observation]) -> None:
        keys = [o.key for o in group if o.key in self._observations]
        known = {key: self._folder.load_reconstruction(name, key) for key in keys}
        if all(known.values()):
            self._done[name] |= {key: answer for key, answer in known.items() if answer}
            return
        if self._executor is None:
            self._executor = make_executor(self._config.engine, self._config.seed, self._progress)
        self._executor.submit(name, self._attacks[name], group)

    def collect(self) -> None:
        """Wait for all that was submitted; attacks that need their history begin here, when it is complete."""
        together = self._config.attack.victims_per_task
        for name, held in self._held.items():
            clients = sorted({o.client for o in held})
            for start in range(0, len(clients), together):
                self._start(name, [o for o in held if o.client in clients[start : start + together]])
        self._held.clear()
        if self._executor is not None:
            for finished in self._executor.results():
                self._keep(finished)

    def _keep(self, finished: Attacked) -> None:
        key = finished.observation.key
        if key not in self._observations:  # the history of another answer
            return
        self._folder.save_reconstruction(finished.attack, key, finished.reconstruction, finished.seconds)
        self._done[finished.attack][key] = (finished.reconstruction, finished.seconds)
        self._folder.log(
            f"{finished.attack}: {key} done in {finished.seconds:.1f} s by {finished.reconstruction.method}"
        )
        self._progress(
            finished.attack, 0.0, f"{len(self._done[finished.attack])} of {len(self._observations)} victims"
        )

    def _progress(self, name: str, share: float, text: str) -> None:
        finished, total = len(self._done[name]), max(1, len(self._observations))
        group = min(self._config.attack.victims_per_task, total - finished)
        self._shown(name, (finished + share * group) / total, text)

    def audit(self, name: str, truths: Sequence[GroundTruth]) -> AuditResult:
        """Score one attack's answers."""
        answers = self._done[name]
        observations = list(self._observations.values())
        return audit_reconstruction(
            name,
            observations,
            [answers[o.key][0] for o in observations],
            truths,
            [answers[o.key][1] for o in observations],
            seed=self._config.seed,
        )

    def answers(self) -> dict[str, dict[str, Reconstruction]]:
        """Attack -> observation key -> answer."""
        return {name: {key: answer for key, (answer, _) in done.items()} for name, done in self._done.items()}


class ReconstructionExperiment(Experiment):
    """Attacks the victims of the attacked rounds while the federation goes on, and scores the images."""

    attacks: dict[str, ReconstructionAttack]

    def __init__(self, plan: Plan, attacks: Mapping[str, ReconstructionAttack]) -> None:
        super().__init__(plan, attacks)
        self.work = Answers(plan.config, plan.folder, attacks, plan.shown)
        self.truths: list[GroundTruth] = []
        self._this_round: list[Observation] = []
        self._defenses = tuple(build_defenses(plan.config.defense).values())

    def wants(self, round: int, client: int) -> bool:
        """Whether this is a victim in an attacked round, or its history that an attack needs."""
        rounds = self.plan.config.attack.rounds
        history = round < max(rounds, default=0) and self.work.need_history(self.plan.world.scenario)
        return (round in rounds or history) and (client == EVERYONE or client < self.plan.config.victims)

    def observe(self, observation: Observation) -> None:
        """Keep it until the round is over."""
        self._this_round.append(observation)

    def after_round(self, record: RoundRecord) -> None:
        """Attack the round's victims."""
        victims, self._this_round = self._this_round, []
        asked = record.round in self.plan.config.attack.rounds
        for observation in victims:
            truth = self._truth(observation, record.clients)
            if asked:
                self.truths.append(truth)
            if self.plan.config.output.save_observations:
                self.plan.folder.save_observation(observation)
                self.plan.folder.save_truth(truth)
        self.work.submit(victims, asked)

    def _truth(self, observation: Observation, answered: Sequence[int]) -> GroundTruth:
        clients = answered if observation.client == EVERYONE else (observation.client,)
        batches = [self._batch(observation.round, client) for client in clients]
        ids = np.concatenate([ids for ids, _ in batches])
        images, labels = self.plan.world.dataset.tensors(ids)
        shown = [part for _, part in batches if part is not None]
        return GroundTruth(
            observation.round,
            observation.client,
            images,
            labels,
            tuple(ids.tolist()),
            torch.cat(shown) if shown else None,
        )

    def _batch(self, round: int, client: int) -> tuple[NDArray[np.int64], Tensor | None]:
        """Sample ids that a client trained on in a round, ascending, and what the model was shown, if not those."""
        config, world = self.plan.config, self.plan.world
        partition = world.partitions[client]
        used = partition[used_positions(round_batches(config, len(partition), round, client))]
        defended = ClientDefenses(self._defenses, config.seed, round, client)
        order = np.argsort(used)
        if not defended.transforms:
            return used[order], None
        images, _ = world.dataset.tensors(used)  # in the client's own order, on which its draws depend
        return used[order], defended.images(images)[torch.from_numpy(order)]

    def collect(self) -> None:
        """Wait for the answers."""
        self.work.collect()
        if not self.truths:
            raise RunFailed(
                f"no update of a victim was seen in rounds {list(self.plan.config.attack.rounds)}: all dropped out, "
                "were not drawn, or were rejected (log.txt); raise attack.victims or attack.rounds"
            )

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Score every attack's images."""
        del federation
        return {name: self.work.audit(name, self.truths) for name in self.attacks}

    def answers(self) -> dict[str, dict[str, Reconstruction]]:
        """Attack -> observation key -> answer."""
        return self.work.answers()
