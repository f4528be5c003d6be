"""Fits against curves whose law is known, a published fit, and data multipliers worked out by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest

from unihetero_jax import scaling
from unihetero_jax.scaling import Curve, Law

TABLE = Path(__file__).parent / "data" / "chinchilla_points.csv"
"""Model size, training FLOPs and loss of 245 runs of arXiv 2203.15556, as read off its figure 4 by Besiroglu et al.
(arXiv 2404.10102)."""
SIZES = np.geomspace(128, 128_000, 8)


def noisy(law, rng, num_seeds=8, noise=0.01, sizes=SIZES):
    return Curve(sizes, law(sizes)[:, None] * np.exp(rng.normal(0, noise, (len(sizes), num_seeds))))


def known(E=0.5, A=20.0, alpha=0.45):
    return Law(("D",), {"E": E, "A": A, "alpha": alpha}, 0.0, 1.0)


@pytest.mark.parametrize(("floor", "alpha"), [(0.0, 0.2), (0.5, 0.45), (1.8, 1.0)])
def test_a_law_without_noise_is_found(floor, alpha):
    law = known(floor, 20.0, alpha)
    found = scaling.fit(law(SIZES), SIZES)
    assert found.coefficients["alpha"] == pytest.approx(alpha, rel=1e-3)
    np.testing.assert_allclose(found(SIZES), law(SIZES), rtol=1e-5)
    assert found.r_squared == pytest.approx(1)


def test_one_run_gone_wrong_moves_little():
    """Least squares would follow it; the Huber loss of log residuals does not."""
    law, losses = known(), known()(SIZES)
    losses[3] *= 3
    assert scaling.fit(losses, SIZES).coefficients["alpha"] == pytest.approx(law.coefficients["alpha"], abs=0.02)


def test_two_inputs_give_the_published_fit():
    """Besiroglu et al. leave out the five runs of the highest losses and find E 1.8172, A 482.01, B 2085.43,
    alpha .3478, beta .3658, at a sum of Huber losses of .0010182741 (their notebook's best).
    """
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    size, flops, loss = (np.array([float(row[name]) for row in rows]) for name in ("parameters", "flops", "loss"))
    kept = loss < np.sort(loss)[-5]
    assert len(rows) == 245 and kept.sum() == 240
    found = scaling.fit(loss[kept], size[kept], (flops / (6 * size))[kept])
    assert found.objective <= 0.00101828
    expected = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    tolerance = {"E": 0.002, "A": 0.03, "B": 0.05, "alpha": 0.004, "beta": 0.006}
    for name, value in expected.items():
        assert found.coefficients[name] == pytest.approx(value, rel=tolerance[name]), name


def test_the_inverse_is_where_the_law_reaches_a_loss():
    law = known()
    np.testing.assert_allclose(law.inverse(law(SIZES)), SIZES, rtol=1e-9)
    assert law.inverse(0.5) == np.inf == law.inverse(0.1), "never below its floor"


def test_data_multiplier_by_hand():
    """An arm that is three times as good with data: A' = A / 3^alpha."""
    baseline, arm = known(), known(A=20.0 / 3**0.45)
    np.testing.assert_allclose(scaling.data_multiplier(baseline, arm, [0.9, 1.5]), 3.0, rtol=1e-9)


def test_interval_holds_the_exponent_and_the_difference_of_two():
    rng = np.random.default_rng(0)
    curves = {"baseline": noisy(known(), rng), "arm": noisy(known(alpha=0.55), rng)}

    def statistics(laws):
        exponents = {name: law.coefficients["alpha"] for name, law in laws.items()}
        return exponents | {"difference": exponents["arm"] - exponents["baseline"]}

    found = scaling.bootstrap(curves, statistics, num_draws=60)
    for name, true in {"baseline": 0.45, "arm": 0.55, "difference": 0.1}.items():
        value, low, high = found[name]
        assert low <= true <= high and low < value < high and high - low < 0.15, name


@pytest.mark.slow
def test_intervals_hold_the_exponent_in_nine_of_ten_trials():
    rng, hits, trials = np.random.default_rng(1), 0, 200
    for _ in range(trials):
        alpha = rng.uniform(0.25, 0.7)
        curve = noisy(known(E=rng.uniform(0.1, 1.0), alpha=alpha), rng, num_seeds=5, noise=0.02)
        _, low, high = scaling.bootstrap({"a": curve}, lambda laws: laws["a"].coefficients, num_draws=100)["alpha"]
        hits += low <= alpha <= high
    assert hits >= 0.9 * trials, hits


def test_too_few_points_between_floor_and_ceiling_are_refused_with_their_number():
    flat = Curve(SIZES, np.full((8, 2), 3.0))
    with pytest.raises(
        ValueError, match="0 of 8 sizes lie between floor and ceiling; a law needs 4: 4 more are missing"
    ):
        scaling.require_points(flat, ceiling=3.0)
    curve = noisy(known(), np.random.default_rng(0))
    scaling.require_points(curve, ceiling=5.0)
    assert scaling.usable_points(curve, ceiling=5.0, floor=curve.losses.mean(axis=1)[4]).sum() == 4


@pytest.mark.parametrize(
    ("losses", "sizes", "message"),
    [([1.0, 2.0], [1.0, 2.0], "needs at least as many points"), ([1, 2, -1], [1, 2, 3], "must be positive"),
     ([1, 2, np.nan], [1, 2, 3], "must be positive and finite")],
)  # fmt: skip
def test_what_no_law_fits_is_refused(losses, sizes, message):
    with pytest.raises(ValueError, match=message):
        scaling.fit(losses, sizes)


def test_the_optimum_of_a_parabola_in_log_size():
    sizes = np.geomspace(1e6, 1e8, 7)
    found = scaling.isoflop_optimum(sizes, 2 + 0.1 * (np.log(sizes) - np.log(2e7)) ** 2)
    assert found.parameters == pytest.approx(2e7, rel=1e-6) and found.loss == pytest.approx(2) and found.is_inside
    assert not scaling.isoflop_optimum(sizes, 2 + 0.1 * (np.log(sizes) - np.log(5e9)) ** 2).is_inside
    with pytest.raises(ValueError, match="no minimum"):
        scaling.isoflop_optimum(sizes, -((np.log(sizes) - 15) ** 2))
    with pytest.raises(ValueError, match="three model sizes, not 2"):
        scaling.isoflop_optimum([1, 2, 2], [1, 2, 3])
