"""Experiments: what the auditor prepares and asks."""
