"""The auditor: the only one who knows the truth. Scores, floors and verdicts, a file per family.

Called, ``fedattack.audit(...)`` is the front door's function of that name.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from fedattack.audit.family import FAMILIES, AuditResult, Family, get_family, headline
from fedattack.audit.forgotten import audit_forgotten
from fedattack.audit.membership import audit_membership
from fedattack.audit.reconstruction import audit_reconstruction
from fedattack.audit.unlearning import audit_unlearning


class _Called(ModuleType):
    """A package whose name is a function's, too."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("fedattack").audit_update(*args, **options)


sys.modules[__name__].__class__ = _Called

__all__ = [
    "FAMILIES",
    "AuditResult",
    "Family",
    "audit_forgotten",
    "audit_membership",
    "audit_reconstruction",
    "audit_unlearning",
    "get_family",
    "headline",
]
