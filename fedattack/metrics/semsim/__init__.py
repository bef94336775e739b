"""SemSim: a distance learned from which reconstructions were recognised (Sun et al., NeurIPS 2023)."""
