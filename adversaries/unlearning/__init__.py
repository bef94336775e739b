"""Clients that choose what the server must forget."""
