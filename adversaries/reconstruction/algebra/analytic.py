"""One image from the first linear layer, by division."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adversaries.base import Progress
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.label_strategies import infer
from adversaries.needs import Needs
from adversaries.reconstruction.base import OneByOne, status_of
from fedattack.errors import NotApplicable
from fedattack.observation import Observation, Reconstruction


@dataclass
class Analytic(OneByOne):
    """Analytic: the image of a batch of one, as the quotient of the first linear layer's weight and bias gradients.

    Row j of the weight gradient is ``d_j x`` and the bias gradient's entry is ``d_j``, so every neuron that sent both
    gives the image; they are weighted by least squares. A clipping factor cancels, and so do any number of local
    steps on the same image, whose rows are all multiples of it. Pixels of which nothing was sent are the prior's.

    References
    ----------
    Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE
    TIFS 2018; Geiping, Bauermeister, Droege, Moeller, "Inverting Gradients", NeurIPS 2020, proposition 3.1.
    """

    needs: ClassVar[Needs] = Needs(
        values="rounded", undecayed="steps", sums="dense", fresh=True, images=1, first_layer=True
    )

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Divide."""
        progress(0.0, "division")
        self.check(observation.scenario)
        if observation.num_examples != 1:
            raise NotApplicable(
                f"client {observation.client} declares {observation.num_examples} samples: the quotient is a mixture "
                "of them; use batch size 1, or --attack spear"
            )
        evidence = Evidence(observation)
        rows, columns, entries, divisors = _pairs(evidence)
        pixels = prior_image(observation).double().flatten()
        square = torch.zeros_like(pixels).index_add_(0, columns, divisors.square())
        product = torch.zeros_like(pixels).index_add_(0, columns, divisors * entries)
        known = square > 0
        pixels[known] = product[known] / square[known]
        left = float((entries - divisors * pixels[columns]).norm() / entries.norm().clamp_min(1e-300))
        labels = infer("auto", evidence)
        # An entry that determines its own pixel vouches for nothing.
        spare = len(entries) >= 2 * len(pixels)
        status = status_of(left, vouched=bool(known.all()) and spare) if bool(known.any()) else "failed"
        details: dict[str, Any] = {
            "status": status,
            "reason": "" if status != "failed" else "the entries sent are not multiples of one image",
            "residual": left,
            "kept": observation.update.kept,
            "neurons": int(rows.unique().numel()),
            "pixels_known": int(known.sum()),
            "labels": labels.note,
        }
        return Reconstruction(
            pixels.clamp(0, 1).float().reshape(1, *observation.scenario.image_shape),
            labels.values,
            loss=left,
            label_confidence=labels.confidence,
            method="analytic",
            floors=floors(observation, labels.values),
            details=details,
        )


def _pairs(evidence: Evidence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns and values of the weight entries whose neuron sent its bias entry too, and that entry."""
    layer = evidence.first_layer
    found = {name: (at, values.double()) for name, _, at, values in evidence.gradient.layers()}
    neurons, inputs = evidence.observation.weights[layer.weight].shape
    positions, values = found[layer.weight]
    divisors = torch.zeros(neurons, dtype=torch.float64)
    divisors[found[layer.bias][0]] = found[layer.bias][1]
    rows, columns = positions // inputs, positions % inputs
    usable = divisors[rows] != 0
    return rows[usable], columns[usable], values[usable], divisors[rows[usable]]
