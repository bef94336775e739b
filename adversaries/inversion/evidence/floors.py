"""What a reconstruction attacker would answer without the update: the floors that its leakage is measured from."""

from __future__ import annotations

import torch
from torch import Tensor

from fedattack.observation import Observation


def prior_image(observation: Observation) -> Tensor:
    """The best single guess, float32 (C, H, W) in [0, 1]: the mean of the auxiliary images, or mid-grey."""
    public = observation.auxiliary
    if public is None or not len(public):
        return torch.full(observation.scenario.image_shape, 0.5)
    return public.images.float().mean(0).clamp(0, 1)


def floors(observation: Observation, labels: Tensor) -> dict[str, Tensor]:
    """Images that need no update, for :attr:`fedattack.observation.Reconstruction.floors`; float32 (B, C, H, W).

    "prior", and "label alone" (the mean of each inferred label's auxiliary images) where these have labels
    and at least two images of each.
    """
    found = {"prior": prior_image(observation).expand(len(labels), -1, -1, -1).clone()}
    public = observation.auxiliary
    if public is not None and public.labels is not None:
        of_class = [public.images[public.labels == label] for label in labels]
        if all(len(images) > 1 for images in of_class):
            found["label alone"] = torch.stack([images.float().mean(0) for images in of_class]).clamp(0, 1)
    return found
