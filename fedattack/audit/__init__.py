"""The auditor: the only one who knows the truth. Scores, floors and verdicts, a file per family."""

from __future__ import annotations

from fedattack.audit.family import AuditResult
from fedattack.audit.membership import audit_membership
from fedattack.audit.reconstruction import audit_reconstruction
from fedattack.audit.unlearning import audit_unlearning

__all__ = ["AuditResult", "audit_membership", "audit_reconstruction", "audit_unlearning"]
