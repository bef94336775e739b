"""Clients that train on samples of their own making, and have them forgotten."""
