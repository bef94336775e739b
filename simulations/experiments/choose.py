"""Which attacks sit in a run, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping

from adversaries import ATTACKS, Attack
from adversaries.needs import Facts
from adversaries.refusals import check_class
from adversaries.seats import MaliciousServer
from fedattack.compression import COMPRESSORS
from fedattack.config import AttackConfig, Config
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import ready_metrics
from fedattack.models import dry_run, hopeless
from fedattack.models.live import PREFIX
from fedattack.registry import build_plugins
from fedattack.task import TASKS, task_of
from fedattack.training import batch_positions
from fedattack.unlearning import build_mechanism
from fedattack.unlearning.gates import build_gates
from simulations.client_app import no_proximal_term
from simulations.experiments.base import EXPERIMENTS
from simulations.experiments.executor import choose_device
from strategies import NEED_SINGLE_UPDATES, build_strategy, drawn

_DRY_IMAGES = 16
"""Of larger batches so many images tell enough."""


def choose_attacks(config: Config) -> dict[str, Attack]:
    """The configured attacks, built and ready."""
    chosen = config.attack
    for name in chosen.names:
        check_class(name, ATTACKS.get(name), AttackConfig.model_fields, EXPERIMENTS.names())
    return build_plugins(ATTACKS, chosen.names, chosen.options, chosen.shared_options, "attack")


def arming_attack(attacks: Mapping[str, Attack]) -> MaliciousServer | None:
    """The one attack that needs the server to send other weights, None where it stays honest; two are refused."""
    arming = {n: a for n, a in attacks.items() if isinstance(a, MaliciousServer)}
    if len(arming) > 1:
        raise ConfigError(
            f"setting 'attack.names' = {', '.join(attacks)}: {' and '.join(arming)} each send weights of their own; "
            "run them one at a time"
        )
    return next(iter(arming.values()), None)


def check_names(config: Config) -> None:
    """Refuse unknown names and devices before anything is read."""
    if config.model.name.startswith(PREFIX) and config.engine.name != "inline":
        raise ConfigError(
            f"setting 'engine.name' = {config.engine.name!r}: model {config.model.name!r} is known in this process "
            "alone; use --engine inline, or a model in a module that can be imported, as package.module:Class"
        )
    build_strategy(config.federation, config.training.learning_rate)
    COMPRESSORS.get(config.compression.name)
    TASKS.get(config.training.task)
    build_mechanism(config.unlearning)
    build_gates(config.gates)
    ready_metrics(config.metric)
    if hides_clients(config.defense) and config.federation.strategy in NEED_SINGLE_UPDATES:
        raise NotApplicable(
            f"setting 'federation.strategy' = {config.federation.strategy!r} looks at single updates, which "
            "'secure-aggregation' hides; use fedavg, fedprox or a server optimiser"
        )
    choose_device(config.engine.device)


def check_model(config: Config, world: World) -> list[str]:
    """Run the named model once, dry, on the largest and the smallest batch of a client; what to know of it."""
    sizes = {
        min(len(batch), _DRY_IMAGES)
        for count in {len(part) for part in world.partitions} - {0}
        for batch in batch_positions(count, config.training, config.seed, 1, 0)
    }
    task = task_of(world.scenario)
    task.check(world.scenario)
    if config.federation.strategy == "fedprox" and not task.proximal:
        raise ConfigError(no_proximal_term(config))
    notes = dry_run(max(sizes), world.scenario, config.seed)
    notes += _check_training(config, world)
    if min(sizes) < max(sizes):
        try:
            dry_run(min(sizes), world.scenario, config.seed)
        except ConfigError as error:
            notes.append(str(error))
    return notes


def _check_training(config: Config, world: World) -> list[str]:
    """Refuse to train first what cannot be trained; else say so."""
    rounds, pretrain = config.federation.rounds, config.federation.pretrain
    trains = rounds + pretrain > 1 or world.scenario.training.local_steps > 1
    if not (why := hopeless(world.scenario, config.seed, trains)):
        return []
    if pretrain:
        raise ConfigError(f"setting 'federation.pretrain' = {pretrain}: {why}")
    return [f"warning: {why.partition('; accepted: ')[0]}; what can be: {why.partition('; accepted: ')[2]}"]


def known_facts(config: Config, world: World) -> Facts:
    """What attacks may ask of the federation before it trains."""
    granted, mechanism = world.auxiliary, build_mechanism(config.unlearning)
    return Facts(
        rounds=config.attack.rounds,
        clients=config.federation.clients,
        drawn=drawn(config.federation),
        samples=tuple(len(ids) for ids in world.partitions[: config.victims]),
        honest=config.federation.clients - len(set(config.attack.malicious_clients)),
        held_out=len(world.pools.nonmembers),
        auxiliary=0 if granted is None else len(granted),
        labelled=None if granted is None else granted.labels is not None,
        references=config.attack.references,
        people=config.attack.unit == "group",
        foreign=not mechanism.by_positions,
        certificate=mechanism.certifies,
        calibrates=mechanism.runs == "server",
    )
