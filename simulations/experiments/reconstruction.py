"""The reconstruction attacks of a run: submitted, kept as they come, scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from adversaries import Attack, ReconstructionAttack
from fedattack.audit import AuditResult, audit_reconstruction
from fedattack.config import Config
from fedattack.groundtruth import GroundTruth
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.storage import RunFolder
from simulations.experiments.executor import Attacked, Executor, groups, make_executor
from simulations.progress import Stages


class _Reconstructions:
    """Submits observations to the attacks, saves every answer when it comes, and knows what is finished."""

    def __init__(
        self, config: Config, folder: RunFolder, attacks: Mapping[str, Attack], shown: Stages
    ) -> None:
        self._config = config
        self._folder = folder
        self._attacks = {n: a for n, a in attacks.items() if isinstance(a, ReconstructionAttack)}
        self._shown = shown
        self._executor: Executor | None = None
        self._observations: dict[str, Observation] = {}
        self._held: dict[str, list[Observation]] = defaultdict(list)  # of attacks that need their history
        self._done: dict[str, dict[str, tuple[Reconstruction, float]]] = {name: {} for name in self._attacks}

    @property
    def wanted(self) -> bool:
        """Whether any reconstruction attack sits in the run."""
        return bool(self._attacks)

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
