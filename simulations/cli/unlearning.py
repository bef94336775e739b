"""The sub-commands of `fedattack unlearning`: auditing what mechanisms leave of forgotten samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from fedattack.config import AttackConfig, Config, UnlearningConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError
from fedattack.registry import plugin_options
from fedattack.unlearning import MECHANISMS, build_mechanism
from fedattack.unlearning.mechanism import Mechanism
from simulations.experiments.shadows import NONE, Counts, ShadowAudit, chosen_targets, make_design
from simulations.pipeline import open_run_folder, report, run_directory


def run_audit(config: Config, mechanisms: str, counts: Counts, console: Console, command: str) -> None:
    """Train shadow models, have each mechanism forget, and write the report."""
    _check(config, counts)
    chosen = named(config.unlearning, [name.strip() for name in mechanisms.split(",") if name.strip()])
    world = build_world(config)
    design = make_design(config, world, counts, chosen_targets(config, world, counts))
    trainings = ShadowAudit(config, world, design, chosen)
    called = config.model_copy(update={"attack": AttackConfig(names=("forgetting-audit",))})
    output = config.output.model_copy(update={"run_dir": str(run_directory(called))})
    config = config.model_copy(update={"output": output})
    asked = {"mechanism": mechanisms} | {name: str(value) for name, value in asdict(counts).items()}
    with open_run_folder(config, console) as (folder, shown):
        if (earlier := folder.load_part("asked")) not in (None, asked):
            raise ConfigError(
                f"setting 'output.run_dir' = {config.output.run_dir!r}: holds an audit of {earlier}; give another one"
            )
        folder.save_part("asked", asked)
        results = trainings.audit(shown)
    about = (
        f"{counts.shadows} shadow trainings of {world.scenario.model.name} on {world.dataset.name}: "
        f"{counts.retained} samples that all have, {counts.targets} targets and {counts.probes} probes by coins, "
        f"{config.federation.rounds} rounds of {world.scenario.training.local_steps} steps, seed {config.seed}"
    )
    heading = "What is left of forgotten samples?"
    report(console, folder, results, None, command, {}, about=about, heading=heading)


def named(config: UnlearningConfig, names: Sequence[str]) -> dict[str, Mechanism | None]:
    """The mechanisms of these names with their settings; "none" is None.

    ConfigError for a name that is unknown or given twice, or a setting that none of them has.
    """
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"setting '--mechanism' = {','.join(names)!r}: name each mechanism once")
    known = {name: MECHANISMS.get(name) for name in names if name != NONE}
    for other in config.options.keys() - known.keys():
        raise ConfigError(f"setting 'unlearning.{other}': is not audited; name it in --mechanism")
    fields = {name: plugin_options(cls).keys() for name, cls in known.items()}
    for option in config.shared_options.keys() - set().union(*fields.values()):
        raise ConfigError(f"setting 'unlearning.{option}': none of {', '.join(known)} has it")
    built: dict[str, Mechanism | None] = {}
    for name in names:
        if name == NONE:
            built[name] = None
            continue
        shared = {key: value for key, value in config.shared_options.items() if key in fields[name]}
        own = {key: value for key, value in config.options.items() if key == name}
        built[name] = build_mechanism(
            config.model_copy(update={"mechanism": name, "options": own, "shared_options": shared})
        )
    return built


def _check(config: Config, counts: Counts) -> None:
    """Refuse (ConfigError) what shadow trainings of one holder of data do not have."""
    if config.federation.clients != 1:
        raise ConfigError(
            f"setting 'federation.clients' = {config.federation.clients}: shadow models have one holder of data; "
            "accepted: 1"
        )
    if config.defense.names:
        raise ConfigError(
            f"setting 'defense.names' = {', '.join(config.defense.names)!r}: shadow models are trained without "
            "defences; leave it open"
        )
    if config.compression.name != "none":
        raise ConfigError(
            f"setting 'compression.name' = {config.compression.name!r}: one holder of data sends nothing; accepted: "
            "none"
        )
    if counts.shadows < 16 or min(counts.targets, counts.retained, counts.probes) < 2:
        raise ConfigError(
            f"{counts.shadows} shadows, {counts.targets} targets, {counts.retained} retained, {counts.probes} "
            "probes: at least 16 shadows and 2 of each other are needed"
        )
