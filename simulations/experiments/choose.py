"""Which attacks sit in a run, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping

from adversaries import ATTACKS, Attack, ReconstructionAttack
from adversaries.needs import Facts
from adversaries.refusals import check_class
from fedattack.compression import COMPRESSORS
from fedattack.config import AttackConfig, Config
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable
from fedattack.registry import build_plugins
from fedattack.unlearning import MECHANISMS
from simulations.experiments.base import EXPERIMENTS
from simulations.experiments.executor import choose_device
from strategies import NEED_SINGLE_UPDATES, build_strategy, drawn


def choose_attacks(config: Config) -> dict[str, Attack]:
    """The configured attacks, built and ready.

    Raises
    ------
    ConfigError
        If a name or a parameter is unknown, or an attack's parameters are given without the attack.
    """
    chosen = config.attack
    for name in chosen.names:
        check_class(name, ATTACKS.get(name), AttackConfig.model_fields, EXPERIMENTS.names())
    return build_plugins(ATTACKS, chosen.names, chosen.options, chosen.shared_options, "attack")


def arming_attack(attacks: Mapping[str, Attack]) -> ReconstructionAttack | None:
    """The one attack that needs the server to send other weights; None where the server stays honest.

    Raises
    ------
    ConfigError
        If there are two: a round carries one model.
    """
    arming = {n: a for n, a in attacks.items() if isinstance(a, ReconstructionAttack) and a.arms}
    if len(arming) > 1:
        raise ConfigError(
            f"setting 'attack.names' = {', '.join(attacks)}: {' and '.join(arming)} each send weights of their own; "
            "run them one at a time"
        )
    return next(iter(arming.values()), None)


def check_names(config: Config) -> None:
    """Refuse unknown names and devices before anything is read.

    Raises
    ------
    BadRequest
    """
    build_strategy(config.federation, config.training.learning_rate)
    COMPRESSORS.get(config.compression.name)
    MECHANISMS.get(config.unlearning.mechanism)
    if hides_clients(config.defense) and config.federation.strategy in NEED_SINGLE_UPDATES:
        raise NotApplicable(
            f"setting 'federation.strategy' = {config.federation.strategy!r} looks at single updates, which "
            "'secure-aggregation' hides; use fedavg, fedprox or a server optimiser"
        )
    choose_device(config.engine.device)


__all__ = ["choose_attacks"]


def known_facts(config: Config, world: World) -> Facts:
    """What attacks may ask of the federation before it trains."""
    granted = world.auxiliary
    return Facts(
        rounds=config.attack.rounds,
        clients=config.federation.clients,
        drawn=drawn(config.federation),
        samples=tuple(len(ids) for ids in world.partitions[: config.victims]),
        held_out=len(world.pools.nonmembers),
        auxiliary=0 if granted is None else len(granted),
        labelled=None if granted is None else granted.labels is not None,
    )
