"""L-CODEC: which rows of a network a sample depends on (CODEC, FOCI), and the scrub of these rows."""

from __future__ import annotations

from fedattack.unlearning.scrub.codec import codec
from fedattack.unlearning.scrub.foci import foci, lfoci

__all__ = ["codec", "foci", "lfoci"]
