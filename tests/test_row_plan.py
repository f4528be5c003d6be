"""Plans of rows: every item once, within capacity, with little padding."""

import numpy as np
import pytest

from unihetero_jax.data.row_plan import plan_rows


def check_plan(costs, row_tokens, row_patches, rows):
    assert sorted(i for row in rows for i in row) == list(range(len(costs)))
    for row in rows:
        assert row and row == sorted(row)
        assert (costs[row].sum(axis=0) <= (row_tokens, row_patches)).all()


@pytest.mark.parametrize("seed", range(25))
def test_plan_keeps_every_item_once_within_capacity(seed):
    rng = np.random.default_rng(seed)
    row_tokens, row_patches = int(rng.integers(8, 300)), int(rng.integers(0, 80)) * 4
    count = int(rng.integers(0, 400))
    costs = np.stack(
        [rng.integers(0, row_tokens + 1, count), rng.integers(0, row_patches // 4 + 1, count) * 4], axis=-1
    )
    costs[rng.random(count) < rng.random(), 1] = 0
    costs[rng.random(count) < 0.1] = (row_tokens, row_patches)
    check_plan(costs, row_tokens, row_patches, plan_rows(costs, row_tokens, row_patches))


def realistic_lengths(count, seed, row_tokens):
    """Log-normal text, and in 70% of the samples one to four images of 1 to 10 tiles of 64 tokens."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(4.5, 1.0, count).astype(int), 4, row_tokens // 2)
    num_images = rng.choice([0, 1, 1, 1, 1, 2, 4], count)
    tiles = np.asarray([rng.choice([1, 5, 10], n).sum() if n else 0 for n in num_images])
    visual = np.minimum(tiles * 64, row_tokens // 2 - 16)
    return np.stack([text + visual + 2 * num_images + 1, visual * 4], axis=-1)


@pytest.mark.parametrize("patches_per_token", [4, 3.6, 3.4])
def test_padding_is_small(patches_per_token):
    costs = realistic_lengths(3000, 0, 4096)
    row_patches = int(4096 * patches_per_token) // 4 * 4
    rows = plan_rows(costs, 4096, row_patches)
    check_plan(costs, 4096, row_patches, rows)
    assert 1 - costs[:, 0].sum() / (len(rows) * 4096) < 0.005


def test_rows_stay_near_the_bound_when_patches_are_scarce():
    costs = realistic_lengths(3000, 0, 4096)
    rows = plan_rows(costs, 4096, 3 * 4096)
    check_plan(costs, 4096, 3 * 4096, rows)
    assert len(rows) <= 1.03 * costs[:, 1].sum() / (3 * 4096)


def test_images_are_spread_over_the_rows():
    costs = np.asarray([[20, 16]] * 50 + [[5, 0]] * 300)
    rows = plan_rows(costs, 100, 64)
    assert len(rows) == 25
    assert max(costs[row, 1].sum() for row in rows) == 32


def heterogeneous_lengths(count, rng):
    """Text, captioned images, samples of four images, and documents of text with some images; rows of 4,096 tokens."""
    kind = rng.choice(4, count, p=[0.2, 0.5, 0.1, 0.2])
    num_images = np.select([kind == 0, kind == 1, kind == 2], [0, 1, 4], np.minimum(1 + rng.poisson(2, count), 6))
    scale = np.asarray([5.8, 3.4, 5.0, 6.0])[kind]
    text = np.clip(rng.lognormal(scale, 0.8), 8, 2048).astype(int)
    visual = np.asarray([rng.integers(64, 257, n).sum() for n in num_images])
    visual = np.minimum(visual, 4096 - text - 2 * num_images - 1)
    return np.stack([text + visual + 2 * num_images + 1, 4 * visual], axis=-1)


def test_padding_is_small_where_tokens_and_patches_are_both_scarce():
    costs = heterogeneous_lengths(4096, np.random.default_rng(0))
    row_patches = int(1.04 * 4096 * costs[:, 1].sum() / costs[:, 0].sum()) // 4 * 4
    rows = plan_rows(costs, 4096, row_patches)
    check_plan(costs, 4096, row_patches, rows)
    assert 1 - costs[:, 0].sum() / (len(rows) * 4096) < 0.003
    assert 1 - costs[:, 1].sum() / (len(rows) * row_patches) < 0.05


def test_too_large_items_are_refused():
    with pytest.raises(ValueError, match="2 items do not fit a row of 10 tokens and 8 patches; item 1 takes 11 tokens"):
        plan_rows(np.asarray([[10, 8], [11, 0], [3, 9]]), 10, 8)
