"""Classifiers, and the layers that they share."""
