"""The library of gradient inversion: knows observations, and no attack."""
