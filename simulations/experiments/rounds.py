"""What a server's membership attacks see of a run: round after round, beside the federation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from adversaries.base import Progress
from adversaries.membership.base import Figures, MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from fedattack.config import Config
from fedattack.errors import FedattackError, NotApplicable, RunFailed
from fedattack.models import build_model
from fedattack.observation import Auxiliary, MembershipScores, Observation, Scenario, called
from fedattack.rng import adversary_seed
from fedattack.storage import RunFolder
from fedattack.task import trained_parameters
from simulations.experiments.executor import Executor, Job, make_executor, reason
from simulations.experiments.references import ReferenceModel, Trained, TrainedReferences
from simulations.progress import Stages

IN_FLIGHT = 2
"""Rounds that may wait for their figures; the federation waits where there would be more."""


@dataclass(frozen=True)
class Seat:
    """What is the same in every round; each process is given it once."""

    attacks: Mapping[str, MembershipAttack]
    knowledge: Knowledge
    auxiliary: Auxiliary | None


@dataclass(frozen=True)
class RoundJob(Job):
    """One round, for the attacks `lacking` it. The public images of its observations are the seat's."""

    number: int
    observations: list[Observation]
    after: dict[str, Tensor] | None
    lacking: tuple[str, ...]
    seed: int
    name: str = "candidates"

    @property
    def key(self) -> str:  # type: ignore[override]
        return f"round {self.number}"

    def run(self, shared: Seat, device: torch.device, progress: Progress) -> Watched:
        found = Watched()
        model = build_model(self.observations[0].scenario.model)
        seen = [replace(o, auxiliary=shared.auxiliary) for o in self.observations]
        for observation in seen:
            if why := _fault(observation, model):
                found.left_out[observation.client] = why
        view = RoundView(
            [o for o in seen if o.client not in found.left_out], shared.knowledge, device, self.after
        )
        for name in self.lacking:
            started = time.perf_counter()
            try:
                if not view.observations:
                    raise NotApplicable(f"no update of round {self.number} can be read")
                found.figures[name] = dict(shared.attacks[name].watch(view, self.seed))
            except Exception as error:  # its own; the other attacks go on
                found.failed[name] = error if isinstance(error, FedattackError) else RunFailed(reason(error))
            found.seconds[name] = time.perf_counter() - started
        return found

    def lost(self, why: str) -> Watched:
        return Watched(failed={name: RunFailed(why) for name in self.lacking})


@dataclass
class Watched:
    """What became of a round: figures, seconds and failures by attack; clients that cannot be read, and why."""

    figures: dict[str, Figures] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, FedattackError] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)


def _fault(observation: Observation, model: nn.Module) -> str:
    """Why an update cannot be one of this model's, "" where it can."""
    update, own = observation.update, {n: tuple(p.shape) for n, p in trained_parameters(model).items()}
    sent = dict(zip(update.names, update.shapes, strict=True))
    if list(sent.items()) != list(own.items()):
        odd = next((n for n in [*own, *sent] if own.get(n) != sent.get(n)), "their order")
        return f"its update is of another model: {odd!r} is {sent.get(odd)}, here {own.get(odd)}"
    broken = [n for n, tensor in observation.buffers.items() if not bool(tensor.isfinite().all())]
    if broken or not bool(update.values.isfinite().all()):
        return f"its {f'buffer {broken[0]!r}' if broken else 'update'} holds NaN or infinite values"
    return ""


