"""fedattack.audit.unlearning_verdict."""

from __future__ import annotations

from fedattack.audit.family import HEADLINES, Level
from fedattack.metrics import Interval
from fedattack.reporting import formats

SLIGHT_DAMAGE = 0.05


def unlearning(before: float, after: float, random: float, damage: Interval) -> tuple[Level, str]:
    """Verdict on an unlearning attack.

    Parameters
    ----------
    before, after, random : float
        Accuracies in [0, 1]: before the request, after it, and after deleting as many random samples.
    damage : Interval
        ``random - after``.

    Returns
    -------
    tuple of str
        Level and sentence.
    """
    level: Level = "none"
    if not damage.known:
        level = "undecided"
    elif damage.low > 0:
        level = "leak" if damage.mean >= SLIGHT_DAMAGE else "partial"
    side = "below" if damage.mean >= 0 else "above"
    gap = f"{abs(damage.mean) * 100:.1f} points {side} the deletion of as many random samples"
    text = (
        f"{HEADLINES['unlearning'][level]}: accuracy {formats.percent(before)} before, {formats.percent(after)} "
        f"after the request, {gap} ({formats.percent(random)})"
    )
    if damage.known:
        ends = f"{formats.signed(damage.low * 100)} to {formats.signed(damage.high * 100)}"
        text += f"; 95 % interval of the damage {ends} points"
    else:
        text += "; one run and no count of test samples, so no interval"
    return level, text
