"""A run from its settings to its report: federation, attacks, auditor, run folder."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from torch import Tensor

from adversaries import Attack
from adversaries.needs import Facts
from adversaries.refusals import applicable, threat_model
from adversaries.seats import MaliciousClient
from fedattack.audit import AuditResult
from fedattack.config import Config
from fedattack.data import World, build_world, world_record
from fedattack.defenses import check_defenses
from fedattack.errors import ConfigError, DataError, FedattackError, RunFailed
from fedattack.files import cannot_write
from fedattack.observation import Auxiliary, Observation, Scenario
from fedattack.reporting import formats
from fedattack.reporting.answers import answer_rows, write_answers_page
from fedattack.reporting.report import CHECKSUM, write_answers, write_results
from fedattack.reporting.terminal import print_answers, print_summary
from fedattack.storage import RunFolder
from fedattack.storage import load_observations as read_observations
from fedattack.storage.observations import observed_rounds, safe_name
from fedattack.storage.plain import read_json
from fedattack.storage.records import summary_document
from fedattack.task import task_of
from simulations.engine.federation import (
    DeletionRequests,
    FederationResult,
    RoundRecord,
    hushed,
    kept_bytes,
    run_federation,
)
from simulations.engine.flower_internals import check_flower
from simulations.engine.ray_session import ray_session
from simulations.experiments import cost
from simulations.experiments.base import EXPERIMENTS, Experiment, Plan, SavedWork, by_family, open_experiments
from simulations.experiments.choose import (
    arming_attack,
    check_model,
    check_names,
    choose_attacks,
    known_facts,
)
from simulations.experiments.executor import choose_device, reason
from simulations.experiments.forgotten import ForgottenExperiment
from simulations.experiments.privacy import CanaryWatch, privacy_accounts, privacy_record
from simulations.generators import Generators
from simulations.progress import Stages, stages, tell

TRAINED_BEFORE = "trained before round 1"
"""Entry of a federation's figures: how long, honestly, and what came of it."""

_AT_ONCE = 1024
"""Images that are read at once for a checksum."""


class Interrupted(KeyboardInterrupt):
    """A run was interrupted; `folder` is where it can be resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, the federation's end, and every attack's audit by name.

    `federation` is None where saved observations were attacked; `reconstructions` is attack -> observation key ->
    answer, of attacks that answer observations; `summary` is the content of ``summary.json``.
    """

    folder: Path
    federation: FederationResult | None
    audits: dict[str, AuditResult]
    reconstructions: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def run_directory(config: Config) -> Path:
    """The configured run folder, or a new one, made here, below ``runs/`` named after the time and the attacks."""
    if config.output.run_dir is not None:
        return Path(config.output.run_dir)
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    name = "-".join([stamp, *(safe_name(one) for one in config.attack.names or ("federation",))])
    for number in itertools.count(1):  # another run may begin in the same second
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(path, error, 0) from error
        return path
    raise AssertionError("there is always another number")


@dataclass(frozen=True, eq=False)
class Resolved:
    """A request that can be carried out: what it comes to before anything starts.

    `named` are the attacks that were asked for, `attacks` those that apply, `left_out` the others and why; `notes` is
    what a person should know.
    """

    world: World
    named: dict[str, Attack]
    attacks: dict[str, Attack]
    left_out: dict[str, str]
    canaries: CanaryWatch
    notes: list[str]


def resolve_run(config: Config) -> Resolved:
    """Everything that is looked at before a run starts; BadRequest where something cannot be. Writes nothing."""
    named = choose_attacks(config)
    arming_attack(named)
    check_names(config)
    world = build_world(config)
    check_defenses(world.scenario)
    cost.require_memory(config, world)

    def check(_: str, attack: Attack) -> None:
        EXPERIMENTS.get(attack.family).check(config, world)
        cost.refuse_too_large(config, world, attack)

    canaries = CanaryWatch(config, world)
    facts, forgotten = known_facts(config, world), config.unlearning.forgotten
    attacks, left_out = applicable(named, world.scenario, facts, check, empty=forgotten)
    notes = [world.shift] if world.shift else []
    notes += [
        *check_model(config, world),
        *(ForgottenExperiment.notes(config, world) if forgotten else ()),
        *(f"{name} is left out: {text}" for name, text in left_out.items()),
        *cost.notes(config, world, attacks),
    ]
    return Resolved(world, named, attacks, left_out, canaries, notes)


