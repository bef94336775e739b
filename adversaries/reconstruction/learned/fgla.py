"""FGLA: features of each image separated from the head's gradient, and a decoder from features to images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from adversaries.base import Progress
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.evidence.labels.label_strategies import infer
from adversaries.inversion.learning import train
from adversaries.inversion.learning.generator import Generator, load_generator, obtain_generator
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.learned import base
from fedattack.config import Positive
from fedattack.models.decoders.from_features import GENERATORS
from fedattack.observation import Observation, Reconstruction, Scenario


@dataclass
class FGLA(base.TrainedAttack):
    """FGLA: a trained decoder draws each image from its features, which the head's gradient gives away.

    In a batch of distinct labels, row y of the head's weight gradient over entry y of its bias gradient is,
    up to what the softmax gives the others, the last features of the image labelled y. A decoder from
    features to images is trained on the auxiliary images; the answer costs one pass of it.

    Deviation: the decoder learns from public images put through the scenario's client and compressor, so that
    it meets features as they will arrive (partly missing, mixed), where the paper feeds it clean ones.

    Parameters
    ----------
    decoder : str
        "train", or the file of a trained one (as by ``fedattack hcgla train-generator``).
    architecture : str
        A name of :data:`fedattack.models.decoders.from_features.GENERATORS`, for "train".
    width : int, optional
        Channels of the decoder; None: the architecture's own.

    References
    ----------
    Xue, Hu, Fu, Ling, Lu, Wang, "Fast Generation-Based Gradient Leakage Attacks against Highly Compressed
    Gradients", INFOCOM 2023.
    """

    name: ClassVar[str] = "fgla"
    needs: ClassVar[Needs] = dataclasses.replace(
        base.TrainedAttack.needs, values="rounded", distinct=True, head="biased"
    )

    decoder: str = "train"
    architecture: str = "fgla"
    epochs: Positive = 20
    width: Positive | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        super().__post_init__()
        GENERATORS.get(self.architecture)

    def needs_now(self, scenario: Scenario) -> Needs:
        """A decoder that was trained needs no public images."""
        return self.needs if self.decoder == "train" else dataclasses.replace(self.needs, auxiliary=0)

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Load a decoder that was trained."""
        if self.decoder != "train":
            load_generator(self.decoder, scenario)

    def answer(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """What the decoder draws from one update's features."""
        decoder = self._decoder(observation, seed, device, progress)
        labels = infer("auto", Evidence(observation))
        images = decoder.start(observation, labels.values)
        repeated = len(labels.values) - len(labels.values.unique())
        figures = decoder.metadata["figures"]
        return Reconstruction(
            images.clamp(0, 1).float(),
            labels.values,
            loss=-float(figures["psnr"]["generator"]),
            label_confidence=labels.confidence,
            method="fgla",
            floors=floors(observation, labels.values),
            details={
                "kept": observation.update.kept,
                "labels": labels.note,
                "held-out PSNR": figures["psnr"]["generator"],
                "mean image's held-out PSNR": figures["psnr"]["mean"],
                "features sent": figures["features_sent"],
                "notes": f"{repeated} labels repeat: their images share one row" if repeated else "",
            },
        )

    def _decoder(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Generator:
        """The decoder, trained once for all victims with one batch size."""
        if self.decoder != "train":
            return load_generator(self.decoder, observation.scenario)
        public = train.public_images(observation, "fgla")
        names = ("architecture", "epochs", "learning_rate", "passes", "width")
        settings = {name: getattr(self, name) for name in names}
        return train.once(
            train.key(self, observation, observation.num_examples, public, seed),
            lambda: obtain_generator("train", observation, seed, device, progress, **settings),
        )
