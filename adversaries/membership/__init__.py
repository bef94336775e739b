"""Attacks that tell which samples a client trained on."""
