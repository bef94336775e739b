"""From figures to words. Every threshold of a verdict stands here.

Reconstruction
    An image counts as *recovered* at 30 dB and SSIM 0.9 or more, at least 6 dB (a quarter of the squared error) above
    every floor and above the shuffled control. Half of the images or more: "private images recovered".
    "Partial leakage" needs one recovered image, or a mean PSNR significantly above the best floor *and* above the
    shuffled control (95 % paired interval over the victims above 0). Anything else is "no leakage beyond the
    prior", or "undecided" where there are too few victims to have an interval.
Membership
    "Membership leaks" when the AUC's interval lies above 0.5 and the AUC above what chance scores with so many
    candidates, or when so many members stand out at 1 % false positives that chance does it less than
    once in 200; "members identified" from an AUC of 0.9.
Unlearning
    Damage is measured against the deletion of as many random samples; it counts when its 95 % interval lies
    above 0, and as slight below 5 points of accuracy.
"""

from __future__ import annotations

from fedattack.audit.family import HEADLINES, Level
from fedattack.metrics import Interval
from fedattack.reporting import formats

RECOVERED_PSNR = 30.0
RECOVERED_SSIM = 0.9
RECOVERED_MARGIN = 6.0
RECOVERED_SHARE = 0.5

COUNTED_DB = 100.0
"""Identical images count as this much where PSNRs are subtracted (float32 pixels end near 140 dB, 8 bit at 59)."""
LABEL_P_VALUE = 0.01


def image_recovered(psnr: float, ssim: float, best_floor: float, control: float | None) -> bool:
    """Whether one image is recovered beyond doubt.

    Parameters
    ----------
    psnr, ssim : float
        Of the reconstruction.
    best_floor : float
        The highest PSNR of any floor on the same image, in dB.
    control : float or None
        PSNR of the same reconstruction against other victims' images; None where there is no other victim.
    """
    above = psnr - best_floor >= RECOVERED_MARGIN and (control is None or psnr - control >= RECOVERED_MARGIN)
    return psnr >= RECOVERED_PSNR and ssim >= RECOVERED_SSIM and above


def reconstruction(
    images: int,
    recovered: int,
    psnr: float,
    ssim: float,
    floor_name: str,
    floor_psnr: float,
    over_floor: Interval,
    over_control: Interval | None,
    labels: tuple[int, int, bool],
    missing: int,
) -> tuple[Level, str]:
    """Verdict on a reconstruction attack.

    Parameters
    ----------
    images, recovered, missing : int
        Private images scored, those recovered, and those without a usable reconstruction.
    psnr, ssim : float
        Means over the scored images.
    floor_name, floor_psnr
        The floor with the highest mean PSNR.
    over_floor, over_control : Interval
        PSNR above that floor and above the shuffled control; over the victims.
    labels : tuple of int, int, bool
        Labels right, labels asked for, and whether that is more than guessing explains.

    Returns
    -------
    tuple of str
        Level and sentence.
    """
    level = _reconstruction_level(images, recovered, over_floor, over_control)
    floor = f"the best floor ({floor_name} {decibel(floor_psnr)})"
    score = f"mean {decibel(psnr)}, SSIM {ssim:.3f}"
    gap = f"{signed_gap(over_floor.mean)} {floor}"
    if psnr - floor_psnr > over_floor.mean + 0.05:
        gap += f", counting no image for more than {COUNTED_DB:.0f} dB"
    text = f"{HEADLINES['reconstruction'][level]}: {score}, {gap}"
    if over_floor.known:
        ends = f"{formats.signed(over_floor.low)} to {formats.signed(over_floor.high)}"
        text += f"; 95 % interval of the gain {ends} dB"
    if recovered and level in ("leak", "partial"):
        text += (
            f"; {recovered} of {images} images at {RECOVERED_PSNR:.0f} dB and SSIM {RECOVERED_SSIM} or more"
        )
    if not over_floor.known:
        text += "; one victim only, so no interval"
    elif level == "none" and over_floor.low > 0:
        text += "; but no better on its own victim than on another's image"
    elif level == "undecided":
        text += (
            "; too few victims to tell a likeness of its own victim from one of anybody: attack more of them"
        )
    right, asked, beyond = labels
    if asked:
        leaking = "the labels do leak" if level == "none" and beyond else "labels"
        text += f"; {leaking}: {right} of {asked} right"
        text += "" if beyond else ", no more than guessing explains"
    if missing:
        text += f"; {missing} without a usable reconstruction, left out of every mean"
    return level, text


def _reconstruction_level(
    images: int, recovered: int, over_floor: Interval, over_control: Interval | None
) -> Level:
    if recovered >= RECOVERED_SHARE * images:
        return "leak"
    if recovered:
        return "partial"
    if not over_floor.known or over_control is None or not over_control.known:
        # One victim at or below its floor is no news either way; above it may be luck.
        return "none" if over_floor.mean <= 0 else "undecided"
    if over_floor.low > 0 and over_control.low > 0:
        return "partial"
    # Above the floor, and likelier its own victim than another by as much, but with too few victims to be sure.
    unsure = over_floor.low > 0 and over_control.mean >= over_floor.mean
    return "undecided" if unsure else "none"


def decibel(value: float) -> str:
    """ "63.0 dB", or words for identical images."""
    return "identical (infinite dB)" if value == float("inf") else f"{value:.1f} dB"


def signed_gap(value: float) -> str:
    """ "48.2 dB above" or "0.3 dB below"."""
    return f"{abs(value):.1f} dB {'above' if value >= 0 else 'below'}"
