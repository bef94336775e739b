"""Attacks that search for images whose gradient is the one that was sent."""
