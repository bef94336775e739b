"""Black-box attacks: they read a model's answers to the candidates, and those of reference models."""
