"""One image from the first linear layer, by division."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adversaries.base import Effort, Progress
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.evidence.labels.label_strategies import infer
from adversaries.inversion.evidence.layers.patches import embeds_patches, patch_embedding
from adversaries.inversion.evidence.one_gradient import gradient_unit
from adversaries.needs import Needs
from adversaries.reconstruction.base import OneByOne, status_of
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.models.normalise import per_pixel
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.task import objective, trained_parameters
from fedattack.training import training_mode


@dataclass
class Analytic(OneByOne):
    """Analytic: the image of a batch of one, from the gradients of the first layer by linear algebra.

    Of a linear first layer, row j of the weight gradient is ``d_j x`` and the bias gradient's entry is ``d_j``, so
    every neuron that sent both gives the image; they are weighted by least squares. A clipping factor cancels, and so
    do any number of local steps on the same image, whose rows are all multiples of it. Pixels of which nothing was
    sent are the prior's.

    Of a vision transformer with learned positions, the gradient of a position is that of its patch's token, d_t, and
    the embedding's is ``sum_t d_t x_t'``: least squares give all patches at once where no fewer directions than
    patches are among the d_t, and the prior the directions that are not. The certificate is the gradient at the
    answer, computed again.

    References
    ----------
    Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE
    TIFS 2018; Geiping, Bauermeister, Droege, Moeller, "Inverting Gradients", NeurIPS 2020, proposition 3.1; Lu,
    Zhang, Zhao, He, Cheng, "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers", CVPR 2022.
    """

    needs: ClassVar[Needs] = Needs(
        values="rounded",
        undecayed="steps",
        sums="dense",
        fresh=True,
        images=1,
        first_layer=True,
        patches=True,
    )

    def needs_now(self, scenario: Scenario) -> Needs:
        """Patches are unknowns of one gradient, in which no entry is missing."""
        if not embeds_patches(scenario.model):
            return self.needs
        return dataclasses.replace(self.needs, update="gradient", entries="all", values="exact")

    def effort(self, scenario: Scenario, images: int) -> Effort:
        """The certificate's gradient."""
        return Effort(gradients=1)

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Divide, or solve for the patches."""
        progress(0.0, "first layer")
        self.check(observation.scenario)
        if observation.num_examples != 1:
            raise NotApplicable(
                f"client {observation.client} declares {observation.num_examples} samples: the quotient is a mixture "
                "of them; use batch size 1, or --attack spear"
            )
        evidence = Evidence(observation)
        if embeds_patches(observation.scenario.model):
            return _from_patches(evidence, device)
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
    """Rows, columns and values of the weight entries whose neuron sent its bias entry too, and that entry.

    Values are those of a model that takes pixels as they are.
    """
    layer = evidence.first_layer
    found = {name: (at, values.double()) for name, _, at, values in evidence.gradient.layers()}
    neurons, inputs = evidence.observation.weights[layer.weight].shape
    positions, values = found[layer.weight]
    divisors = torch.zeros(neurons, dtype=torch.float64)
    divisors[found[layer.bias][0]] = found[layer.bias][1]
    rows, columns = positions // inputs, positions % inputs
    usable = divisors[rows] != 0
    rows, columns, values = rows[usable], columns[usable], values[usable]
    normalised = per_pixel(evidence.observation.scenario.model, values)
    if normalised is not None:
        mean, deviation = normalised
        values = values * deviation[columns] + divisors[rows] * mean[columns]
    return rows, columns, values, divisors[rows]


PIXEL_DEVIATION = 0.25
"""Of a pixel from the prior's, where the gradients of the tokens do not determine it."""

ROUNDING = 2.0**-24
"""Of one float32 number, relative."""


def _from_patches(evidence: Evidence, device: torch.device) -> Reconstruction:
    """All patches by least squares, regularised as far as rounding asks for it."""
    observation = evidence.observation
    layout = patch_embedding(observation.scenario.model)
    sent = evidence.gradient.dense()
    tokens = sent[layout.positions].double().reshape(-1, layout.width)[layout.skipped :][: layout.count]
    weight = sent[layout.weight].double().flatten(1)
    prior = prior_image(observation).double()
    left, scales, right = torch.linalg.svd(tokens.T, full_matrices=False)
    # What a token's gradient is off by meets a patch's value of about a half.
    noise = math.hypot(
        _rounding(evidence, layout.weight),
        0.5 * math.sqrt(layout.count) * _rounding(evidence, layout.positions),
    )
    known = int((scales > noise / PIXEL_DEVIATION).sum())
    labels = infer("auto", evidence)
    pixels = prior.clone()
    if known:
        guess = layout.patches(prior)
        factors = scales / (scales.square() + (noise / PIXEL_DEVIATION) ** 2)
        found = guess + right.T @ (factors[:, None] * (left.T @ (weight - tokens.T @ guess)))
        image = layout.images(found)
        pixels[:, : image.shape[1], : image.shape[2]] = image
    images = pixels.clamp(0, 1).float()[None]
    residual = _gradient_error(evidence, images, labels.values, device)
    status = status_of(residual, vouched=known == layout.count) if known else "failed"
    reasons = []
    if not known:
        reasons.append(
            "the gradients of all positions are zero, as behind a head of zeros in the first round"
        )
    elif known < layout.count:
        reasons.append(
            f"the gradients of {layout.count} tokens of {layout.width} numbers have {known} independent directions; "
            "the prior fills the others"
        )
    if known and status == "failed":
        reasons.append("the gradient at the answer is not the one that was sent")
    details: dict[str, Any] = {
        "status": status,
        "reason": "; ".join(reasons),
        "residual": residual,
        "kept": observation.update.kept,
        "patches": layout.count,
        "directions": known,
        "labels": labels.note,
    }
    return Reconstruction(
        images,
        labels.values,
        loss=residual,
        label_confidence=labels.confidence,
        certificate=residual,
        method="analytic (patches)",
        floors=floors(observation, labels.values),
        details=details,
    )


def _rounding(evidence: Evidence, name: str) -> float:
    """Deviation of the rounding in one entry of a tensor's gradient: of weights, where their change was sent."""
    observation = evidence.observation
    size = float(evidence.gradient.dense()[name].double().square().mean().sqrt())
    if observation.update.kind == "delta":
        weights = float(observation.weights[name].double().square().mean().sqrt())
        size += weights / abs(gradient_unit(observation))
    return ROUNDING * size


def _gradient_error(evidence: Evidence, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Relative error of the gradient at images, as a client would compute it; up to a factor where it is clipped."""
    observation = evidence.observation
    scenario = observation.scenario
    with torch.random.fork_rng(devices=[]):
        module = build_model(scenario.model)
    module.load_state_dict(observation.weights)
    module = training_mode(module.to(device), scenario.training.batch_norm)
    loss = objective(module, module(images.to(device)), labels.to(device))
    trained = trained_parameters(module)
    slopes = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    found = torch.cat([one.flatten() for one in slopes]).double().cpu()
    sent = evidence.gradient.values.double()
    factor = float(found @ sent) / max(float(found @ found), 1e-300) if evidence.clips else 1.0
    return float((factor * found - sent).norm() / sent.norm().clamp_min(1e-300))
