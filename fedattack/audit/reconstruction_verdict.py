"""From scores of images to words. Every threshold of the verdict stands here.

An image counts as *recovered* at 30 dB and SSIM 0.9 or more, at least 6 dB (a quarter of the squared error) above
every floor and above the control. Half of the images or more: "private images recovered".

Scores of pixels call a shifted, mirrored or re-lit image safe. So victims also count as *identified*: their private
images rank first among others' by registered correlation. That says something where chance would do as well in fewer
than 1 of 100 audits, and where no floor identifies the same victims as often (sign test). Half of the images
recovered of what a defence showed the model, and half of the victims identified: "private images recovered", too.

"Partial leakage" needs one recovered image, or a gain whose interval lies above 0 both over the best floor and over
the control, or labels beyond their floor, or a recovered image of what a defence showed the model, or victims
identified. "No leakage" needs the gain's upper end below 3 dB, the control counting as a floor there, and as many
victims identified as chance would have, in 1 of 20 audits at least. An interval below 0, or a mean 3 dB or more
below the best floor, is an attack that failed. The rest is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedattack.audit.family import Level, further_units, gain_level
from fedattack.metrics import Interval
from fedattack.metrics.identification import Evidence
from fedattack.metrics.statistics import FEWEST
from fedattack.reporting import formats

RECOVERED_PSNR = 30.0
RECOVERED_SSIM = 0.9
RECOVERED_MARGIN = 6.0
RECOVERED_SHARE = 0.5

MARGIN = 3.0
"""A gain of less is no leakage, in dB: half of the squared error."""

COUNTED_DB = 100.0
"""Identical images count as this much where PSNRs are subtracted (float32 pixels end near 140 dB, 8 bit at 59)."""

LABEL_P_VALUE = 0.01
IDENTIFIED_P_VALUE = 0.01
UNSURE_P_VALUE = 0.05
"""Of victims identified by chance: below the first they are identified, above the second they are not."""

HEADLINES: dict[Level, str] = {
    "leak": "private images recovered",
    "partial": "partial leakage",
    "none": "no leakage beyond the prior",
}


@dataclass(frozen=True)
class Labels:
    """Labels right of those asked for, the best answer without the update, whether it is beaten (None: unknown)."""

    right: int = 0
    of: int = 0
    floor: float = 0.0
    beyond: bool | None = False


@dataclass(frozen=True)
class Identified:
    """Victims whose private images rank first, beside chance, and beside the floor that identifies the most.

    `over_floors` is the largest p-value over the floors of identifying no more victims than they do; `looks` how many
    sets of victims are judged; `single` whether each victim is one image.
    """

    evidence: Evidence
    floor: str = ""
    floor_first: int = 0
    over_floors: float = 0.0
    looks: int = 1
    single: bool = True

    @property
    def beyond(self) -> bool:
        """Whether more are identified than chance or any floor would."""
        p_value = self.evidence.p_value * self.looks
        return p_value < IDENTIFIED_P_VALUE and self.over_floors < UNSURE_P_VALUE

    @property
    def unsure(self) -> bool:
        """Whether so few victims or candidates, or so many identified, leave it open."""
        told = self.evidence
        reachable = told.of ** -float(told.count) < IDENTIFIED_P_VALUE
        return not reachable or (told.p_value < UNSURE_P_VALUE and self.over_floors < 0.5)

    def record(self) -> dict[str, Any]:
        """JSON-able: "first" of "of" victims among "gallery" candidates, what chance and the best floor have, ..."""
        told = self.evidence
        return {
            "first": told.first,
            "of": told.count,
            "gallery": told.of,
            "chance": told.chance,
            "p_value": told.p_value,
            "low": told.share.low,
            "high": told.share.high,
            "floor": self.floor_first,
            "beyond": self.beyond,
        }

    @property
    def text(self) -> str:
        """ "8 of 8 private images rank first among 65 (by chance 0.1, p < 0.0001; best floor 0, 95 % ...)"."""
        told, what = self.evidence, "private images rank" if self.single else "private batches rank"
        low, high = (formats.percent(end, 0) for end in (told.share.low, told.share.high))
        ends = f", {told.share.confidence * 100:.3g} % interval {low} to {high}"
        floor = f"; best floor {self.floor_first}" if self.floor else ""
        chance = f"by chance {formats.decimal(told.chance)}, {formats.p_value(told.p_value)}{floor}"
        return f"{told.first} of {told.count} {what} first among {told.of} ({chance}{ends})"


@dataclass(frozen=True)
class Findings:
    """What a verdict is given: images asked for and recovered, means over the scored ones, and the best floor.

    `over_floor` and `over_control` are PSNRs above those, over the victims; no control where there is no other
    victim. `failed` has "key" and "reason" of the victims without an answer, `shown` the mean PSNR against what a
    defence showed the model and how many images of that were recovered, `identified` whose images they
    are, `methods` what answered, and why.
    """

    images: int
    recovered: int
    psnr: float
    ssim: float
    floor_name: str
    floor_psnr: float
    over_floor: Interval
    over_control: Interval | None
    labels: Labels = Labels()
    failed: Sequence[Mapping[str, str]] = ()
    shown: tuple[float, int] | None = None
    identified: Identified | None = None
    methods: str = ""


def image_recovered(psnr: float, ssim: float, best_floor: float, control: float | None) -> bool:
    """Whether one image is recovered beyond doubt.

    In dB: `best_floor` on the same image, and `control`, against other victims' images (None where there is none).
    """
    above = psnr - best_floor >= RECOVERED_MARGIN and (control is None or psnr - control >= RECOVERED_MARGIN)
    return psnr >= RECOVERED_PSNR and ssim >= RECOVERED_SSIM and above


def reconstruction(found: Findings) -> tuple[Level, str]:
    """Level and reasons of the verdict."""
    level, gain, control = _level(found), found.over_floor, found.over_control
    floor = f"the best floor ({found.floor_name} {decibel(found.floor_psnr)})"
    text = f"mean {decibel(found.psnr)}, SSIM {found.ssim:.3f}, {signed_gap(gain.mean)} {floor}"
    if found.psnr - found.floor_psnr > gain.mean + 0.05:
        text += f", counting no image for more than {COUNTED_DB:.0f} dB"
    if gain.known:
        ends = f"{formats.signed(gain.low)} to {formats.signed(gain.high)}"
        text += f"; {gain.confidence * 100:.3g} % interval of the gain {ends} dB"
    else:
        text += f"; {gain.count} victim{'s' if gain.count != 1 else ''} only, so no interval"
    if found.recovered:
        text += f"; {found.recovered} of {found.images} images at {RECOVERED_PSNR:.0f} dB and SSIM {RECOVERED_SSIM}"
        text += " or more"
    if found.shown is not None:
        text += f"; against what the model was shown {decibel(found.shown[0])}"
        text += f", {found.shown[1]} of {found.images} images of it recovered" if found.shown[1] else ""
    if level in ("none", "undecided") and gain.known and gain.low > 0:
        text += "; but no better on its own victim than on another's image"
    if level == "undecided" and gain_level(gain, MARGIN) != "none":
        more = max(further_units(one, MARGIN) for one in (gain, control) if one is not None)
        least = "at least " if gain.count < FEWEST else "about "
        text += f"; {least}{more:,} more victim{'s' if more != 1 else ''} would tell"
    if found.identified is not None:
        text += f"; {found.identified.text}"
    text += _label_words(found.labels)
    if found.failed:
        who = f"{len(found.failed)} victim{'s' if len(found.failed) != 1 else ''} failed"
        text += f"; {who} ({found.failed[0]['key']}: {found.failed[0]['reason']}), left out of every mean"
    return level, text + (f"; {found.methods}" if found.methods else "")


def _label_words(labels: Labels) -> str:
    if not labels.of:
        return ""
    known = "the labels do leak" if labels.beyond else "labels"
    verdict = {True: "", False: ", no more than that", None: ", too few clients to tell"}[labels.beyond]
    floor = f"best answer without the update: {labels.floor:.1f}{verdict}"
    return f"; {known}: {labels.right} of {labels.of} right ({floor})"


def _level(found: Findings) -> Level:
    if found.recovered >= RECOVERED_SHARE * found.images:
        return "leak"
    named, of_shown = found.identified, 0 if found.shown is None else found.shown[1]
    beyond = named is not None and named.beyond
    many = named is not None and named.evidence.share.mean >= RECOVERED_SHARE
    if beyond and many and of_shown >= RECOVERED_SHARE * found.images:
        return "leak"
    if found.recovered or found.labels.beyond or of_shown or beyond:
        return "partial"
    level, control = gain_level(found.over_floor, MARGIN), found.over_control
    if level in ("partial", "undecided"):
        if control is not None and control.mean < found.over_floor.mean and control.high < MARGIN:
            level = "none"
        elif control is None or not control.low > 0:
            level = "undecided"
    # Pixels cannot tell a moved or re-lit image: "no leakage" needs that nobody was identified, and could have been
    # where a defence changes the images.
    if (
        level == "none"
        and named is not None
        and named.unsure
        and (named.evidence.first or found.shown is not None)
    ):
        return "undecided"
    return "undecided" if level == "none" and found.shown is not None and named is None else level


def decibel(value: float) -> str:
    """ "63.0 dB", or words for identical images."""
    return "identical (infinite dB)" if value == float("inf") else f"{value:.1f} dB"


def signed_gap(value: float) -> str:
    """ "48.2 dB above" or "0.3 dB below"."""
    return f"{abs(value):.1f} dB {'above' if round(value, 1) >= 0 else 'below'}"
