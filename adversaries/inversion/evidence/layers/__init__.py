"""Layers whose gradients are read: linear ones before a ReLU, the network above one, embeddings of patches."""
