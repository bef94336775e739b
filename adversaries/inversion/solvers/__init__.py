"""Numerical solvers, which know no domain; torch only."""
