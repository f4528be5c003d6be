"""The four ways in which generating images may fail to help, each as a number beside its threshold.

What was not measured says so and how it is measured: an empty cell is no all-clear. Thresholds are our choice.
"""

import dataclasses
from collections.abc import Sequence

from unihetero_jax.html_page import table

UNDERSTANDING = "understanding under pixel-level generation"
SCALING = "scaling of understanding-only data"
ACCUMULATION = "error accumulation over long sequences"
GENERALISATION = "generalisation across data kinds"
MAX_HELDOUT_LOSS = 0.05
"""Accuracy that may be lost on kinds of data that were held out."""
MIN_GAIN = 0.05
"""Share of the loss that the last step up in data has to take away; less is a curve that has flattened."""


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


def of_pixels(estimate: float, low: float, high: float, margin: float) -> Signature:
    """From the contrast of a pixel objective with the better baseline; effects are positive where it helps."""
    return Signature(
        UNDERSTANDING,
        f"effect {estimate:.4f} ({low:.4f} to {high:.4f}) of an arm that draws pixels",
        f"interval below {-margin:g}",
        high < -margin,
    )


def of_understanding_curve(sizes: Sequence[float], losses: Sequence[float]) -> Signature:
    """From mean losses of the understanding arm over sizes of data, ascending."""
    gain = (losses[-2] - losses[-1]) / losses[-2]
    return Signature(
        SCALING,
        f"from {sizes[-2]:,.0f} to {sizes[-1]:,.0f} pairs the loss falls by {gain:.1%}",
        f"less than {MIN_GAIN:.0%}",
        gain < MIN_GAIN,
    )


def of_rollouts(who: str, growth: Sequence[float], horizon: float, length: int) -> Signature:
    """From `evaluation/rollout_error.py`: growth with its interval, horizon, and how many positions there are."""
    estimate, low, high = growth
    return Signature(
        ACCUMULATION,
        f"{who}: error grows by {estimate:.4f} ({low:.4f} to {high:.4f}) a position in logarithm; halfway to the mean "
        f"embedding after {horizon:.0f} of {length} positions",
        "interval above 0 and horizon before the end",
        low > 0 and horizon < length,
    )


def of_kinds(benchmark: str, accuracy: float, heldout: str, heldout_accuracy: float) -> Signature:
    """From a benchmark and its twin of combinations that no sample shows."""
    lost = accuracy - heldout_accuracy
    return Signature(
        GENERALISATION,
        f"{benchmark} {accuracy:.3f}, {heldout} {heldout_accuracy:.3f}: {lost:.3f} lost",
        f"more than {MAX_HELDOUT_LOSS:g}",
        lost > MAX_HELDOUT_LOSS,
    )


def signatures_table(signatures: Sequence[Signature]) -> str:
    """The box of a run's or of a sweep's page, as HTML."""
    says = {True: "shows", False: "does not show", None: "–"}
    rows = [(one.name, one.measured, one.threshold, says[one.shows]) for one in signatures]
    return table("Each with its number and its threshold", ("failure", "measured", "shows if", "here"), rows)
