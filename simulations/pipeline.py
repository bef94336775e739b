"""A run from its settings to its report: federation, attacks, auditor, run folder."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from adversaries import Attack, MembershipAttack, ReconstructionAttack
from fedattack.audit import AuditResult, audit_membership, audit_unlearning
from fedattack.config import Config
from fedattack.data import World, build_world, world_record
from fedattack.defenses import ClientDefenses, build_defenses, check_defenses
from fedattack.errors import ConfigError, RunFailed
from fedattack.groundtruth import GroundTruth
from fedattack.observation import EVERYONE, Observation, Reconstruction
from fedattack.reporting.report import write_answers, write_results
from fedattack.reporting.terminal import print_summary
from fedattack.storage import RunFolder
from fedattack.storage import load_observations as read_observations
from fedattack.storage import load_truths as read_truths
from fedattack.storage.records import summary_document
from simulations.client_app import round_batches, used_positions
from simulations.engine.federation import FederationResult, RoundRecord, run_federation
from simulations.engine.ray_session import ray_session
from simulations.experiments.choose import arming_attack, check_names, check_seats, choose_attacks
from simulations.experiments.executor import choose_device
from simulations.experiments.membership import membership_experiment
from simulations.experiments.privacy import privacy_accounts, privacy_record
from simulations.experiments.reconstruction import _Reconstructions
from simulations.experiments.unlearning import unlearning_experiment
from simulations.progress import Stages, stages

# A run has its own progress bars and table; Flower's lines between them would say the same again.
logging.getLogger("flwr").setLevel(logging.ERROR)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, the federation's end, and every attack's audit by name.

    Parameters
    ----------
    folder : Path
    federation : FederationResult or None
        None where saved observations were attacked.
    audits : dict of str to AuditResult
    reconstructions : dict of str to dict of str to Reconstruction
        Attack -> observation key -> answer.
    summary : dict
        The content of ``summary.json``.
    """

    folder: Path
    federation: FederationResult | None
    audits: dict[str, AuditResult]
    reconstructions: dict[str, dict[str, Reconstruction]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def run_directory(config: Config) -> Path:
    """The configured run folder, or a new one below ``runs/`` named after the time and the attacks."""
    if config.output.run_dir is not None:
        return Path(config.output.run_dir)
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return Path("runs") / "-".join([stamp, *(config.attack.names or ("federation",))])


def simulate(
    config: Config,
    *,
    console: Console | None = None,
    command: str = "",
    federate: Callable[..., FederationResult] = run_federation,
) -> RunResult:
    """Train a federation, attack it, audit the attacks and write the run folder.

    Everything that can be refused is refused before anything starts. A killed run, started again with the same
    settings and folder, goes on where it was.

    Parameters
    ----------
    config : Config
    console : rich Console, optional
        Where progress and the table go; None: nowhere.
    command : str
        The command line, for the report.
    federate : callable
        What trains, called like :func:`simulations.engine.federation.run_federation`; ``flwr run`` brings its own
        grid here.

    Returns
    -------
    RunResult

    Raises
    ------
    BadRequest
        If the request cannot be carried out as it was put.
    RunFailed
        If a run that had started could not be finished.

    Examples
    --------
    >>> from fedattack.config import Config
    >>> settings = {"dataset": "digits", "image-size": 16, "attack": "hcgla", "clients": 2, "engine": "inline"}
    >>> result = simulate(Config.from_mapping(settings))  # doctest: +SKIP
    >>> result.audits["hcgla"].verdict  # doctest: +SKIP
    """
    console = console or Console(quiet=True)
    attacks = choose_attacks(config)
    check_names(config)
    world = build_world(config)
    check_defenses(world.scenario)
    for attack in attacks.values():
        attack.check(world.scenario)
    check_seats(config, world, attacks)
    arming_attack(attacks)
    folder = RunFolder.create(run_directory(config), config)
    folder.save_part("world", world_record(world))
    console.print(f"run folder [bold]{folder.path}[/]", highlight=False, soft_wrap=True)
    session = ray_session(config.engine) if config.engine.name == "ray" else nullcontext()
    with logging_to(folder), session, stages(console) as shown:
        run = _Run(config, world, folder, attacks, shown)
        federation = run.train(federate)
        run.collect()
        audits = run.audit(federation)
    results = list(audits.values())
    figures = federation_figures(config, world, federation)
    write_results(
        folder,
        results,
        figures,
        command=command,
        label_counts=label_counts(world),
        notes=[note for note in (world.dataset.note,) if note],
    )
    print_summary(console, results, figures)
    for name, account in figures["privacy"].items():
        console.print(f"[bold]{name}[/]  {account['text']}", highlight=False)
    console.print(f"report [bold]{folder.path / 'report.html'}[/]", highlight=False, soft_wrap=True)
    return RunResult(
        folder.path, federation, audits, run.answers(), summary_document(config, results, figures)
    )


def attack_folder(
    directory: Path,
    config: Config,
    *,
    console: Console | None = None,
    truth: Path | None = None,
    command: str = "",
) -> RunResult:
    """Attack saved observations, without the federation; score the answers where the truth is given.

    Parameters
    ----------
    directory : Path
        An ``observations`` folder of a run, or the run folder itself.
    config : Config
        Of which attacks, seed, engine and output are used; the scenario is the observations' own.
    truth : Path, optional
        A ``truth`` folder.

    Raises
    ------
    BadRequest
        If the folder holds no observations, or an attack does not apply to them.
    """
    console = console or Console(quiet=True)
    attacks = choose_attacks(config)
    choose_device(config.engine.device)
    if not attacks:
        raise ConfigError("setting 'attack.names' is empty: name one, for example --attack hcgla")
    for name, attack in attacks.items():
        if not isinstance(attack, ReconstructionAttack):
            raise ConfigError(
                f"attack {name!r} needs a running federation; saved observations can be reconstructed"
            )
    inner = directory / "observations"
    observations = read_observations(inner if inner.is_dir() else directory)
    for attack in attacks.values():
        for observation in observations:
            attack.check(observation.scenario)
    truths = read_truths(truth) if truth is not None else None
    folder = RunFolder.create(run_directory(config), config)
    console.print(f"run folder [bold]{folder.path}[/]", highlight=False, soft_wrap=True)
    session = ray_session(config.engine) if config.engine.name == "ray" else nullcontext()
    with logging_to(folder), session, stages(console) as shown:
        work = _Reconstructions(config, folder, attacks, shown)
        by_round: dict[int, list[Observation]] = defaultdict(list)
        for observation in observations:
            by_round[observation.round].append(observation)
        for batch in by_round.values():
            work.submit(batch)
        work.collect()
    results = [work.audit(name, truths) for name in attacks] if truths is not None else []
    if results:
        write_results(folder, results, command=command)
        print_summary(console, results)
        console.print(f"report [bold]{folder.path / 'report.html'}[/]", highlight=False, soft_wrap=True)
    else:
        write_answers(folder, work.answers())
        console.print(f"nothing is scored without --truth; the pictures are in [bold]{folder.images}[/]")
    audits = {result.attack: result for result in results}
    return RunResult(folder.path, None, audits, work.answers(), summary_document(config, results, None))


class _FolderHandler(logging.Handler):
    """Writes log records into a run folder's ``log.txt``."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(logging.INFO)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        self._folder.log(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def logging_to(folder: RunFolder) -> Iterator[None]:
    """Send fedattack's log, Flower's errors and what ended the block to the run folder, not to the terminal."""
    handler = _FolderHandler(folder)
    kept: list[tuple[logging.Logger, int, bool, list[logging.Handler]]] = []
    for name, level in (("fedattack", logging.INFO), ("flwr", logging.ERROR)):
        logger = logging.getLogger(name)
        kept.append((logger, logger.level, logger.propagate, logger.handlers))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    except BaseException as error:
        with suppress(RunFailed):  # the disk may be full
            folder.log(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        for logger, level, propagate, handlers in kept:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


class _Run:
    """One run: the federation with the adversaries in it."""

    def __init__(
        self, config: Config, world: World, folder: RunFolder, attacks: Mapping[str, Attack], shown: Stages
    ) -> None:
        self.config = config
        self.world = world
        self.folder = folder
        self.attacks = attacks
        self.shown = shown
        self.work = _Reconstructions(config, folder, attacks, shown)
        self.members = {n: a for n, a in attacks.items() if isinstance(a, MembershipAttack)}
        self._this_round: list[Observation] = []
        self._all: list[Observation] = []
        self.truths: list[GroundTruth] = []
        self._defenses = tuple(build_defenses(config.defense).values())

    def train(self, federate: Callable[..., FederationResult]) -> FederationResult:
        """Train; hand each round's observations to the attacks while the rounds go on."""
        total = self.config.federation.rounds
        self.shown("federation", 0.0, f"round 1 of {total}")
        return federate(
            self.config,
            self.world,
            run_dir=self.folder.path,
            on_observation=self._observed,
            observe=self._observe,
            on_round=self._finished_round,
            arming=arming_attack(self.attacks),
        )

    def _victim(self, round: int, client: int) -> bool:
        chosen = client == EVERYONE or client < self.config.victims
        rounds = self.config.attack.rounds
        history = round < max(rounds, default=0) and self.work.need_history(self.world.scenario)
        return self.work.wanted and (round in rounds or history) and chosen

    def _observe(self, round: int, client: int) -> bool:
        return bool(self.members) or self._victim(round, client)

    def _observed(self, observation: Observation) -> None:
        if self._victim(observation.round, observation.client):
            self._this_round.append(observation)
        if self.members:
            self._all.append(observation)

    def _finished_round(self, record: RoundRecord) -> None:
        victims, self._this_round = self._this_round, []
        asked = record.round in self.config.attack.rounds
        for observation in victims:
            truth = self._truth(observation, record.clients)
            if asked:
                self.truths.append(truth)
            if self.config.output.save_observations:
                self.folder.save_observation(observation)
                self.folder.save_truth(truth)
        for client, reason in (*record.rejected, *record.failed):
            self.folder.log(f"round {record.round}: reply of client {client} not used: {reason}")
        accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.1%}"
        self.folder.log(f"round {record.round}: {len(record.clients)} clients{accuracy}")
        rounds = self.config.federation.rounds
        self.shown("federation", record.round / rounds, f"round {record.round} of {rounds}{accuracy}")
        self.work.submit(victims, asked)

    def _truth(self, observation: Observation, answered: Sequence[int]) -> GroundTruth:
        clients = answered if observation.client == EVERYONE else (observation.client,)
        batches = [self._batch(observation.round, client) for client in clients]
        ids = np.concatenate([ids for ids, _ in batches])
        images, labels = self.world.dataset.tensors(ids)
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
        partition = self.world.partitions[client]
        used = partition[used_positions(round_batches(self.config, len(partition), round, client))]
        defended = ClientDefenses(self._defenses, self.config.seed, round, client)
        order = np.argsort(used)
        if not defended.transforms:
            return used[order], None
        images, _ = self.world.dataset.tensors(used)  # in the client's own order, on which its draws depend
        return used[order], defended.images(images)[torch.from_numpy(order)]

    def collect(self) -> None:
        """Wait for the reconstructions."""
        self.work.collect()
        if self.work.wanted and not self.truths:
            raise RunFailed(
                f"no update of a victim was seen in rounds {list(self.config.attack.rounds)}: all dropped out, "
                "were not drawn, or were rejected (log.txt); raise attack.victims or attack.rounds"
            )

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Score every attack, in the order in which they were named."""
        audits: dict[str, AuditResult] = {}
        for name, attack in self.attacks.items():
            if isinstance(attack, ReconstructionAttack):
                audits[name] = self.work.audit(name, self.truths)
            elif isinstance(attack, MembershipAttack):
                audits[name] = self._membership(name, attack, federation)
            else:
                audits[name] = self._unlearning(name, federation)
        return audits

    def _membership(self, name: str, attack: MembershipAttack, federation: FederationResult) -> AuditResult:
        started = time.perf_counter()
        outcome = membership_experiment(
            self.config,
            self.world,
            self._all,
            attack,
            device=choose_device(self.config.engine.device),
            progress=lambda share, text: self.shown(name, share, text),
        )
        self.shown(name, 1.0, f"{len(outcome.is_member)} candidates")
        seconds = time.perf_counter() - started
        self.folder.save_scores(name, outcome.target, outcome.scores, seconds)
        self.folder.save_part(f"{name}-candidates", outcome.details)
        return audit_membership(
            name,
            outcome.scores,
            outcome.is_member,
            clients=[outcome.target],
            seconds=seconds,
            accuracy=next((r.accuracy for r in reversed(federation.rounds) if r.accuracy is not None), None),
            chance_accuracy=commonest_share(self.world),
            test_samples=len(self.world.pools.nonmembers),
            seed=self.config.seed,
        )

    def _unlearning(self, name: str, federation: FederationResult) -> AuditResult:
        started = time.perf_counter()
        outcome = unlearning_experiment(
            self.config,
            self.world,
            federation,
            name,
            progress=lambda share, text: self.shown(name, share, text.removeprefix(f"{name}: ")),
        )
        seconds = time.perf_counter() - started
        self.folder.save_part(name, dataclasses.asdict(outcome))
        return audit_unlearning(
            name,
            outcome.before,
            outcome.after,
            outcome.random,
            requests=len(outcome.request.positions),
            mechanism=outcome.mechanism,
            test_samples=outcome.test_samples,
            chance_accuracy=commonest_share(self.world),
            seconds=seconds,
            seed=self.config.seed,
        )

    def answers(self) -> dict[str, dict[str, Reconstruction]]:
        """Attack -> observation key -> answer."""
        return self.work.answers()


def federation_figures(config: Config, world: World, federation: FederationResult) -> dict[str, Any]:
    """The federation as the report and ``summary.json`` show it."""
    rounds = [
        {
            "round": record.round,
            "loss": record.loss,
            "accuracy": record.accuracy,
            "train_loss": record.train_loss,
            "answered": len(record.clients),
            "failed": len(record.failed),
            "rejected": len(record.rejected),
            "dropped": len(record.dropped),
            "wire_bytes": record.wire_bytes,
            "seconds": record.seconds,
        }
        for record in federation.rounds
    ]
    refused = [
        {"round": record.round, "client": client, "reason": reason}
        for record in federation.rounds
        for client, reason in (*record.rejected, *record.failed)
    ]
    auxiliary = world.auxiliary
    privacy = privacy_record(privacy_accounts(config, world, federation.rounds))
    return {
        "data set": world.dataset.name,
        "clients": config.federation.clients,
        "samples of all clients": int(sum(map(len, world.partitions))),
        "held-out samples": len(world.pools.nonmembers),
        "auxiliary images granted": 0 if auxiliary is None else len(auxiliary),
        "auxiliary source": "none" if auxiliary is None else auxiliary.source,
        "partition": config.partition.name,
        "strategy": config.federation.strategy,
        "defences": ", ".join(config.defense.names) or "none",
        **{f"guarantee of {name}": account["text"] for name, account in privacy.items()},
        "privacy": privacy,
        "rounds": rounds,
        "rejections": refused,
    }


def commonest_share(world: World) -> float:
    """Share of the commonest class among the held-out samples: what a model that knows nothing gets right."""
    labels = world.dataset.labels[world.pools.nonmembers]
    return float(np.bincount(labels).max()) / len(labels)


def label_counts(world: World) -> dict[int, dict[int, int]]:
    """Client -> label -> samples, of the clients' partitions."""
    return {
        client: dict(Counter(world.dataset.labels[ids].tolist()))
        for client, ids in enumerate(world.partitions)
    }


__all__ = ["RunResult", "attack_folder", "run_directory", "simulate"]
