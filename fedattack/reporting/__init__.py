"""Reporting: the auditor, run folders and stored observations. Figures and the report are in modules of their own."""

from __future__ import annotations

from fedattack.reporting.auditor import audit_membership, audit_reconstruction, audit_unlearning
from fedattack.reporting.observation_store import load_observations, load_truths, save_observation, save_truth
from fedattack.reporting.results import AuditResult
from fedattack.reporting.run_folder import RunFolder

__all__ = [
    "AuditResult",
    "RunFolder",
    "audit_membership",
    "audit_reconstruction",
    "audit_unlearning",
    "load_observations",
    "load_truths",
    "save_observation",
    "save_truth",
]
