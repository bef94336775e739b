"""The command, the engines and the runs. Importing any of it prepares the environment for Flower, Ray and torch."""

from simulations.engine.environment import prepare_environment

prepare_environment()
