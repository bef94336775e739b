"""Attacks that solve for the images exactly."""
