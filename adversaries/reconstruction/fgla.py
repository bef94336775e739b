"""FGLA: features of each image separated from the head's gradient, and a decoder from features to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from adversaries.base import Progress, ReconstructionAttack, no_progress
from adversaries.reconstruction import trained
from adversaries.reconstruction.floors import floors
from adversaries.reconstruction.hcgla import learned
from adversaries.reconstruction.hcgla.generator import Generator, load_generator, train_generator
from adversaries.reconstruction.label_inference import infer
from fedattack.errors import ConfigError, NotApplicable, unknown_name
from fedattack.models.generators import GENERATORS
from fedattack.observation import Observation, Reconstruction, Scenario


@dataclass
class FGLA(ReconstructionAttack):
    """FGLA: a trained decoder draws each image from its features, which the head's gradient gives away.

    In a batch of distinct labels, row y of the head's weight gradient over entry y of its bias gradient is, up to
    what the softmax gives the others, the last features of the image labelled y. A decoder from features to images is
    trained on the auxiliary images; the answer costs one pass of it.

    Deviation: the decoder learns from public images put through the scenario's client and compressor, so that it
    meets features as they will arrive (partly missing, mixed), where the paper feeds it clean ones.

    Parameters
    ----------
    decoder : str
        "train", or the file of a trained one (as by ``fedattack hcgla train-generator``).
    architecture : str
        A name of :data:`fedattack.models.generators.GENERATORS`, for "train".
    passes, epochs, learning_rate, width
        Of the training, see :func:`adversaries.reconstruction.hcgla.generator.train_generator`.

    References
    ----------
    Xue, Hu, Fu, Ling, Lu, Wang, "Fast Generation-Based Gradient Leakage Attacks against Highly Compressed Gradients",
    INFOCOM 2023.
    """

    needs: ClassVar[str] = (
        "one client's update with distinct labels, a head with bias, auxiliary images to train on"
    )

    decoder: str = "train"
    architecture: str = "fgla"
    passes: int = 2
    epochs: int = 20
    learning_rate: float = 1e-3
    width: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work."""
        for name in ("passes", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting 'fgla.{name}' = {getattr(self, name)}: must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"setting 'fgla.learning_rate' = {self.learning_rate}: must be positive")
        if self.architecture not in GENERATORS:
            raise unknown_name("generator", self.architecture, GENERATORS.names())

    def check(self, scenario: Scenario) -> None:
        """Refuse heads without bias, updates of signs, and batches whose labels must repeat.

        Raises
        ------
        NotApplicable, DataError
        """
        head = learned.head_of(scenario.model)
        if scenario.training.batch_size < 1:
            raise NotApplicable(
                "training.batch_size = 0: clients' batches differ, and the decoder is trained for one size; give it"
            )
        if scenario.training.batch_size > head.classes:
            raise NotApplicable(
                f"training.batch_size = {scenario.training.batch_size} > {head.classes} classes: labels must repeat, "
                "and equal labels share one row of features"
            )
        if scenario.compression.name == "sign":
            raise NotApplicable(
                "compression.name = 'sign': the quotient of signs is not a feature; use --attack lti"
            )
        if self.decoder != "train":
            load_generator(self.decoder, scenario)

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        answers = []
        for observation in observations:
            self.check(observation.scenario)
            decoder = self._decoder(observation, seed, device, progress)
            labels = infer("auto", observation)
            images = decoder.start(observation, labels.values)
            repeated = len(labels.values) - len(labels.values.unique())
            figures = decoder.metadata["figures"]
            answers.append(
                Reconstruction(
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
            )
        progress(1.0, "done")
        return answers

    def _decoder(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Generator:
        """The decoder, trained once for all victims with one batch size."""
        if self.decoder != "train":
            return load_generator(self.decoder, observation.scenario)
        public = trained.public_images(observation, "fgla")
        made_for = learned.described(
            observation.scenario, observation.weights, observation.num_examples, observation.round
        )
        return trained.once(
            ("fgla", repr(made_for), trained.identity(public), repr(self), seed),
            lambda: train_generator(
                observation.scenario,
                observation.weights,
                public,
                None,
                seed,
                self.architecture,
                observation.num_examples,
                self.epochs,
                self.learning_rate,
                self.passes,
                width=self.width,
                round=observation.round,
                device=device,
                progress=progress,
            )[0],
        )
