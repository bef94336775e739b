"""A whole run in which the only holder of data scrubs what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedattack.audit.family import get_family
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.models import build_model
from simulations.engine.federation import run_federation
from simulations.pipeline import simulate

RUN = {
    "dataset": "digits",
    "clients": 1,
    "protocol": "fedavg",
    "compressor": "none",
    "batch-size": 32,
    "local-steps": 40,
    "rounds": 4,
    "learning-rate": 0.2,
    "engine": "inline",
    "attack": "unlearn-max-loss",
    "requests": 3,
    "mechanism": "scrub",
    "unlearning.seeds": 1,
    "mechanism.perturbations": 100,
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "tiny-cnn"])
def test_the_largest_losses_are_scrubbed(tmp_path: Path, model: str) -> None:
    config = Config.from_mapping(
        RUN | {"model": model, "mechanism.mode": "published", "run-dir": str(tmp_path / "r")}
    )
    result = simulate(config).audits["unlearn-max-loss"]
    world = build_world(config)
    trained = build_model(world.scenario.model)
    trained.load_state_dict(run_federation(config, world).weights)
    images, labels = world.dataset.tensors(world.partitions[0])
    with torch.no_grad():
        losses = functional.cross_entropy(trained(images), labels, reduction="none")
    told = result.summary["details"]
    assert {one["position"] for one in told["samples"]} == set(losses.topk(3).indices.tolist())
    first = told["samples"][0]
    assert first["loss_before"] == pytest.approx(float(losses[first["position"]]), rel=1e-4)
    assert all(one["loss_after"] > one["loss_before"] for one in told["samples"])
    assert told["ascent_cosine"] > 0.9999
    # two of about 5.6 epochs are trained again for the released Hessian, then three samples
    spent = result.summary["costs"]["mechanism"]
    assert spent["rounds"] == 0
    assert 2 <= spent["gradients"] <= 4.1


@pytest.mark.slow
def test_noise_that_destroys_the_model_ends_the_run_with_a_warning(tmp_path: Path) -> None:
    config = Config.from_mapping(
        RUN | {"model": "mlp", "mechanism.noise": True, "run-dir": str(tmp_path / "r")}
    )
    result = simulate(config).audits["unlearn-max-loss"]
    assert result.summary["metrics"]["algorithm"]["mean"] > 0.5
    told = result.summary["details"]
    warning = get_family("unlearning").beside(result)[-1]
    assert warning.startswith(f"warning: noise of deviation {told['sigma']:.3g} on the scrubbed rows cost ")
    assert told["lost_to_noise"] > 0.5
