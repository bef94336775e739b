"""Which attacks sit in a run, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adversaries import ATTACKS, Attack, build_attack
from adversaries.base import attack_options
from adversaries.seats import MaliciousServer
from fedattack.compression import COMPRESSORS
from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import hides_clients
from fedattack.errors import ConfigError, NotApplicable, unknown_name
from fedattack.models import dry_run
from fedattack.task import TASKS
from fedattack.training import batch_positions
from fedattack.unlearning import build_mechanism
from simulations.experiments.executor import choose_device
from strategies import NEED_SINGLE_UPDATES, build_strategy

_DRY_IMAGES = 16
"""Of larger batches so many images tell enough."""


def choose_attacks(config: Config) -> dict[str, Attack]:
    """The configured attacks, built and ready.

    Raises
    ------
    ConfigError
        If a name or a parameter is unknown, or an attack's parameters are given without the attack.
    """
    classes = {name: ATTACKS.get(name) for name in config.attack.names}
    for name in config.attack.options:
        if name not in classes:
            if name not in ATTACKS:
                raise unknown_name("section or attack", name, [*ATTACKS.names(), *Config.model_fields])
            raise ConfigError(f"parameters of {name!r} are set, but it is not in setting 'attack.names'")
    known = {option for cls in classes.values() for option in attack_options(cls)}
    for option in config.attack.shared_options:
        if option not in known:
            raise unknown_name("setting", f"attack.{option}", [f"attack.{one}" for one in known])
    return {
        name: build_attack(cls, name, config.attack.options.get(name, {}), config.attack.shared_options)
        for name, cls in classes.items()
    }


def applicable(
    attacks: Mapping[str, Attack], checks: Sequence[Callable[[str, Attack], None]]
) -> tuple[dict[str, Attack], dict[str, str]]:
    """The attacks that pass all `checks`, and of the others why not.

    Raises
    ------
    NotApplicable
        If there are attacks and none applies.
    """
    kept: dict[str, Attack] = {}
    left_out: dict[str, str] = {}
    for name, attack in attacks.items():
        try:
            for check in checks:
                check(name, attack)
        except NotApplicable as error:
            left_out[name] = str(error)
        else:
            kept[name] = attack
    if left_out and not kept:
        sentences = [text if name in text else f"attack {name!r}: {text}" for name, text in left_out.items()]
        raise NotApplicable("; ".join(sentences))
    return kept, left_out


def arming_attack(attacks: Mapping[str, Attack]) -> MaliciousServer | None:
    """The one attack that needs the server to send other weights; None where the server stays honest.

    Raises
    ------
    ConfigError
        If there are two: a round carries one model.
    """
    arming = {n: a for n, a in attacks.items() if isinstance(a, MaliciousServer)}
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
    TASKS.get(config.training.task)
    build_mechanism(config.unlearning)
    if hides_clients(config.defense) and config.federation.strategy in NEED_SINGLE_UPDATES:
        raise NotApplicable(
            f"setting 'federation.strategy' = {config.federation.strategy!r} looks at single updates, which "
            "'secure-aggregation' hides; use fedavg, fedprox or a server optimiser"
        )
    choose_device(config.engine.device)


def check_model(config: Config, world: World) -> list[str]:
    """Run the named model once, dry, on the largest and the smallest batch of a client; what to know of it.

    Raises
    ------
    BadRequest
        If no client can train it.
    """
    sizes = {
        min(len(batch), _DRY_IMAGES)
        for count in {len(part) for part in world.partitions} - {0}
        for batch in batch_positions(count, config.training, config.seed, 1, 0)
    }
    facts = world.scenario.model, config.training.batch_norm, config.seed
    notes = dry_run(max(sizes), *facts)
    if min(sizes) < max(sizes):
        try:
            dry_run(min(sizes), *facts)
        except ConfigError as error:
            notes.append(str(error))
    return notes


def check_held_out(config: Config, world: World, name: str) -> None:
    """Refuse an attack that is measured on held-out samples where there are none.

    Raises
    ------
    NotApplicable
    """
    if not len(world.pools.nonmembers):
        raise NotApplicable(
            f"attack {name!r} needs held-out samples: setting 'data.nonmembers' = {config.data.nonmembers}; "
            "accepted: 1 or more"
        )
