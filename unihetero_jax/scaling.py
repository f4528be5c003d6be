"""Scaling laws: fits with intervals, and what two curves say of each other.

    L(D)   = E + A D^-alpha                 loss over samples (or steps, or FLOPs)
    L(N,D) = E + A N^-alpha + B D^-beta     over parameters and samples (arXiv 2203.15556, approach 3)

The sum of Huber losses of log residuals is minimised from many starts (delta .001, as there). Intervals are those of a
bootstrap that draws seeds and, among the sizes, points. Each point is a run of its own with a complete schedule: points
within a run share its noise and its learning rate and are never fitted.

Objectives are compared by the difference of exponents, by the data multiplier, and by data utilisation (our
definition): pairs that the baseline needs over those that the arm needs for the same held-out loss.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

DELTA = 1e-3
"""Where the Huber loss of a log residual turns from square to absolute."""
NUM_DRAWS = 300
LEVEL = 0.95
MIN_POINTS = 4
"""Sizes between floor and ceiling that three parameters need to leave one over."""
_NEAR_FLOOR, _NEAR_CEILING = 0.02, 0.02
_BOUND = 40.0
"""Of the logarithms of A, B and E; beyond, float64 has nothing to say."""


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law: `coefficients` are E, then A and the exponent of every input in order.

    Attributes:
        names: of the inputs (`D`, or `N` and `D`).
        coefficients: {"E": ..., "A": ..., "alpha": ..., ...}.
        objective: sum of Huber losses at the optimum.
        r_squared: of the logarithm of the loss.
    """

    names: tuple[str, ...]
    coefficients: dict[str, float]
    objective: float
    r_squared: float

    def __call__(self, *inputs: Any) -> np.ndarray:
        """Loss at inputs of equal shape."""
        total = np.full(np.broadcast_shapes(*(np.shape(x) for x in inputs)), self.coefficients["E"], np.float64)
        for (factor, exponent), x in zip(_terms(len(self.names)), inputs, strict=True):
            total = total + self.coefficients[factor] * np.asarray(x, np.float64) ** -self.coefficients[exponent]
        return total

    def inverse(self, loss: Any) -> np.ndarray:
        """Of a law of one input: where it reaches a loss; infinity at its floor and below."""
        factor, exponent = _terms(1)[0]
        above = np.asarray(loss, np.float64) - self.coefficients["E"]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = (self.coefficients[factor] / above) ** (1 / self.coefficients[exponent])
        return np.where(above > 0, found, np.inf)


def _terms(num_inputs: int) -> list[tuple[str, str]]:
    return [("A", "alpha"), ("B", "beta")][:num_inputs]


def fit(losses: Any, *inputs: Any, names: Sequence[str] = (), floor: bool = True, near: Law | None = None) -> Law:
    """The law of one or two inputs with the least sum of Huber losses of log residuals.

    Args:
        losses: positive, [points].
        inputs: positive, [points] each: D, or N and D.
        names: of the inputs.
        floor: whether E is fitted; without, it is 0.
        near: a law to start from, in place of many starts (a bootstrap's draws lie near the whole's).

    Raises:
        ValueError: a value is not positive, or there are fewer points than parameters.
    """
    y = np.asarray(losses, np.float64)
    x = [np.asarray(values, np.float64) for values in inputs]
    names = tuple(names) or (("D",) if len(x) == 1 else ("N", "D"))
    num_parameters = 2 * len(x) + floor
    if len(y) < num_parameters:
        raise ValueError(f"a law of {num_parameters} parameters needs at least as many points, not {len(y)}")
    if not all((values > 0).all() and np.isfinite(values).all() for values in (y, *x)):
        raise ValueError("losses and sizes must be positive and finite")
    logs = np.stack([np.log(values) for values in x])
    centre = logs.mean(axis=1, keepdims=True)  # decorrelates factors and exponents
    starts = _starts(y, logs - centre, floor) if near is None else _starts_near(near, centre[:, 0], floor)
    results = [_solve(start, np.log(y), logs - centre, floor, far=near is None) for start in starts]
    best = min(results, key=lambda result: result.cost)
    return _law(best, np.log(y), centre[:, 0], names, floor)


