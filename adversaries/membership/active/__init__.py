"""Membership attacks that change what is trained."""
