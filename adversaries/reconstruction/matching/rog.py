"""ROG: matching in a low-dimensional space of images, and a network that mends what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from adversaries.inversion.evidence import client as clients
from adversaries.inversion.evidence.client import ImitatedClient
from adversaries.inversion.evidence.one_gradient import as_gradient
from adversaries.inversion.learning import train
from adversaries.inversion.learning.denoiser import PAIRS, Denoiser, Pairs, load_denoiser, train_denoiser
from adversaries.inversion.matching.match import Match
from adversaries.inversion.matching.settings import Matching
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.matching.base import OptimisationAttack, Task
from adversaries.reconstruction.matching.recipes import Recipe
from fedattack.config import Positive
from fedattack.errors import NotApplicable
from fedattack.observation import Auxiliary, Observation, Scenario
from fedattack.rng import numpy_rng


class LowResolution:
    """A chart of the pixels of images `factor` times smaller each way, enlarged by bicubic interpolation."""

    def __init__(self, shape: tuple[int, ...], factor: int) -> None:
        batch, channels, height, width = shape
        self._shape = shape
        self._small = (batch, channels, -(-height // factor), -(-width // factor))

    def images(self, variables: Tensor) -> Tensor:
        """(V, N) -> (V, B, C, H, W)."""
        small = variables.reshape(-1, *self._small[1:])
        large = F.interpolate(small, size=self._shape[2:], mode="bicubic", align_corners=False)
        return large.unflatten(0, (-1, self._shape[0]))

    def variables(self, images: Tensor) -> Tensor:
        """(V, B, C, H, W) -> (V, N): their means over blocks."""
        small = F.interpolate(images.flatten(0, 1), size=self._small[2:], mode="area")
        return small.reshape(len(images), -1)


@dataclass
class ROG(OptimisationAttack):
    """ROG: matches the gradient with enlarged small images, then lets a trained network mend them (Yue et al. 2023).

    A quarter of the unknowns make matching quick and robust to compression and noise; what the small images lack a
    network adds, which was trained on auxiliary images that went through the same client, compressor and matching.

    Deviations: the paper's networks are large and trained on ImageNet; here it is the DnCNN of
    :mod:`adversaries.inversion.learning.denoiser`. Preset "published" has the cosine distance and signed Adam.

    Parameters
    ----------
    factor : int
        How many times smaller the small images are, along each side.
    mend : str
        "train": on the auxiliary images; "off"; or the file of a denoiser (``fedattack hcgla train-denoiser``).
    pairs : int
        Auxiliary images to reconstruct for the training.
    epochs : int, optional
        Of the training; None: as many as 600 steps.

    References
    ----------
    Yue, Jin, Wong, Baron, Dai, "Gradient Obfuscation Gives a False Sense of Security in Federated Learning", USENIX
    Security 2023.
    """

    needs: ClassVar[Needs] = dataclasses.replace(OptimisationAttack.needs, auxiliary=32)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(
            Matching(
                objective="cosine", optimiser="signed-adam", learning_rate=0.05, iterations=600, decay=True
            ),
            tv=1e-2,
            start="grey",
            note="small images, cosine distance",
        )
    }

    factor: Positive = 2
    mend: str = "train"
    pairs: Annotated[int, Field(ge=8)] = 64
    epochs: Positive | None = None

    def needs_now(self, scenario: Scenario) -> Needs:
        """Without a mending network to train no public images are needed."""
        needs = super().needs_now(scenario)
        return needs if self.mend == "train" else dataclasses.replace(needs, auxiliary=0)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Also refuse steps that cannot be imitated for the training, and load the denoiser."""
        super().probe(scenario, facts)
        if self.mend == "train" and scenario.training.local_steps > 1:
            raise NotApplicable(
                f"training.local_steps = {scenario.training.local_steps}: the mending network is trained on single "
                "gradients; set rog.mend 'off' or local_steps 1"
            )
        if self.mend not in ("train", "off"):
            load_denoiser(self.mend)

    def search(self, task: Task) -> tuple[list[Match], dict[str, Any]]:
        """Match small images and mend them."""
        matches = self._small(task)
        if self.mend == "off":
            return matches, {"mended": "off"}
        denoiser = load_denoiser(self.mend) if self.mend != "train" else self._trained(task)
        mended = [dataclasses.replace(one, images=denoiser(one.images.clamp(0, 1))) for one in matches]
        scores = denoiser.metadata["figures"]["psnr"]
        return mended, {
            "mended": self.mend,
            "held-out PSNR before mending": scores["noisy"],
            "held-out PSNR": scores["denoised"],
        }

    def _small(self, task: Task) -> list[Match]:
        chart = LowResolution(tuple(task.starts.shape[2:]), self.factor)
        variables = chart.variables(task.starts.flatten(0, 1)).unflatten(0, task.starts.shape[:2])
        return task.match(variables, chart)

    def _trained(self, task: Task) -> Denoiser:
        """The mending network, trained once for all victims with one batch size."""
        first = task.observations[0]
        public = train.public_images(first, "rog")
        size = task.labels.shape[1]
        key = train.key(self, first, size, public, task.seed)

        def make() -> Denoiser:
            pairs = self._pairs(task, public, size)
            return train_denoiser(pairs, None, task.seed, epochs=self.epochs, device=task.device)[0]

        return train.once(key, make)

    def _pairs(self, task: Task, public: Auxiliary, size: int) -> Pairs:
        """Auxiliary images as this attack rebuilds them, labels known, beside themselves."""
        first = task.observations[0]
        client = ImitatedClient(first.scenario, first.weights, task.seed, first.round)
        rng = numpy_rng(task.seed, "rog.pairs")
        count = min(self.pairs, len(public)) // size
        if count < 2:
            raise NotApplicable(
                f"{len(public)} auxiliary images are fewer than two batches of {size}; grant more"
            )
        chosen = torch.from_numpy(rng.permutation(len(public))[: count * size]).reshape(count, size)
        labels = torch.stack([clients.draw_labels(size, client.head.classes, rng) for _ in chosen])
        seen: list[Observation] = []
        for number, (rows, values) in enumerate(zip(chosen, labels, strict=True)):
            observation = client.observe(public.images[rows], values, number)
            seen.append(dataclasses.replace(observation, update=as_gradient(observation)))
        imitation = dataclasses.replace(
            task,
            observations=seen,
            labels=labels,
            starts=torch.full((1, count, *task.starts.shape[2:]), 0.5),
            options={},
        )
        found = self._small(imitation)
        order = chosen.flatten()
        groups = public.groups if public.groups is not None else torch.arange(len(public))
        return Pairs(
            noisy=torch.cat([one.images for one in found]).clamp(0, 1),
            clean=public.images[order],
            groups=groups[order],
            stage=torch.ones(len(order), dtype=torch.int64),
            mean=public.images.mean(0),
            metadata={"kind": PAIRS, "grouped_by": "people" if public.groups is not None else "images"},
        )
