"""Attacks from the seat of a client, which sees the global models it is sent."""
