"""The auditor: the only one who knows the truth. Scores, floors and verdicts, a file per family."""

from __future__ import annotations

from fedattack.audit.family import FAMILIES, AuditResult, Family, get_family, headline
from fedattack.audit.forgotten import audit_forgotten
from fedattack.audit.membership import audit_membership
from fedattack.audit.reconstruction import audit_reconstruction
from fedattack.audit.unlearning import audit_unlearning

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
