"""Which source and which record every draw of the mixture is: closed forms of the configuration alone.

Mixture time `t` counts planned draws. The share of a source is a piecewise linear function of it, so the draws that a
source has had by any time need no counting:

    count(t) = min(offset + floor(phase + integral of its share from 0 to t), limit)

The window that ends at t holds for each source the draws count(t - W) .. count(t). Its size is W but for rounding (by
less than the number of sources), and each source is at every window's end within one draw of its integral: a rule that
forced windows to exactly W draws could not promise both that and a closed form. Draw i of a source has epoch
`i // size` and stands in a keyed order of blocks and of records within a block.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FOREVER = 2**50
"""Draws after which a source that is drawn at all has been drawn."""
_SERIES_TERMS = 10
BLOCK_RECORDS = 1024
"""Records drawn from one neighbourhood of a file before the next; keeps reads local."""


def stable_key(*parts: Any) -> int:
    """64-bit key of a purpose, the same on every machine."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_order(seed: int, size: int) -> np.ndarray:
    """A permutation of `range(size)`: numbers sorted by a keyed 64-bit hash (splitmix64)."""
    x = (np.arange(size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0xD6E8FEB86659FD93)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(x ^ (x >> np.uint64(32)), kind="stable")


@functools.lru_cache(maxsize=64)
def _order_of_blocks(seed: int, num_blocks: int) -> tuple[np.ndarray, int]:
    """The order in which an epoch visits blocks, and where in it the last (perhaps short) block stands."""
    order = keyed_order(seed, num_blocks).astype(np.int32)
    return order, int(np.flatnonzero(order == num_blocks - 1)[0])


_order_in_block = functools.lru_cache(maxsize=512)(keyed_order)


def epoch_records(seed: int, name: str, size: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """Record numbers `start .. stop` of an epoch's order over a source of `size` records. Reads only what it returns.

    Every epoch is a permutation: blocks of 1,024 records in a keyed order, records of a block in another.
    """
    num_blocks = -(-size // BLOCK_RECORDS)
    short = size - (num_blocks - 1) * BLOCK_RECORDS
    order, short_at = _order_of_blocks(stable_key(seed, name, epoch, "blocks"), num_blocks)
    missing = BLOCK_RECORDS - short  # blocks after the short one begin this much earlier
    at = start // BLOCK_RECORDS
    if at >= short_at and start >= short_at * BLOCK_RECORDS + short:
        at = (start + missing) // BLOCK_RECORDS
    parts = []
    while (first := at * BLOCK_RECORDS - (missing if at > short_at else 0)) < stop:
        block = int(order[at])
        length = short if at == short_at else BLOCK_RECORDS
        within = _order_in_block(stable_key(seed, name, epoch, "records", block), length)
        parts.append(block * BLOCK_RECORDS + within[max(start - first, 0) : stop - first])
        at += 1
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class Member:
    """A source as the schedule sees it.

    Attributes:
        size: its records.
        weight: what its share of the draws is proportional to.
        weight_schedule: (progress, factor) pairs, progress rising from 0 to 1: the weight is multiplied by the factor,
            linear in between and constant outside. Empty: always 1.
        max_epochs: it is drawn at most so many times its size; 0: without limit.
        offset: draws that an earlier mixture of the same run has had of it.
    """

    size: int
    weight: float
    weight_schedule: Sequence[Sequence[float]] = ()
    max_epochs: float = 0.0
    offset: int = 0


class MixtureSchedule:
    """The draws of every window of a mixture.

    Attributes:
        names: of the sources, in the order of all per-source arrays here.
    """

    def __init__(self, members: Mapping[str, Member], seed: int, window_size: int, planned_draws: int = 0):
        """`planned_draws`: mixture time at which progress is 1; needed where a member has a `weight_schedule`.

        Raises:
            ValueError: a schedule without `planned_draws`, or no source has a share at some progress.
        """
        self.names = tuple(members)
        self._members, self._seed, self._window_size = list(members.values()), seed, window_size
        knots, self._weights = _weights(self._members)
        if len(knots) > 1 and planned_draws < 1:
            raise ValueError("data.planned_draws must be positive: a weight_schedule is a function of the share drawn")
        self._times = np.asarray(knots) * planned_draws
        self._integrals = np.zeros_like(self._weights)
        for knot in range(1, len(knots)):
            self._integrals[knot] = self._integral(self._times[knot], knot - 1)
        self._phases = np.asarray([stable_key(seed, name, "phase") / 2**64 for name in self.names])
        self._offsets = np.asarray([member.offset for member in self._members], np.int64)
        self._limits = np.asarray([_limit(member) for member in self._members])

    def counts(self, time: int) -> np.ndarray:
        """`int64[num_sources]`: draws of each source before a time, those of an earlier mixture included."""
        whole = np.floor(self._phases + self.integral(time)).astype(np.int64)
        return np.minimum(self._offsets + whole, self._limits)

    def integral(self, time: float) -> np.ndarray:
        """`float64[num_sources]`: the integral of each source's share from 0 to a time, in draws."""
        return self._integral(time, int(np.searchsorted(self._times, time, "right")) - 1)

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, record, epoch) of the draws of a window, source by source; the cost does not depend on `number`."""
        first, last = self.counts(number * self._window_size), self.counts((number + 1) * self._window_size)
        sources = np.repeat(np.arange(len(self.names)), last - first)
        drawn = [self._draws(source, int(first[source]), int(last[source])) for source in range(len(self.names))]
        return sources, np.concatenate([records for records, _ in drawn]), np.concatenate([e for _, e in drawn])

    def drawable(self, number: int) -> np.ndarray:
        """`bool[num_sources]`: whether a source has a draw in this window or a later one."""
        start = number * self._window_size
        return self.counts(max(start, int(self._times[-1])) + FOREVER) > self.counts(start)

    def _draws(self, source: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        name, size = self.names[source], self._members[source].size
        if high <= low:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        bounds = [low, *range((low // size + 1) * size, high, size), high]
        records = [
            epoch_records(self._seed, name, size, start // size, start % size, start % size + stop - start)
            for start, stop in itertools.pairwise(bounds)
        ]
        return np.concatenate(records), np.arange(low, high) // size

    def _integral(self, time: float, knot: int) -> np.ndarray:
        """Integral up to a time that lies behind the given knot: weights are linear between two knots."""
        elapsed, weights = time - self._times[knot], self._weights[knot]
        slopes = np.zeros_like(weights)
        if knot + 1 < len(self._times):
            slopes = (self._weights[knot + 1] - weights) / (self._times[knot + 1] - self._times[knot])
        return self._integrals[knot] + _integral_of_share(weights, slopes, elapsed)


def _integral_of_share(weights: np.ndarray, slopes: np.ndarray, elapsed: float) -> np.ndarray:
    """Integral over x from 0 to `elapsed` of (a + b x) / (c + d x); a, b by source, c, d their sums.

    Its closed form, b x / d + (a - b c / d) log(1 + d x / c) / d, cancels where the sum hardly changes: there the
    logarithm's series is divided out.
    """
    total, total_slope = weights.sum(), slopes.sum()
    if not slopes.any():
        return elapsed * (weights / total)
    change = total_slope * elapsed / total
    if abs(change) > 0.01:
        per_slope = slopes / total_slope
        return per_slope * elapsed + (weights - per_slope * total) * (np.log1p(change) / total_slope)
    powers = np.arange(_SERIES_TERMS)
    signed = (-change) ** powers
    return (
        elapsed / total * (weights * (signed / (powers + 1)).sum() + slopes * elapsed * (signed / (powers + 2)).sum())
    )


def _weights(members: Sequence[Member]) -> tuple[list[float], np.ndarray]:
    """Progress of the knots, rising from 0, and the weight of each source at each."""
    knots = sorted({0.0, *(progress for member in members for progress, _ in member.weight_schedule)})
    weights = np.asarray([[member.weight * _factor(member, knot) for member in members] for knot in knots], np.float64)
    totals = weights.sum(axis=1, keepdims=True)
    if not (totals > 0).all():
        raise ValueError(f"data.sources: at progress {knots[int(np.argmin(totals))]:g} every weight is zero")
    return knots, weights


def _factor(member: Member, progress: float) -> float:
    if not member.weight_schedule:
        return 1.0
    at, factors = zip(*member.weight_schedule, strict=True)
    return float(np.interp(progress, at, factors))


def _limit(member: Member) -> int:
    if member.max_epochs == 0:
        return np.iinfo(np.int64).max
    return max(int(member.max_epochs * member.size), 1)
