"""What a differential privacy guarantee lets any attacker reach."""

from __future__ import annotations

import math

from scipy.special import expit


def allowed_tpr(fpr: float, epsilon: float, delta: float) -> float:
    """Largest true-positive rate at a false-positive rate that (epsilon, delta)-differential privacy allows.

    All in [0, 1] but `epsilon` >= 0, which may be infinite (Kairouz, Oh and Viswanath, The composition theorem for
    differential privacy, 2017, theorem 2.1).
    """
    first = math.inf if epsilon > 700 else math.exp(epsilon) * fpr + delta  # exp overflows beyond
    return max(0.0, min(1.0, first, 1 - math.exp(-epsilon) * (1 - delta - fpr)))


def allowed_auc(epsilon: float, delta: float) -> float:
    """Area under :func:`allowed_tpr` over all false-positive rates: the largest AUC of any attacker."""
    return delta + (1 - delta) * (float(expit(epsilon)) + delta * float(expit(-epsilon)))