@hushed(logging.ERROR)  # a run has its own progress bars and table; Flower's lines would say the same again
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
    console
        Where progress and the table go; None: nowhere.
    command
        The command line, for the report.
    federate
        What trains, called like :func:`simulations.engine.federation.run_federation`.

    Raises
    ------
    BadRequest
        If the request cannot be carried out as it was put.
    RunFailed
        If a run that had started could not be finished.
    """
    console = console or Console(quiet=True)
    if federate is run_federation:
        check_flower()
    asked = resolve_run(config)
    world, named, attacks, left_out = asked.world, asked.named, asked.attacks, asked.left_out
    canaries, forgotten, notes = asked.canaries, config.unlearning.forgotten, asked.notes
    sitting = config.attack.model_copy(update={"names": tuple(attacks)})
    rounds: list[RoundRecord] = []
    scored: dict[str, AuditResult] = {}
    failed: dict[str, BaseException] = {}
    ended: RunFailed | None = None
    with open_run_folder(config, console) as (folder, shown), ExitStack() as stack:
        generators = Generators(config, world, folder)
        folder.save_part("world", world_record(world))
        for note in notes:
            shown.say(note, folder)
        plan = Plan(config.model_copy(update={"attack": sitting}), world, folder, shown)
        experiments = list(open_experiments(plan, attacks))
        if forgotten:
            experiments.append(ForgottenExperiment.beside(experiments, plan, named))
        for experiment in experiments:
            stack.callback(experiment.close)
        try:
            federation = _train(plan, experiments, attacks, federate, rounds, canaries, generators)
        except RunFailed as error:  # what was seen until then can be told
            ended = error
            federation = FederationResult({}, rounds, [])
            experiments = [one for one in experiments if one.from_saved is not None]
        for experiment in experiments:
            try:
                experiment.collect()
                scored |= experiment.audit(federation)
                failed |= experiment.failed
            except Exception as error:
                failed |= dict.fromkeys(experiment.attacks, error)
        late = [f"{name} failed: {reason(error)}" for name, error in failed.items()]
        late += [f"the federation ended after round {len(rounds)}: {ended}"] if ended else []
        if not scored and (ended or failed):
            first = next(iter(failed.values()), None)
            raise ended or (first if isinstance(first, FedattackError) else RunFailed(late[0])) from first
        for note in late:
            shown.say(note, folder)
    results = with_threats(scored, attacks, world.scenario, world.auxiliary)
    figures = federation_figures(config, world, federation)
    measured = canaries.audit(federation.rounds)
    if measured is not None:
        figures["canaries"] = measured.record()
    notes = [*([world.dataset.note] if world.dataset.note else []), *notes, *late]
    more: dict[str, Any] = {"label_counts": label_counts(world), "canaries": measured}
    made = generators.finish("; ".join(f"{n}: {one['text']}" for n, one in figures["privacy"].items()))
    if made is not None:
        more["generated"] = made.images
        if made.diversity is not None:
            figures["generator"] = dataclasses.asdict(made.diversity)
            figures["images of the generator"] = made.diversity.text
            notes += [f"warning: {made.diversity.text}"] if made.diversity.collapsed else []
    more["notes"] = notes
    summary = report(console, folder, results, figures, command, left_out, **more)
    for name, account in figures["privacy"].items():
        tell(console, "", name, account["text"])
    if measured is not None:
        console.print(Text(measured.text, style="bold red" if measured.broken else ""))
    if made is not None:
        told = "" if made.diversity is None else made.diversity.text
        tell(console, "generator", made.path, told)
    if ended is not None:
        raise ended
    answers = {name: one for experiment in experiments for name, one in experiment.answers().items()}
    return RunResult(folder.path, federation, {one.attack: one for one in results}, answers, summary)


def attack_folder(
    directory: Path,
    config: Config,
    *,
    console: Console | None = None,
    truth: Path | None = None,
    command: str = "",
) -> RunResult:
    """Attack saved observations, without the federation; score the answers where the truth is given.

    `directory` is an ``observations`` folder of a run, or the run folder itself, `truth` a ``truth`` folder. Of
    `config` attacks, seed, engine and output are used. Raises BadRequest where there are no observations, or an
    attack does not apply to them.
    """
    console = console or Console(quiet=True)
    named = attackable(config)
    if truth is not None and not truth.is_dir():
        raise DataError(
            f"--truth {str(truth)!r}: there is no such folder; accepted: the folder truth of a run"
        )
    inner = directory / "observations"
    saved = inner if inner.is_dir() else directory
    numbers = observed_rounds(saved)
    attacks, left_out = named, dict[str, str]()
    for number in numbers:  # all are read once before anything starts, one round at a time
        first = read_observations(saved, number)[0]
        public = first.auxiliary
        facts = Facts(
            rounds=(number,),
            auxiliary=0 if public is None else len(public),
            labelled=None if public is None else public.labels is not None,
            references=config.attack.references,
        )
        attacks, more = applicable(attacks, first.scenario, facts)
        left_out |= more
    notes = [f"{name} is left out: {text}" for name, text in left_out.items()]
    scored: dict[str, AuditResult] = {}
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, BaseException] = {}
    with open_run_folder(config, console) as (folder, shown), ExitStack() as stack:
        told = {"folder": str(saved.resolve())}
        if (earlier := folder.load_part("observations")) not in (None, told):
            what = f"holds attacks on {dict(earlier or {}).get('folder')}; give another folder"
            raise ConfigError(f"setting 'output.run_dir' = {str(folder.path)!r}: {what}")
        folder.save_part("observations", told)
        for note in notes:
            shown.say(note, folder)
        works: list[SavedWork] = []
        for family, chosen in by_family(attacks).items():
            opened = EXPERIMENTS.get(family).from_saved
            assert opened is not None
            works.append(opened(config, folder, chosen, shown, saved, truth))
            stack.callback(works[-1].close)
        for number in numbers:
            batch = read_observations(saved, number)
            for work in works:
                work.submit(batch)
        for work in works:
            work.collect()
            answers |= work.answers()
            scored |= work.audit() if truth is not None else {}
            failed |= work.failed
        late = [f"{name} failed: {reason(error)}" for name, error in failed.items()]
        if failed and len(failed) == len(attacks):
            error = next(iter(failed.values()))
            raise error if isinstance(error, FedattackError) else RunFailed(late[0]) from error
        for note in late:
            shown.say(note, folder)
    results = with_threats(scored, attacks, first.scenario, first.auxiliary)
    if results:
        summary = report(console, folder, results, None, command, left_out, notes=[*notes, *late])
    else:
        write_answers(folder, answers)
        threats = {
            name: threat_model(one, one.needs_now(first.scenario), bool(first.auxiliary))
            for name, one in attacks.items()
        }
        page = write_answers_page(folder, answers, threats, notes=[*notes, *late], command=command)
        left = " and ".join(dict.fromkeys(work.left for work in works))
        print_answers(console, answer_rows(answers))
        tell(console, f"nothing is scored without --truth; {left} of", folder.path)
        tell(console, "report", page)
        summary = summary_document(config, results, None, left_out)
        folder.close()
    audits = {result.attack: result for result in results}
    return RunResult(folder.path, None, audits, answers, summary)


def attackable(config: Config) -> dict[str, Attack]:
    """The configured attacks, built; ConfigError where one needs more than what a server saw."""
    named = choose_attacks(config)
    choose_device(config.engine.device)
    if not named:
        raise ConfigError("setting 'attack.names' is empty: name one, for example --attack hcgla")
    for name, attack in named.items():
        if EXPERIMENTS.get(attack.family).from_saved is None or isinstance(attack, MaliciousClient):
            what = "needs a running federation; what a server saw can be attacked later"
            raise ConfigError(f"attack {name!r} {what}")
    return named


@contextmanager
def open_run_folder(config: Config, console: Console) -> Iterator[tuple[RunFolder, Stages]]:
    """The run's folder, with its log, the Ray session that the engine needs, and the progress bars."""
    folder = RunFolder.create(run_directory(config), config)
    tell(console, "run folder", folder.path)
    session = ray_session(config.engine) if config.engine.name == "ray" else nullcontext()
    try:
        with logging_to(folder), session, stages(console) as shown:
            yield folder, shown
    except KeyboardInterrupt as ended:
        raise Interrupted(folder.path) from ended


