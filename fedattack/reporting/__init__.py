"""Reporting: terminal, figures, templates, the page."""
