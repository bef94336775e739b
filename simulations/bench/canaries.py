"""Canaries under ``clip-noise`` in a federation of one round: bounds and estimate beside the exact epsilon."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from fedattack.audit.canaries import CanaryAudit
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.data.dataset import ImageDataset
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.rng import numpy_rng
from simulations.engine.federation import run_federation
from simulations.experiments.privacy import CanaryWatch

CLIENTS = 8


@dataclasses.dataclass
class HalfNoise(ClipNoise):
    """Accounts for the agreed noise, and adds half of it."""

    def _noise(self, like: Any, generator: Any) -> Any:
        """Half of what was agreed."""
        return super()._noise(like, generator) / 2


def measured(seed: int, canaries: int, defense: str = "clip-noise", **settings: Any) -> CanaryAudit:
    """What so many sample canaries, all that the clients have, measure in one round of one step."""
    settings = {
        "dataset": "digits",
        "model": "mlp",
        "width": 256,
        "clients": CLIENTS,
        "batch-size": 0,
        "compressor": "none",
        "engine": "inline",
        "defense": defense,
        "defense.unit": "sample",
        "canaries": canaries,
        "seed": seed,
        "federation.evaluate": False,
        **settings,
    }
    config = Config.from_mapping(settings)
    world = crowd(build_world(config), canaries, seed)
    watch = CanaryWatch(config, world)
    done = run_federation(config, world, on_observation=watch.observe, on_round=watch.after_round)
    found = watch.audit(done.rounds)
    assert found is not None
    return found


def crowd(world: World, samples: int, seed: int) -> World:
    """The world with so many samples of noise, dealt out to its clients."""
    rng, old = numpy_rng(seed, "bench.canaries"), world.dataset
    images = rng.integers(0, 256, (samples, *old.images.shape[1:]), dtype=np.uint8)
    labels = rng.integers(0, old.classes, samples)
    dataset = ImageDataset("noise", images, labels, old.class_names, None, "")
    parts = tuple(np.array_split(np.arange(samples), len(world.partitions)))
    nobody = np.zeros(0, np.int64)
    pools = dataclasses.replace(world.pools, clients=np.arange(samples), nonmembers=nobody, auxiliary=nobody)
    return dataclasses.replace(world, dataset=dataset, pools=pools, partitions=parts, auxiliary=None)


def run(quick: bool = False) -> dict[str, Any]:
    """Noise 0.5, 1, 2 and half of them in secret, 2,000 canaries, one release, 20 seeds."""
    seeds, canaries = (range(2), 300) if quick else (range(20), 2000)
    rows: list[dict[str, Any]] = []
    for defense in ("clip-noise", f"{__name__}:HalfNoise"):
        for noise in (0.5, 1.0, 2.0):
            started = time.perf_counter()
            found = [measured(seed, canaries, defense, **{"defense.noise": noise}) for seed in seeds]
            estimates = np.array([one.estimate.epsilon if one.estimate else np.nan for one in found])
            exact = found[0].account.epsilon
            rows.append(
                {
                    "defence": defense.rpartition(":")[2],
                    "noise": noise,
                    "accounted": exact,
                    "estimate": float(estimates.mean()),
                    "estimate_sd": float(estimates.std()),
                    "bound": float(np.mean([one.bound for one in found])),
                    "normal_bound": float(np.mean([one.normal_bound for one in found])),
                    "gaussian_bound": float(np.mean([one.gaussian_bound for one in found])),
                    "bounds_above": sum(one.least > exact for one in found),
                    "broken": sum(one.broken for one in found),
                    "of": len(found),
                    "ceiling": found[0].ceiling,
                    "gaussian_ceiling": found[0].gaussian_ceiling,
                    "seconds": (time.perf_counter() - started) / len(found),
                }
            )
    told = {
        f"{row['defence']}, noise {row['noise']:g}": (
            f"accounted {row['accounted']:.2f}, estimate {row['estimate']:.2f} +- {row['estimate_sd']:.2f}, bounds "
            f"{row['normal_bound']:.2f} (normal scores), {row['gaussian_bound']:.2f} (Gaussian) and "
            f"{row['bound']:.2f} (any), broken in {row['broken']} of {row['of']}"
        )
        for row in rows
    }
    return {"canaries": canaries, **told, "rows": rows}
