"""Verdicts on claims: supported, not supported or inconclusive, by a rule that is fixed before the runs.

A contrast is the mean over seeds of the paired difference between a baseline's loss and an arm's (positive: the arm is
better). Its interval is Student's, at a level that Holm's procedure gives each of the primary contrasts (Holm 1979):

    supported       lower bound > 0 and estimate >= m
    not supported   upper bound < m
    inconclusive    otherwise; with the number of seeds that would decide

m is the margin, the least effect worth the name. n seeds are enough if an effect of m is told from 0, and 0 from m,
with the wanted power at Holm's strictest level (`seeds_needed`); n and m are written down before the arms run.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import special  # not scipy.stats, whose import takes every command a second

Verdict = Literal["supported", "not supported", "inconclusive"]
LEVEL = 0.05
"""Two-sided, of all primary contrasts together: 2.5% for each direction."""
POWER = 0.85
"""Of each verdict at the recommended seeds; above .8, since the spread that they follow from is an estimate itself."""
LEAST_SEEDS = 8
"""Fewer is called exploratory."""
MOST_SEEDS = 100_000
COLLAPSE_SHARE = 0.2
"""Above it the verdict says that the arm collapsed instead."""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One comparison with its verdict.

    Attributes:
        name: of the contrast.
        estimate: mean paired difference, in units of the metric; positive is better for the arm.
        low, high: its interval at `level`.
        spread: standard deviation of the differences over seeds.
        num_seeds: n.
        level: what Holm's procedure left it, two-sided.
        p_value: two-sided, of no difference.
        verdict: by the rule.
        seeds_to_decide: n at which the interval would be half as wide as the margin needs; None where it is decided.
    """

    name: str
    estimate: float
    low: float
    high: float
    spread: float
    num_seeds: int
    level: float
    p_value: float
    verdict: Verdict
    seeds_to_decide: int | None

    @property
    def is_exploratory(self) -> bool:
        return self.num_seeds < LEAST_SEEDS


def judge(differences: Mapping[str, Sequence[float]], margin: float, level: float = LEVEL) -> list[Contrast]:
    """Verdicts on the primary contrasts, in the order given.

    Args:
        differences: by contrast, baseline less arm for every seed; every started run counts with what it got.
        margin: m > 0.
        level: two-sided, of all together.

    Raises:
        ValueError: the margin is not positive, a contrast has fewer than two seeds or a value that is not finite.
    """
    if not margin > 0:
        raise ValueError(f"margin {margin} must be positive: the least effect worth the name")
    for name, values in differences.items():
        if len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"contrast {name}: at least two finite differences are needed, not {list(values)}")
    p_values = {name: _p_value(np.asarray(values, np.float64)) for name, values in differences.items()}
    levels = holm_levels(p_values, level)
    return [_contrast(name, np.asarray(values, np.float64), p_values[name], levels[name], margin)
            for name, values in differences.items()]  # fmt: skip


def holm_levels(p_values: Mapping[str, float], level: float = LEVEL) -> dict[str, float]:
    """What Holm's step-down procedure compares each p-value with.

    The k-th smallest of n has level / (n - k + 1), until one is not below its own: from there on all have that one's
    (they are not rejected, and their intervals shall not be narrower than the one that stopped).
    """
    left, found, stopped = len(p_values), {}, None
    for name in sorted(p_values, key=lambda one: p_values[one]):
        own = level / left if stopped is None else stopped
        found[name] = own
        if stopped is None and p_values[name] > own:
            stopped = own
        left -= 1
    return found


def _p_value(values: np.ndarray) -> float:
    spread = values.std(ddof=1)
    if spread == 0:
        return 1.0 if values.mean() == 0 else 0.0
    return float(2 * special.stdtr(len(values) - 1, -abs(values.mean()) / spread * math.sqrt(len(values))))


def _contrast(name: str, values: np.ndarray, p_value: float, level: float, margin: float) -> Contrast:
    n, estimate, spread = len(values), float(values.mean()), float(values.std(ddof=1))
    half = _quantile(level, n) * spread / math.sqrt(n)
    low, high = estimate - half, estimate + half
    verdict: Verdict = "inconclusive"
    if low > 0 and estimate >= margin:
        verdict = "supported"
    elif high < margin:
        verdict = "not supported"
    decide = _seeds_to_decide(estimate, spread, level, margin) if verdict == "inconclusive" else None
    return Contrast(name, estimate, low, high, spread, n, level, p_value, verdict, decide)


def _seeds_to_decide(estimate: float, spread: float, level: float, margin: float) -> int:
    """Seeds at which an interval about the same estimate would be clear of 0 (at or above m) or of m (below)."""
    distance = estimate if estimate >= margin else margin - estimate
    distance = max(distance, 1e-9 * margin)
    return _least(lambda n: _quantile(level, n) * spread / math.sqrt(n) < distance)


def _quantile(level: float, num_seeds: int) -> float:
    """Half the width of Student's two-sided interval, in standard errors."""
    return float(special.stdtrit(num_seeds - 1, 1 - level / 2))


def seeds_needed(spread: float, margin: float, num_contrasts: int, level: float = LEVEL, power: float = POWER) -> int:
    """n with which a true effect of 2m is called supported, and one of 0 not supported, with the power asked for.

    By the noncentral t at the strictest level that Holm gives (level / num_contrasts). Not supported at 0 asks for an
    upper bound below m, the harder of the two.

    Args:
        spread: standard deviation of paired differences, from a pilot.
        margin: m.
        num_contrasts: primary contrasts.
        level: two-sided, of all together.
        power: of each.
    """
    if not spread > 0 or not margin > 0:
        raise ValueError(f"spread {spread} and margin {margin} must be positive")
    return max(_least(lambda n: detects(margin, spread, n, level / num_contrasts) >= power), 2)


def detects(effect: float, spread: float, num_seeds: int, level: float) -> float:
    """Probability that the interval of a true effect lies above 0."""
    critical = _quantile(level, num_seeds)
    return float(1 - special.nctdtr(num_seeds - 1, effect / spread * math.sqrt(num_seeds), critical))


def smallest_detectable(
    spread: float, num_seeds: int, num_contrasts: int, level: float = LEVEL, power: float = POWER
) -> float:
    """The effect that n seeds tell from 0 with this power."""
    low, high = 0.0, spread
    while detects(high, spread, num_seeds, level / num_contrasts) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if detects(middle, spread, num_seeds, level / num_contrasts) >= power else (middle, high)
        )
    return high


def _least(is_enough) -> int:
    """The least n from 2 on for which it holds, by doubling and halving."""
    high = 2
    while not is_enough(high):
        high *= 2
        if high > MOST_SEEDS:
            return MOST_SEEDS
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if middle >= 2 and is_enough(middle) else (middle + 1, high)
    return high