def _starts(y: np.ndarray, logs: np.ndarray, floor: bool) -> list[np.ndarray]:
    """Every combination of shares of the floor and exponents; factors follow from the middle of the data."""
    floors = (0.02, 0.3, 0.6, 0.9) if floor else (0.0,)
    found = []
    for share in floors:
        for exponents in itertools.product((0.1, 0.3, 0.6, 1.2), repeat=len(logs)):
            rest = np.log(np.median(y) * (1 - share) / len(logs))
            start = [value for exponent in exponents for value in (rest, exponent)]
            found.append(np.array(([np.log(y.min() * share)] if floor else []) + start))
    return found


def _starts_near(law: Law, centre: np.ndarray, floor: bool) -> list[np.ndarray]:
    """A law's own parameters, about other centres."""
    rest = []
    for (factor, exponent), middle in zip(_terms(len(centre)), centre, strict=True):
        slope = law.coefficients[exponent]
        rest += [np.log(max(law.coefficients[factor], 1e-300)) - slope * middle, slope]
    if not floor:
        return [np.array(rest)]
    bottom = np.log(max(law.coefficients["E"], 1e-15))
    return [np.array([bottom, *rest])]


def _predicted(parameters: np.ndarray, logs: np.ndarray, floor: bool) -> tuple[np.ndarray, np.ndarray]:
    """Log of the law and its Jacobian by the parameters: [log E], then log factor and exponent of every input."""
    parts = [np.full(logs.shape[1], parameters[0])] if floor else []
    rest = parameters[1:] if floor else parameters
    parts += [rest[2 * i] - rest[2 * i + 1] * logs[i] for i in range(len(logs))]
    stacked = np.stack(parts)
    top = stacked.max(axis=0)
    weights = np.exp(stacked - top)
    total = weights.sum(axis=0)
    weights /= total
    columns = [weights[0]] if floor else []
    for i in range(len(logs)):
        own = weights[i + floor]
        columns += [own, -own * logs[i]]
    return top + np.log(total), np.stack(columns, axis=1)


def _solve(start: np.ndarray, y: np.ndarray, logs: np.ndarray, floor: bool, far: bool) -> Any:
    def residuals(parameters: np.ndarray) -> np.ndarray:
        return _predicted(parameters, logs, floor)[0] - y

    def of(parameters: np.ndarray) -> np.ndarray:
        return _predicted(parameters, logs, floor)[1]

    jacobian: Any = of  # scipy's stubs know names of methods alone

    low = np.array(([-_BOUND] if floor else []) + [-_BOUND, 0.0] * len(logs))
    high = np.array(([_BOUND] if floor else []) + [_BOUND, 5.0] * len(logs))
    start = np.clip(start, low + 1e-9, high - 1e-9)
    if far:  # where the Huber loss is nearly linear everywhere: a wider one finds the valley
        wide = least_squares(residuals, start, jacobian, (low, high), loss="huber", f_scale=30 * DELTA, max_nfev=200)
        start = np.clip(wide.x, low + 1e-9, high - 1e-9)
    tight = 1e-12 if far else 1e-8
    return least_squares(
        residuals, start, jacobian, (low, high), loss="huber", f_scale=DELTA, xtol=tight, ftol=tight, gtol=1e-14,
        max_nfev=400,
    )  # fmt: skip


