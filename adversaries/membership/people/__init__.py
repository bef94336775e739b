"""Attacks that ask about people, by samples of theirs that nobody trained on."""
