"""Generators of images and their critics: the nets, and how clients train them."""