def _law(result: Any, y: np.ndarray, centre: np.ndarray, names: tuple[str, ...], floor: bool) -> Law:
    rest = result.x[1:] if floor else result.x
    coefficients = {"E": float(np.exp(result.x[0])) if floor else 0.0}
    for i, (factor, exponent) in enumerate(_terms(len(names))):
        coefficients[exponent] = float(rest[2 * i + 1])
        coefficients[factor] = float(np.exp(rest[2 * i] + rest[2 * i + 1] * centre[i]))
    squares = float((np.asarray(result.fun) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    return Law(names, coefficients, float(result.cost), 1 - squares / spread if spread > 0 else 0.0)


# ---------------------------------------------------------------- curves of several seeds


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses of one arm: by size and seed.

    Attributes:
        sizes: D of each point, increasing, float[points].
        losses: float[points, seeds]; every entry is the end of a complete run.
    """

    sizes: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        assert self.losses.shape[0] == len(self.sizes) and (np.diff(self.sizes) > 0).all()


def usable_points(curve: Curve, ceiling: float | None = None, floor: float | None = None) -> np.ndarray:
    """Which points lie between ceiling (what a model without data has) and floor, as far as they are known: only they
    show a slope.

    A point counts whose mean is at least 2% of the way below the ceiling, and 2% above the floor, if one is known.
    """
    mean = curve.losses.mean(axis=1)
    bottom = mean.min() if floor is None else floor
    top = mean.max() if ceiling is None else ceiling
    span = top - bottom
    below = np.ones(len(mean), bool) if ceiling is None else mean < ceiling - _NEAR_CEILING * span
    above = np.ones_like(below) if floor is None else mean > floor + _NEAR_FLOOR * span
    return below & above


def require_points(curve: Curve, ceiling: float | None = None, floor: float | None = None) -> None:
    """Raises ValueError, saying how many points are missing, where too few lie between floor and ceiling."""
    usable = int(usable_points(curve, ceiling, floor).sum())
    if usable < MIN_POINTS:
        raise ValueError(
            f"{usable} of {len(curve.sizes)} sizes lie between floor and ceiling; a law needs {MIN_POINTS}: "
            f"{MIN_POINTS - usable} more are missing"
        )


def bootstrap(
    curves: Mapping[str, Curve],
    statistics: Callable[[Mapping[str, Law]], Mapping[str, float]],
    num_draws: int = NUM_DRAWS,
) -> dict[str, tuple[float, float, float]]:
    """{name: (value, low, high)} of what follows from the fitted laws of all curves; 95%.

    Seeds are drawn with replacement, the same ones in every curve (runs are paired by seed), and so are points, at
    least `MIN_POINTS` different ones.
    """
    rng = np.random.default_rng(0)
    fitted = {name: fit(curve.losses.mean(axis=1), curve.sizes) for name, curve in curves.items()}
    whole = statistics(fitted)
    drawn: list[Mapping[str, float]] = []
    num_seeds = min(curve.losses.shape[1] for curve in curves.values())
    while len(drawn) < num_draws:
        seeds = rng.integers(num_seeds, size=num_seeds)
        laws = {}
        for name, curve in curves.items():
            points = _drawn_points(rng, len(curve.sizes))
            laws[name] = fit(curve.losses[np.ix_(points, seeds)].mean(axis=1), curve.sizes[points], near=fitted[name])
        drawn.append(statistics(laws))
    tail = 100 * (1 - LEVEL) / 2
    found = {}
    for name, value in whole.items():
        low, high = np.nanpercentile([one[name] for one in drawn], (tail, 100 - tail))
        found[name] = float(value), float(low), float(high)
    return found


def _drawn_points(rng: np.random.Generator, number: int) -> np.ndarray:
    while True:
        points = np.sort(rng.integers(number, size=number))
        if len(np.unique(points)) >= min(MIN_POINTS, number):
            return points


def data_multiplier(baseline: Law, arm: Law, losses: Any) -> np.ndarray:
    """`D_baseline / D_arm` at equal loss: 2 means that the arm needs half of the data."""
    return baseline.inverse(losses) / arm.inverse(losses)


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """The best model size at a budget: the vertex of a parabola in log N (arXiv 2203.15556, approach 2)."""

    parameters: float
    loss: float
    is_inside: bool


def isoflop_optimum(num_parameters: Any, losses: Any) -> IsoFlop:
    """From runs of one budget.

    Raises:
        ValueError: fewer than three sizes, or a curve that opens downwards, which has no optimum.
    """
    x, y = np.log(np.asarray(num_parameters, np.float64)), np.asarray(losses, np.float64)
    if len(np.unique(x)) < 3:
        raise ValueError(f"an IsoFLOP curve needs three model sizes, not {len(np.unique(x))}")
    square, linear, constant = np.polyfit(x, y, 2)
    if square <= 0:
        raise ValueError("the losses have no minimum over these model sizes; add smaller and larger ones")
    vertex = -linear / (2 * square)
    return IsoFlop(float(np.exp(vertex)), float(constant - linear**2 / (4 * square)), bool(x.min() < vertex < x.max()))
