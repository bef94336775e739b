"""What an attack on synthetic data is: it tells from a released generator, or its images, who was trained on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.membership.base import Figures, MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.synthetic.release import Release
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from adversaries.seats import CuriousServer
from fedattack.errors import NotApplicable
from fedattack.observation import MembershipScores, Scenario

Access = Literal["samples", "latents", "generator", "critic"]
"""Of a release: its images; the latents they were made from, and more of both; its gradients; its critic."""

LEAST_PUBLIC = 2
"""Public images without which there is no reference."""


@dataclass
class SyntheticAttack(CuriousServer, MembershipAttack):
    """Base of the attacks on what a training of a generator releases at its end; a subclass brings :meth:`judge`.

    In a federation the release is the last global generator, of which `samples` images are drawn; elsewhere
    (:meth:`about`) it is anybody's images. Scores are about anybody.

    Parameters
    ----------
    samples : int
        Images drawn from the generator.
    calibrated : bool
        Whether the score is less that of a reference release: images of a generator that the adversary trains, as
        the federation did, on its public images (Chen et al., GAN-Leaks, CCS 2020, section 4.4). Says how much nearer
        an image is than it would be to anybody's generator.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", trains="generate")
    access: ClassVar[Access] = "samples"
    watches: ClassVar[Literal["every", "last"]] = "last"

    samples: Annotated[int, Field(ge=1)] = 5000
    calibrated: bool = False

    @abstractmethod
    def judge(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """Score of each image, (N,), float64, finite; higher means "more likely trained on".

        `images`, float32 (N, C, H, W) in [0, 1], the scale of the release's. NotApplicable where the release lacks
        what is needed.
        """

    def about(self, release: Release, images: Tensor, seed: int, device: torch.device) -> Tensor:
        """:meth:`judge`, calibrated where that is asked for; NotApplicable also by :meth:`Release.check`."""
        parts = {
            "samples": ("images",),
            "latents": ("latents", "generator"),
            "generator": ("latents", "generator"),
        }
        if lacking := [
            part for part in parts.get(self.access, ("critic",)) if getattr(release, part) is None
        ]:
            raise NotApplicable(
                f"needs the {' and the '.join(lacking)} of what is released, where they are not; use an attack on "
                "images alone, such as full-black-box"
            )
        release.check(images)
        found = self.judge(release, images, seed, device)
        if self.calibrated:
            if release.reference is None:
                raise NotApplicable("calibrated: no reference generator; grant public images, or a reference")
            found = found - self.judge(release.reference, images, seed, device)
        return found

    def needs_now(self, scenario: Scenario) -> Needs:
        """With public images for the reference, where scores are calibrated."""
        least = max(self.needs.auxiliary, LEAST_PUBLIC if self.calibrated else 0)
        return replace(self.needs, auxiliary=least)

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``scores``, float64 (N,)."""
        release = view.release(self.samples, self.calibrated, seed)
        return {"scores": self.about(release, view.candidates.images, seed, view.device)}

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """Those of the last round."""
        last = max(rounds)
        return MembershipScores(rounds[last]["scores"], type(self).__name__, {"rounds": [last]})
