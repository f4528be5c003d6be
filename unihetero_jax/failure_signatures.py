"""The four ways in which generating images may fail to help, each as a number beside its threshold.

What was not measured says so and how it is measured: an empty cell is no all-clear. Thresholds are our choice.
"""

import dataclasses
import math
from collections.abc import Sequence

from unihetero_jax.html_page import table

UNDERSTANDING = "understanding under pixel-level generation"
SCALING = "scaling of understanding-only data"
ACCUMULATION = "error accumulation over long sequences"
GENERALISATION = "generalisation across data kinds"
MAX_HELDOUT_LOSS = 0.05
"""Accuracy that may be lost on kinds of data that were held out."""
MIN_GAIN = 0.05
"""Share of the loss that a doubling of the data has to take away at the end; less is a curve that has flattened."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """One failure: what was measured, past which value it shows, and whether it does (None: not measured)."""

    name: str
    measured: str
    threshold: str
    shows: bool | None


def not_measured(name: str, how: str) -> Signature:
    """A signature without a number."""
    return Signature(name, f"not measured: {how}", "", None)


def of_pixels(contrast: str, estimate: float, low: float, high: float, margin: float) -> Signature:
    """From the contrast of a pixel objective with a baseline; effects are positive where it helps."""
    return Signature(
        UNDERSTANDING,
        f"{contrast}: effect {estimate:.4f} ({low:.4f} to {high:.4f})",
        f"interval below {-margin:g}",
        _shows(high < -margin, low, high),
    )


def of_understanding_curve(who: str, sizes: Sequence[float], losses: Sequence[float]) -> Signature:
    """From mean losses of an understanding arm over sizes of data, ascending."""
    doublings = math.log2(sizes[-1] / sizes[-2])
    gain = 1 - (losses[-1] / losses[-2]) ** (1 / doublings)
    return Signature(
        SCALING,
        f"{who}: from {sizes[-2]:,.0f} to {sizes[-1]:,.0f} the loss falls by {gain:.1%} for each doubling",
        f"less than {MIN_GAIN:.0%}",
        _shows(gain < MIN_GAIN, gain),
    )


def of_rollouts(who: str, growth: Sequence[float], horizon: float, length: int) -> Signature:
    """From `evaluation/rollout_error.py`: growth with its interval, horizon, and how many positions there are."""
    estimate, low, high = growth
    return Signature(
        ACCUMULATION,
        f"{who}: error grows by {estimate:.4f} ({low:.4f} to {high:.4f}) a position in logarithm; halfway to the mean "
        f"embedding after {horizon:.0f} of {length} positions",
        "interval above 0 and horizon before the end",
        _shows(low > 0 and horizon < length, low, high, horizon),
    )


def of_kinds(benchmark: str, accuracy: float, heldout: str, heldout_accuracy: float) -> Signature:
    """From a benchmark and its twin of combinations that no sample shows."""
    lost = accuracy - heldout_accuracy
    return Signature(
        GENERALISATION,
        f"{benchmark} {accuracy:.3f}, {heldout} {heldout_accuracy:.3f}: {lost:.3f} lost",
        f"more than {MAX_HELDOUT_LOSS:g}",
        _shows(lost > MAX_HELDOUT_LOSS, lost),
    )


def _shows(shows: bool, *figures: float) -> bool | None:
    """Nothing is said of figures that are not finite, such as the interval of one seed."""
    return bool(shows) if all(map(math.isfinite, figures)) else None


def signatures_table(signatures: Sequence[Signature]) -> str:
    """The box of a run's or of a sweep's page, as HTML."""
    says = {True: "shows", False: "does not show", None: "–"}
    rows = [(one.name, one.measured, one.threshold, says[one.shows]) for one in signatures]
    return table("Each with its number and its threshold", ("failure", "measured", "shows if", "here"), rows)
