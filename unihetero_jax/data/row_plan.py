"""Which samples share a row, from lengths alone: packing by the vector (token positions, image patches)."""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

NUM_GROUPS = 8
"""Groups of samples with images, by patches per token (our choice: finer steers no better)."""
SPREADS = (1.0, 0.5, 0.0)
"""How evenly images are spread over the rows, in the order tried: 1 gives every row its fair share and no more."""
CLOSE_ENOUGH = 1.0025
"""Attempts end at so many times the rows that are needed at least."""
MAX_SKIPPED = 30
"""Samples of too many patches that a search for one that fits passes over before it looks in the next group."""
_PATCH_BITS = 32


def plan_rows(costs: np.ndarray, row_tokens: int, row_patches: int) -> list[list[int]]:
    """Assigns items to rows so that few rows are needed. Every item comes out exactly once.

    Rows are filled one after another: the largest item left, then ever again the largest that leaves either nothing or
    room enough for another, from the group whose patches per token come nearest to what is still free (`_steered`).
    That is tried with images spread evenly over the rows and then less so; where it stays behind the bound, best fit
    with images first is tried as well. The plan with fewest rows is taken, the first of equals.

    Args:
        costs: `int[n, 2]`, (token positions, image patches) of each item.
        row_tokens, row_patches: capacity of a row.

    Returns:
        Rows as ascending lists of item numbers.

    Raises:
        ValueError: an item does not fit an empty row.
    """
    costs = np.asarray(costs, np.int64).reshape(-1, 2)
    too_long = np.flatnonzero((costs[:, 0] > row_tokens) | (costs[:, 1] > row_patches))
    if too_long.size:
        worst = too_long[0]
        raise ValueError(
            f"{too_long.size} items do not fit a row of {row_tokens} tokens and {row_patches} patches; "
            f"item {worst} takes {costs[worst, 0]} tokens and {costs[worst, 1]} patches"
        )
    if not len(costs):
        return []
    capacity = (row_tokens, row_patches)
    sums = costs.sum(axis=0)
    least = max(-(-int(sums[0]) // row_tokens), -(-int(sums[1]) // row_patches) if row_patches else 1)
    best: list[list[int]] = []
    for spread in SPREADS if sums[1] and sums[1] / least < 0.9 * row_patches else SPREADS[1:]:
        best = _fewer(best, _steered(costs, capacity, spread))
        if len(best) <= CLOSE_ENOUGH * least:
            break
    else:
        best = _fewer(best, _best_fit(costs, capacity))
    return [sorted(members) for members in best]


def _fewer(best: list[list[int]], rows: list[list[int]]) -> list[list[int]]:
    return rows if not best or len(rows) < len(best) else best


def _steered(costs: np.ndarray, capacity: tuple[int, int], spread: float) -> list[list[int]]:
    """Fills rows one after another; see `plan_rows`.

    An item is one integer, (tokens, patches, number) from high bits to low: a sorted list of those finds the largest
    item of at most so many tokens by bisection, and takes it out by a move of memory.
    """
    bits = max(len(costs) - 1, 1).bit_length()
    shift, number_mask, patch_mask = _PATCH_BITS + bits, (1 << bits) - 1, (1 << _PATCH_BITS) - 1
    items = [(tokens << _PATCH_BITS | patches) << bits | i for i, (tokens, patches) in enumerate(costs.tolist())]
    groups, group_of, middles = _groups(costs, items)
    nearest = [sorted(range(len(groups)), key=lambda group: (abs(group - i), group)) for i in range(len(groups))]
    fair_patches = costs[:, 1].sum() / max(costs[:, 0].sum(), 1) * capacity[0]
    reserve = int(np.quantile(costs[:, 0], 0.1))  # so much is left of a row only if some item can fill it
    withheld = max(capacity[1] - fair_patches, 0.0) * spread
    is_used = bytearray(len(costs))
    rows = []

    def largest(group: list[int], max_tokens: int, max_patches: int) -> int:
        """Place in its group of the largest item that fits; -1: there is none among those looked at."""
        at = bisect.bisect_left(group, (max_tokens + 1) << shift) - 1
        for place in range(at, max(at - MAX_SKIPPED, -1), -1):
            if (group[place] >> bits) & patch_mask <= max_patches:
                return place
        return -1

    def choose(free_tokens: int, free_patches: int) -> tuple[int, int] | None:
        fullest, least_left = None, free_tokens + 1
        wanted = (free_patches - withheld) / free_tokens
        for number in nearest[bisect.bisect(middles, wanted)]:
            group = groups[number]
            if (place := largest(group, free_tokens, free_patches)) < 0:
                continue
            left = free_tokens - (group[place] >> shift)
            if left <= free_tokens >> 10:
                return number, place
            if (with_reserve := largest(group, free_tokens - reserve, free_patches)) >= 0:
                return number, with_reserve
            if left < least_left:
                fullest, least_left = (number, place), left
        return fullest

    size = np.max(costs / np.maximum(capacity, 1), axis=1)
    for first in np.lexsort((np.arange(len(costs)), -size)).tolist():
        if is_used[first]:
            continue
        free_tokens, free_patches = capacity
        chosen = (group_of[first], bisect.bisect_left(groups[group_of[first]], items[first]))
        row = []
        while chosen is not None:
            item = groups[chosen[0]].pop(chosen[1])
            row.append(item & number_mask)
            is_used[row[-1]] = True
            free_tokens -= item >> shift
            free_patches -= (item >> bits) & patch_mask
            chosen = choose(free_tokens, free_patches) if free_tokens > 0 else None
        rows.append(row)
    return rows


def _groups(costs: np.ndarray, items: Sequence[int]) -> tuple[list[list[int]], list[int], list[float]]:
    """Items by patches per token: the groups as sorted lists, the group of each item, the ratios between groups."""
    tokens, patches = costs[:, 0], costs[:, 1]
    with_image = np.flatnonzero(patches > 0)
    by_ratio = with_image[np.argsort(patches[with_image] / np.maximum(tokens[with_image], 1), kind="stable")]
    members = [part for part in (np.flatnonzero(patches == 0), *np.array_split(by_ratio, NUM_GROUPS)) if part.size]
    ratios = [patches[part].sum() / max(tokens[part].sum(), 1) for part in members]
    group_of = np.zeros(len(costs), np.int64)
    for number, part in enumerate(members):
        group_of[part] = number
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ratios)]
    return [sorted(items[i] for i in part.tolist()) for part in members], group_of.tolist(), middles


def _best_fit(costs: np.ndarray, capacity: tuple[int, int]) -> list[list[int]]:
    """Largest item first, those with images before text, each into the row that keeps the fewest free tokens."""
    size = np.max(costs / np.maximum(capacity, 1), axis=1)
    order = np.lexsort((np.arange(len(costs)), -costs[:, 0], -size, costs[:, 1] == 0))
    rows: list[list[int]] = []
    patches: list[int] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for item, (need_tokens, need_patches) in zip(order.tolist(), costs[order].tolist(), strict=True):
        for at in range(bisect.bisect_left(free, (need_tokens, -1)), len(free)):
            room, row = free[at]
            if patches[row] >= need_patches:
                del free[at]
                break
        else:
            row, room = len(rows), capacity[0]
            rows.append([])
            patches.append(capacity[1])
        rows[row].append(item)
        patches[row] -= need_patches
        bisect.insort(free, (room - need_tokens, row))
    return rows
