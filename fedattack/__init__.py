"""A federated-learning simulator with pluggable adversaries.

:func:`invert` rebuilds images from an update of your own model, :func:`audit` scores that against the truth,
:func:`simulate` trains and attacks a whole federation on your own model and data. The command: ``fedattack --help``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedattack.config import Config
    from fedattack.errors import BadRequest, FedattackError, RunFailed
    from fedattack.observation import Reconstruction
    from simulations.flower_app import eavesdrop, run_flower_app
    from simulations.front_door import Audit, Inversion, audit, invert, simulate
    from simulations.pipeline import RunResult

    __version__: str

_FROM = {
    "invert": "simulations.front_door",
    "simulate": "simulations.front_door",
    "Inversion": "simulations.front_door",
    "Audit": "simulations.front_door",
    "RunResult": "simulations.pipeline",
    "eavesdrop": "simulations.flower_app",
    "run_flower_app": "simulations.flower_app",
    "Config": "fedattack.config",
    "Reconstruction": "fedattack.observation",
    "FedattackError": "fedattack.errors",
    "BadRequest": "fedattack.errors",
    "RunFailed": "fedattack.errors",
}
"""Public name -> module that has it, imported when it is asked for."""

__all__ = [
    "Audit",
    "BadRequest",
    "Config",
    "FedattackError",
    "Inversion",
    "Reconstruction",
    "RunFailed",
    "RunResult",
    "__version__",
    "audit",
    "eavesdrop",
    "invert",
    "run_flower_app",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fedattack.version import fedattack_version

        return fedattack_version()
    if name == "audit":  # the auditor's room, which can be called
        return importlib.import_module("fedattack.audit")
    if name not in _FROM:
        raise AttributeError(f"module 'fedattack' has no attribute {name!r}")
    found = getattr(importlib.import_module(_FROM[name]), name)
    globals()[name] = found
    return found


def audit_update(*args: Any, **options: Any) -> Any:
    """What ``fedattack.audit(...)`` calls, for that name is the auditor's room as well."""
    return importlib.import_module("simulations.front_door").audit(*args, **options)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
