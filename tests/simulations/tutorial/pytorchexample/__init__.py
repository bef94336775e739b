"""The app of Flower's PyTorch tutorial, attacked in three lines: each says so."""
