"""Decoders from features and latent vectors to images, image priors, denoisers."""
