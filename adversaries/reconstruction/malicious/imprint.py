"""Imprint: images that fall alone into a bin between two thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adversaries.reconstruction.malicious.bins import BinReading


@dataclass
class Imprint(BinReading):
    """Imprint: a malicious server puts bins in front of the model and reads the images that fall into one alone.

    Every row of the added layer measures the image in the same way and has its own threshold. What two neighbouring
    rows' gradients differ by comes from the images measured between their thresholds; of an image that is alone
    there it is the image, times a number that the bias holds (Fowl et al. 2022). Thresholds are quantiles of the
    measurement over the granted images, or of a normal without any.

    Beyond the paper, the rows may be shared out to several independent measurements, and images that were found are
    taken out of the other measurements' bins (:mod:`~adversaries.inversion.solvers.peeling`). Two images in one bin
    of every measurement are rare, so that nearly whole batches come out where one measurement with all rows leaves
    the share that the birthday bound names. Each image is put through the model with each label: what it would have
    left in its bin is compared with what was there, which labels it and tells mixtures apart without the truth.

    Exact for one gradient with model ``imprint``. Under top-k its rows, which nearly all images move, mostly do not
    survive; with values rounded or several local steps their differences drown. The rows of model
    ``imprint-sparse`` are moved by their own bin's images alone: exact under top-k too, where the kept share
    allows, and approximate for rounded values and local steps, for which images are believed that two measurements
    show alike. Two equal images are one sum, and are not told apart. Parameters are those of
    :class:`~.bins.BinReading`.

    References
    ----------
    Fowl, Geiping, Czaja, Goldblum, Goldstein, "Robbing the Fed: Directly Obtaining Private Data in Federated Learning
    with Modified Models", ICLR 2022.
    """

    name: ClassVar[str] = "imprint"
