"""Forgetting by influence functions: a Newton step with the curvature of all samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedattack.unlearning.newton import Newton


@dataclass
class Influence(Newton):
    """Influence functions (Koh and Liang, 2017): the step of "newton" with the Hessian of all samples.

    The Hessian does not depend on what is forgotten, so that a server could factorise it once; the error of that
    grows with the share that is forgotten. The settings are those of "newton".
    """

    curves: ClassVar[Literal["left", "all"]] = "all"