class Watch:
    """Shows rounds to a server's attacks, keeps what they make of them, and has them conclude.

    Figures are stored as they come, and not asked for again where they are on disk; scores are too. A round that
    fails for an attack is left out of what it concludes from, with a line; one for which all failed, and one that
    needs more reference models than could be trained, is in `failed`.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        attacks: Mapping[str, MembershipAttack],
        seat: tuple[Knowledge, Auxiliary | None],
        setting: tuple[Scenario, int],
        shown: Stages,
    ) -> None:
        """`seat`: knowledge, and the public images; `setting`: the scenario, and how many rounds are trained."""
        self.config, self.folder, self.attacks, self.shown = config, folder, dict(attacks), shown
        self.knowledge, auxiliary = seat
        self.scenario, self.rounds = setting
        self.figures: dict[str, dict[int, Figures]] = {n: dict(folder.load_rounds(n)) for n in self.attacks}
        self.failed: dict[str, BaseException] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self._seat = Seat(self.attacks, self.knowledge, auxiliary)
        self._executor: Executor | None = None
        self._said: set[str] = set()
        self._faults: dict[str, FedattackError] = {}
        self._references: TrainedReferences | None = None
        needing = [n for n, a in self.attacks.items() if a.needs_now(self.scenario).references]
        if needing:
            trained = self.rounds + config.federation.pretrain
            self._references = TrainedReferences(config, folder, self.knowledge, self.scenario, trained)
            for job in self._references.missing():
                self.executor.later(job)
        elif config.attack.references and self.attacks:
            folder.log("attack.references: none is trained, no attack of this run reads any")

    @property
    def executor(self) -> Executor:
        """Where rounds are read and reference models trained."""
        if self._executor is None:
            self._executor = make_executor(
                self.config.engine, self.shown, self._keep, self._seat, at_most=IN_FLIGHT
            )
        return self._executor

    def lacks(self, name: str, round: int) -> bool:
        """Whether an attack has no figures of a round."""
        return round not in self.figures[name]

    def show(
        self, observations: Sequence[Observation], after: dict[str, Tensor] | None, names: Iterable[str]
    ) -> None:
        """Have the attacks `names` look at a round, those that have not; waits where many rounds are in flight."""
        number = observations[0].round
        lacking = tuple(name for name in names if self.lacks(name, number))
        if lacking:
            bare = [replace(o, auxiliary=None) for o in observations]
            seed = adversary_seed(self.config.seed, "watch", number)
            self.executor.submit(RoundJob(number, bare, after, lacking, seed))

    def _keep(self, job: Job, found: Watched | Trained) -> None:
        """Store what became of a job, at once."""
        if isinstance(job, ReferenceModel) and isinstance(found, Trained):
            assert self._references is not None
            self._references.keep(job, found)
            self.shown("references", self._references.share, job.key)
            return
        assert isinstance(job, RoundJob)
        assert isinstance(found, Watched)
        for client, why in found.left_out.items():
            self._say(f"round {job.number}: client {client} is left out of what is read: {why}")
        for name, error in found.failed.items():
            self._faults.setdefault(name, error)
            text = f"{name}: round {job.number} cannot be read: {error}"
            self._say(text, once=f"{name}: {error}")
        for name, figures in found.figures.items():
            self.folder.save_round(name, job.number, figures)
            self.figures[name][job.number] = figures
            self.seconds[name] += found.seconds[name]
            self.shown(name, job.number / self.rounds, job.key)

    def _say(self, text: str, once: str = "") -> None:
        """Print and log a line; of several that are alike in `once` the first is printed."""
        if once in self._said:
            self.folder.log(text)
        else:
            self.shown.say(text, self.folder)
        self._said |= {once} if once else set()

    def collect(self) -> None:
        """Wait for all figures and reference models."""
        if self._executor is not None:
            self._executor.finish()
        if self._references is not None:
            references = self._references.collected()
            self.shown.say(self._references.note, self.folder)
            self.knowledge = replace(self.knowledge, references=references)
            for name, attack in self.attacks.items():
                needed = attack.needs_now(self.scenario).references
                if needed > (0 if references is None else len(references)):
                    self.failed[name] = RunFailed(f"needs {needed} reference models; {self._references.note}")
        for name, error in self._faults.items():
            if not self.figures[name]:
                self.failed.setdefault(name, error)
        for found in self.figures.values():
            for number in sorted(found):  # they come as they are ready
                found[number] = found.pop(number)

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._executor is not None:
            self._executor.close()

    def scores(
        self, name: str, target: int, answer: Callable[[], MembershipScores] | None = None
    ) -> MembershipScores | None:
        """What an attack concludes for a target; None, with a line, where it cannot.

        Stored, and read back where it is of the same rounds and as many reference models.

        `answer`: of an attack that reads no rounds.
        """
        basis = [*self.figures.get(name, ())]
        if (references := self.knowledge.references) is not None:
            basis.append(len(references))
        if known := self.folder.load_scores(name, target, basis):
            return known[0]
        started = time.perf_counter()
        try:
            if answer is not None:
                found = answer()
            else:
                found = self.attacks[name].scores(self.figures[name], target, self.knowledge)
            wanted = (len(self.knowledge.candidates.labels),)
            if tuple(found.scores.shape) != wanted or not bool(found.scores.isfinite().all()):
                given = f"scores of shape {tuple(found.scores.shape)}, or NaN or infinite ones"
                raise RunFailed(f"{name} answered {given}; finite ones of shape {wanted} were asked for")
        except Exception as error:  # the other targets are scored
            self.pass_over(name, target, error)
            return None
        self.seconds[name] += time.perf_counter() - started
        self.folder.save_scores(name, target, found, self.seconds[name], basis)
        return found

    def pass_over(self, name: str, target: int, error: Exception) -> None:
        """Say, once, why an attack is not scored about a target."""
        self._faults[name] = error if isinstance(error, FedattackError) else RunFailed(reason(error))
        self._say(f"{name}: not scored about {called(target)}: {reason(error)}")

    def fault(self, name: str) -> FedattackError:
        """Why an attack could score nobody."""
        return self._faults.get(name) or NotApplicable(
            f"{name}: no update of a client that it is asked about was observed"
        )
