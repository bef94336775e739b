"""Attacks on synthetic data and the generators it comes from: a file each."""
