"""The rule by hand, Holm's levels against a table, and its calibration by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from unihetero_jax import verdicts

MARGIN, SPREAD = 0.02, 0.03


def around(mean, spread, num_seeds, rng):
    return rng.normal(mean, spread, num_seeds)


def exact(mean, spread, num_seeds):
    """Values with exactly this mean and standard deviation."""
    values = np.linspace(-1, 1, num_seeds)
    return mean + spread * values / values.std(ddof=1)


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [(0.05, "supported"), (0.0, "not supported"), (-0.05, "not supported"), (0.015, "inconclusive")],
)
def test_the_rule_on_one_contrast(mean, verdict):
    values = exact(mean, SPREAD, 36)
    found = verdicts.judge({"only": values}, MARGIN)[0]
    half = stats.t.ppf(0.975, 35) * SPREAD / 6
    assert (found.low, found.high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert found.verdict == verdict and found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert (found.seeds_to_decide is None) == (verdict != "inconclusive")


def test_a_clear_effect_below_the_margin_is_not_supported():
    found = verdicts.judge({"only": exact(0.01, 0.001, 16)}, MARGIN)[0]
    assert found.low > 0 and found.verdict == "not supported"


def test_the_seeds_that_would_decide_do():
    found = verdicts.judge({"only": exact(0.026, 0.1, 16)}, MARGIN)[0]
    assert found.verdict == "inconclusive" and found.seeds_to_decide > 16
    assert verdicts.judge({"only": exact(0.026, 0.1, found.seeds_to_decide)}, MARGIN)[0].verdict == "supported"
    assert verdicts.judge({"only": exact(0.026, 0.1, found.seeds_to_decide - 1)}, MARGIN)[0].verdict == "inconclusive"


def test_holm_levels_by_hand():
    """Holm (1979) on .01, .04, .03: .01 against .05 / 3 is below; .03 against .05 / 2 is not, and stops all others."""
    levels = verdicts.holm_levels({"a": 0.01, "b": 0.04, "c": 0.03})
    assert levels == pytest.approx({"a": 0.05 / 3, "c": 0.025, "b": 0.025})
    assert verdicts.holm_levels({"a": 0.001, "b": 0.002, "c": 0.003}) == pytest.approx(
        {"a": 0.05 / 3, "b": 0.025, "c": 0.05}
    )
    assert set(verdicts.holm_levels({"a": 0.2, "b": 0.3, "c": 0.4}).values()) == {0.05 / 3}


def test_seeds_needed_against_the_noncentral_t_by_simulation():
    n = verdicts.seeds_needed(SPREAD, MARGIN, 3)
    rng = np.random.default_rng(0)
    values = rng.normal(MARGIN, SPREAD, (20_000, n))
    t = values.mean(axis=1) / values.std(axis=1, ddof=1) * math.sqrt(n)
    power = (t > stats.t.ppf(1 - 0.05 / 3 / 2, n - 1)).mean()
    assert verdicts.POWER - 0.01 < power < verdicts.POWER + 0.03
    assert verdicts.smallest_detectable(SPREAD, n, 3) == pytest.approx(MARGIN, rel=0.05)
    assert verdicts.seeds_needed(SPREAD, MARGIN, 1) < n < verdicts.seeds_needed(2 * SPREAD, MARGIN, 3)


@pytest.mark.parametrize(("effect", "verdict", "least"), [(0.0, "not supported", 0.8), (2 * MARGIN, "supported", 0.8)])
def test_calibration_at_the_recommended_seeds(effect, verdict, least):
    """1,000 repetitions of three contrasts each; at no effect "supported" in at most 2.5% plus two standard errors."""
    rng, n = np.random.default_rng(7), verdicts.seeds_needed(SPREAD, MARGIN, 3)
    counts = dict.fromkeys(("supported", "not supported", "inconclusive"), 0)
    for _ in range(1000):
        found = verdicts.judge({name: around(effect, SPREAD, n, rng) for name in "abc"}, MARGIN)
        counts[found[0].verdict] += 1
    assert counts[verdict] >= 1000 * least, counts
    if effect == 0:
        assert counts["supported"] <= 1000 * (0.025 + 2 * math.sqrt(0.025 * 0.975 / 1000)), counts


@pytest.mark.parametrize("num_seeds", [2, 8])
def test_no_effect_is_rarely_supported_whatever_the_number_of_seeds(num_seeds):
    rng = np.random.default_rng(3)
    supported = sum(
        any(one.verdict == "supported" for one in verdicts.judge(
            {name: around(0.0, SPREAD, num_seeds, rng) for name in "abc"}, 0.001
        ))
        for _ in range(1000)
    )  # fmt: skip
    assert supported <= 1000 * (0.025 + 2 * math.sqrt(0.025 * 0.975 / 1000)), supported


@pytest.mark.parametrize(
    ("differences", "margin", "message"),
    [({"a": [1.0]}, 1.0, "contrast a: at least two finite"), ({"a": [1.0, math.nan]}, 1.0, "contrast a"),
     ({"a": [1.0, 2.0]}, 0.0, "margin 0.0 must be positive")],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(differences, margin, message):
    with pytest.raises(ValueError, match=message):
        verdicts.judge(differences, margin)
