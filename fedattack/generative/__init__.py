"""Generators of images and their critics: the nets, how clients train them, and their files."""

from fedattack.generative.saved import GanSettings, load_gan, save_gan

__all__ = ["GanSettings", "load_gan", "save_gan"]