def with_threats(
    scored: Mapping[str, AuditResult],
    attacks: Mapping[str, Attack],
    scenario: Scenario,
    public: Auxiliary | None,
) -> list[AuditResult]:
    """What was scored, in the order of the attacks, each with its threat model; then what is no attack's alone."""
    threats = {n: threat_model(one, one.needs_now(scenario), bool(public)) for n, one in attacks.items()}
    found = [replace(scored[name], threat=threats[name]) for name in attacks if name in scored]
    return [*found, *(result for name, result in scored.items() if name not in attacks)]


def report(
    console: Console,
    folder: RunFolder,
    results: Sequence[AuditResult],
    figures: Mapping[str, Any] | None,
    command: str,
    left_out: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Write the report, give the folder back, show the table and where the report is; ``summary.json``'s content."""
    write_results(folder, results, figures, command=command, left_out=left_out, **more)
    folder.close()
    print_summary(console, results, figures)
    tell(console, "report", folder.path / "report.html")
    return dict(read_json(folder.path / "summary.json"))


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


def _train(
    plan: Plan,
    experiments: Sequence[Experiment],
    attacks: Mapping[str, Attack],
    federate: Callable[..., FederationResult],
    rounds: list[RoundRecord],
    canaries: CanaryWatch,
    generators: Generators,
) -> FederationResult:
    """Train; hand each round's observations to those who look while the rounds go on, and note the rounds."""
    total = plan.config.federation.rounds

    def observed(observation: Observation) -> None:
        for experiment in experiments:
            if experiment.wants(observation.round, observation.client):
                experiment.observe(observation)
        if canaries.canaries is not None:
            canaries.observe(observation)

    def after_round(record: RoundRecord) -> None:
        rounds.append(record)
        for client, why in (*record.rejected, *record.failed):
            plan.folder.log(f"round {record.round}: reply of client {client} not used: {why}")
        accuracy = _figures_of(record)
        if generators.watches and record.loss is not None:
            accuracy = f", {task_of(plan.world.scenario).called[0]} {formats.compact(record.loss)}"
        plan.folder.log(f"round {record.round}: {len(record.clients)} clients{accuracy}")
        plan.shown("federation", record.round / total, f"round {record.round} of {total}{accuracy}")
        canaries.after_round(record)
        for experiment in experiments:
            experiment.after_round(record)

    def pretrained(record: RoundRecord) -> None:
        earlier.append(record)
        count, planned = len(earlier), plan.config.federation.pretrain
        text = f"round {count} of {planned} before round 1{_figures_of(record)}"
        plan.folder.log(text)
        plan.shown("pretraining", count / planned, text)
        if count == planned:
            plan.shown.say(f"{TRAINED_BEFORE}: {trained_before(earlier)}", plan.folder)
            plan.shown("federation", 0.0, f"round 1 of {total}")

    def global_model(round: int, weights: dict[str, Tensor]) -> None:
        generators.after_round(round, weights)
        for experiment in experiments:
            experiment.global_model(round, weights)

    def requested(requests: DeletionRequests) -> None:
        for experiment in experiments:
            experiment.requests(requests)

    def released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for experiment in experiments:
            weights = experiment.release(weights)
        return weights

    clients = any(isinstance(attack, MaliciousClient) for attack in attacks.values())
    questions = {name: asked for one in experiments for name, asked in one.questions().items()}
    arming = arming_attack(attacks)
    earlier: list[RoundRecord] = []
    if plan.config.federation.pretrain:
        plan.shown("pretraining", 0.0, f"{plan.config.federation.pretrain} rounds before round 1")
    else:
        plan.shown("federation", 0.0, f"round 1 of {total}")

    def looked_at(round: int, client: int) -> bool:
        return canaries.canaries is not None or any(one.wants(round, client) for one in experiments)

    if kept := kept_bytes(plan.config, plan.world, looked_at):
        what = f"replies that are looked at again take up to {formats.count(kept >> 20)} MiB of the journal"
        plan.shown.say(what, plan.folder)
    return federate(
        plan.config,
        plan.world,
        run_dir=plan.folder.path,
        on_observation=observed,
        observe=looked_at,
        on_round=after_round,
        on_pretrained=pretrained,
        on_weights=global_model,
        on_requests=requested if clients else None,
        release=released,
        arming=arming,
        candidates=next((questions.get(name) for name, attack in attacks.items() if attack is arming), None),
        questions={n: asked for n, asked in questions.items() if isinstance(attacks[n], MaliciousClient)},
        identity=plan.folder.identity,
        weights_again=lambda round: (
            generators.again(round) or any(one.weights_again(round) for one in experiments)
        ),
    )


def _figures_of(record: RoundRecord) -> str:
    """A round's accuracy, where it is known, to stand behind its number."""
    return "" if record.accuracy is None else f", accuracy {record.accuracy:.1%}"


def federation_figures(config: Config, world: World, federation: FederationResult) -> dict[str, Any]:
    """The federation as the report and ``summary.json`` show it."""
    figures = ("round", "loss", "accuracy", "train_loss", "wire_bytes", "seconds")
    rounds = [
        {name: getattr(record, name) for name in figures}
        | {name: len(getattr(record, name)) for name in ("failed", "rejected", "dropped")}
        | {"answered": len(record.clients)}
        for record in federation.rounds
    ]
    refused = [
        {"round": record.round, "client": client, "reason": reason}
        for record in federation.rounds
        for client, reason in (*record.rejected, *record.failed)
    ]
    auxiliary = world.auxiliary
    privacy = privacy_record(privacy_accounts(config, world, federation.all_rounds))
    return {
        "data set": world.dataset.name,
        CHECKSUM: data_checksum(world),
        "clients": config.federation.clients,
        "samples of all clients": int(sum(map(len, world.partitions))),
        "held-out samples": len(world.pools.nonmembers),
        "auxiliary images granted": 0 if auxiliary is None else len(auxiliary),
        "auxiliary source": "none" if auxiliary is None else auxiliary.source,
        "partition": config.partition.name,
        "strategy": config.federation.strategy,
        **(pretraining(federation.pretraining) if config.federation.pretrain else {}),
        "defences": ", ".join(config.defense.names) or "none",
        **{f"guarantee of {name}": account["text"] for name, account in privacy.items()},
        "privacy": privacy,
        "called": dict(zip(("loss", "train_loss"), task_of(world.scenario).called, strict=True)),
        "rounds": rounds,
        "rejections": refused,
    }


def pretraining(rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """How the rounds before round 1 ended, as figures and in words."""
    last = rounds[-1] if rounds else None
    figures = {"loss": last and last.loss, "accuracy": last and last.accuracy}
    return {TRAINED_BEFORE: trained_before(rounds), "pretraining": {"rounds": len(rounds), **figures}}


def trained_before(rounds: Sequence[RoundRecord]) -> str:
    """What the rounds before round 1 came to, in words."""
    if not rounds:
        return "not to its end"
    last = rounds[-1]
    known = [("loss", last.loss, formats.compact), ("accuracy", last.accuracy, formats.percent)]
    figures = [f"{name} {shown(value)}" for name, value, shown in known if value is not None]
    count = len(rounds)
    held_out = f": {', '.join(figures)} on held-out samples" if figures else ""
    return f"{count} round{'s' if count > 1 else ''}{held_out}"


def data_checksum(world: World) -> str:
    """SHA-256 of all images and labels that clients were dealt, client by client, in words."""
    digest, dataset = hashlib.sha256(), world.dataset
    for ids in world.partitions:
        for start in range(0, len(ids), _AT_ONCE):
            digest.update(np.ascontiguousarray(dataset.images[ids[start : start + _AT_ONCE]]).data)
        digest.update(np.ascontiguousarray(dataset.labels[ids]).data)
    return f"SHA-256 {digest.hexdigest()}, of the clients' images and labels"


def label_counts(world: World) -> dict[int, dict[int, int]]:
    """Client -> label -> samples, of the clients' partitions."""
    labels = world.dataset.labels
    return {client: dict(Counter(labels[ids].tolist())) for client, ids in enumerate(world.partitions)}
