"""Which rows of a network tell a sample's loss when the sample is shown with noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedattack.rng import numpy_rng
from fedattack.unlearning.central import Central
from fedattack.unlearning.scrub.codec import LARGEST, codec
from fedattack.unlearning.scrub.foci import foci, lfoci
from fedattack.unlearning.scrub.hypercolumn import Hypercolumn

Order = Literal["foci", "lfoci", "codec", "full", "random"]

_CHUNK = 250  # images in one pass


def choose_rows(
    central: Central,
    column: Hypercolumn,
    flat: Tensor,
    base: Mapping[str, Tensor],
    position: int,
    order: Order,
    perturbations: int,
    scale: float,
) -> list[int]:
    """Places in the hypercolumn, ascending; none where the model's answers are too large to be told apart.

    That is what noise may leave of it (:data:`~fedattack.unlearning.scrub.codec.LARGEST`).

    Parameters
    ----------
    flat, base
        The model: trained parameters (P,), and a state dict for the rest.
    order : str
        "foci"; "lfoci", with noise of .01 on answers and losses; "codec", every row that tells of the loss by
        itself; "full", every row; "random", as many as FOCI chooses.
    perturbations, scale
        How often the sample at `position` is shown, and the deviation of the noise on its pixels.
    """
    if order == "full":
        return list(range(len(column)))
    x, y = perturbed(central, column, flat, base, position, perturbations, scale)
    if not (np.abs(x) <= LARGEST).all() or not (np.abs(y) <= LARGEST).all():  # NaN fails too
        return []
    draws = numpy_rng(central.seed, "unlearning: scrub rows", position)
    if order == "codec":
        told = [codec(y, answers) for answers in x.T]
        return [place for place, value in enumerate(told) if value > 0] or [int(np.argmax(told))]
    chosen, _ = lfoci(x, y, draws) if order == "lfoci" else foci(x, y)
    if order == "random":
        chosen = draws.choice(len(column), len(chosen), replace=False).tolist()
    return sorted(chosen)


def perturbed(
    central: Central,
    column: Hypercolumn,
    flat: Tensor,
    base: Mapping[str, Tensor],
    position: int,
    perturbations: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Hypercolumns (perturbations, rows) and losses (perturbations,) of one sample under noise, float64."""
    images, labels = central.samples(np.array([position]))
    draws = central.rng("scrub perturbations", position)
    found = []
    for part in np.array_split(np.arange(perturbations), -(-perturbations // _CHUNK)):
        noise = torch.randn(len(part), *images.shape[1:], generator=draws, dtype=torch.float64)
        shown = images + scale * noise.to(images)
        answers, logits = column.answers(lambda x: central.logits(flat, base, x), shown)
        found.append((answers, cross_entropy(logits, labels.expand(len(part)), reduction="none")))
    x, y = (torch.cat(parts).double().numpy() for parts in zip(*found, strict=True))
    return x, y
