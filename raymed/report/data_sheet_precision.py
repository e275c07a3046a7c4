"""How precisely a test set of a given size can measure: the 95 % interval to expect before there is a model.

Sensitivity and specificity by Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), AUROC by the standard error of
Hanley and McNeil (Radiology 143, 1982, exponential approximation).
"""

import math

Z = 1.959964  # of 95 %


def proportion_interval(fraction: float, num: int) -> tuple[float, float]:
    """Wilson's interval of a fraction in [0, 1] observed in num >= 1 cases."""
    centre = (fraction + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * math.sqrt(fraction * (1 - fraction) / num + (Z / (2 * num)) ** 2)
    return centre - half, centre + half


def auroc_interval(auroc: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """auroc ± 1.96 SE, cut at 0 and 1, with SE² = (A (1 - A) + (p - 1) (Q1 - A²) + (n - 1) (Q2 - A²)) / (p n),
    Q1 = A / (2 - A) and Q2 = 2 A² / (1 + A), for p >= 1 positive and n >= 1 negative cases."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = (num_positive - 1) * (q1 - auroc**2) + (num_negative - 1) * (q2 - auroc**2)
    half = Z * math.sqrt((auroc * (1 - auroc) + spread) / (num_positive * num_negative))
    return max(0.0, auroc - half), min(1.0, auroc + half)


def num_for_half_width(fraction: float, half_width: float) -> int:
    """The smallest number of cases whose Wilson interval of the fraction is no wider than ± half_width (0, 0.5)."""
    num = 1
    while True:
        low, high = proportion_interval(fraction, num)
        if high - low <= 2 * half_width:
            return num
        num += 1
