"""fedattack.audit.membership_verdict."""

from __future__ import annotations

from fedattack.audit.family import HEADLINES, Level
from fedattack.metrics import Interval, OperatingPoint
from fedattack.reporting import formats

IDENTIFIED_AUC = 0.9
TAIL_P_VALUE = 0.005


def membership(auc: Interval, chance: Interval, tail: OperatingPoint, targets: int) -> tuple[Level, str]:
    """Verdict on a membership attack.

    Parameters
    ----------
    auc, chance : Interval
        The attack's AUC (mean over the targets) and that of scores which know nothing.
    tail : OperatingPoint
        At 1 % false positives, of the target with the smallest p-value.
    targets : int
        Clients asked about; the tail's p-value is multiplied by it.

    Returns
    -------
    tuple of str
        Level and sentence.
    """
    ranked = auc.low > 0.5 and auc.mean > chance.high
    stands_out = tail.p_value * targets < TAIL_P_VALUE
    level: Level = (
        "leak" if ranked and auc.mean >= IDENTIFIED_AUC else "partial" if ranked or stands_out else "none"
    )
    backwards = auc.high < 0.5 and auc.mean < chance.low and not stands_out
    if backwards:
        level = "undecided"
    floor = f"chance 0.500 [{chance.low:.3f}, {chance.high:.3f}]"
    figures = f"AUC {auc.mean:.3f} [{auc.low:.3f}, {auc.high:.3f}], {floor}"
    found = (
        f"at {formats.rate(tail.max_fpr)} false positives {tail.true_positives} of {tail.members} members found "
        f"(chance: {tail.chance_mean * tail.members:.1f})"
    )
    if backwards:
        return (
            level,
            f"undecided: the scores run backwards: {figures}; the statistic's sign is to be questioned; {found}",
        )
    return level, f"{HEADLINES['membership'][level]}: {figures}; {found}"
