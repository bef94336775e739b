"""What is kept on disk: run folders, observations, records; every file whole or not there."""

from __future__ import annotations

from fedattack.storage.observations import load_observations, load_truths, save_observation, save_truth
from fedattack.storage.run_folder import RunFolder, StoredAnswer

__all__ = ["RunFolder", "StoredAnswer", "load_observations", "load_truths", "save_observation", "save_truth"]
