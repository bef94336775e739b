"""Training of SemSim: originals, recognised and unrecognised reconstructions as triplets.

Sun, Gao, Guo, Deng, Zhou, Qiu and Zhang, Privacy assessment on reconstructed images: are existing evaluation metrics
faithful to human perception?, NeurIPS 2023.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedattack.errors import ConfigError, DataError
from fedattack.files import content_hash
from fedattack.metrics.semsim.checkpoint import (
    Described,
    Name,
    Width,
    channel_statistics,
    fill,
    load_net,
    save_net,
)
from fedattack.metrics.semsim.network import SMALLEST, NetworkName, embedding_network
from fedattack.metrics.semsim.rated import AXES, Rated
from fedattack.models.classifiers.layers import kaiming_uniform
from fedattack.rng import torch_rng

KIND = "SemSim"

Rule = Literal["paper", "sony"]
Augmentation = Literal["crop-flip", "crop", "exposure", "none"]

MARGIN = 1.0
_PAD, _SMALL_PAD = 4, 1
_AT_ONCE = 256


@dataclass(frozen=True)
class Recipe:
    """How a SemSim is trained.

    ``rule``: "paper", anchor an original, positive a recognised and negative an unrecognised reconstruction of it;
    "sony", as the released code has it: every image is an anchor, its positive any image of its own kind (that may be
    itself; an original is of the kind of its recognised reconstructions), its negative any of the other kind.
    ``normalised``: embeddings have length 1, in training as in scoring. ``fallback``: an original without
    unrecognised reconstructions takes those of others, and one without recognised ones is left out (by "sony" it is
    its own positive); else both are refused.
    ``augmentation``, of each image on its own: "crop", at random from the image padded by 4 black pixels;
    "crop-flip", and mirrored at random; "exposure", cropped from one padded by 1, contrast times 0.5 to 1.5, up to
    0.15 brighter or darker, with noise of up to 0.15; "none".
    """

    rule: Rule = "paper"
    normalised: bool = True
    fallback: bool = False
    network: NetworkName = "small-cnn"
    width: int = 16
    dimensions: int = 64
    steps: int = 400
    batch: int = 128
    optimiser: Literal["sgd", "adam"] = "adam"
    learning_rate: float = 2e-3
    augmentation: Augmentation = "exposure"
    seed: int = 0


RECIPES = {
    "small": Recipe(),
    # The source tells no momentum and no weight decay; 0.9 and 0 are ours. Its 100 epochs of 1,149 folders with some
    # ten images each are about as many steps.
    "published": Recipe(
        network="resnet18",
        width=64,
        dimensions=512,
        steps=9000,
        optimiser="sgd",
        learning_rate=0.05,
        augmentation="crop-flip",
    ),
}
"""By name: a small net for CPUs, and the published one."""


class SemSimFacts(Described):
    """What a SemSim's file says of itself.

    `proxy`: the classifier whose answers it learned, empty for people's; `originals`: digests of those it was trained
    on (:attr:`~.rated.Rated.digests`), and `split_hash`, the SHA-256 of their list; `seen`: models, attacks, ... in
    its training.
    """

    rule: Rule
    normalised: bool
    network: NetworkName
    width: Width
    dimensions: Width
    steps: int = Field(ge=1)
    label_source: Literal["human", "proxy"]
    proxy: Name = ""
    fallback: bool = False
    augmentation: Augmentation
    originals: tuple[Name, ...]
    split_hash: Name
    seen: dict[str, tuple[Name, ...]] = Field(default_factory=dict)

    @property
    def heading(self) -> str:
        """ "SemSim", or, of proxy ratings, "SemSim-proxy[<labeller>]"."""
        return f"SemSim-proxy[{self.proxy or 'unknown'}]" if self.label_source == "proxy" else "SemSim"


@dataclass(frozen=True)
class SemSimNet:
    """A trained net in evaluation mode, what is known of it, and the SHA-256 of its weights."""

    net: nn.Module
    facts: SemSimFacts
    hash: str

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Float64 (N, dimensions) of images (N, C, S, S) in [0, 1]; DataError for another size.

        Equal images have equal embeddings, to the bit, wherever they stand: each is embedded once, in an order that
        depends on the images alone.
        """
        self.facts.check_shape(tuple(images.shape[1:]), self.facts.heading)
        if not len(images):
            return torch.zeros(0, self.facts.dimensions, dtype=torch.float64)
        scaled = self.facts.scaled(images)
        rows, place = scaled.flatten(1).unique(dim=0, return_inverse=True)
        parts = [
            _embedded(self.net, part, self.facts.normalised)
            for part in rows.view(-1, *scaled.shape[1:]).split(_AT_ONCE)
        ]
        return torch.cat(parts).double()[place]

    def distances(self, images: Tensor, truth: Tensor) -> Tensor:
        """Euclidean distance of the embeddings of each pair, float64 (N,); 0 for equal images.

        NaN where one holds NaN or infinite values. DataError as :meth:`embed`.
        """
        finite = (images.isfinite() & truth.isfinite()).flatten(1).all(dim=1)
        both = self.embed(torch.cat([images[finite].float(), truth[finite].float()]))
        found = torch.full((len(images),), torch.nan, dtype=torch.float64)
        found[finite] = (both[: len(both) // 2] - both[len(both) // 2 :]).norm(dim=1)
        return found


def _embedded(net: nn.Module, scaled: Tensor, normalised: bool) -> Tensor:
    """What loss and score are taken of: the one place that normalises."""
    features = net(scaled)
    return functional.normalize(features, dim=1) if normalised else features


class Triplets:
    """Draws triplets by a rule, as places among the originals (0 to M - 1) and reconstructions (M to M + N - 1).

    ``anchors`` (A,): the images that are anchors. ``figures``: how many originals are used, left out, or take
    unrecognised reconstructions of others. DataError, which counts them, for originals without both labels where
    `fallback` is not allowed, and where nothing is left.
    """

    def __init__(self, rated: Rated, rule: Rule, fallback: bool) -> None:
        many = len(rated.originals)
        places = np.arange(len(rated)) + many
        yes, no = (
            _Lists(rated.owner[side], places[side], many) for side in (rated.recognised, ~rated.recognised)
        )
        lacks_yes, lacks_no = yes.counts == 0, no.counts == 0
        bad = lacks_yes | lacks_no
        if bad.any() and not fallback:
            raise DataError(
                f"{int(bad.sum())} of {many} originals lack a label ({int(lacks_yes.sum())} have no recognised, "
                f"{int(lacks_no.sum())} no unrecognised reconstruction): rate more, leave them out, or allow "
                "fallback negatives"
            )
        used = ~lacks_yes if rule == "paper" else np.ones(many, dtype=bool)
        strangers = places[~rated.recognised]
        if not used.any() or not len(strangers):
            raise DataError(
                f"no triplet among {len(rated)} ratings: a recognised and an unrecognised reconstruction are needed"
            )
        self.figures = {
            "originals": int(used.sum()),
            "left_out": int((~used).sum()),
            "fallback_negatives": int((used & lacks_no).sum()),
        }
        self._strangers = strangers
        originals = np.arange(many)
        if rule == "paper":
            self.anchors, self._own = originals[used], originals[used]
            self._same = np.ones(len(self.anchors), dtype=bool)
            self._lists = {True: yes, False: no}
            return
        # The released code: a folder of the original with what was recognised, and one of what was not.
        good = _Lists(
            np.concatenate([originals, rated.owner[rated.recognised]]),
            np.concatenate([originals, places[rated.recognised]]),
            many,
        )
        of = np.concatenate([originals, rated.owner])
        kind = np.concatenate([np.ones(many, dtype=bool), rated.recognised])
        chosen = used[of]
        self.anchors, self._own, self._same = np.flatnonzero(chosen), of[chosen], kind[chosen]
        self._lists = {True: good, False: no}

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, positives and negatives, each int64 (count,)."""
        chosen = torch.randint(len(self.anchors), (count,), generator=generator).numpy()
        fractions = torch.rand(2, count, generator=generator, dtype=torch.float64).numpy()
        own, same = self._own[chosen], self._same[chosen]
        picked = []
        for fraction, kinds in zip(fractions, (same, ~same), strict=True):
            drawn = np.where(
                kinds, self._lists[True].pick(own, fraction), self._lists[False].pick(own, fraction)
            )
            # An original without unrecognised reconstructions: those of others.
            stranger = self._strangers[(fraction * len(self._strangers)).astype(np.int64)]
            picked.append(np.where(drawn < 0, stranger, drawn))
        return torch.from_numpy(self.anchors[chosen]), *(torch.from_numpy(part) for part in picked)  # type: ignore[return-value]


class _Lists:
    """Images of each original, to draw one from."""

    def __init__(self, owner: NDArray[np.int64], places: NDArray[np.int64], many: int) -> None:
        self._places = places[np.argsort(owner, kind="stable")]
        self.counts = np.bincount(owner, minlength=many)
        self._starts = np.cumsum(self.counts) - self.counts

    def pick(self, owner: NDArray[np.int64], fraction: NDArray[np.float64]) -> NDArray[np.int64]:
        """One of each owner's; -1 where it has none."""
        if not len(self._places):
            return np.full(len(owner), -1, dtype=np.int64)
        counts = self.counts[owner]
        at = self._starts[owner] + np.minimum((fraction * counts).astype(np.int64), np.maximum(counts - 1, 0))
        return np.where(counts > 0, self._places[np.minimum(at, len(self._places) - 1)], -1)


def train_semsim(
    rated: Rated,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> SemSimNet:
    """Train on rated reconstructions; the same ratings, in whatever order, and recipe give the same net.

    Loss: ``max(0, |a - p| - |a - n| + 1)`` of the embeddings. ``figures``: counts of :class:`Triplets`, the mean loss
    of the last tenth of the steps and the share of its triplets that are the wrong way round.

    Raises
    ------
    ConfigError, DataError
        For a recipe that cannot be; ratings that give no triplets (see :class:`Triplets`) or too small images.
    """
    _check(rated, recipe)
    rated = _ordered(rated)
    triplets = Triplets(rated, recipe.rule, recipe.fallback)
    images = torch.cat([rated.originals, rated.reconstructions]).float().clamp(0, 1)
    mean, std = channel_statistics(images)
    trained_on = sorted(rated.digests)
    facts = SemSimFacts(
        channels=images.shape[1],
        size=images.shape[-1],
        mean=mean,
        std=std,
        seed=recipe.seed,
        rule=recipe.rule,
        normalised=recipe.normalised,
        network=recipe.network,
        width=recipe.width,
        dimensions=recipe.dimensions,
        steps=recipe.steps,
        label_source="proxy" if rated.proxy else "human",
        proxy=rated.proxy,
        fallback=recipe.fallback,
        augmentation=recipe.augmentation,
        originals=tuple(trained_on),
        split_hash=hashlib.sha256("\n".join(trained_on).encode()).hexdigest(),
        seen={axis: tuple(map(str, np.unique(rated.facts[axis]))) for axis in AXES if axis in rated.facts},
    )
    net = embedding_network(recipe.network, facts.channels, recipe.width, recipe.dimensions)
    kaiming_uniform(net, torch_rng(recipe.seed, "semsim"))
    net.to(device).train()
    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "adam":
        optimiser = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    else:
        optimiser = torch.optim.SGD(net.parameters(), lr=recipe.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    draws = torch_rng(recipe.seed, "semsim triplets")
    last: list[tuple[float, float]] = []
    for step in range(recipe.steps):
        drawn = torch.cat(triplets.draw(recipe.batch, draws))
        batch = facts.scaled(varied(images[drawn], recipe.augmentation, draws).to(device))
        anchor, positive, negative = _embedded(net, batch, recipe.normalised).chunk(3)
        loss = functional.triplet_margin_loss(anchor, positive, negative, margin=MARGIN, p=2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step >= recipe.steps - max(1, recipe.steps // 10):
            near, far = ((anchor - other).detach().norm(dim=1) for other in (positive, negative))
            last.append((float(loss.detach()), float((near >= far).double().mean())))
        if progress is not None:
            progress((step + 1) / recipe.steps)
    net.cpu().eval().requires_grad_(False)
    if not all(bool(one.isfinite().all()) for one in net.state_dict().values()):
        raise ConfigError(f"learning rate {recipe.learning_rate:g}: the training diverged; try a smaller one")
    losses, wrong = (float(np.mean(part)) for part in zip(*last, strict=True))
    figures: dict[str, Any] = {**triplets.figures, "ratings": len(rated), "loss": losses, "wrong_way": wrong}
    return SemSimNet(net, facts.model_copy(update={"figures": figures}), content_hash(net.state_dict()))


def save_semsim(path: Path, trained: SemSimNet) -> None:
    """Write it whole or not at all (RunFailed)."""
    save_net(path, KIND, trained.net.state_dict(), trained.facts)


def load_semsim(path: str | Path) -> SemSimNet:
    """What :func:`save_semsim` wrote; DataError as :func:`~.checkpoint.load_net`, or if the tensors do not fit."""
    tensors, facts, digest = load_net(path, KIND, SemSimFacts)
    name = f"{KIND} {str(path)!r}"
    if hashlib.sha256("\n".join(facts.originals).encode()).hexdigest() != facts.split_hash:
        raise DataError(f"{name}: split_hash is not that of its list of originals")
    try:
        with torch.device("meta"):
            net = embedding_network(facts.network, facts.channels, facts.width, facts.dimensions)
    except ConfigError as error:
        raise DataError(f"{name}: {error}") from None
    return SemSimNet(fill(net, tensors, name), facts, digest)


def varied(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image, (B, C, H, W) in [0, 1], changed on its own as :class:`Recipe` says."""
    if augmentation == "none":
        return images
    count, _, height, width = images.shape
    pad = _SMALL_PAD if augmentation == "exposure" else _PAD
    padded = functional.pad(images, [pad] * 4)
    corner = torch.randint(2 * pad + 1, (2, count), generator=generator)
    rows = corner[0, :, None] + torch.arange(height)
    columns = corner[1, :, None] + torch.arange(width)
    if augmentation == "crop-flip":
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    cut = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
    if augmentation != "exposure":
        return cut
    draws = torch.rand(3, count, 1, 1, 1, generator=generator)
    factor, lift, spread = 0.5 + draws[0], 0.3 * draws[1] - 0.15, 0.15 * draws[2]
    mean = cut.mean(dim=(1, 2, 3), keepdim=True)
    changed = (cut - mean) * factor + mean + lift + spread * torch.randn(cut.shape, generator=generator)
    return changed.clamp(0, 1)


def _ordered(rated: Rated) -> Rated:
    """The same ratings in an order that depends on the pixels alone, so that file names have no part in it."""
    first = np.argsort(np.array(rated.digests))
    place = np.argsort(first)[rated.owner]
    digests = [
        hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in rated.reconstructions.contiguous()
    ]
    second = np.lexsort((np.array(digests), place))
    return replace(
        rated,
        originals=rated.originals[torch.from_numpy(first)],
        reconstructions=rated.reconstructions[torch.from_numpy(second)],
        owner=place[second],
        recognised=rated.recognised[second],
        facts={name: values[second] for name, values in rated.facts.items()},
        labels=None if rated.labels is None else rated.labels[first],
    )


def _check(rated: Rated, recipe: Recipe) -> None:
    """Refuse recipes and images that no training can start from."""
    for name in ("steps", "batch", "width", "dimensions"):
        if getattr(recipe, name) < 1:
            raise ConfigError(f"{name} = {getattr(recipe, name)}: must be at least 1")
    if not 0 < recipe.learning_rate < float("inf"):
        raise ConfigError(f"learning rate {recipe.learning_rate}: must be above 0")
    if rated.originals.shape[-1] < SMALLEST:
        raise DataError(f"images of {rated.originals.shape[-1]} pixels: SemSim needs at least {SMALLEST}")
