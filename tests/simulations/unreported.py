"""A run as ``simulations.pipeline.simulate`` carries it out, but for the report, which costs more than the rest."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from fedattack.audit import AuditResult
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.storage import RunFolder
from simulations.engine.federation import FederationResult, run_federation
from simulations.experiments.base import Plan
from simulations.experiments.choose import choose_attacks
from simulations.experiments.membership import MembershipExperiment
from simulations.experiments.privacy import CanaryWatch
from simulations.generators import Generators
from simulations.pipeline import _train, logging_to
from simulations.progress import stages


def audited(
    config: Config,
    console: Console | None = None,
    federate: Callable[..., FederationResult] = run_federation,
) -> dict[str, AuditResult]:
    """The audits of the membership attacks of an inline run."""
    folder = RunFolder.create(config.output.run_dir, config)
    attacks = choose_attacks(config)
    with logging_to(folder), stages(console or Console(quiet=True)) as shown:
        plan = Plan(config, build_world(config), folder, shown)
        found = MembershipExperiment(plan, attacks)
        beside = CanaryWatch(config, plan.world), Generators(config, plan.world, folder)
        federation = _train(plan, [found], attacks, federate, [], *beside)
        found.collect()
        audits = found.audit(federation)
        for name, error in found.failed.items():
            shown.say(f"{name} failed: {error}", folder)
        return audits
